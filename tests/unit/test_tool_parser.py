"""Calls in the text of answers, in every way of writing them and cut anywhere."""

import random

import pytest

from nodeserve.text.tool_parser import (
    MAX_SPACE,
    STYLES,
    Arguments,
    Call,
    Content,
    Event,
    ToolParser,
)

NAMES = frozenset({"f", "g"})
DEEP = '{"a": "x}\\"<\\\\", "b": [1, {"c": null}], "é": "</tool_call>"}'
F: list[Event] = [Call("f"), Arguments('{"a": 1}')]
G: list[Event] = [Call("g"), Arguments("{}")]
C1, C2, E1, E2, SEP = (
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁calls▁end｜>", "<｜tool▁sep｜>"),
)
CASES: dict[str, list[tuple[str, list[Event]]]] = {
    "hermes": [
        (
            f'Look.\n<tool_call>\n{{"name": "f", "arguments": {DEEP}}}\n</tool_call>\n'
            '<tool_call>{"arguments": {"x": 1}, "name": "g"}</tool_call>\n',
            [Content("Look."), Call("f"), Arguments(DEEP), Call("g"), Arguments('{"x": 1}')],
        ),
        ('<tool_call>{"name": "g"}</tool_call>', G),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}} so', [*F, Content(" so")]),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', F),
        (
            '<tool_call>{"id": 5, "name": "f", "arguments": {"a": 1}, "more": [{}]}</tool_call>',
            F,
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', [Call("f"), Arguments('{"a": 1')]),
        ('<tool_call>{"name": "f", "argum', [Call("f")]),
        ('<tool_call>{"na', [Content('<tool_call>{"na')]),
        ("a <tool_call> no </tool_call> b", [Content("a <tool_call> no b")]),
        ('<tool_call>{"answer": 5}', [Content('<tool_call>{"answer": 5}')]),
        ("1 < 2 <tool", [Content("1 < 2 <tool")]),
        ("  text \n", [Content("  text \n")]),
        ("", []),
    ],
    "llama3_json": [
        ('{"name": "f", "parameters": {"a": 1}}', F),
        ('\n{"type": "function", "name": "f", "parameters": {"a": 1}}', F),
        (
            '<|python_tag|>{"name": "f", "arguments": {"a": 1}}; {"name": "g", "parameters": {}}',
            [*F, *G],
        ),
        ('{"answer": {"name": "f"}}', [Content('{"answer": {"name": "f"}}')]),
        ('{"name": "Bob", "age": 5}', [Content('{"name": "Bob", "age": 5}')]),
        ('Use {"name": "f"}', [Content('Use {"name": "f"}')]),
        ("<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
    ],
    "mistral": [
        (
            'Yes. [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, '
            '{"name": "g", "arguments": {}}]',
            [Content("Yes."), *F, *G],
        ),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x1[ARGS]{}', [*F, *G]),
        ('[TOOL_CALLS]f{"a": 1}', F),
        (
            '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, 5]',
            [*F, Content(", 5]")],
        ),
        ("[TOOL_CALLS] [5]", [Content("[TOOL_CALLS] [5]")]),
        ("an [TOOL", [Content("an [TOOL")]),
    ],
    "deepseek": [
        (
            f'ok{C1}{C2}function{SEP}f\n```json\n{{"a": 1}}\n```{E1}\n'
            f"{C2}function{SEP}g\n```json\n{{}}\n```{E1}{E2}",
            [Content("ok"), *F, *G],
        ),
        (f'{C1}{C2}f{SEP}{{"a": 1}}{E1}{C2}g{SEP}{{}}{E1}{E2}', [*F, *G]),
        (f'{C1}{C2}f{SEP}{{"a": "{E1}"}}{E1}{E2}', [Call("f"), Arguments(f'{{"a": "{E1}"}}')]),
        (f"{C1}{C2}f", [Content(f"{C2}f")]),
    ],
}
ALL = [(style, text, events) for style, cases in CASES.items() for text, events in cases]


def read(style: str, parts: list[str]) -> list[Event]:
    """All events, neighbours of a kind joined."""
    parser = ToolParser(STYLES[style], NAMES)
    events = [event for part in parts for event in parser.push(part)] + parser.finish()
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content | Arguments) and isinstance(last, type(event)):
            joined[-1] = type(event)(last.text + event.text)
        else:
            joined.append(event)
    assert parser.num_calls == sum(isinstance(event, Call) for event in joined)
    return joined


def test_every_style_has_cases() -> None:
    assert set(CASES) == set(STYLES)


@pytest.mark.parametrize(("style", "text", "events"), ALL, ids=lambda value: str(value)[:30])
def test_an_answer_says_the_same_wherever_it_is_cut(
    style: str, text: str, events: list[Event]
) -> None:
    assert read(style, [text]) == events
    for cut in range(len(text) + 1):
        assert read(style, [text[:cut], text[cut:]]) == events
    assert read(style, list(text)) == events


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(10))
def test_any_text_is_read_to_its_end_and_alike_in_parts(style: str, seed: int) -> None:
    """Pieces of all styles in any order: nothing raises, and cuts still do not matter."""
    rng = random.Random(seed)
    whole = [text for _, text, _ in ALL]
    words = [*whole, "{", "}", '"', "[", "]", "\\", ",", ":", " ", "name", C2, SEP, E1, "[ARGS]"]
    for _ in range(20):
        pieces = (rng.choice(words) for _ in range(rng.randint(1, 6)))
        text = "".join(piece[: rng.randint(1, len(piece))] for piece in pieces if piece)
        parts, rest = [], text
        while rest:
            size = rng.randint(1, 9)
            parts.append(rest[:size])
            rest = rest[size:]
        assert read(style, parts) == read(style, [text])


@pytest.mark.parametrize("style", STYLES)
def test_only_so_much_white_space_is_held_back(style: str) -> None:
    """Each character that is held costs as many more: a model that wrote nothing else, which a
    `logit_bias` can make it do, kept the gateway's loop for seconds."""
    parser = ToolParser(STYLES[style], NAMES)
    (content,) = parser.push(" " * 3 * MAX_SPACE)
    assert content == Content(" " * 2 * MAX_SPACE)
    assert parser.push("x") + parser.finish() == [Content(" " * MAX_SPACE + "x")]


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolParser(STYLES["hermes"], NAMES)
    assert parser.push('<tool_call>{"name": "f",') == [Call("f")]
    assert parser.push(' "arguments": {"a"') == [Arguments('{"a"')]
    assert parser.push(": 1}") == [Arguments(": 1}")]
    assert parser.push("}") == [] and parser.finish() == []
