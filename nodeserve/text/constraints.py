"""Which tokens an answer may go on with: schemas, regular expressions, grammars, by llguidance.

A constraint travels as text. Whoever takes it from a user checks it (`check`, which needs no
vocabulary); a worker compiles it for its own and asks a matcher, token for token. A matcher's state
is a function of the constraint and of the tokens consumed: it can be made again anywhere.

Both are bounded by what they may compute, not by a clock: the same constraint is taken or refused
on every machine. llguidance is imported by what first needs it.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nodeserve.errors import InvalidRequest, ModelError
from nodeserve.text.tokenizer import Tokenizer
from nodeserve.types import Constraint, brief, check_constraint, shown

if TYPE_CHECKING:
    import llguidance

# Runs of white space between JSON's parts end: a small model would go on for ever.
WHITESPACE = r"[ \t\r\n]{0,40}"
ANY_OBJECT = '{"type":"object"}'
MAX_CHOICES = 1024
MAX_GBNF_CHARACTERS = 1 << 14  # translated in Python: 20 ms
MAX_COMPILED = 64  # that a compiler keeps
MISSING = (
    "constraint cannot be followed: llguidance is not installed where the server runs"
    " (pip install 'nodeserve[structured]')"
)


def constraint_of(value: object) -> Constraint:
    """From what people write: one of

    {"json_schema": a schema, as an object or as text}, {"json_object": true}, {"regex": text},
    {"choice": [texts]}, {"grammar": text, Lark's notation or GBNF}, or a Constraint.
    InvalidRequest says what is wrong; whether it can be compiled is `check`'s to say.
    """
    if isinstance(value, Constraint):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InvalidRequest(
            "constraint must have one of json_schema, json_object, regex, choice and grammar, got"
            f" {shown(value)}"
        )
    [(kind, given)] = value.items()
    match kind, given:
        case "json_schema", str() | bool() | dict():
            return Constraint("json_schema", given if isinstance(given, str) else _json(given))
        case "json_object", True:
            return Constraint("json_schema", ANY_OBJECT)
        case "regex", str():
            return Constraint("regex", given)
        case "choice", [*texts]:
            return Constraint("grammar", choice_grammar(texts))
        case "grammar", str():
            return Constraint("grammar", _lark(given))
    raise InvalidRequest(f"constraint {shown(kind)} cannot be {shown(given)}")


def _json(schema: object) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as problem:
        raise InvalidRequest(f"constraint json_schema must be as in JSON: {problem}") from None


def choice_grammar(texts: list[object]) -> str:
    """The grammar of one of these texts."""
    if not 1 <= len(texts) <= MAX_CHOICES or not all(isinstance(one, str) for one in texts):
        raise InvalidRequest(f"constraint choice must be a list of 1 to {MAX_CHOICES} texts")
    return "start: " + " | ".join(map(quoted, map(str, texts)))


def quoted(text: str) -> str:
    """A text as Lark's notation has it."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """What a grammar has on the right side of a rule for the JSON that a schema allows."""
    options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
    if isinstance(schema, bool):
        schema = {"anyOf": [schema]}
    if isinstance(own := schema.get("x-guidance"), dict):
        options |= own
    return "%json " + _json({**schema, "x-guidance": options})


def _lark(text: str) -> str:
    if "::=" not in text:
        return text
    if len(text) > MAX_GBNF_CHARACTERS:
        raise InvalidRequest(
            f"constraint grammar has {len(text)} characters; as GBNF at most"
            f" {MAX_GBNF_CHARACTERS} are taken, more in Lark's notation"
        )
    try:
        from llguidance import gbnf_to_lark
    except ImportError:
        raise InvalidRequest(MISSING) from None
    try:
        return gbnf_to_lark.any_to_lark(text)
    except Exception as problem:  # noqa: BLE001  # the package raises nothing narrower
        raise InvalidRequest(f"constraint grammar is no GBNF: {brief(problem)}") from None


def check(constraint: Constraint) -> None:
    """InvalidRequest if it cannot be compiled; where llguidance is not installed only if it is too
    large, and the server says the rest. Takes milliseconds for a large one, and lets other threads
    run."""
    check_constraint(constraint)
    try:
        from llguidance import LLMatcher
    except ImportError:
        return
    if problem := LLMatcher.validate_grammar(_grammar(constraint), limits=_limits()):
        raise _refused(constraint, problem)


def _grammar(constraint: Constraint) -> str:
    """As llguidance takes it."""
    from llguidance import LLMatcher

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.text)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.text)
    try:
        return LLMatcher.grammar_from_json_schema(
            constraint.text, defaults={"whitespace_pattern": WHITESPACE}
        )
    except ValueError as problem:
        raise _refused(constraint, problem) from None


