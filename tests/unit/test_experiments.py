"""What a profile is measured with stays within what workers take; passes are read off as told."""

import pytest

from nodeserve.policy.cost import RankWork
from nodeserve.profiling.experiments import (
    WARM,
    WRITTEN,
    Experiment,
    Run,
    experiments,
    run_of,
    sure,
    undisturbed,
)
from nodeserve.profiling.measure import handoff_errors, rate_of
from nodeserve.types import Timings
from nodeserve.wire.messages import StepDone


@pytest.mark.parametrize("limits", [(128, 64, 2048, 40_000), (8192, 256, 65_536, 400_000)])
def test_experiments_fit_a_worker(limits: tuple[int, int, int, int]) -> None:
    _, max_num_seqs, max_model_len, num_kv_tokens = limits
    planned = experiments(*limits)
    assert {one.held_out for one in planned} == {True, False}
    for one in planned:
        assert one.batch <= max_num_seqs
        assert one.prompt + one.output <= max_model_len
        assert one.batch * (one.prompt + one.output) <= num_kv_tokens
    shapes = {(one.batch, one.prompt, one.output): one.held_out for one in planned}
    fitted = {shape for shape, held_out in shapes.items() if not held_out}
    assert fitted.isdisjoint(shape for shape, held_out in shapes.items() if held_out)


def test_all_sequences_of_an_experiment_decode_together_for_a_while() -> None:
    """Each pass until the last prompt is done writes a token of those whose prompts are."""
    budget = 128
    for one in experiments(budget, 64, 2048, 40_000):
        if one.output > 1:
            assert one.output - one.batch * one.prompt / budget >= WRITTEN


def test_a_small_worker_has_fewer() -> None:
    planned = experiments(64, 4, 128, 300)
    assert max(one.batch for one in planned) == 4
    assert max(one.prompt for one in planned) < 128


def step(began_s: float, seconds: float, prefill: int = 0, decodes: int = 2) -> StepDone:
    return StepDone(
        *(b"", b"", b"", None, [], b"", b"", [], 0),
        began_s,
        seconds,
        prefill,
        prefill * prefill / 2,
        decodes,
        decodes * 10,
        b"",
    )


def test_passes_and_the_gaps_between_them() -> None:
    experiment = Experiment("2 x 16", 2, 16, 12, held_out=False)
    steps = [
        (0, step(0.0, 1.0, prefill=32, decodes=0)),
        (1, step(0.5, 1.0)),
        (0, step(1.1, 1.0)),
        (0, step(2.2, 1.0)),
        (0, step(9.0, 1.0)),  # after a wait
    ]
    timings = [Timings(transit_s=0.001, return_s=0.002)]
    timed, gaps, transits, busy_s = run_of(steps, timings, experiment)
    assert [one.work for one in timed] == [
        RankWork(32, 512.0, 0, 0),
        RankWork(0, 0.0, 2, 20),  # the third decode pass of worker 0
    ]
    assert WARM == 2
    assert gaps == pytest.approx([0.1, 0.1])
    assert {one.group for one in timed} == {"2 x 16"}
    assert busy_s == pytest.approx(5.0)
    assert transits == []  # two requests at once wait for each other


def test_messages_take_what_lone_requests_say() -> None:
    run = run_of([], [Timings(transit_s=0.001, return_s=0.002)], Experiment("", 1, 4, 1, True))
    assert run.transits == pytest.approx([0.0015])


def test_runs_that_something_held_up_are_made_again_and_dropped() -> None:
    runs = [Run([], [], [], busy_s) for busy_s in (1.5, 1.0, 1.9, 1.02)]
    assert not sure(runs[:1])
    assert not sure(runs[:3])
    assert sure(runs)
    assert undisturbed(runs) == [runs[1], runs[3]]


def test_a_copy_that_was_held_up_says_nothing_about_the_link() -> None:
    pulls = [(size, size / 1e9) for size in (1000, 2000, 4000) for _ in range(3)]
    held_up = [*pulls, (2000, 1.0)]
    assert rate_of(held_up) == pytest.approx(1e9)
    found = handoff_errors(held_up, 1e9)
    assert found is not None
    assert found.worst == pytest.approx(0.0)
    assert found.num_groups == 3
    assert handoff_errors([], 1e9) is None
