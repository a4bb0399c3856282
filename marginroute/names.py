"""Candidates, classes, tiers and tasks go by name between gateways and bundles: where a bundle has them."""

from __future__ import annotations

from collections.abc import Sequence

from marginroute.errors import InputError


def index_of(name: str | None, known: tuple[str, ...], what: str) -> int:
    """Index of a name among those of a bundle; None: the first.

    Raises:
        InputError: the bundle does not know it; `what` says in words what it should be.
    """
    if name is None:
        return 0
    if name not in known:
        raise InputError(f"{what} {name!r} is not in the bundle; legal: {', '.join(known)}")
    return known.index(name)


def indices(known: Sequence[str]) -> dict[str | None, int]:
    """Name -> index, as `index_of`."""
    return {None: 0, **{name: i for i, name in enumerate(known)}}


def places(new: Sequence[str], old: Sequence[str]) -> dict[int, int]:
    """Old index -> new index of the names that both have."""
    return {i: new.index(name) for i, name in enumerate(old) if name in new}
