"""The words that every part shares: what a request asks for and what it gets back."""

import reprlib
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

from nodeserve.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_LISTED = 1024  # entries of logit_bias and of stop_token_ids
MAX_CONSTRAINT_BYTES = 1 << 16  # of its text as UTF-8
CONSTRAINT_KINDS = ("json_schema", "regex", "grammar")
MAX_PROBLEM_CHARACTERS = 300
LEAST_TEMPERATURE = 1e-5  # below it the most likely token is taken, as vLLM does


class Role(Enum):
    """What an instance does: one phase, or both (chunked prefill joined with decode)."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer's text must be: JSON that a schema allows, or what a regular expression or a
    grammar (in Lark's notation) describes. `text` is the schema, expression or grammar itself."""

    kind: str  # one of CONSTRAINT_KINDS
    text: str = field(repr=False)  # it may be as long as a prompt, and is the user's


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. Names and defaults are those vLLM's users know.

    `logprobs=None` gives none, 0 the chosen token's alone, n also the n most likely ones, taken
    from the raw logits (before penalties, bias and temperature). `top_k=0` keeps all tokens.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def shapes_logits(self) -> bool:
        """True when penalties, bias, a minimum length or a constraint change the logits before the
        choice."""
        return self.needs_tokens or bool(self.logit_bias) or self.min_tokens > 0

    @property
    def needs_tokens(self) -> bool:
        """True when the next choice depends on which tokens came before: penalties and constraints
        do."""
        return self.penalises or self.constraint is not None

    @property
    def penalises(self) -> bool:
        """True when tokens that were there count against a choice."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


FLOAT_RANGES = {  # field: (lowest, highest, lowest itself excluded)
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "repetition_penalty": (0.01, 100.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
}
INT_RANGES = {
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
}
SAMPLING_FIELDS = frozenset(f.name for f in fields(Sampling))


def shown(value: object) -> str:
    """A client's value for an error message: short, whatever its size and depth."""
    return reprlib.repr(value)


def brief(problem: object) -> str:
    """What a library says is wrong with a file, which may be all of the file."""
    text = str(problem)
    return text if len(text) <= MAX_PROBLEM_CHARACTERS else f"{text[:MAX_PROBLEM_CHARACTERS]}..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not _is_int(value) or not low <= value <= high:  # type: ignore[operator]
        raise InvalidRequest(f"{name} must be an integer from {low} to {high}, got {shown(value)}")


def check_priority(priority: object) -> None:
    """A priority is a 32-bit integer; InvalidRequest otherwise."""
    _check_int("priority", priority, -(2**31), 2**31 - 1)


def _check_float(name: str, value: object, low: float, high: float, open_low: bool) -> None:
    number = isinstance(value, float) or _is_int(value)
    if not number or not low <= value <= high:  # type: ignore[operator]  # NaN is in no range
        raise InvalidRequest(f"{name} must be a number from {low} to {high}, got {shown(value)}")
    if open_low and value == low:
        raise InvalidRequest(f"{name} must be above {low}, got {shown(value)}")


def _check_bias(bias: object, vocab_size: int) -> None:
    if not isinstance(bias, dict):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, got {shown(bias)}")
    if len(bias) > MAX_LISTED:
        raise InvalidRequest(f"logit_bias has {len(bias)} entries; at most {MAX_LISTED} are taken")
    for token_id, value in bias.items():
        _check_int("logit_bias token id", token_id, 0, vocab_size - 1)
        _check_float("logit_bias value", value, -100.0, 100.0, False)


def check_constraint(constraint: Constraint) -> None:
    """What can be seen without compiling it; InvalidRequest otherwise."""
    if not constraint.text:
        raise InvalidRequest(f"constraint {constraint.kind} must not be empty")
    try:
        num_bytes = len(constraint.text.encode())
    except UnicodeEncodeError:  # lone surrogates
        raise InvalidRequest("constraint must be text that can be encoded as UTF-8") from None
    if num_bytes > MAX_CONSTRAINT_BYTES:
        raise InvalidRequest(
            f"constraint has {num_bytes} bytes; at most {MAX_CONSTRAINT_BYTES} are taken"
        )


