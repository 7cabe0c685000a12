"""Prompts computed by an instance of one shape and decoded by one of another, for test_pairs.

Workers of the first keep their pages in files; each worker of the second copies its part from
there as it would from a peer's shared memory, by the plan and the code of a real node.
"""

import itertools
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nodeserve.layout import Shape
from nodeserve.model.group import Groups
from nodeserve.model.inputs import StepInputs
from nodeserve.model.ops_cpu import CpuCache
from nodeserve.policy.blocks import blocks_for
from nodeserve.policy.copy_plan import PageShard
from nodeserve.shards import Place
from nodeserve.wire.messages import AttachPages, pack_ids
from nodeserve.worker.contract import Landed, Source, Ticket
from nodeserve.worker.handoff import HostTransfer
from nodeserve.worker.page_shard import page_shard
from nodeserve.worker.pages import make_pool
from nodeserve.worker.peer_seats import PeerSeats
from tests.reference.parallel_steps import (
    BLOCK_SIZE,
    EMPTY,
    MAX_BLOCKS,
    NUM_DECODES,
    PROMPTS,
    Case,
    inputs_of,
    run_model,
)

Cases = dict[str, tuple[Case, list[Shape]]]  # by family; shapes of the first instances
LENGTHS = [length for length, _ in PROMPTS]


class Handed(NamedTuple):
    """A prompt that an instance of shape `source` computed."""

    source: Shape
    prompt: int


def prompts_of(place: Place) -> list[int]:
    """Those that this worker's DP rank of the first instance computes; none, if there are more
    ranks."""
    return list(range(place.ep_rank, len(PROMPTS), place.ep))


def handed(sources: Sequence[Shape], place: Place) -> list[Handed]:
    """Those that this worker's DP rank of the second instance decodes: from first ones of every
    shape, and from all of their ranks."""
    every = [Handed(*one) for one in itertools.product(sources, range(len(PROMPTS)))]
    return every[place.ep_rank :: place.ep]


def prefill(place: Place, groups: Groups, cases: Cases, folder: Path) -> dict[str, torch.Tensor]:
    """First tokens' logits [prompts, vocab_size] of each case, where this worker gives them."""
    mine = prompts_of(place)
    found = {}
    for name, (case, _) in cases.items():

        def pages(block_bytes: int, name: str = name) -> Any:
            with open(_file(folder, name, place.shape, place.rank), "x+b") as file:
                return make_pool(file.fileno(), len(PROMPTS) * MAX_BLOCKS * block_bytes)

        model, cache, _ = run_model(place, groups, case.checkpoint, case.dtype, pages)
        spans = {prompt: (0, LENGTHS[prompt]) for prompt in mine}
        inputs = inputs_of(case.tokens, spans, mine) if spans else EMPTY
        found[name] = model.forward(inputs, cache).clone()
    return found


def _file(folder: Path, name: str, shape: Shape, rank: int) -> Path:
    return folder / f"{name}.{shape}.{rank}"


class Misled(HostTransfer):
    """Copies one run of its plan from a wrong place of the source's block: just behind."""

    def attach(self, team: int, sources: Sequence[Source]) -> None:
        (first, *others), rest = sources[0].runs, sources[1:]
        wrong = first._replace(source=first.source + first.num_bytes)
        super().attach(team, [sources[0]._replace(runs=(wrong, *others)), *rest])


def decode(
    place: Place, groups: Groups, cases: Cases, folder: Path, misled: bool = False
) -> dict[str, torch.Tensor]:
    """Logits [steps, sequences, vocab_size] of each case, where this worker gives them, of what
    its DP rank was `handed`. misled: leaders are."""
    kind = Misled if misled and place.is_leader else HostTransfer
    found = {}
    for name, (case, sources) in cases.items():
        mine = handed(sources, place)
        model, cache, transfer, shard = _worker(place, groups, case, len(mine), kind)
        seats = PeerSeats(transfer, shard, turn=place.rank)
        leaders = {
            one: _attach(seats, folder, name, one, first=100 * number)
            for number, one in enumerate(sources)
        }
        for number, (source, prompt) in enumerate(mine):
            _pull(transfer, leaders[source][prompt % source.ep], prompt, number)
        steps = [_step_of(case, mine, step) for step in range(NUM_DECODES)]
        found[name] = torch.stack([model.forward(inputs, cache).clone() for inputs in steps])
    return found


def _step_of(case: Case, mine: list[Handed], step: int) -> StepInputs:
    """A decode of each of these, with what one worker's logits said."""
    starts = [LENGTHS[one.prompt] + step for one in mine]
    spans = {number: (start, start + 1) for number, start in enumerate(starts)}
    return inputs_of([case.tokens[one.prompt] for one in mine], spans, list(spans))


def _worker(
    place: Place, groups: Groups, case: Case, num_sequences: int, kind: type[HostTransfer]
) -> tuple[Any, Any, HostTransfer, PageShard]:
    """Its model and pages, what copies into them, and which part of every block they are."""
    pools: list[Any] = []

    def pages(block_bytes: int) -> Any:
        with open(os.memfd_create("pages"), "w+b") as file:
            pools.append(make_pool(file.fileno(), num_sequences * MAX_BLOCKS * block_bytes))
        return pools[0]

    model, cache, layout = run_model(place, groups, case.checkpoint, case.dtype, pages)
    shard = page_shard(case.checkpoint.config, layout, isinstance(cache, CpuCache))
    return model, cache, kind(pools[0], layout.block_bytes), shard


def _attach(seats: PeerSeats, folder: Path, name: str, shape: Shape, first: int) -> list[int]:
    """Tell of all workers of an instance, the first of which has this number; the numbers of those
    that lead its DP ranks."""
    leaders = list(range(first, first + shape.num_workers, shape.tp * shape.pp))
    with ExitStack() as owner:  # a team is mapped when the last of it is heard of
        for rank in range(shape.num_workers):
            there = Place.of(shape, rank)
            file = owner.enter_context(open(_file(folder, name, shape, rank), "rb"))
            pages = file.fileno(), os.fstat(file.fileno()).st_size, b""
            seat = [there.tp_rank, there.tp, there.pp_rank, there.pp]
            seats.attach(AttachPages(first + rank, *pages, leaders[there.ep_rank], seat))
    return leaders


def _pull(transfer: HostTransfer, leader: int, prompt: int, number: int) -> None:
    """A prompt's pages into those of the sequence `number`."""
    blocks = range(blocks_for(LENGTHS[prompt], BLOCK_SIZE))
    source_ids, target_ids = (
        pack_ids([first * MAX_BLOCKS + block for block in blocks]) for first in (prompt, number)
    )
    transfer.begin(Ticket(number, leader, source_ids, target_ids))
    [landed] = transfer.poll()
    assert isinstance(landed, Landed), landed
