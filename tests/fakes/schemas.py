"""Random JSON schemas whose every answer is short: no text, list or number in them is unbounded."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
WORDS = ("red", "Grün", 'a "b"', "x/y\\z", "", "日本", "tab\there", "🙂")


def random_schema(rng: random.Random) -> Schema:
    """An object, or sometimes something else, with definitions that it may refer to."""
    schema = _object(rng, 2) if rng.random() < 0.8 else _any(rng, 2)
    return {**schema, "$defs": {"small": _leaf(rng)}}


def _any(rng: random.Random, depth: int) -> Schema:
    if depth == 0 or rng.random() < 0.5:
        return {"$ref": "#/$defs/small"} if rng.random() < 0.15 else _leaf(rng)
    makers: list[Callable[[random.Random, int], Schema]] = [_object, _array, _either]
    return rng.choice(makers)(rng, depth - 1)


def _leaf(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 2000)},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 2},
            {"type": "string", "maxLength": rng.randint(0, 8)},
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "string", "pattern": "^[A-Z][a-z]{1,4}$"},
            {"type": "string", "format": "date"},
            {"type": ["string", "null"], "maxLength": 4},
            {"enum": rng.sample(WORDS, 3)},
            {"enum": [1, "1", None, [2], {"k": False}]},
            {"const": rng.choice([0, "fixed", {"a": [1, 2]}])},
        ]
    )


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["name", "a b", "größe", "n1", "list", "$x"], rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    most = least + rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": most}


def _either(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth), _any(rng, depth)]}