def _check_ends(sampling: Sampling) -> None:
    """A constraint says itself where an answer may end, and there the model's stop token comes."""
    if sampling.ignore_eos:
        raise InvalidRequest("ignore_eos cannot be true with a constraint: it could never end")
    if sampling.min_tokens:
        raise InvalidRequest("min_tokens must be 0 with a constraint, which says when it may end")


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raise InvalidRequest naming the first field that is out of range."""
    for name, (low, high) in INT_RANGES.items():
        _check_int(name, getattr(sampling, name), low, high)
    for name, (low_f, high_f, open_low) in FLOAT_RANGES.items():
        _check_float(name, getattr(sampling, name), low_f, high_f, open_low)
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens ({sampling.min_tokens}) is above max_tokens ({sampling.max_tokens})"
        )
    if sampling.seed is not None:
        _check_int("seed", sampling.seed, 0, MAX_SEED)
    if sampling.logprobs is not None:
        _check_int("logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    if not isinstance(sampling.ignore_eos, bool):
        raise InvalidRequest(f"ignore_eos must be true or false, got {shown(sampling.ignore_eos)}")
    _check_bias(sampling.logit_bias, vocab_size)
    if len(sampling.stop_token_ids) > MAX_LISTED:
        raise InvalidRequest(
            f"stop_token_ids has {len(sampling.stop_token_ids)} entries; at most {MAX_LISTED}"
        )
    for token_id in sampling.stop_token_ids:
        _check_int("stop_token_ids", token_id, 0, vocab_size - 1)
    if sampling.constraint is not None:
        check_constraint(sampling.constraint)
        _check_ends(sampling)


def sampling_from(values: dict[str, Any]) -> Sampling:
    """Build Sampling from a mapping off the wire; unknown names are refused by name."""
    unknown = sorted(map(str, set(values) - SAMPLING_FIELDS))
    if unknown:
        known = ", ".join(sorted(SAMPLING_FIELDS))
        raise InvalidRequest(f"unknown sampling field {shown(unknown[0])}; known fields: {known}")
    stops = values.get("stop_token_ids", ())
    if not isinstance(stops, list | tuple):
        raise InvalidRequest(f"stop_token_ids must be a list of token ids, got {shown(stops)}")
    constraint = constraint_from(values.get("constraint"))
    return Sampling(**{**values, "stop_token_ids": tuple(stops), "constraint": constraint})


def constraint_from(value: object) -> Constraint | None:
    """From a mapping of its kind to its text; InvalidRequest says what it is instead."""
    if value is None:
        return None
    if isinstance(value, Constraint):
        value = {value.kind: value.text}
    if isinstance(value, dict) and len(value) == 1:
        [(kind, text)] = value.items()
        if kind in CONSTRAINT_KINDS and isinstance(text, str):
            return Constraint(kind, text)
    kinds = ", ".join(CONSTRAINT_KINDS)
    raise InvalidRequest(f"constraint must map one of {kinds} to a text, got {shown(value)}")


def sampling_to(sampling: Sampling) -> dict[str, Any]:
    """The fields that differ from the defaults: what travels."""
    default = Sampling()
    values = {
        name: getattr(sampling, name)
        for name in sorted(SAMPLING_FIELDS)
        if getattr(sampling, name) != getattr(default, name)
    }
    if sampling.constraint is not None:
        values["constraint"] = {sampling.constraint.kind: sampling.constraint.text}
    return values


@dataclass(frozen=True, slots=True)
class Slo:
    """A request's limits in seconds; None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def missed(
        self, ttft_s: float | None, tpot_s: float | None, e2e_s: float | None = None
    ) -> tuple[str, ...]:
        """Names of the limits that a request with these times misses.

        A request with one token has no TPOT and cannot miss it; one without a first token misses
        any limit of the TTFT.
        """
        late = []
        if self.ttft_s is not None and (ttft_s is None or ttft_s > self.ttft_s):
            late.append("ttft")
        if self.tpot_s is not None and tpot_s is not None and tpot_s > self.tpot_s:
            late.append("tpot")
        if self.e2e_s is not None and (e2e_s is None or e2e_s > self.e2e_s):
            late.append("e2e")
        return tuple(late)

    def met(self, ttft_s: float | None, tpot_s: float | None, e2e_s: float | None = None) -> bool:
        """Whether a request that ended well was good."""
        return not self.missed(ttft_s, tpot_s, e2e_s)

    def scaled(self, factor: float) -> "Slo":
        """Every limit times `factor`: the SLO scale of DistServe's plots."""
        return Slo(*(None if one is None else one * factor for one in self.limits))

    @property
    def limits(self) -> tuple[float | None, float | None, float | None]:
        return (self.ttft_s, self.tpot_s, self.e2e_s)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability (natural log) of one chosen token and of the most likely alternatives."""

    logprob: float
    top: dict[int, float]  # token id -> logprob, most likely first


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds, and who did the work. Worker ids are indices.

    The first five stages add up to the server's share of the TTFT. `handoff_wait_s` is from the
    first token to the start of the pull, `decode_s` from the first token to the last. `handoff_*`
    are 0 for a request that stayed on one worker.
    """

    scheduler_wait_s: float = 0.0  # arrival to departure from the coordinator's buffer
    transit_s: float = 0.0  # departure to receipt by the worker
    device_wait_s: float = 0.0  # receipt to the start of the first pass that has some of it
    prefill_s: float = 0.0  # to the end of the pass that gave the first token
    return_s: float = 0.0  # to the coordinator having that token
    handoff_wait_s: float = 0.0
    handoff_s: float = 0.0
    handoff_bytes: int = 0
    decode_s: float = 0.0
    prefill_worker: int = -1
    decode_worker: int = -1
    num_preemptions: int = 0
    num_rounds: int = 0  # departures that left it behind
    lost_before_s: float = 0.0  # of the wait: with workers that ended before the first token
    lost_after_s: float = 0.0  # of decode: from losing its place to the next token

    @property
    def ttft_s(self) -> float:
        """Arrival at the coordinator to the first token there."""
        waits = self.scheduler_wait_s + self.transit_s + self.device_wait_s
        return waits + self.prefill_s + self.return_s


class Load(NamedTuple):
    """What a worker holds now. Never travels alone.

    `num_received` makes it exact: what was sent to the worker after its first `num_received`
    requests is in no other number here, all before it is.
    """

    num_running: int  # sequences that decode, or whose pages are on their way here
    num_waiting: int  # sequences whose prefill has not finished
    num_pinned: int  # prefilled, waiting to be pulled
    num_free_blocks: int  # less those that waiting sequences will take
    waiting_tokens: int  # prompt tokens not computed in a step that has ended
    num_received: int  # prompts and pulls since it started


@dataclass(frozen=True, slots=True)
class StartEvent:
    """A step of a node's start, for people: `done` of `total` in `phase`."""

    phase: str  # model, workers, loading, pages, ready; note: only `message` counts
    worker: int | None
    done: int
    total: int
    message: str = ""
