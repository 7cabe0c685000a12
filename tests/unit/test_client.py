"""AsyncClient against a scripted server: answers, stop strings, refusals, errors."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nodeserve import AsyncClient
from nodeserve.client import Chunk
from nodeserve.errors import (
    ERRORS,
    FrameTooLarge,
    InvalidRequest,
    ModelError,
    NodeServeError,
    Overloaded,
)
from nodeserve.types import Timings, TokenLogprobs
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import (
    TO_CLIENT,
    Abort,
    End,
    Submit,
    Tokens,
    pack_floats,
    pack_ids,
    unpack_ids,
)
from tests.fakes.server import TIMINGS, VOCAB_SIZE, FakeServer, Peer, saying, tokens_for

# ---- answers


async def test_a_completion_has_all_there_is(server: FakeServer, client: AsyncClient) -> None:
    server.script = saying("Paris")
    done = await client.generate([1, 2, 3], max_tokens=9, temperature=0, stop_token_ids=[4])
    assert (done.text, done.token_ids) == ("Paris", list(b"Paris"))
    assert (done.finish_reason, done.logprobs) == ("stop", None)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 5)
    assert done.usage.total_tokens == 8
    assert done.timings == TIMINGS
    (submit,) = server.submits
    assert list(unpack_ids(submit.token_ids)) == [1, 2, 3]
    assert submit.sampling == {"max_tokens": 9, "temperature": 0, "stop_token_ids": [4]}
    assert (submit.slo, submit.priority) == (None, 0)


async def test_the_client_measures_times(server: FakeServer, client: AsyncClient) -> None:
    latency = (await client.generate([1])).latency
    assert latency.ttft_s is not None and latency.e2e_s is not None and latency.tpot_s is not None
    assert 0 < latency.ttft_s <= latency.e2e_s
    assert latency.tpot_s == pytest.approx((latency.e2e_s - latency.ttft_s) / 2)

    server.script = saying("1")
    latency = (await client.generate([1])).latency
    assert (latency.ttft_s, latency.tpot_s) == (latency.e2e_s, None)
    server.script = saying("")
    assert (await client.generate([1])).latency.ttft_s is None


async def test_a_stream_is_the_completion_in_parts(client: AsyncClient) -> None:
    parts = [chunk async for chunk in client.generate([1, 2], stream=True)]
    whole = await client.generate([1, 2])
    assert "".join(part.text for part in parts) == whole.text
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    *before, last = parts
    for part in before:
        assert (part.finish_reason, part.usage, part.timings) == (None, None, None)
    assert (last.finish_reason, last.usage, last.timings) == ("length", whole.usage, whole.timings)


async def test_chunks_come_as_soon_as_their_tokens(server: FakeServer, client: AsyncClient) -> None:
    taken = asyncio.Event()

    async def script(peer: Peer, submit: Submit) -> None:
        peer.tokens(submit.request_id, [ord("x")])
        await taken.wait()
        peer.end(submit, "stop", 1)

    server.script = script
    texts = []
    async for chunk in client.generate([1], stream=True):
        texts.append(chunk.text)
        taken.set()
    assert texts == ["x", ""]


async def test_text_is_encoded_and_a_chat_goes_through_the_template(
    server: FakeServer, client: AsyncClient
) -> None:
    await client.generate("hello <own>")
    await client.chat([{"role": "user", "content": "hi"}], max_tokens=3)
    first, second = (list(unpack_ids(submit.token_ids)) for submit in server.submits)
    assert first == [259, ord(" "), 263]
    assert bytes(second) == b"[user]hi[assistant]"
    assert server.submits[1].sampling == {"max_tokens": 3}


async def test_characters_are_whole_however_tokens_cut_them(
    server: FakeServer, client: AsyncClient
) -> None:
    server.script = saying("né 🙂!")
    texts = [chunk.text async for chunk in client.generate("x", stream=True)]
    assert "".join(texts) == "né 🙂!"
    assert not any("�" in text for text in texts)


async def test_without_detokenising_no_tokenizer_is_needed(tmp_path: Path) -> None:
    async with FakeServer(tmp_path / "s") as server, AsyncClient(server.path) as client:
        done = await client.generate([5, 6], detokenize=False)
        assert (done.text, done.token_ids) == ("", tokens_for(server.submits[0]))
        with pytest.raises(ModelError, match="/nowhere"):
            await client.generate([5, 6])


async def test_logprobs_are_read(server: FakeServer, client: AsyncClient) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        for token_id in (7, 8):
            entry = [-0.5, pack_ids([token_id, 9]), pack_floats([-0.5, -1.25])]
            peer.tokens(submit.request_id, [token_id], [entry])
        peer.end(submit, "length", 2)

    server.script = script
    done = await client.generate([1], logprobs=2)
    assert done.logprobs == [
        TokenLogprobs(-0.5, {7: -0.5, 9: -1.25}),
        TokenLogprobs(-0.5, {8: -0.5, 9: -1.25}),
    ]


async def test_slo_and_priority_travel(server: FakeServer, client: AsyncClient) -> None:
    await client.generate([1], slo={"ttft_ms": 100}, priority=-3, seed=5)
    (submit,) = server.submits
    assert (submit.slo, submit.priority, submit.sampling) == ({"ttft_ms": 100}, -3, {"seed": 5})


async def test_timings_of_a_newer_server_are_read(server: FakeServer, client: AsyncClient) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        timings = {**asdict(Timings(scheduler_wait_s=1.0)), "future_s": 2.0}
        peer.send(End(submit.request_id, "length", None, "", {}, timings, None))

    server.script = script
    done = await client.generate([1, 2])
    assert done.timings == Timings(scheduler_wait_s=1.0)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (2, 0)


# ---- stop strings


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_aborts_the_request(
    server: FakeServer, client: AsyncClient, stream: bool
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        for token_id in b"one STOP":
            peer.tokens(submit.request_id, [token_id])
        await server.aborted[submit.request_id].wait()
        peer.tokens(submit.request_id, [ord("!")])  # was under way
        peer.end(submit, "cancelled", 9, "cancelled", "cancelled by the client")

    server.script = script
    if stream:
        parts = [chunk async for chunk in client.generate([1], stop="STOP", stream=True)]
        text, last = "".join(part.text for part in parts), parts[-1]
    else:
        done = await client.generate([1], stop=["nothing", "STOP"])
        text, last = done.text, Chunk(usage=done.usage, timings=done.timings)
        assert (done.finish_reason, done.token_ids) == ("stop", list(b"one STOP"))
    assert text == "one "
    assert last.usage is not None and last.usage.completion_tokens == 8
    assert last.timings == TIMINGS


async def test_a_stop_string_in_the_last_tokens_needs_no_abort(
    server: FakeServer, client: AsyncClient
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        end = End(submit.request_id, "length", None, "", {"completion_tokens": 4}, {}, None)
        items = [[submit.request_id, pack_ids(list(b"a.b.")), None]]
        peer.send_raw(frame(TO_CLIENT.encode(Tokens(items))) + frame(TO_CLIENT.encode(end)))

    server.script = script
    done = await client.generate([1], stop=".")
    assert (done.text, done.finish_reason) == ("a", "stop")
    await client.stats()
    assert server.count(Abort) == 0


async def test_text_that_only_begins_a_stop_string_comes_at_the_end(
    server: FakeServer, client: AsyncClient
) -> None:
    server.script = saying("one ST")
    done = await client.generate([1], stop="STOP")
    assert (done.text, done.finish_reason) == ("one ST", "stop")


async def test_a_lost_connection_after_a_stop_string_loses_nothing(
    server: FakeServer, client: AsyncClient
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        peer.tokens(submit.request_id, list(b"a."))
        await server.aborted[submit.request_id].wait()
        peer.close()

    server.script = script
    done = await client.generate([1], stop=".")
    assert (done.text, done.finish_reason, done.usage.completion_tokens) == ("a", "stop", 2)


# ---- refused before anything is sent


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([1], {"temprature": 1.0}, "temprature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"stop": "x", "detokenize": False}, "stop"),
        ([1], {"stop": ["x", ""]}, "stop"),
        ([1], {"slo": {"ttft_ms": ...}}, "slo"),
        ([1], {"priority": 2**64}, "priority"),
        ([2**31], {}, "prompt"),
        ([1.5], {}, "prompt"),
        (["a"], {}, "prompt"),
        (b"abcd", {}, "prompt"),
        (None, {}, "prompt"),
        (7, {}, "prompt"),
        ("\ud800", {}, "prompt"),
    ],
    ids=repr,
)
async def test_what_cannot_be_sent_is_refused_by_name(
    server: FakeServer, client: AsyncClient, prompt: Any, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        await client.generate(prompt, **options)
    assert (await client.generate([1])).finish_reason == "length"
    assert len(server.submits) == 1


async def test_a_request_over_the_frame_limit_disturbs_nobody(tmp_path: Path) -> None:
    async with (
        FakeServer(tmp_path / "s", max_frame_bytes=100) as server,
        AsyncClient(server.path) as client,
    ):
        with pytest.raises(FrameTooLarge, match="allows 100"):
            await client.generate([1] * 100, detokenize=False)
        assert (await client.generate([1], detokenize=False)).finish_reason == "length"
        assert len(server.peers) == 1


# ---- errors from the server


@pytest.mark.parametrize("code", [*ERRORS, "a_newer_code"])
async def test_an_error_has_the_class_of_its_code(
    server: FakeServer, client: AsyncClient, code: str
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        peer.end(submit, "error", 0, code, "what happened")

    server.script = script
    with pytest.raises(NodeServeError, match="what happened") as caught:
        await client.generate([1])
    assert type(caught.value) is ERRORS.get(code, NodeServeError)


async def test_tokens_before_an_error_are_delivered(
    server: FakeServer, client: AsyncClient
) -> None:
    async def script(peer: Peer, submit: Submit) -> None:
        end = End(submit.request_id, "error", "overloaded", "enough", {}, {}, 2.5)
        items = [[submit.request_id, pack_ids(list(b"ab")), None]]
        peer.send_raw(frame(TO_CLIENT.encode(Tokens(items))) + frame(TO_CLIENT.encode(end)))

    server.script = script
    texts = []
    with pytest.raises(Overloaded, match="enough"):
        async for chunk in client.generate([1], stream=True):
            texts.append(chunk.text)
    assert texts == ["ab"]


@pytest.mark.parametrize("priority", [1.5, True, None, 2**31])
async def test_a_bad_priority_costs_no_other_request(client: AsyncClient, priority: Any) -> None:
    """It travelled, and the server closed the connection that all requests share."""
    running = await client.start([1, 2])
    with pytest.raises(InvalidRequest, match="priority"):
        await client.generate([1], priority=priority)
    chunks = []
    while chunk := await running.chunk():
        chunks.append(chunk)
    assert chunks[-1].finish_reason is not None
