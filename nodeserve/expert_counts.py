"""How often each expert of a model was chosen, as a file: a node counts, a later one places by it.

The file is JSON: `counts` has a list for each layer with a number of rows for each expert, zeros
where a layer has none; `model` says what was counted. It may come from anywhere, so all of it is
checked against the model that is to be served.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nodeserve.config import ModelConfig
from nodeserve.errors import ConfigError, ModelError
from nodeserve.model_files import open_regular
from nodeserve.types import shown

MAX_BYTES = 16 << 20  # a hundred layers of a thousand experts with ten digits each take one
MOST_ROWS = 1e15
Counts = tuple[tuple[float, ...], ...]  # rows: [num_layers][num_experts]


def facts_of(config: ModelConfig) -> dict[str, Any]:
    """What counts are about. Fine-tunings of one model have these in common."""
    moe = config.moe
    return {
        "architecture": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "num_experts": moe.num_experts if moe else 0,
        "num_active": moe.num_active if moe else 0,
    }


def write_counts(path: Path, facts: dict[str, Any], counts: Sequence[Sequence[float]]) -> None:
    """ConfigError where that cannot be written."""
    lists = ",\n".join(json.dumps(list(layer)) for layer in counts)
    text = f'{{"model": {json.dumps(facts)},\n"counts": [\n{lists}\n]}}\n'
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror}") from None


def read_counts(path: Path, config: ModelConfig) -> Counts:
    """The rows in a file, which must be about this model. ConfigError says what is wrong."""
    try:
        return _checked(_parsed(path), config)
    except (ModelError, ValueError) as problem:
        hint = "`nodeserve experts --out FILE` writes such files"
        raise ConfigError(f"--expert-counts {path}: {problem}; {hint}") from None


def _parsed(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it does not hold a JSON object")
    return value


def _checked(value: dict[str, Any], config: ModelConfig) -> Counts:
    facts, told = facts_of(config), value.get("model")
    if not isinstance(told, dict):
        raise ValueError("it does not say which `model` was counted")
    for name, ours in facts.items():
        if told.get(name) != ours:
            raise ValueError(
                f"it is about another model: {name} is {shown(told.get(name))} there and {ours!r}"
                " here"
            )
    layers = value.get("counts")
    num_layers, num_experts = facts["num_layers"], facts["num_experts"]
    if not isinstance(layers, list) or len(layers) != num_layers:
        raise ValueError(f"`counts` is not a list of {num_layers} layers")
    for number, layer in enumerate(layers):
        if not isinstance(layer, list) or len(layer) != num_experts:
            raise ValueError(f"layer {number} of `counts` is not a list of {num_experts} numbers")
        for expert, rows in enumerate(layer):
            if not _are_rows(rows):
                raise ValueError(
                    f"layer {number}, expert {expert}: {shown(rows)} is no number of rows, use 0"
                    f" to {MOST_ROWS:g}"
                )
    return tuple(tuple(map(float, layer)) for layer in layers)


def _are_rows(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= MOST_ROWS  # type: ignore[operator]
