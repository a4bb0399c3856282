"""What the bodies of OpenAI-style calls say: text of a prompt, its question, and the usage that an answer reports.

Works for chat completions, completions, responses and Anthropic's messages alike: whatever text is found counts.
Nothing here keeps a text; a body that is no JSON says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from marginroute.latency import running_mean
from marginroute.prefix_index import MAX_BLOCKS, block_hashes

PATHS = ("/chat/completions", "/completions", "/responses", "/messages", "/generate", "/infer")  # ends of paths
PROMPT_KEYS = ("messages", "prompt", "input", "instructions", "system", "text")
TOKENS_PER_CHARACTER = 0.25  # English prose; corrected by the usage that upstreams report
RECENT_PROMPTS = 200.0
MAX_DEPTH = 12  # of lists and objects inside a message that are searched for text

_USAGE = {
    "prompt": re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,9})\b'),
    "output": re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,9})\b'),
}


def is_generation(path: str) -> bool:
    """Whether a call to this path asks a model for text."""
    return path.partition("?")[0].rstrip("/").endswith(PATHS)


def texts(value: Any, depth: int = MAX_DEPTH) -> Iterator[str]:
    """Every text in messages or prompts, in order."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, Mapping):
        yield from texts(value.get("content") or value.get("text"), depth - 1)
    elif depth and isinstance(value, list | tuple):
        for item in value:
            yield from texts(item, depth - 1)


def question(value: Any, depth: int = MAX_DEPTH) -> str | None:
    """What the user asked last: text of the last message from `user`, or the last text where there are no roles."""
    if depth and isinstance(value, list | tuple):
        asked = [item for item in value if isinstance(item, Mapping) and item.get("role") == "user"]
        if asked:
            return "\n".join(texts(asked[-1])) or None
        for item in reversed(value):
            if found := question(item, depth - 1):
                return found
        return None
    return "\n".join(texts(value)) or None


@dataclass(frozen=True)
class Call:
    """What a request body says.

    Attributes:
        characters: of its texts.
        data: its texts as UTF-8 bytes, tools first as engines put them.
        question: what was asked last; None if nothing was.
        model: that it names.
        streamed: whether it asks for a stream.
        metadata: that the client sent along, as far as it is words.
    """

    characters: int
    data: bytes
    question: str | None
    model: str
    streamed: bool
    metadata: Mapping[str, str]


def read_call(body: bytes) -> tuple[Call, dict[str, Any]] | None:
    """A request body and its JSON object; None if it is none (or was cut off)."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict):
        return None
    prompt = [call.get(key) for key in PROMPT_KEYS]
    found = list(texts(prompt))
    tools = [json.dumps(call["tools"], sort_keys=True)] if call.get("tools") else []
    metadata = call.get("metadata")
    words = {k: x for k, x in metadata.items() if isinstance(x, str)} if isinstance(metadata, dict) else {}
    return Call(
        characters=sum(len(text) for text in found),
        data=b"\0".join(text.encode("utf-8", "replace") for text in (*tools, *found)),
        question=question(prompt),
        model=str(call.get("model") or ""),
        streamed=call.get("stream") is True,
        metadata=words,
    ), call


def dumps(call: Mapping[str, Any]) -> bytes:
    """A request body."""
    return json.dumps(call, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def usage(tail: bytes) -> tuple[int | None, int | None]:
    """Prompt and output tokens that the end of an answer reports, the last of each; None where it does not."""
    found = [pattern.findall(tail) for pattern in _USAGE.values()]
    prompt, output = (int(numbers[-1]) if numbers else None for numbers in found)
    return prompt, output


class TokenRatio:
    """Tokens per character of text (or byte of body): a running mean over the prompts whose usage was reported.

    Args:
        start: before any was.
    """

    def __init__(self, start: float = TOKENS_PER_CHARACTER) -> None:
        self.value, self._weight = start, 1.0

    def tokens(self, length: int) -> int:
        """Estimated tokens, at least 1."""
        return max(round(length * self.value), 1)

    def learn(self, length: int, tokens: int) -> None:
        """A prompt of this length had so many tokens."""
        if length > 0 and tokens > 0:
            self.value, self._weight = running_mean(self.value, self._weight, tokens / length, RECENT_PROMPTS)


def hashed(data: bytes, block_bytes: int, tokens: int) -> tuple[list[int], float]:
    """Block hashes of a prompt of about so many tokens, and tokens per block."""
    hashes = block_hashes(data[: MAX_BLOCKS * block_bytes], block_bytes)
    return hashes, block_bytes * tokens / max(len(data), 1)
