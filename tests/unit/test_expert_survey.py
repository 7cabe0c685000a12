"""Who is asked what experts were chosen, and what comes of wrong and missing answers."""

import asyncio
from typing import Any

import pytest

from nodeserve.coordinator.expert_survey import ExpertSurvey
from nodeserve.coordinator.link import LOST, READY, WorkerLink
from nodeserve.errors import ProtocolError
from nodeserve.layout import Shape
from nodeserve.types import Role
from nodeserve.wire.messages import (
    TO_WORKER,
    CountExperts,
    ExpertsCounted,
    pack_counts,
    pack_ids,
)
from tests.fakes.channel import FakeChannel
from tests.unit.test_expert_counts import MODEL

SHAPES = (Shape(tp=2, ep=2), Shape(), Shape(ep=2))
RIGHT = ExpertsCounted(1, pack_ids([1, 2]), pack_counts(range(12)), pack_counts([5, 10, 5, 46]))


def workers(shapes: tuple[Shape, ...] = SHAPES) -> list[WorkerLink]:
    links: list[WorkerLink] = []
    for instance, shape in enumerate(shapes):
        for rank in range(shape.num_workers):
            link = WorkerLink(len(links), Role.MIXED, FakeChannel(), -1)  # type: ignore[arg-type]
            link.instance, link.rank, link.shape, link.state = instance, rank, shape, READY
            links.append(link)
    return links


def asked(link: WorkerLink) -> list[Any]:
    channel: Any = link.channel
    return [TO_WORKER.decode(record) for record in channel.records]


async def test_one_worker_of_each_rank_that_shares_experts_is_asked() -> None:
    links, results = workers(), list[dict[str, Any]]()
    survey = ExpertSurvey(links, MODEL)
    links[6].state = LOST
    survey.ask(results.append)
    assert [len(asked(link)) for link in links] == [1, 0, 1, 0, 0, 1, 0]
    assert asked(links[0]) == [CountExperts(1)]
    for index in (5, 0, 2):
        assert not results
        survey.counted(links[index], RIGHT)
    (told,) = results
    assert told["model"]["num_experts"] == 6 and told["silent"] == []
    rows = [(row["worker"], row["instance"], row["shape"]) for row in told["ranks"]]
    assert rows == [(0, 0, "tp2.ep2"), (2, 0, "tp2.ep2"), (5, 2, "ep2")]
    assert told["ranks"][0]["experts"] == RIGHT.experts and told["ranks"][0]["num_ranks"] == 2
    survey.counted(links[0], RIGHT)  # once too often: nobody waits for it
    survey.ask(results.append)
    survey.counted(links[0], RIGHT)  # an answer to the first question
    assert len(results) == 1


WRONG = {
    "half a layer": RIGHT._replace(layers=b"\1\0"),
    "an unknown layer": RIGHT._replace(layers=pack_ids([1, 3])),
    "few experts": RIGHT._replace(experts=pack_counts(range(11))),
    "three ranks": RIGHT._replace(ranks=pack_counts(range(6))),
    "less than none": RIGHT._replace(ranks=pack_counts([5, -1, 5, 46])),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_answer_that_does_not_add_up_is_an_error_of_the_worker(name: str) -> None:
    links = workers()
    survey = ExpertSurvey(links, MODEL)
    survey.ask(lambda result: None)
    with pytest.raises(ProtocolError, match="rows of experts"):
        survey.counted(links[0], WRONG[name])


async def test_who_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeserve.coordinator.survey.ANSWER_TIMEOUT_S", 0.0)
    links = workers((Shape(ep=2),))
    survey = ExpertSurvey(links, MODEL)
    done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
    survey.ask(done.set_result)
    survey.counted(links[1], RIGHT)
    told = await done
    assert [row["worker"] for row in told["ranks"]] == [1] and told["silent"] == [0]


async def test_where_nobody_shares_experts_the_answer_comes_at_once() -> None:
    results = list[dict[str, Any]]()
    ExpertSurvey(workers((Shape(tp=2),)), MODEL).ask(results.append)
    assert results[0]["ranks"] == [] and results[0]["silent"] == []
