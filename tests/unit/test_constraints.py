"""What llguidance makes of constraints for a vocabulary of bytes and a few words."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nodeserve.errors import InvalidRequest, ModelError
from nodeserve.text import Tokenizer
from nodeserve.text.constraints import Compiler, check, choice_grammar, constraint_of, json_rule
from nodeserve.types import MAX_CONSTRAINT_BYTES, Constraint
from tests.fakes.gguf_writer import gpt2_metadata, sentencepiece_metadata, write_gguf

EOS, BOS, HELLO, OWN = 262, 261, 259, 263
VOCAB = 300  # the model's: it has places that no token fills
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bytes") / "model.gguf"
    return Tokenizer.load(write_gguf(path, gpt2_metadata()))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer, VOCAB, [EOS])


def ids_of(allowed: bytes) -> list[int]:
    return [8 * at + bit for at, byte in enumerate(allowed) for bit in range(8) if byte >> bit & 1]


def walk(
    compiler: Compiler, constraint: Constraint, rng: random.Random, eos: int = EOS
) -> list[int]:
    """A random answer. At each of its tokens a matcher that was made anew says the same."""
    matcher, answer = compiler.matcher(constraint), list[int]()
    while True:
        allowed = matcher.allowed()
        assert not matcher.problem
        again = compiler.matcher(constraint)
        again.consume(answer)
        assert again.allowed() == allowed
        ids = ids_of(allowed)
        assert ids
        token = rng.choice(ids) if eos not in ids or rng.random() < 0.7 else eos
        if token == eos:
            return answer
        answer.append(token)
        matcher.consume([token])


@pytest.mark.parametrize("seed", range(5))
def test_every_random_answer_is_what_the_schema_allows(
    tokenizer: Tokenizer, compiler: Compiler, seed: int
) -> None:
    answer = walk(compiler, constraint_of({"json_schema": PERSON}), random.Random(seed))
    jsonschema.validate(json.loads(tokenizer.decode(answer)), PERSON)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ({"choice": ["yes", 'n"o\n', "é"]}, {"yes", 'n"o\n', "é"}),
        ({"regex": "a|bc"}, {"a", "bc"}),
        ({"grammar": 'start: "x" y\ny: "1" | "2"'}, {"x1", "x2"}),
        ({"grammar": 'root ::= "x" y\ny ::= "1" | "2"'}, {"x1", "x2"}),
        ({"json_schema": {"const": [1]}}, {"[1]"}),
        ({"json_schema": '{"enum": [true, null]}'}, {"true", "null"}),
    ],
)
def test_each_kind_gives_just_its_texts(
    tokenizer: Tokenizer, compiler: Compiler, value: dict[str, Any], texts: set[str]
) -> None:
    rng = random.Random(7)
    constraint = constraint_of(value)
    check(constraint)
    found = {tokenizer.decode(walk(compiler, constraint, rng)) for _ in range(40)}
    if constraint.kind == "json_schema":  # it leaves white space open
        found = {json.dumps(json.loads(text)) for text in found}
    assert found == texts


def test_words_of_the_vocabulary_are_used_and_special_ones_only_by_name(
    tokenizer: Tokenizer, compiler: Compiler
) -> None:
    matcher = compiler.matcher(Constraint("regex", "(hello|<bos>|<own>)+"))
    ids = ids_of(matcher.allowed())
    assert HELLO in ids and BOS not in ids and ord("<") in ids
    assert OWN in ids, "a token with a text of its own is text"
    named = compiler.matcher(Constraint("grammar", f"start: <[{BOS}]> /a+/"))
    assert ids_of(named.allowed()) == [BOS]


def test_at_the_end_only_the_stop_tokens_are_left(compiler: Compiler) -> None:
    matcher = compiler.matcher(constraint_of({"choice": ["ab"]}))
    matcher.consume(b"ab")
    assert ids_of(matcher.allowed()) == [EOS] and not matcher.problem


def test_a_token_that_cannot_be_is_a_problem_and_no_exception(compiler: Compiler) -> None:
    matcher = compiler.matcher(constraint_of({"choice": ["ab"]}))
    matcher.consume([ord("x")])
    matcher.allowed()
    assert matcher.problem and "Tokens:" not in matcher.problem


def test_sentencepiece_texts_are_forced_without_a_space_of_its_own(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_gguf(tmp_path / "model.gguf", sentencepiece_metadata()))
    compiler = Compiler(tokenizer, tokenizer.vocab_size, [2])
    answer = walk(compiler, constraint_of({"choice": ["hello hello"]}), random.Random(0), 2)
    assert tokenizer.decode(answer, continues=True) == "hello hello"


def test_white_space_ends(tokenizer: Tokenizer, compiler: Compiler) -> None:
    """Unbounded, a model that likes spaces would never come to the next part."""
    rule = Constraint("grammar", f"start: {json_rule({'const': [1]})}")
    for constraint in (constraint_of({"json_schema": {"const": [1]}}), rule):
        matcher = compiler.matcher(constraint)
        matcher.consume(b"[")
        num_spaces = 0
        while ord(" ") in ids_of(matcher.allowed()):
            matcher.consume(b" ")
            num_spaces += 1
        assert 0 < num_spaces <= 40 and ids_of(matcher.allowed()) == [ord("1")]


def test_a_grammar_may_hold_schemas_that_refer_to_themselves(compiler: Compiler) -> None:
    schema = {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
    }
    matcher = compiler.matcher(Constraint("grammar", f'start: "<" {json_rule(schema)} ">"'))
    matcher.consume(b"<[[],[]]")
    assert ord(">") in ids_of(matcher.allowed()) and not matcher.problem


BAD: list[tuple[Any, str]] = [
    (None, "one of json_schema"),
    ({}, "one of json_schema"),
    ({"regex": "a", "choice": ["b"]}, "one of json_schema"),
    ({"xml": "a"}, "'xml' cannot be"),
    ({"json_object": False}, "'json_object' cannot be"),
    ({"json_schema": 5}, "'json_schema' cannot be 5"),
    ({"json_schema": {"a": {1}}}, "as in JSON"),
    ({"json_schema": "{"}, "json_schema cannot be used: EOF"),
    ({"json_schema": {"type": "objekt"}}, "objekt"),
    ({"json_schema": {"not": {}}}, "Unimplemented.*not"),
    ({"json_schema": {"$ref": "https://example.com/x"}}, "does not fetch"),
    ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "Unsatisfiable"),
    ({"regex": "("}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"grammar": "xx"}, "grammar cannot be used"),
    ({"grammar": "root ::= ("}, "no GBNF"),
    ({"grammar": "root ::= " + '"a" ' * 5000}, "16384 are taken"),
    ({"choice": []}, "list of 1 to"),
    ({"choice": ["a", 5]}, "list of 1 to"),
    ({"regex": "a" * (MAX_CONSTRAINT_BYTES + 1)}, "at most 65536"),
]


@pytest.mark.parametrize(("value", "words"), BAD, ids=lambda value: repr(value)[:40])
def test_what_cannot_be_is_said(value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check(constraint_of(value))
    assert str(caught.value).startswith("constraint") and len(str(caught.value)) < 500


EVIL = {
    "nested repetitions": Constraint("regex", "((a{1,100}){1,100}){1,100}"),
    "a long way back": Constraint("regex", ".*a.{3000}"),
    "many ways back": Constraint("regex", "(.*a){40}(.*b){40}.{500}"),
    "many names": constraint_of({"json_schema": {"enum": [f"value{i}" for i in range(4000)]}}),
    "deep": Constraint("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "wide": constraint_of({"json_schema": {"properties": {f"p{i}": {} for i in range(4000)}}}),
    "long": constraint_of({"json_schema": {"type": "string", "minLength": 10**7}}),
    "many items": constraint_of(
        {"json_schema": {"type": "array", "minItems": 10**6, "items": {"type": "string"}}}
    ),
    "crossed": constraint_of(
        {
            "json_schema": {
                "allOf": [
                    {"anyOf": [{"properties": {f"{a}{i}": {"type": "string"}}} for a in "abc"]}
                    for i in range(12)
                ]
            }
        }
    ),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_constraint_is_refused_or_followed_within_bounds(
    compiler: Compiler, name: str
) -> None:
    """The bound is on what is computed; the deadline of every test only ends what has none."""
    try:
        check(EVIL[name])
        matcher = compiler.matcher(EVIL[name])
    except InvalidRequest:
        return
    rng = random.Random(1)
    for _ in range(50):
        ids = ids_of(matcher.allowed())
        if matcher.problem or set(ids) <= {EOS}:
            return
        matcher.consume([rng.choice([token for token in ids if token != EOS])])


def test_the_same_again_is_not_compiled_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tokenizer, VOCAB, [EOS])
    made: list[Constraint] = []
    compile_it = Compiler._compile

    def counted(self: Compiler, constraint: Constraint) -> Any:
        made.append(constraint)
        return compile_it(self, constraint)

    monkeypatch.setattr(Compiler, "_compile", counted)
    monkeypatch.setattr("nodeserve.text.constraints.MAX_COMPILED", 2)
    one, two, three = (Constraint("regex", text) for text in "abc")
    for constraint in (one, two, one, one, three, one, two):
        matcher = compiler.matcher(constraint)
        matcher.consume(constraint.text.encode())
        assert ids_of(matcher.allowed()) == [EOS], "copies do not share their state"
    assert made == [one, two, three, two], "the one that was not used for longest goes"


def test_a_model_without_a_stop_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="no stop token"):
        Compiler(tokenizer, VOCAB, [])


def test_texts_are_quoted_as_the_notation_wants() -> None:
    assert choice_grammar(['a"b', "é\n"]) == 'start: "a\\"b" | "é\\n"'
