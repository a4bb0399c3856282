"""What the headers of a provider's response say of its rate limits."""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Mapping

LEFT = {
    "requests_left": ("x-ratelimit-remaining-requests", "anthropic-ratelimit-requests-remaining"),
    "tokens_left": ("x-ratelimit-remaining-tokens", "anthropic-ratelimit-tokens-remaining"),
}
"""Headers of OpenAI (and of those who copy it), and of Anthropic."""
REFUSED, OVERLOADED = 429, (503, 529)


def told_by(status: int, headers: Mapping[str, object]) -> dict[str, float]:
    """Arguments of `Gateway.rate_limit_told` that a response with these headers (names in lower case) stands for."""
    found = {}
    for name, known in LEFT.items():
        left = next((x for header in known if (x := _number(headers.get(header))) is not None), None)
        if left is not None:
            found[name] = left
    after_s = _retry_after_s(headers)
    if status == REFUSED or (status in OVERLOADED and after_s is not None):
        found["retry_after_s"] = after_s or 0.0
    return found


def _retry_after_s(headers: Mapping[str, object]) -> float | None:
    """Seconds, whether they are given as such, in milliseconds, or as a date."""
    milliseconds, after = _number(headers.get("retry-after-ms")), headers.get("retry-after")
    if milliseconds is not None:
        return 1e-3 * milliseconds
    if (seconds := _number(after)) is not None or after is None:
        return seconds
    try:
        return max(email.utils.parsedate_to_datetime(str(after)).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _number(value: object) -> float | None:
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if 0.0 <= number < math.inf else None
