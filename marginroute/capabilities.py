"""What each gateway can see of a request and do with it: one table, which every adapter takes its abilities from.

What a gateway cannot do is never legal in a View (`telemetry.GatewayState`), so that no policy chooses it.
`marginroute capabilities` prints the table, and docs/gateways.md shows it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from marginroute import view as v
from marginroute.errors import InputError
from marginroute.view import Array, Layout

ABILITIES = ("shed", "cache", "defer", "hold", "hedge")
OF_KIND = {v.CACHE: "cache", v.DEFER: "defer", v.SHED: "shed"}  # what a candidate of this kind asks of a gateway


@dataclass(frozen=True)
class Capabilities:
    """One row.

    Attributes:
        prompt: what is seen of it: `text` or `length`; without the text there is no prefix match and no prediction.
        first_token: whether the gateway learns when an answer begins.
        tokens: whether it learns how many tokens there were.
        acts: whether it can carry anything out; one that only watches decides in shadow mode.
        can: beside sending a request on, any of `ABILITIES`: answer with status 429 (`shed`) or from a response cache
            (`cache`), keep batch work until it is released (`defer`), keep requests until a full replica has room
            (`hold`), send a call a second time while it has no first token (`hedge`).
        retries: whether a failed attempt is decided again.
        when_we_fail: what becomes of requests while our process is dead or slow.
    """

    prompt: str
    first_token: bool
    tokens: bool
    acts: bool
    can: tuple[str, ...]
    retries: bool
    when_we_fail: str


WAITING = ("shed", "defer", "hold")
GATEWAYS = {
    "litellm": Capabilities("text", True, True, True, ("shed", "cache"), True, "there is no process of ours"),
    "envoy-observe": Capabilities("text", True, True, False, (), False, "nothing"),
    "envoy-headers": Capabilities("length", False, False, True, WAITING, False, "Envoy goes on alone"),
    "envoy-buffered": Capabilities("text", False, False, True, WAITING, False, "Envoy goes on alone"),
    "envoy-full-duplex": Capabilities("text", True, True, True, WAITING, False, "requests fail until it is back"),
    "http": Capabilities("text", True, True, True, ABILITIES, True, "the caller goes on alone"),
}


def abilities(gateway: str, wanted: Collection[str]) -> frozenset[str]:
    """What an operator lets a gateway do.

    Raises:
        InputError: something that this gateway cannot do, or that is no ability.
    """
    legal = GATEWAYS[gateway].can
    for name in wanted:
        if name not in legal:
            raise InputError(f"can: {name!r} is nothing that {gateway} can do; legal: {', '.join(legal) or 'nothing'}")
    return frozenset(wanted)


def able(layout: Layout, can: Collection[str]) -> Array:
    """(C,) bool: candidates that a gateway with these abilities can carry out."""
    made: Array = np.array([OF_KIND.get(int(kind)) in (None, *can) for kind in layout.kind], dtype=np.bool_)
    return made


COLUMNS = ("gateway", "prompt", "first token", "tokens", "acts", *ABILITIES, "retries", "while we are dead or slow")


def rows() -> list[tuple[str, ...]]:
    """The table as words, in the order of `COLUMNS`."""

    def word(yes: bool) -> str:
        return "yes" if yes else "no"

    return [
        (
            name,
            row.prompt,
            *map(word, (row.first_token, row.tokens, row.acts)),
            *(word(ability in row.can) for ability in ABILITIES),
            word(row.retries),
            row.when_we_fail,
        )
        for name, row in GATEWAYS.items()
    ]


def markdown() -> str:
    """The table as docs/gateways.md has it."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
