"""The soak's judges find what they look for."""

import itertools
from typing import Any

import pytest

from bench.soak.answers import Answer, whole
from bench.soak.growth import LEAST_S, growths
from bench.soak.ledger import Ledger, Second
from bench.soak.line import Ask, Line
from bench.soak.picture import picture
from nodeserve.types import Sampling
from nodeserve.wire.frames import frame
from nodeserve.wire.messages import TO_CLIENT, End, Hello, ToClient, pack_ids
from nodeserve.wire.messages import Tokens as TokensMessage
from nodeserve.worker.executor_sim import Tokens

VOCAB, EOS = 1000, (2, 3)
TOKENS = Tokens(VOCAB, EOS)
PROMPT = [5, 600, 7]
GREEDY = Sampling(max_tokens=9, temperature=0.0)


def answer(**sampling: Any) -> Answer:
    values = {"max_tokens": 9, "temperature": 0.0, **sampling}
    return Answer(PROMPT, Sampling(**values), TOKENS, VOCAB)


@pytest.mark.parametrize("seed", [None, 0, 1, 2**60 + 7])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_right_stream_is_right_however_it_is_cut(temperature: float, seed: int | None) -> None:
    told = 4242 if seed is None else seed
    stream = whole(PROMPT, Sampling(max_tokens=9, temperature=temperature, seed=told), TOKENS)
    for cut in range(10):
        one = answer(temperature=temperature, seed=seed)
        assert one.add(stream[:cut]) == one.add(stream[cut:]) == ""
        assert one.end("length") == "" and one.end("stop") != ""


@pytest.mark.parametrize("seed", [None, 77])
def test_a_lost_doubled_or_wrong_token_is_found(seed: int | None) -> None:
    stream = whole(PROMPT, Sampling(max_tokens=9, seed=77), TOKENS)
    for place in range(1, 8):
        for wrong in (
            stream[:place] + stream[place + 1 :],
            stream[: place + 1] + stream[place:],
            [*stream[:place], (stream[place] + 50) % VOCAB, *stream[place + 1 :]],
        ):
            one = answer(temperature=0.8, seed=seed)
            assert one.add(wrong) or one.end("length"), (place, wrong)
    assert answer(temperature=0.8, seed=78).add(stream)


def test_an_answer_ends_where_it_must() -> None:
    stream = whole(PROMPT, GREEDY, TOKENS)
    short = answer()
    short.add(stream[:8])
    assert "after 8 of 9" in short.end("length")
    assert "after the last" in answer().add([*stream, 1])
    stop = answer(stop_token_ids=(stream[4],))
    first = stream.index(stream[4])
    assert stop.add(stream[: first + 1]) == "" and stop.end("stop") == ""
    assert stop.end("length") == "ended with length, not stop"
    assert "after the last" in stop.add(stream[first + 1 :])


# ---- lines


