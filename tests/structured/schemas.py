"""Random JSON schemas as clients write them, some with keywords that no grammar can hold an answer to."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("name", "age", "items", "kind", "a b", 'quo"te', "größe", "x")
_UNSUPPORTED = ({"uniqueItems": True}, {"not": {"type": "null"}}, {"propertyNames": {"maxLength": 3}}, {"if": {"type": "string"}})


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of a few levels."""
    if depth == 3 and rng.random() < 0.1:  # a tree of itself
        tree = {"type": "object", "properties": {"value": random_schema(rng, 0), "next": {"$ref": "#/$defs/tree"}}}
        return {"$defs": {"tree": tree | {"required": ["value"], "additionalProperties": False}}, "$ref": "#/$defs/tree"}
    kinds = [_text, _integer, _number, _words, _fixed] + [_object, _array, _either] * (2 if depth else 0)
    schema = rng.choice([_object, _array] if depth == 3 else kinds)(rng, depth)
    if rng.random() < 0.02:
        schema |= rng.choice(_UNSUPPORTED)
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.8:
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema = {"type": "array", "items": random_schema(rng, depth - 1), "minItems": least}
    return schema | ({"maxItems": least + rng.randint(0, 3)} if rng.random() < 0.8 else {})


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _text(rng: random.Random, depth: int) -> dict[str, Any]:
    more: list[dict[str, Any]] = [
        {},
        {"maxLength": rng.randint(0, 20)},
        {"minLength": 2, "maxLength": 9},
        {"pattern": rng.choice(["^[a-f]{2,5}$", "^(red|green)-[0-9]+$", "x", r"^[0-9]{3}-[0-9]{4}$"])},
        {"format": rng.choice(["date", "time", "date-time", "uuid", "ipv4"])},
        {"format": "email", "maxLength": 40},  # longer ones are no addresses to a validator, which a schema does not say
    ]
    return {"type": "string"} | rng.choice(more)


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer"} | rng.choice([{}, {"minimum": low}, {"minimum": low, "maximum": low + rng.randint(0, 500)}])


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number"} | rng.choice([{}, {"minimum": 0}, {"exclusiveMinimum": 0, "maximum": 2.5}])


def _words(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "green", 3, 4.5, None, True, "ünï", ""], rng.randint(1, 4))}


def _fixed(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [{"type": "boolean"}, {"type": "null"}, {"const": "fixed"}, {"const": 7}, {"type": ["string", "null"], "maxLength": 5}]
    )
