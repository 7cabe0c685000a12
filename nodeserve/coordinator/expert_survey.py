"""What the ranks that share experts have counted, as one answer.

Ranks count their own rows, so those of all ranks are all rows. The workers that cut one rank's
matrices between them (tp) see the same ones: only the first of them is asked, of each stage.
Nothing is added up here, on the loop that must not be late: who asks does that.
"""

from collections.abc import Iterable
from typing import Any

from nodeserve.config import ModelConfig
from nodeserve.coordinator.link import WorkerLink
from nodeserve.coordinator.survey import Survey, Tell
from nodeserve.errors import ProtocolError
from nodeserve.expert_counts import facts_of
from nodeserve.wire.messages import CountExperts, ExpertsCounted, unpack_counts, unpack_ids


class ExpertSurvey:
    """Asks all such ranks. `links` are the present lives of all workers."""

    def __init__(self, links: list[WorkerLink], model: ModelConfig) -> None:
        self._links = links
        self._facts = facts_of(model)
        self._told: dict[WorkerLink, ExpertsCounted | None] = {}
        self._survey = Survey(self._begin, self._result)

    def ask(self, tell: Tell) -> None:
        """`tell` gets what docs/protocol.md says of `Experts`."""
        self._survey.ask(tell)

    def counted(self, link: WorkerLink, told: ExpertsCounted) -> None:
        """An answer; ProtocolError if it cannot be so."""
        if self._survey.expects(link, told.number):
            _check(told, self._facts, link.shape.ep)
            self._told[link] = told
            self._survey.answered(link)

    def _begin(self, number: int) -> Iterable[WorkerLink]:
        self._told = {link: None for link in self._links if _counts(link)}
        for link in self._told:
            link.send(CountExperts(number))
        return list(self._told)

    def _result(self) -> dict[str, Any]:
        return {
            "model": self._facts,
            "ranks": [_row(link, told) for link, told in self._told.items() if told],
            "silent": [link.index for link, told in self._told.items() if told is None],
        }


def _counts(link: WorkerLink) -> bool:
    return link.alive and link.shape.ep > 1 and link.rank % link.shape.tp == 0


def _row(link: WorkerLink, told: ExpertsCounted) -> dict[str, Any]:
    return {
        "worker": link.index,
        "instance": link.instance,
        "role": link.role.value,
        "shape": str(link.shape),
        "num_ranks": link.shape.ep,
        "layers": told.layers,
        "experts": told.experts,
        "ranks": told.ranks,
    }


def _check(told: ExpertsCounted, facts: dict[str, Any], num_ranks: int) -> None:
    num_layers, rest = divmod(len(told.layers), 4)
    sizes = len(told.experts), len(told.ranks)
    holds = not rest and sizes == (
        8 * num_layers * facts["num_experts"],
        8 * num_layers * num_ranks,
    )
    if not (
        holds
        and all(0 <= layer < facts["num_layers"] for layer in unpack_ids(told.layers))
        and min((*unpack_counts(told.experts), *unpack_counts(told.ranks)), default=0) >= 0
    ):
        raise ProtocolError("a worker's record does not add up: rows of experts")
