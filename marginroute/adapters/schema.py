"""A small part of JSON Schema: what the sidecar's OpenAPI document promises is what it checks, from one definition."""

from __future__ import annotations

import json
from typing import Any

from marginroute.errors import InputError

Schema = dict[str, Any]
MAX_SAFE = 2**53  # integers beyond it are not the same in every language


def string(most: int, about: str, least: int = 0) -> Schema:
    """Text of at most so many characters."""
    return {"type": "string", "minLength": least, "maxLength": most, "description": about}


def number(low: float, high: float, about: str) -> Schema:
    """A finite number."""
    return {"type": "number", "minimum": low, "maximum": high, "description": about}


def integer(low: int, high: int, about: str) -> Schema:
    """A whole number."""
    return {"type": "integer", "minimum": low, "maximum": high, "description": about}


def boolean(about: str) -> Schema:
    """True or false."""
    return {"type": "boolean", "description": about}


def one_of(words: tuple[str, ...], about: str) -> Schema:
    """One of a few words."""
    return {"type": "string", "enum": list(words), "description": about}


def array(items: Schema, most: int, about: str) -> Schema:
    """A list of at most so many items."""
    return {"type": "array", "items": items, "maxItems": most, "description": about}


def fields(properties: dict[str, Schema], required: tuple[str, ...] = (), closed: bool = True) -> Schema:
    """An object with these members; with no others if it is closed."""
    made: Schema = {"type": "object", "properties": properties, "additionalProperties": not closed}
    return {**made, "required": list(required)} if required else made


def either(by: str, schemas: list[Schema]) -> Schema:
    """One of several objects, told apart by the one word that member `by` of each may be."""
    return {"oneOf": schemas, "discriminator": {"propertyName": by}}


_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def check(value: Any, schema: Schema, place: str = "body") -> None:
    """Raises InputError at the first place where a value is not what a schema says."""
    if "oneOf" in schema:
        schema = _chosen(value, schema, place)
    kind: str = schema["type"]
    fits = isinstance(value, _KINDS[kind])
    if not fits or (isinstance(value, bool) and kind != "boolean"):
        raise InputError(f"{place} is of the wrong type; legal is {kind}")
    if kind == "string":
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", MAX_SAFE):
            low, high = schema.get("minLength", 0), schema["maxLength"]
            raise InputError(f"{place} has {len(value)} characters; legal is {low} to {high}")
        if "enum" in schema and value not in schema["enum"]:
            raise InputError(f"{place} = {value[:60]!r} is unknown; legal: {', '.join(schema['enum'])}")
    elif kind in ("number", "integer"):
        if not schema["minimum"] <= value <= schema["maximum"]:
            raise InputError(f"{place} is out of range; legal is {schema['minimum']} to {schema['maximum']}")
    elif kind == "array":
        if len(value) > schema["maxItems"]:
            raise InputError(f"{place} has {len(value)} items; legal is up to {schema['maxItems']}")
        for i, item in enumerate(value):
            check(item, schema["items"], f"{place}[{i}]")
    elif kind == "object":
        _check_object(value, schema, place)


def _chosen(value: Any, schema: Schema, place: str) -> Schema:
    by = schema["discriminator"]["propertyName"]
    word = value.get(by) if isinstance(value, dict) else None
    words = [one["properties"][by]["enum"][0] for one in schema["oneOf"]]
    if not isinstance(word, str) or word not in words:
        raise InputError(f"{place}.{by} is missing or unknown; legal: {', '.join(words)}")
    chosen: Schema = schema["oneOf"][words.index(word)]
    return chosen


def _check_object(value: dict[str, Any], schema: Schema, place: str) -> None:
    properties = schema["properties"]
    for name in schema.get("required", ()):
        if name not in value:
            raise InputError(f"{place}.{name} is missing")
    for name, member in value.items():
        if name in properties:
            check(member, properties[name], f"{place}.{name}")
        elif not schema["additionalProperties"]:
            raise InputError(f"{place}.{name[:60]} is unknown; legal: {', '.join(properties)}")


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # json.loads would make one for every call
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def parse(data: bytes) -> Any:
    """Strict JSON.

    Raises:
        InputError: it is none, or nested too deeply.
    """
    try:
        return _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass"))
    except (ValueError, RecursionError):
        raise InputError("the body is no JSON") from None


def dumps(value: Any) -> bytes:
    """JSON without spaces."""
    return _ENCODER.encode(value).encode()
