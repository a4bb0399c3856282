"""Plain heads: what is read in one go means the same to a whole HTTP parser, and what is not plain is left to it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("httptools", reason="pip install 'marginroute[http]'")
import httptools

from marginroute.adapters.http_head import MOST_BYTES, Head, read, split


class Parsed:
    """What httptools makes of a request."""

    def __init__(self, data):
        self.url, self.headers, self.body, self.complete = b"", [], b"", False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url):
        self.url += url

    def on_header(self, name, value):
        self.headers.append((name.lower(), value))

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        self.complete = True


NAMES = ["host", "content-length", "Content-Length", "connection", "transfer-encoding", "expect", "upgrade", "te"]
NAMES += ["authorization", "x-a", "x_b", "", "x y", "content-length "]
VALUES = ["x", "3", "003", "+3", "3, 3", " 3 ", "", "keep-alive", "close", "chunked", "Bearer abc", "\t3", "3\x00", "é"]
line = st.tuples(st.sampled_from(NAMES), st.sampled_from([":", ": ", ":\t", " : "]), st.sampled_from(VALUES)).map(
    "".join
)
start = st.tuples(
    st.sampled_from(["GET", "POST", "get", "PUT", "HEAD"]),
    st.sampled_from(["/v1/decide", "/", "/a?b=1", "//a", "/%41", "*", "/a b", "http://x/y"]),
    st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "http/1.1"]),
).map(" ".join)
plain_line = st.sampled_from(
    ["host: x", "content-length: 3", "x-a: b", "authorization: Bearer abc", "Connection: Keep-Alive"]
)
heads = st.one_of(
    st.tuples(start, st.lists(line, max_size=4), st.sampled_from(["\r\n", "\r\n", "\n", "\r\n "])),
    st.tuples(
        st.sampled_from(["POST /v1/decide HTTP/1.1", "GET /health HTTP/1.1"]),
        st.lists(plain_line, max_size=4),
        st.just("\r\n"),
    ),
).map(lambda parts: (parts[2].join([parts[0], *parts[1]]) + "\r\n\r\n").encode("latin-1"))


@settings(max_examples=2000, deadline=None)
@given(heads)
def test_a_plain_head_means_the_same_to_a_parser(head):
    found = read(head)
    if found is None:
        return
    parsed = Parsed(head + b"y" * found.length)
    assert parsed.complete and parsed.body == b"y" * found.length
    assert (parsed.parser.get_method(), parsed.url.decode()) == (found.method, found.path)
    assert parsed.parser.get_http_version() == "1.1" and parsed.parser.should_keep_alive()
    assert not parsed.parser.should_upgrade() and b"expect" not in dict(parsed.headers)
    assert dict(parsed.headers).get(b"authorization", b"").strip() == found.authorization


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (b"content-length: 3\r\n", Head(b"POST", "/v1/decide", 3, b"")),
        (b"Host: x\r\nContent-Length:3\r\nAuthorization: Bearer t \r\n", Head(b"POST", "/v1/decide", 3, b"Bearer t")),
        (b"content-length: 3\r\nConnection: keep-alive\r\n", Head(b"POST", "/v1/decide", 3, b"")),
        (b"content-length: 3\r\ncontent-length: 3\r\n", None),
        (b"content-length: 3\r\ntransfer-encoding: chunked\r\n", None),
        (b"content-length: 3\r\nconnection: close\r\n", None),
        (b"content-length: 3\r\nexpect: 100-continue\r\n", None),
        (b"content-length: -3\r\n", None),
        (b"content-length: 3\r\nx: a\r\n b\r\n", None),
        (b"", None),
    ],
)
def test_what_is_plain(fields, found):
    assert read(b"POST /v1/decide HTTP/1.1\r\n" + fields + b"\r\n") == found


def test_a_head_is_split_from_what_follows_once_it_is_complete_and_if_it_is_short():
    head = b"POST /v1/decide HTTP/1.1\r\ncontent-length: 3\r\n\r\n"
    assert split(head + b"abcGET") == (Head(b"POST", "/v1/decide", 3, b""), b"abcGET")
    assert split(head[:-1]) is None
    assert split(head[:-2] + b"x: " + b"y" * MOST_BYTES + b"\r\n\r\n") is None
