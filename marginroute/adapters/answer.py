"""What passes by of an answer, piece by piece: when its first token came, how many tokens, what usage it reports."""

from __future__ import annotations

from marginroute.adapters import chat

TAIL_BYTES = 8192  # of an answer, in which its usage is looked for
_EVENT = b"data:"


class Answer:
    """Watches the body of one response; keeps its last 8 KiB and nothing else.

    Attributes:
        streamed: whether it is a stream of server-sent events.
        first_s: own clock's time of the first piece; None before.
        events: server-sent events so far: about one per token.
    """

    def __init__(self) -> None:
        self.streamed, self.events = False, 0
        self.first_s: float | None = None
        self._tail = b""

    def saw(self, piece: bytes, now_s: float) -> bool:
        """A piece of the body; True for the first one that holds something."""
        if not piece:
            return False
        first = self.first_s is None
        if first:
            self.first_s = now_s
        if self.streamed:
            seam = self._tail[-len(_EVENT) + 1 :] if self._tail else b""
            self.events += (seam + piece).count(_EVENT)
        self._tail = (self._tail + piece)[-TAIL_BYTES:]
        return first

    def usage(self) -> tuple[int | None, int | None]:
        """Prompt and output tokens; those of a stream that reports none are its events, less the closing one."""
        prompt_tokens, output_tokens = chat.usage(self._tail)
        if output_tokens is None and self.streamed:
            output_tokens = max(self.events - (b"[DONE]" in self._tail), 0)
        return prompt_tokens, output_tokens
