"""Hedging at a gateway: a request without a first token gets a second call, and the first token says who answers.

The caller keeps the time. It asks (`Gateway.hedge`), sends the request to who is named beside the one that has it,
tells which of the two had the first token, and cancels the other. Both calls are in the counters while they run; each
leaves them once, whatever the caller tells or forgets.
"""

from __future__ import annotations

from marginroute import view as v
from marginroute.decision import Decision
from marginroute.runtime import Runtime
from marginroute.settling import Pending
from marginroute.telemetry import GatewayState
from marginroute.view import View

CANCELLED = "cancelled"  # end of a call that says nothing of its candidate


def second_key(id: str) -> str:
    """Under which the counters have the second call of a request."""
    return f"\0second\0{id}"


def key_of(pending: Pending) -> str:
    """Under which they have the call that answers, or the first one."""
    return second_key(pending.facts.id) if pending.second_answers else pending.facts.id


def narrow(view: View, candidate: int, free: bool) -> None:
    """Leaves in a view at a hedge timer who may get a second call: nobody if it is not `free`, nor who is full."""
    others = view.signals[v.IN_FLIGHT] < view.signals[v.IN_FLIGHT_CAP]
    view.legal &= others & free
    view.legal[candidate] = True


def send(runtime: Runtime, pending: Pending, decision: Decision) -> None:
    """The request goes to who was decided on, too."""
    pending.second, pending.calls = decision.name, (pending.sent_to, decision.name)
    runtime.begin(second_key(pending.facts.id), decision.candidate, pending.facts)


def answered_by(state: GatewayState, pending: Pending, candidate: str) -> bool:
    """One of two calls has its first token: the other one ends. True if that was the second one's."""
    if not pending.second or candidate not in (pending.sent_to, pending.second):
        return False
    won = candidate == pending.second
    state.end(pending.facts.id if won else second_key(pending.facts.id), CANCELLED)
    if won:
        pending.sent_to, pending.second_answers = candidate, True
        state.moved(pending.facts.session, candidate)
    pending.second = ""
    return won


def failed(state: GatewayState, pending: Pending, candidate: str) -> bool:
    """A call has failed (empty: all of them); False if the request has another one, which goes on."""
    first, second = pending.sent_to, pending.second
    if second and candidate == second:
        state.end(second_key(pending.facts.id), "failed")
        pending.second = ""
        return False
    if second and candidate == first:
        state.end(pending.facts.id, "failed")
        pending.sent_to, pending.second, pending.second_answers = second, "", True
        return False
    if second:
        state.end(second_key(pending.facts.id), "failed")
    state.end(key_of(pending), "failed")
    pending.second = ""
    return True


def over(state: GatewayState, pending: Pending) -> None:
    """The request is sent somewhere else, or has ended: no second call is left."""
    if pending.second or pending.second_answers:
        state.end(second_key(pending.facts.id), CANCELLED)
        pending.second, pending.second_answers = "", False
