"""Where the last call of each session went: what *session-affinity* goes by, bounded in size and age."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

MOST_SESSIONS = 100_000
FORGOTTEN_S = 24 * 3600.0  # beyond any time to live that a rule may have


class SessionMap:
    """Session -> candidate and time of its last call; the one that was used least recently goes first."""

    def __init__(self, most: int = MOST_SESSIONS) -> None:
        self._most = most
        self._last: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def note(self, session: str, candidate: int, now_s: float) -> None:
        """A call of a session is sent to a candidate; nothing for a call without session."""
        if not session:
            return
        self._last[session] = candidate, now_s
        self._last.move_to_end(session)
        while len(self._last) > self._most or next(iter(self._last.values()))[1] < now_s - FORGOTTEN_S:
            self._last.popitem(last=False)

    def find(self, session: str) -> tuple[int, float] | None:
        """Candidate and time of the session's last call, if it is remembered."""
        return self._last.get(session)

    def take_over(self, old: SessionMap, candidates: Mapping[int, int]) -> None:
        """Goes on where an earlier map ends; the mapping leads from its candidates to these."""
        for session, (candidate, at_s) in old._last.items():
            if candidate in candidates:
                self.note(session, candidates[candidate], at_s)
