"""What others have at the same candidates: workers that share their counters, and whatever only the engines tell of.

Workers of one gateway may tell each other exactly (`shared`). Anything else, instances that share nothing or traffic
that does not come through a gateway, shows on an engine's metrics page: what that says beyond the known requests counts
as others' until the next page (`latency.beyond`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from marginroute import view as v
from marginroute.latency import RECENT_LENGTHS, beyond, running_mean
from marginroute.view import Array

FRESH_S = 0.1  # age to which a metrics page is set beside what this gateway has in flight now


class Elsewhere:
    """Others' requests at C candidates; not thread-safe (see `telemetry.GatewayState`).

    Attributes:
        at_engines: (C,) requests of other workers that their engines have.
        arrivals_per_s: at other workers.
    """

    def __init__(self, candidates: int) -> None:
        self.at_engines, self.arrivals_per_s = np.zeros(candidates), 0.0
        self._rows: Array | None = None  # (S, C) counters of other workers
        self._beyond = np.zeros((3, candidates))
        self._crowded = False  # whether there is anything beyond
        self._prefill_tokens = (0.0, 0.0)  # mean of a request, requests

    def told(self, rows: Mapping[int, Array], at_engines: Array, arrivals_per_s: float) -> None:
        """What other workers of this gateway have: rows of signals, (C,) each; those at the engines; their arrivals."""
        made = None
        if rows:
            made = np.zeros((len(v.SIGNALS), len(at_engines)))
            for row, values in rows.items():
                made[row] = values
        self._rows, self.at_engines, self.arrivals_per_s = made, at_engines, arrivals_per_s

    def scraped(self, signals: Array, c: int, held: float) -> None:
        """An engine has just told its load; `signals` (S, C) are this gateway's own, of which `held` wait here."""
        mine = signals[:, c]
        known = mine if self._rows is None else mine + self._rows[:, c]
        self._beyond[:, c] = beyond(
            mine[v.WAITING],
            mine[v.RUNNING],
            mine[v.KV_USAGE] * mine[v.KV_CAPACITY_TOKENS],
            mine[v.IN_FLIGHT] - held + self.at_engines[c],
            known[v.DECODING],
            known[v.DECODING_TOKENS],
        )
        self._crowded = bool(self._beyond.any())

    def sent(self, prefill_tokens: float) -> None:
        """This gateway has sent a request with so many tokens to prefill: others' are taken to be like its own."""
        self._prefill_tokens = running_mean(*self._prefill_tokens, prefill_tokens, RECENT_LENGTHS)

    def add_to(self, signals: Array) -> None:
        """Adds it all to own counters, (S, C)."""
        if self._rows is not None:
            signals += self._rows
        if self._crowded:
            waiting, decoding, tokens = self._beyond
            signals[v.IN_FLIGHT] += waiting + decoding
            signals[v.PENDING_PREFILL_TOKENS] += waiting * self._prefill_tokens[0]
            signals[v.DECODING] += decoding
            signals[v.DECODING_TOKENS] += tokens

    def take_over(self, old: Elsewhere, candidates: Mapping[int, int]) -> None:
        """Goes on where the state of an earlier bundle ends; `candidates` leads from its indices to these."""
        for theirs, c in candidates.items():
            self._beyond[:, c] = old._beyond[:, theirs]
        self._crowded, self._prefill_tokens = bool(self._beyond.any()), old._prefill_tokens
