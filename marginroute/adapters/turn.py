"""How a coroutine waits for the turn of a request that its gateway holds back."""

from __future__ import annotations

import asyncio
from functools import partial

from marginroute.gateway import Gateway


def turn_of(gateway: Gateway, id: str) -> asyncio.Future[None] | None:
    """What is done once it is the turn of request `id`, in whichever thread that shows; None: it need not wait."""
    loop = asyncio.get_running_loop()
    turn: asyncio.Future[None] = loop.create_future()
    return turn if gateway.on_line(id, partial(loop.call_soon_threadsafe, _resolve, turn)) else None


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
