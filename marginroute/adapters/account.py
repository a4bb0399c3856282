"""How a request stands with its customer's account, as whoever keeps the accounts tells the gateway."""

from __future__ import annotations

import math

from marginroute.contracts import STANDINGS

WITHIN = STANDINGS[0]


def account_of(standing: object, quota_left: object) -> tuple[str, float, str]:
    """What was told of an account, as `Facts.standing` and `Facts.quota_left`.

    Args:
        standing: one of `STANDINGS`; None or empty: not told.
        quota_left: number or text from 0 to 1, share of the allowance that is left; None or empty: not told.

    Returns:
        Standing, share, and a sentence on what was not legal and is left out; empty if all was.
    """
    stands, left, complaint = str(standing or WITHIN), _number(quota_left), ""
    if stands not in STANDINGS:
        complaint = f"standing {stands[:60]!r} is taken as {WITHIN!r}; legal: {', '.join(STANDINGS)}"
        stands = WITHIN
    if not 0.0 <= left <= 1.0:
        complaint = f"quota_left {str(quota_left)[:60]!r} is taken as 1; legal is a number from 0 to 1"
        left = 1.0
    return stands, left, complaint


def share_left(spend_usd: object, budget_usd: object) -> float | None:
    """Share of a budget that has not been spent; None without a budget."""
    spent, budget = _number(spend_usd, 0.0), _number(budget_usd, math.nan)
    if not (budget > 0.0 and math.isfinite(budget) and math.isfinite(spent)):
        return None
    return min(max(1.0 - spent / budget, 0.0), 1.0)


def _number(value: object, missing: float = 1.0) -> float:
    """A number, or a text that is one; nan for anything else."""
    if value is None or value == "":
        return missing
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
