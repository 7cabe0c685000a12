"""`nodeserve experts`: how often experts were chosen, and what placing them by that would bring."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from nodeserve.cli.talk import CONNECT_TIMEOUT_S, socket_option
from nodeserve.client import Client
from nodeserve.errors import ConfigError
from nodeserve.expert_counts import write_counts
from nodeserve.policy.expert_placement import imbalance, place, rows_of
from nodeserve.wire.numbers import unpack_counts, unpack_ids

Table = list[list[int]]


@dataclass(slots=True)
class Busy:
    """What the ranks of one instance computed."""

    name: str
    num_ranks: int
    rows: dict[int, list[int]] = field(default_factory=dict)  # by layer, of each rank


@click.command()
@socket_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the counts there, for `nodeserve start --expert-counts`.",
)
@click.option(
    "--redundant-experts",
    type=click.IntRange(min=0),
    default=0,
    help="Say what so many second copies in each layer would bring.",
)
def experts(socket: str | None, out: Path | None, redundant_experts: int) -> None:
    """Show how evenly ranks that share experts (epN) were busy since the server started, and how
    evenly they would have been with experts placed by what was counted."""
    with Client(socket, connect_timeout_s=CONNECT_TIMEOUT_S) as client:
        told = client.experts()
    counts = counts_of(told)
    for line in [*complaints(told), *summary(counts, instances_of(told), redundant_experts)]:
        click.echo(line)
    if out is not None:
        write_counts(out, told["model"], counts)
        click.echo(f"{out}: for `nodeserve start --expert-counts {out}`")


def counts_of(told: dict[str, Any]) -> Table:
    """Rows of each expert in each layer, of all ranks; ConfigError if there are none."""
    num_experts = told["model"]["num_experts"]
    counts = [[0] * num_experts for _ in range(told["model"]["num_layers"])]
    for rank in told["ranks"]:
        for layer, rows in _by_layer(rank["layers"], rank["experts"], num_experts):
            _add(counts[layer], rows)
    if not told["ranks"] and not told["silent"]:
        raise ConfigError(
            "no ranks share experts here: rows are counted in instances of epN, by a server of a"
            " mixture of experts"
        )
    if not any(map(any, counts)):
        raise ConfigError("no rows were counted yet: send requests first")
    return counts


def instances_of(told: dict[str, Any]) -> list[Busy]:
    found: dict[int, Busy] = {}
    for rank in told["ranks"]:
        name = f"instance {rank['instance']} ({rank['role']}, {rank['shape']})"
        one = found.setdefault(rank["instance"], Busy(name, rank["num_ranks"]))
        for layer, rows in _by_layer(rank["layers"], rank["ranks"], one.num_ranks):
            _add(one.rows.setdefault(layer, [0] * one.num_ranks), rows)
    return list(found.values())


def _by_layer(layers: bytes, rows: bytes, width: int) -> Iterable[tuple[int, Sequence[int]]]:
    values = unpack_counts(rows)
    for position, layer in enumerate(unpack_ids(layers)):
        yield layer, values[position * width : (position + 1) * width]


def _add(total: list[int], rows: Sequence[int]) -> None:
    for position, count in enumerate(rows):
        total[position] += count


def complaints(told: dict[str, Any]) -> list[str]:
    silent = ", ".join(map(str, told["silent"]))
    return [f"warning: worker {silent} did not answer, its rows are missing"] if silent else []


def summary(counts: Table, instances: Iterable[Busy], redundant_experts: int) -> list[str]:
    """For people: the busiest rank against the mean one, as it was and as it would be."""
    layers = [layer for layer in counts if any(layer)]
    hottest = max(max(layer) * len(layer) / sum(layer) for layer in layers)
    lines = [
        f"{sum(map(sum, layers))} rows of {len(layers[0])} experts in {len(layers)} layers;"
        f" the hottest expert has {hottest:.1f} times the mean of its layer",
        "busiest rank / mean rank:",
    ]
    for one in instances:
        was = imbalance(one.rows.values())
        words = [f"{one.name} was {was:.2f}", f"placed by these counts {by(layers, one, 0):.2f}"]
        if redundant_experts:
            with_copies = by(layers, one, redundant_experts)
            words.append(f"with {redundant_experts} redundant experts {with_copies:.2f}")
        lines.append("  " + ", ".join(words))
    return lines


def by(layers: Table, instance: Busy, num_copies: int) -> float:
    """The imbalance of experts placed by these counts, for requests that would choose the same."""
    return imbalance(
        rows_of(place(layer, instance.num_ranks, num_copies), layer) for layer in layers
    )
