"""The head of a plain HTTP request, read in one go.

Plain is what nearly every caller sends: GET or POST, a path without query or escapes, one Content-Length, and no header
that says more of how the request is framed. Such a head means here what it means to a whole parser (a test holds the
two to each other); any other is left to that parser, which refuses it or not.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

MOST_BYTES = 2048  # of a plain head
END = b"\r\n\r\n"

_HEAD = re.compile(rb"(GET|POST) (/[\w/.-]*) HTTP/1\.1\r\n((?:[\w-]+:[ -~]*\r\n)*)\r\n", re.ASCII)
_FRAMING = re.compile(
    rb"^(connection|content-length|expect|keep-alive|proxy-connection|te|trailer|transfer-encoding|upgrade"
    rb"|authorization):[ ]*(.*?)[ ]*\r$",
    re.ASCII | re.IGNORECASE | re.MULTILINE,
)
_LENGTH = re.compile(rb"[0-9]{1,9}")


class Head(NamedTuple):
    """What a plain head says.

    Attributes:
        method: `GET` or `POST`.
        path: as it stands there.
        length: bytes of the body.
        authorization: value of that header; empty without one.
    """

    method: bytes
    path: str
    length: int
    authorization: bytes


def split(data: bytes) -> tuple[Head, bytes] | None:
    """Head and what is there of the body, and of whatever follows; None if the head is not plain, or not complete."""
    end = data.find(END, 0, MOST_BYTES)
    if end < 0:
        return None
    end += len(END)
    head = read(data[:end])
    return None if head is None else (head, data[end:])


@lru_cache(maxsize=256)  # a caller's heads are the same, but for the length
def read(head: bytes) -> Head | None:
    """A complete head, with the empty line that ends it; None if it is not plain."""
    found = _HEAD.fullmatch(head)
    if found is None:
        return None
    method, path, fields = found.groups()
    told: dict[bytes, bytes] = {}
    for name, value in _FRAMING.findall(fields):
        if name.lower() in told:
            return None
        told[name.lower()] = value
    lasting = told.pop(b"connection", b"keep-alive").lower() == b"keep-alive"
    length, authorization = told.pop(b"content-length", None), told.pop(b"authorization", b"")
    if told or not lasting or (length is None) != (method == b"GET"):
        return None
    if length is not None and not _LENGTH.fullmatch(length):
        return None
    return Head(method, path.decode("ascii"), int(length or 0), authorization)