def _limits() -> "llguidance.LLParserLimits":
    """At most some 10 ms for a token and 100 to compile, where a usual schema takes 0.05 and 1: a
    step of the whole worker waits for it. An object of optional properties takes time that grows
    with their square, so the number of symbols has a low limit; 200 objects of four are within."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=400_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=5_000,
        verbose_errors=False,
    )


def _refused(constraint: Constraint, problem: object) -> InvalidRequest:
    return InvalidRequest(f"constraint {constraint.kind} cannot be used: {_words(problem)}")


def _words(problem: object) -> str:
    """What llguidance says, in one line."""
    return brief(" ".join(str(problem).replace("<non-verbose/>", "").split()))


class Matcher:
    """How far one answer is. Never raises for what the text or the tokens are: see `problem`."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._num_bytes = -(-vocab_size // 8)

    @property
    def problem(self) -> str:
        """Why it cannot go on; empty as long as it can."""
        return _words(self._matcher.get_error()) if self._matcher.is_error() else ""

    def consume(self, token_ids: Iterable[int]) -> None:
        """The answer has these tokens next."""
        self._matcher.consume_tokens(list(token_ids))

    def allowed(self) -> bytes:
        """One bit for each token of the model, the lowest of the first byte for token 0: whether it
        may come next. Where the answer may end, the model's stop tokens may."""
        # The tokenizer may have fewer tokens than the model, or more.
        bits = self._matcher.compute_bitmask()[: self._num_bytes]
        return bits.ljust(self._num_bytes, b"\0")


class Compiler:
    """Makes matchers for one vocabulary; keeps the latest, since users send the same again."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        """vocab_size: the model's, which may be above the tokenizer's."""
        stops = sorted(eos_token_ids)
        if not stops:
            raise ModelError("constraint cannot be followed: the model names no stop token")
        self._vocab_size = vocab_size
        self._tokenizer = _llguidance_tokenizer(tokenizer, stops)
        self._compiled: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()

    @classmethod
    def load(cls, location: str, vocab_size: int, eos_token_ids: Iterable[int]) -> "Compiler":
        """For the tokenizer of a checkpoint; ModelError where there is none."""
        return cls(Tokenizer.load(location), vocab_size, eos_token_ids)

    def matcher(self, constraint: Constraint) -> Matcher:
        """At the answer's beginning; InvalidRequest if it cannot be compiled."""
        first = self._compiled.get(constraint)
        if first is None:
            first = self._compiled[constraint] = self._compile(constraint)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return Matcher(first.deep_copy(), self._vocab_size)

    def _compile(self, constraint: Constraint) -> "llguidance.LLMatcher":
        from llguidance import LLMatcher

        made = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=_limits())
        if made.is_error():
            raise _refused(constraint, made.get_error())
        return made


def _llguidance_tokenizer(tokenizer: Tokenizer, stops: list[int]) -> "llguidance.LLTokenizer":
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError:
        raise InvalidRequest(MISSING) from None
    spelling = _Spelling(tokenizer, stops)
    made = LLTokenizer(TokenizerWrapper(spelling), eos_token=stops)
    spelling.greedy = made.greedy_tokenize
    return made


class _Spelling:
    """What llguidance asks of a tokenizer: the bytes of all tokens, and how a text is cut."""

    def __init__(self, tokenizer: Tokenizer, stops: list[int]) -> None:
        self.eos_token_id = stops[0]
        self.bos_token_id = tokenizer.bos_token_id
        self.special_token_ids = sorted({*tokenizer.special_ids, *stops})
        self.greedy: Any = lambda text: []
        self._tokenizer = tokenizer
        self._special = frozenset(self.special_token_ids)
        self._pieces = tokenizer.pieces(skip_special=False)
        # A special token is no text: its name behind a byte that is in none.
        self.tokens = [
            b"\xff" * (token_id in self._special) + self._pieces[token_id]
            for token_id in range(tokenizer.vocab_size)
        ]

    def __call__(self, text: bytes) -> list[int]:
        """How the model would write a text that the constraint leaves no choice about."""
        ids = self._tokenizer.encode(text.decode(), add_special=False)
        spelled = b"".join(map(self._pieces.__getitem__, ids))
        if spelled == text and self._special.isdisjoint(ids):
            return ids
        found: list[int] = self.greedy(text.decode())  # its own way with spaces, or with names
        return found
