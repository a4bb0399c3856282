"""Units stand in names: what a description or a signal table calls seconds, tokens or USD is named so."""

import re

import pytest

from agents.schema import schemas
from marginroute import view

UNITS = {  # how a description begins, and what the name must then hold
    r"(mean |smallest |longest |median )?seconds\b(?!.* over those of)": r"_s$",
    r"(mean |median )?(prompt |output )?tokens\b(?! per)": r"tokens",
    r"usd per hour\b": r"usd_per_h",
    r"usd per (million|mtok)": r"usd_per_mtok",
    r"usd\b": r"usd",
    r"(mean )?(arrivals|requests) per second\b": r"_per_s$",
}


def fields():
    """(name, description) of every key of a configuration file and of every signal."""
    for kind, schema in schemas().items():
        for part in (schema, *schema.get("$defs", {}).values()):
            for key, field in part.get("properties", {}).items():
                yield f"{kind}: {part.get('title')}.{key}", field.get("description", "")
    for table in (view.SIGNALS, view.REQUEST):
        yield from ((f"view: {name}", words) for name, words in table)


def without_unit(rows):
    """Names that lack the unit of their description."""
    for name, words in rows:
        for begins, wanted in UNITS.items():
            if re.match(begins, words, re.I):
                if not re.search(wanted, name):
                    yield name, words
                break


def test_names_hold_the_unit_of_their_description():
    assert list(without_unit(fields())) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("x.timeout", "Seconds until it is over."), ("x.price", "USD per million tokens."), ("x.length", "Tokens.")],
)
def test_the_check_finds_names_without_units(name, words):
    assert list(without_unit([(name, words)])) == [(name, words)]
