"""Which candidates a View leaves to choose from: what the gateway can carry out now, and the class is entitled to."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.capabilities import able
from marginroute.rate_limits import RateBook
from marginroute.view import Array


class LegalMask:
    """Masks of one bundle at one gateway.

    Args:
        bundle: whose candidates and entitlements.
        can: what the gateway can do beside sending a request on (`capabilities.ABILITIES`).
        hold_s: seconds after which a deferred request is decided again.
        delay_tolerant: (K,) whether requests of a class may be held.
        rates: told who is left out, its rate limit being spent.
    """

    def __init__(
        self, bundle: Bundle, can: Collection[str], hold_s: float, delay_tolerant: Sequence[bool], rates: RateBook
    ) -> None:
        self._allowed, self._models = bundle.allowed, v.answering_tiers(bundle.layout, bundle.allowed)
        self._least_left_s, self._delay_tolerant, self._rates = 2.0 * hold_s, delay_tolerant, rates
        kind = bundle.layout.kind
        self._serving, self._able = int((kind <= v.PROVIDER).sum()), able(bundle.layout, can)
        carried_out = (kind <= v.PROVIDER) | self._able
        self._made: dict[tuple[int, bool, bool], Array] = {}  # by class, may be deferred, there is an answer
        self._some: dict[tuple[int, bool, bool], bool] = {}  # whether those leave any
        for k, defer, answer in itertools.product(range(len(self._allowed)), (False, True), (False, True)):
            may = carried_out & ((kind != v.CACHE) | answer) & ((kind != v.DEFER) | defer)
            self._made[k, defer, answer] = may & self._allowed[k]
            self._some[k, defer, answer] = bool((may & self._allowed[k]).any())

    def of(
        self,
        k: int,
        deadline_left_s: float,
        available: Collection[int] | None,
        stored_by: int | None,
        in_hand: bool,
        spent: Sequence[int],
    ) -> Array:
        """(C,) bool for a request of class k; shedding is the last resort even where there is no way to, unless
        providers whose limits are spent may refuse by themselves.

        Args:
            k: index of its class.
            deadline_left_s: seconds until its deadline.
            available: replicas and providers that may serve it now; None: all.
            stored_by: index of the tier that gave the stored answer; None: there is none.
            in_hand: whether an answer to the request is in hand, which is one that its class is entitled to.
            spent: providers that would refuse it.
        """
        answer = in_hand or (stored_by is not None and bool(self._models[k, stored_by]))
        defer, serving = self._delay_tolerant[k] and deadline_left_s > self._least_left_s, self._serving
        legal: Array = self._made[k, defer, answer].copy()
        if not in_hand and available is None and not spent:
            if not self._some[k, defer, answer]:
                legal[-1] = True
            return legal
        if in_hand:
            legal[serving] = self._able[serving]
        if available is not None:
            legal[:serving] = False
            here = [c for c in available if c < serving]
            legal[here] = self._allowed[k, here]
        if spent and (missed := [c for c in spent if legal.item(c)]):
            for c in missed:
                legal[c] = False
            if legal.item(-1) or legal.any():
                self._rates.note_left_out(missed)
            else:
                legal[missed] = True
        if not (legal.item(-1) or legal.any()):
            legal[-1] = True
        return legal
