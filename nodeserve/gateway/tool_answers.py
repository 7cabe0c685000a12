"""What a request's tools ask of its answer: the grammar of one that must call, or may."""

import json
from dataclasses import replace

from nodeserve.gateway.asked import Asked
from nodeserve.gateway.problems import BadField
from nodeserve.text import Tokenizer
from nodeserve.text.constraints import json_rule, quoted
from nodeserve.text.tools import Style, calls_rules
from nodeserve.types import Constraint


def constrained(asked: Asked, style: Style, tokenizer: Tokenizer) -> Asked:
    """With the constraint that its tools, and its own constraint beside them, come to."""
    tooling, own = asked.tooling, asked.sampling.get("constraint")
    assert tooling is not None
    if own is None and not tooling.must:
        return asked

    def mark(text: str) -> str:
        token_id = tokenizer.special_id(text)
        return quoted(text) if token_id is None else f"<[{token_id}]>"

    rules = calls_rules(style, tooling.allowed, tooling.parallel, mark)
    if own is None:
        return _with(asked, f"start: calls\n{rules}", "tools")
    name = asked.constraint_field
    if tooling.must:
        raise BadField(name, "cannot be given where tool_choice asks for a call")
    if own.kind != "json_schema":
        raise BadField(name, "cannot be given beside tools: only a JSON schema can")
    try:
        schema = json.loads(own.text)
    except (ValueError, RecursionError) as problem:
        raise BadField(name, f"is no JSON: {problem}") from None
    return _with(asked, f"start: calls | answer\nanswer: {json_rule(schema)}\n{rules}", name)


def _with(asked: Asked, grammar: str, name: str) -> Asked:
    sampling = {**asked.sampling, "constraint": Constraint("grammar", grammar)}
    return replace(asked, sampling=sampling, constraint_field=name)
