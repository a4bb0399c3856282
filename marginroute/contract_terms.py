"""The contracts of a bundle's classes, as a View shows them: prices, remedies, SLOs, and how a request stands."""

from __future__ import annotations

import math

import numpy as np

from marginroute import contracts
from marginroute import view as v
from marginroute.bundle import Bundle
from marginroute.errors import InputError
from marginroute.view import Array

STANDS = {name: i for i, name in enumerate(contracts.STANDINGS)}
CONTRACT = v.REQUEST_NAMES[v.INPUT_PRICE_USD : v.MISS_USD]  # request signals that the contract of a class fixes


class ContractTerms:
    """What every class has agreed, by its index.

    Attributes:
        terms: of each class, as in the bundle.
        delay_tolerant: whether its requests may be held.

    Raises:
        InputError: the bundle lacks a term.
    """

    def __init__(self, bundle: Bundle) -> None:
        names = bundle.layout.class_names
        self._signals = [_signals(bundle, name).tobytes() for name in names]
        self.terms = [bundle.terms[name] for name in names]
        self._most_tokens = [terms.get("context_tokens", math.inf) for terms in self.terms]
        self._committed = [terms.get("committed_usd", 0.0) > 0.0 for terms in self.terms]
        self.delay_tolerant = [terms.get("delay_tolerant", 0.0) > 0.0 for terms in self.terms]

    def request(self, k: int) -> bytearray:
        """Memory of the (Q,) request signals of a class within its allowance; what no contract fixes is 0."""
        return bytearray(self._signals[k])

    def show(self, k: int, request: Array, standing: str, quota_left: float) -> bool:
        """Writes what an answer brings as the request stands; True if its contract refuses it.

        Raises:
            InputError: the standing is none of `contracts.STANDINGS`.
        """
        if standing not in contracts.STANDINGS:
            raise InputError(f"standing {standing!r} is unknown; legal: {', '.join(contracts.STANDINGS)}")
        committed, stands = self._committed[k], STANDS[standing]
        if request.item(v.PROMPT_TOKENS) > self._most_tokens[k]:
            stands = contracts.REFUSED
        if stands == contracts.WITHIN and quota_left == 1.0 and not committed:
            return False  # as `request` has it
        request[v.STANDING], request[v.QUOTA_LEFT] = stands, quota_left
        if stands == contracts.REFUSED:
            return True
        if stands != contracts.WITHIN or committed:
            terms = self.terms[k]
            contracts.show_standing(
                request,
                stands,
                float(committed and quota_left > 0.0),
                terms.get("beyond_factor", 1.0),
                terms.get("overage_usd", 0.0),
                terms.get("bad_lifetime_usd", 0.0),
                terms.get("unserved_lifetime_usd", 0.0),
            )
        return False


def _signals(bundle: Bundle, class_name: str) -> Array:
    terms = bundle.terms.get(class_name, {})
    missing = [name for name in CONTRACT if name not in terms]
    if missing:
        raise InputError(f"the bundle has no {missing[0]} for class {class_name!r}; export the policy again")
    request = np.array([terms[name] if name in CONTRACT else 0.0 for name in v.REQUEST_NAMES])
    request[v.BAD_ANSWER_USD] += terms.get("bad_lifetime_usd", 0.0)
    request[v.UNSERVED_CREDIT_USD] += terms.get("unserved_lifetime_usd", 0.0)
    request[v.MISS_USD] = terms.get("missed_lifetime_usd", 0.0)
    request[v.STANDING], request[v.QUOTA_LEFT] = contracts.WITHIN, 1.0
    return request