class Wire:
    """The node's side of a line: what the client writes is thrown away."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...


def line(*asks: Ask) -> tuple[Line, Ledger]:
    ledger = Ledger()
    client = Line(ledger)
    client.connection_made(Wire())  # type: ignore[arg-type]
    say(client, Hello(2, {}))
    for ask in asks:
        client.send(ask)
    return client, ledger


def say(client: Line, *messages: ToClient) -> None:
    client.data_received(b"".join(frame(TO_CLIENT.encode(one)) for one in messages))


def tokens(request_id: int, ids: list[int]) -> TokensMessage:
    return TokensMessage([[request_id, pack_ids(ids), None]])


def end(request_id: int, code: str | None = None, retry_after_s: float | None = None) -> End:
    reason = "length" if code is None else "cancelled" if code == "cancelled" else "error"
    return End(request_id, reason, code, "", {}, {}, retry_after_s)


RIGHT = whole(PROMPT, GREEDY, TOKENS)
WHOLE: list[ToClient] = [tokens(0, RIGHT[:4]), tokens(0, RIGHT[4:]), end(0)]


def test_a_whole_answer_is_no_fault() -> None:
    client, ledger = line(Ask(answer()))
    say(client, *WHOLE)
    assert not ledger.num_faults and client.idle.is_set() and not ledger.num_open
    assert ledger.now.ended == ledger.now.in_time == 1 and ledger.now.tokens == 9
    say(client, *[tokens(0, [1])])
    client.connection_lost(None)
    assert ledger.faults == ["tokens for a request after its end"]


FAULTS: dict[str, list[ToClient]] = {
    "a second end": [*WHOLE, end(0)],
    "tokens after the end": [*WHOLE, tokens(0, [4])],
    "somebody else's tokens": [tokens(1, [4])],
    "somebody else's end": [end(1)],
    "a frame that came twice": [WHOLE[0], *WHOLE],
    "a frame that is missing": WHOLE[1:],
    "an end too early": [WHOLE[0], end(0)],
    "an end without tokens": [end(0)],
    "an error": [end(0, "worker_lost")],
    "cancelled, though nobody asked for it": [end(0, "cancelled")],
    "refused, and not told for how long": [end(0, "overloaded")],
    "refused after tokens": [WHOLE[0], end(0, "overloaded", 1.0)],
}


@pytest.mark.parametrize("said", FAULTS.values(), ids=FAULTS.keys())
def test_what_may_not_be_is_a_fault(said: list[ToClient]) -> None:
    client, ledger = line(Ask(answer()))
    say(client, *said)
    assert ledger.num_faults == len(ledger.faults) >= 1


def test_a_lost_connection_is_a_fault_unless_we_left() -> None:
    client, ledger = line(Ask(answer()), Ask(answer()))
    client.hang_up()
    client.connection_lost(None)
    assert not ledger.num_faults and ledger.counts["left"] == 2
    client, ledger = line(Ask(answer()))
    client.connection_lost(None)
    assert ledger.faults == ["the connection was lost with 1 open requests"]


def test_refusals_cancels_and_wanted_errors_are_none() -> None:
    cancelled, invalid = Ask(answer()), Ask(answer())
    cancelled.abort_after, invalid.ends_with = 2, "invalid_request"
    client, ledger = line(cancelled, invalid, Ask(answer()))
    say(client, WHOLE[0], end(0, "cancelled"), end(1, "invalid_request"))
    say(client, end(2, "overloaded", 0.5))
    assert not ledger.num_faults and cancelled.aborted and ledger.now.refused == 1


@pytest.mark.parametrize(("kills", "faults"), [(2, 1), (3, 0)])
def test_only_who_saw_three_workers_killed_may_be_lost(kills: int, faults: int) -> None:
    client, ledger = line(Ask(answer()))
    for _ in range(kills):
        ledger.killed()
    say(client, WHOLE[0], end(0, "worker_lost"))
    assert ledger.num_faults == faults and ledger.now.kills == kills


def test_what_comes_after_one_left_is_not_looked_at() -> None:
    """Several messages may have been read at once."""
    client, ledger = line(Ask(answer()))
    client.on_tokens = lambda num_tokens: client.hang_up()
    say(client, *WHOLE)
    assert not ledger.num_faults and ledger.counts["left"] == 1


# ---- memory


def series(values: list[int], pid: int = 1) -> list[Second]:
    return [Second(rss_bytes={pid: value}) for value in values]


def test_growth_is_from_the_first_quarter_to_the_end() -> None:
    warm = [100 + min(second, 50) for second in range(400)]
    (steady,) = growths(series(warm))
    assert steady.share == 0.0 and steady.seconds == 400
    (leak,) = growths(series([1000 + second for second in range(400)]))
    assert leak.share == pytest.approx((380 - 120) / 1120, rel=0.01)
    assert growths(series([1] * (LEAST_S - 1))) == []


def test_a_run_can_be_drawn() -> None:
    seconds = series([100 << 20, 101 << 20, 102 << 20] * 40)
    for place, second in enumerate(seconds):
        second.ended, second.tokens, second.kills = place % 3, 10 * place, int(place == 50)
        second.in_time = second.ended
        second.rss_bytes[2] = 50 << 20
    drawn = picture(seconds, 1, "a title")
    assert drawn.startswith("<svg") and "a title" in drawn
    assert drawn.count("<polyline") >= 7
    assert picture(seconds[:1], 1, "short").startswith("<svg")
    assert all(word in drawn for word in itertools.chain(("MiB", "tokens/s", "killed")))
