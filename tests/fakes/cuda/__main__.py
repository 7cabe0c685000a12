"""Compiles the fake `_cuda` ahead of the tests that load it."""

from tests.fakes.cuda.build import build

build()
