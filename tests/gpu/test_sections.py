"""gpu-check's sections as tests: all of them in one run, one test for each.

`make gpu-check` is the same with a table and a record. The kernels' section is left out: its tests
are beside this file and in tests/reference/gpu.
"""

from collections.abc import Iterator

import pytest
import torch

from bench.gpu.check import environment
from bench.gpu.plan import SECTIONS, TOTAL_S, Section
from bench.gpu.runner import Result, Runs, Task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.timeout(900),
]

CHOSEN = tuple(section for section in SECTIONS if section.name != "kernels")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Result]]:
    folder = tmp_path_factory.mktemp("gpu-check")
    found: list[Result] = []
    task = Task(folder, (), environment(folder / "site", rehearse=False))
    Runs(task, TOTAL_S, found.append).run(CHOSEN)
    yield {result.section.name: result for result in found}


@pytest.mark.parametrize("section", CHOSEN, ids=lambda section: section.name)
def test_section(section: Section, results: dict[str, Result]) -> None:
    against = [line for line in results[section.name].lines if line.counts_against]
    assert results[section.name].lines and not against
