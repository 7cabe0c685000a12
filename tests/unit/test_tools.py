"""How prompts tell of functions, and how an answer that must call one is written."""

import json
import random
from typing import Any

import jsonschema
import pytest

from nodeserve.text import Detokenizer, Tokenizer
from nodeserve.text.constraints import Compiler, quoted
from nodeserve.text.tool_parser import STYLES, Arguments, Call
from nodeserve.text.tools import MAX_CALLS, Style, Tool, calls_rules, style_of, with_tools
from nodeserve.types import Constraint
from tests.unit.test_constraints import BOS, EOS, compiler, ids_of, tokenizer

__all__ = ["compiler", "tokenizer"]  # fixtures
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"enum": ["Oslo", 'a"b']}},
}


def tool(name: str, **more: Any) -> Tool:
    return Tool(name, {"type": "function", "function": {"name": name}}, **more)


SPACES = frozenset(b" \t\r\n")
TOOLS = (tool("weather", parameters=CITY), tool("now"))
STYLES_AS_WRITTEN = [
    Style("hermes"),
    Style("llama3_json"),
    Style("mistral"),
    Style("mistral", bare=True),
    Style("deepseek"),
    Style("deepseek", fenced=True),
]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("style", STYLES_AS_WRITTEN, ids=str)
def test_what_the_grammar_allows_the_parser_reads(
    tokenizer: Tokenizer, compiler: Compiler, style: Style, parallel: bool
) -> None:
    """Random answers of each style: nothing but calls, of these functions, with their arguments."""
    grammar = f"start: calls\n{calls_rules(style, TOOLS, parallel, quoted)}"
    rng, counts = random.Random(3), set()
    for _ in range(6):
        answer = written(tokenizer, compiler, grammar, rng)
        events = style.parser(TOOLS).push(answer)
        counts.add(len(events) // 2)
        for call, arguments in zip(events[::2], events[1::2], strict=True):
            assert isinstance(call, Call) and isinstance(arguments, Arguments)
            found = next(one for one in TOOLS if one.name == call.name)
            jsonschema.validate(json.loads(arguments.text), dict(found.parameters))
    several = parallel and style.name != "llama3_json"
    assert (max(counts) > 1) == several and max(counts) <= MAX_CALLS


def written(tokenizer: Tokenizer, compiler: Compiler, grammar: str, rng: random.Random) -> str:
    matcher, answer = compiler.matcher(Constraint("grammar", grammar)), list[int]()
    while True:
        ids = ids_of(matcher.allowed())
        others = [one for one in ids if one != EOS]
        if EOS in ids and (not others or rng.random() < 0.4):
            break
        solid = [one for one in others if one not in SPACES]  # more of it would take long
        answer.append(rng.choice(others if rng.random() < 0.2 else solid or others))
        matcher.consume(answer[-1:])
        assert not matcher.problem
    return tokenizer.decode(answer)


def test_markers_that_are_special_tokens_are_named_as_such() -> None:
    rules = calls_rules(Style("mistral"), TOOLS, False, lambda text: "<[9]>")
    assert rules.startswith('calls: <[9]> "[" one "]"')


def test_markers_that_are_special_tokens_stay_in_the_text(tokenizer: Tokenizer) -> None:
    ids = [BOS, *b"a", EOS]
    assert Detokenizer(tokenizer).push(ids) == "a"
    assert Detokenizer(tokenizer, show=frozenset({"<bos>", "<none>"})).push(ids) == "<bos>a"
    assert tokenizer.special_id("<bos>") == BOS and tokenizer.special_id("a") is None


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ tools }} <tool_call>", Style("hermes")),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", Style("mistral")),
        ("tools [TOOL_CALLS] [ARGS]", Style("mistral", bare=True)),
        ("tools <|python_tag|>", Style("llama3_json")),
        ("tools Environment: ipython", Style("llama3_json")),
        ("tools <｜tool▁call▁begin｜>", Style("deepseek")),
        ("tools <｜tool▁call▁begin｜>```json", Style("deepseek", fenced=True)),
        ("{{ messages }}", Style("hermes", knows_tools=False)),
    ],
)
def test_the_template_shows_the_style(template: str, style: Style) -> None:
    assert style_of(template) == style


def test_a_name_overrules_the_template() -> None:
    assert style_of("tools <tool_call>", "mistral").name == "mistral"
    assert all(style_of("", name).parser(TOOLS).names == {"weather", "now"} for name in STYLES)


def call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}


TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": None, "tool_calls": [call('{"zone": 1}'), call("")]},
    {"role": "tool", "tool_call_id": "1", "content": "noon"},
]


def test_a_template_that_knows_tools_gets_them_and_arguments_as_objects() -> None:
    messages, variables = with_tools(Style("hermes"), TALK, TOOLS)
    assert variables == {"tools": [dict(one.described) for one in TOOLS]}
    arguments = [one["function"]["arguments"] for one in messages[2]["tool_calls"]]
    assert arguments == [{"zone": 1}, {}] and messages[:2] == TALK[:2]
    assert with_tools(Style("hermes"), TALK, ())[1] == {}, (
        "a template may ask whether there are any"
    )


def test_arguments_that_were_cut_off_stay_as_they_are() -> None:
    cut = [{"role": "assistant", "content": None, "tool_calls": [call('{"zo')]}]
    assert with_tools(Style("hermes"), cut, TOOLS)[0] == cut


def test_a_template_that_does_not_know_tools_gets_words() -> None:
    messages, variables = with_tools(Style("hermes", knows_tools=False), TALK, TOOLS)
    assert variables == {}
    system, user, assistant, result = messages
    assert system["content"].startswith("Be brief.\n\n") and user == TALK[1]
    for one in TOOLS:
        assert json.dumps(dict(one.described)) in system["content"]
    assert (assistant["role"], result["role"]) == ("assistant", "user")
    events = Style("hermes").parser(TOOLS).push(assistant["content"])
    assert events == [Call("now"), Arguments('{"zone": 1}'), Call("now"), Arguments("{}")]
    assert "noon" in result["content"]
    alone, _ = with_tools(Style("hermes", knows_tools=False), TALK[1:2], TOOLS)
    assert [one["role"] for one in alone] == ["system", "user"]
