"""What a second call is worth: a margin rule at a hedge timer.

A request has waited for t seconds at candidate 0 without a first token. Its TTFT from now on there is taken as

    max(what a new call would take there, t)

since of a call that is late nothing says better how long it takes than how long it has taken. TTFTs spread as the
rule's chances to miss a limit say (log-logistic with its `sharpness` a), so that of two calls the one at c answers
first with

    win = ttft_0 ** a / (ttft_0 ** a + ttft_c ** a).

With a second call at c, TTFT, E2E and patience are missed only where both calls miss them, a call fails only where both
fail, and TPOT and P(good) are those of who wins. Both prompts are paid, and the output of the winner. The capacity at c
is taken in full, that at 0 as far as it wins. To stay with candidate 0 is to wait; it is compared like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from marginroute import view as v
from marginroute.view import Array, View

_ONE = np.array(1.0)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two calls of one request, for every candidate that might get the second one.

    Attributes:
        there: (..., C) 1.0 for the candidate that has the request; no such one in views of other decisions.
        second: (..., C) bool, candidates that would get a second call.
        win: (..., C) chance that the call at the candidate answers first; 1 but for second calls.
    """

    there: Array
    second: Array
    win: Array

    def _first(self, x: Array) -> Array:
        """(..., 1) what `x` is for the candidate that has the request; 0 in other views."""
        first: Array = (x * self.there).sum(axis=-1, keepdims=True)
        return first

    def both(self, chance: Array) -> Array:
        """Chance that something happens to both calls."""
        return np.where(self.second, chance * self._first(chance), chance)

    def of_winner(self, x: Array) -> Array:
        """What is expected of whoever answers."""
        return np.where(self.second, self.win * x + (_ONE - self.win) * self._first(x), x)

    def of_loser(self, x: Array) -> Array:
        """What is expected of the call that is cancelled; 0 without a second call."""
        return np.where(self.second, (_ONE - self.win) * x + self.win * self._first(x), 0.0)

    def taken(self, x: Array) -> Array:
        """The second call in full, and the first one as far as it wins."""
        return np.where(self.second, x + (_ONE - self.win) * self._first(x), x)


def pair_of(view: View, ttft_s: Array, sharpness: Array | float) -> Pair | None:
    """The pairs of the views at a hedge timer, None if there is none; `ttft_s` (..., C) becomes that from now on."""
    waited_s = view.signals[v.UNDER_WAY_S]
    if not waited_s.any():
        return None
    np.maximum(ttft_s, waited_s, out=ttft_s)
    there = (waited_s > 0.0).astype(np.float64)
    second = there.any(axis=-1, keepdims=True) & (there == 0.0) & (view.layout.kind <= v.PROVIDER)
    first_s = (ttft_s * there).sum(axis=-1, keepdims=True)
    ratio = np.power(np.where(second, ttft_s, _ONE) / np.where(second, first_s, _ONE), sharpness)
    return Pair(there, second, np.where(second, _ONE / (_ONE + ratio), _ONE))
