"""The sidecar as a process: sockets, limits, many callers at once, TLS, and what remains when it is killed."""

import asyncio
import http.client
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time

import pytest
from envoy_process import REPOSITORY, Process, free_port, until

pytest.importorskip("uvicorn", reason="pip install 'marginroute[http]'")
pytest.importorskip("prometheus_client", reason="pip install 'marginroute[http]'")

sys.path.insert(0, str(REPOSITORY / "examples" / "http"))
from client import Sidecar

TOKEN = "0123456789abcdef"


class Server(Process):
    """`marginroute serve`, on a Unix socket unless words say otherwise."""

    def __init__(self, bundle, folder, *words, **settings) -> None:
        folder.mkdir(exist_ok=True)
        self.uds, self.log, config = str(folder / "s.sock"), folder / "records.jsonl", folder / "settings.yaml"
        config.write_text(json.dumps({"mode": "live", **settings}))
        where = words or ("--uds", self.uds)
        command = ["-m", "marginroute", "serve", str(bundle), "--log", str(self.log), "--config", str(config), *where]
        super().__init__([sys.executable, *command], folder / "output.txt")

    def wait(self):
        until(lambda: "sidecar on" in self.output.read_text() or not self.alive(), what="the sidecar")
        assert self.alive(), self.output.read_text()
        return self

    def connect(self, timeout=5.0):
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(timeout)
        made.connect(self.uds)
        return made


@pytest.fixture(scope="module")
def server(bundle_folder, tmp_path_factory):
    made = Server(bundle_folder, tmp_path_factory.mktemp("sidecar"), request_timeout_s=1.0, max_body_bytes=10_000)
    yield made.wait()
    assert made.stop() == 0
    assert "Traceback" not in made.output.read_text()
    assert not os.path.exists(made.uds)


def post(path, body, more=b""):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n".encode()
    return head + more + b"\r\n" + data


def read(connection):
    """(status, body) of the next response; (0, b"") if there is no whole one."""
    data, whole = b"", None
    while whole is None or len(data) < whole:
        piece = connection.recv(65536)
        if not piece:
            return 0, b""
        data += piece
        head, blank, _ = data.partition(b"\r\n\r\n")
        if blank and whole is None:
            lines = head.lower().split(b"\r\n")
            length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
            whole = len(head) + len(blank) + length
    return int(data.split()[1]), data[len(head) + len(blank) :]


def decides(server):
    """Whether the server decides a fresh request."""
    with server.connect() as connection:
        connection.sendall(post("/v1/decide", {}))
        return read(connection)[0] == 200


def test_only_owner_and_group_may_use_the_socket(server):
    assert stat.S_IMODE(os.stat(server.uds).st_mode) == 0o660


def test_one_connection_serves_many_requests_and_pipelines(server):
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(post("/v1/decide", {}))
            assert read(connection)[0] == 200


def test_plain_and_other_requests_take_turns_on_a_connection(server):
    """Whole or in pieces, one after the other or several at once: each gets its answer, in order."""
    plain, chunks = post("/v1/decide", {"id": "plain"}), b'{"id": "chunks"}'
    chunked = b"POST /v1/decide HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunks), chunks)
    unknown, health = b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    expected = {plain: (200, b'"plain"'), chunked: (200, b'"chunks"'), unknown: (404, b"path"), health: (200, b"alive")}
    with server.connect() as connection:
        for order in ((plain, chunked, unknown, health), (chunked, plain), (health, plain, plain), (unknown, plain)):
            whole = b"".join(order)
            for size in (len(whole), 7, len(plain) - 3):
                data = b""
                for at in range(0, len(whole), size):
                    connection.sendall(whole[at : at + size])
                    time.sleep(0.002)
                for request in order:
                    while b"}" not in data:
                        piece = connection.recv(65536)
                        assert piece, data
                        data += piece
                    answer, _, data = data.partition(b"}")
                    status, said = expected[request]
                    assert int(answer.split()[1]) == status and said in answer
                assert data == b""


def test_half_open_connections_are_closed(server):
    """Callers that open and say nothing, or stop in the middle of head or body, do not keep a connection for ever."""
    beginnings = (b"", b"POST /v1/dec", post("/v1/decide", b"{" + b" " * 200)[:-100])
    connections = [server.connect() for _ in beginnings]
    for connection, beginning in zip(connections, beginnings, strict=True):
        connection.sendall(beginning)
    assert decides(server)
    for connection in connections:
        assert read(connection)[0] in (0, 400)
        connection.close()


def test_a_caller_that_trickles_is_cut_off(server):
    with server.connect() as connection, pytest.raises(OSError):
        connection.sendall(b"POST /v1/decide HTTP/1.1\r\n")
        for _ in range(100):
            connection.sendall(b"x: y\r\n")
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/v1/decide", b"x" * 20_000), 413),
        (
            b"POST /v1/decide HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"3000\r\n" + b"x" * 0x3000,
            413,
        ),
        (post("/v1/decide", {}, b"x: " + b"y" * 40_000 + b"\r\n"), 0),
        (b"POST /" + b"z" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 0),
        (post("/v1/decide", {}, b"content-length: 5\r\n"), 400),
        (post("/v1/decide", {}, b"transfer-encoding: chunked\r\n"), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
    ],
    ids=["length", "chunks", "header", "path", "two lengths", "length and chunks", "TLS", "version"],
)
def test_what_is_too_large_or_no_http_is_refused(server, request_, status):
    with server.connect() as connection:
        connection.sendall(request_)
        try:
            got = read(connection)[0]
        except ConnectionError:
            got = 0
        assert got in {status, 0} if status == 400 else got == status
    assert decides(server)


@pytest.mark.parametrize("many", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_at_once(bundle_folder, tmp_path, many):
    """So many connections, each with a request under way at the same moment: all get an answer, each its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < many + 1000:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = Server(bundle_folder, tmp_path / "many", request_timeout_s=60.0).wait()

    async def one(i, turn, opened, go):
        request = post("/v1/decide", {"id": f"many{i}"})
        async with turn:
            reader, writer = await asyncio.open_unix_connection(server.uds)
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")  # taken in, and not only waiting to be
            await reader.readuntil(b"}")
        writer.write(request[:-3])
        opened.append(i)
        if len(opened) == many:
            go.set()
        await go.wait()
        writer.write(request[-3:])
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()
        return head.split()[1] == b"200" and json.loads(body)["id"] == f"many{i}"

    async def run():
        turn, go, opened = asyncio.Semaphore(500), asyncio.Event(), []
        return await asyncio.wait_for(asyncio.gather(*(one(i, turn, opened, go) for i in range(many))), 100.0)

    try:
        assert all(asyncio.run(run()))
        assert decides(server)
    finally:
        assert server.stop() == 0
    assert len(server.log.read_text().splitlines()) == many + 1  # all are written when it ends


def test_killed_and_back(bundle_folder, tmp_path):
    """A gateway that asks the sidecar goes on by itself while it is dead or hangs, and uses it again afterwards."""
    folder = tmp_path / "killed"
    server = Server(bundle_folder, folder).wait()
    sidecar = Sidecar(server.uds, timeout_s=0.2, rest_s=0.2)
    served, ended = [], threading.Event()

    def gateway():
        while not ended.is_set():
            decision = sidecar.decide(prompt="hello")
            served.append("the sidecar's choice" if decision else "its own choice")
            if decision:
                sidecar.tell({"event": "finished", "id": decision["id"], "status": "completed"})
            time.sleep(0.01)

    threads = [threading.Thread(target=gateway) for _ in range(4)]
    for thread in threads:
        thread.start()

    def seen(what, seconds=15.0):
        start = len(served)
        until(lambda: len(served) - start >= 20 and set(served[-20:]) == {what}, seconds, what)

    try:
        seen("the sidecar's choice")
        server.process.send_signal(signal.SIGSTOP)
        seen("its own choice")
        server.process.send_signal(signal.SIGCONT)
        seen("the sidecar's choice")
        server.stop(signal.SIGKILL)
        seen("its own choice")
        server = Server(bundle_folder, folder).wait()  # the socket of the dead one is in its way
        seen("the sidecar's choice")
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        server.stop()


def test_two_cannot_share_a_socket(server, bundle_folder, tmp_path):
    second = Server(bundle_folder, tmp_path / "second", "--uds", server.uds)
    assert second.process.wait(20.0) == 2
    assert "listens on" in second.output.read_text() and decides(server)


def test_tls_and_token(bundle_folder, tmp_path, certificate):
    key, cert = map(str, certificate)
    (tmp_path / "token").write_text(TOKEN + "\n")
    port = free_port()
    words = ("--host", "0.0.0.0", "--port", str(port), "--tls-cert", cert, "--tls-key", key)
    server = Server(bundle_folder, tmp_path / "tls", *words, token_file=str(tmp_path / "token")).wait()
    try:
        for told, expected in (({}, 401), ({"authorization": f"Bearer {TOKEN}"}, 200)):
            context = ssl.create_default_context(cafile=cert)
            connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=10.0)
            connection.request("POST", "/v1/decide", b"{}", told)
            assert connection.getresponse().status == expected
            connection.close()
        plain = http.client.HTTPConnection("localhost", port, timeout=10.0)
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.request("GET", "/health")
            plain.getresponse()
        assert TOKEN not in server.output.read_text()
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", "0.0.0.0"), "can be reached from other machines: give --tls-cert"),
        (("--host", "192.0.2.1", "--tls-cert", "CERT", "--tls-key", "KEY"), "name a token_file"),
        (("--tls-cert", "CERT"), "needs both"),
        (("--tls-cert", "nowhere.pem", "--tls-key", "KEY"), "nowhere.pem is missing"),
        (("--port", "70000"), "legal is 0 to 65535"),
        (("--uds", "x" * 200), "too long"),
        (("--uds", "FILE"), "is no socket"),
        (("--token-file", "FILE"), "holds no token"),
    ],
)
def test_what_is_not_safe_or_not_possible_is_refused(bundle_folder, tmp_path, certificate, capsys, words, said):
    from marginroute.__main__ import main

    (tmp_path / "file").write_text("short")
    names = {"CERT": str(certificate[1]), "KEY": str(certificate[0]), "FILE": str(tmp_path / "file")}
    arguments = ["serve", str(bundle_folder), "--log", str(tmp_path / "log.jsonl"), *(names.get(w, w) for w in words)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mode: alive", "'alive'; legal: shadow"),
        ("mood: good", "unknown key 'mood'"),
        ("max_body_bytes: lots", "max_body_bytes = 'lots' is of the wrong kind"),
        ("can: [fly]", "'fly' is nothing that http can do"),
        ("- a list", "must map settings to values"),
        ("a: [", "not YAML"),
        ("rollback: {error_rate: 7}", "legal is 0 to 1"),
        ("endpoints: {small/0: 5}", "endpoints = "),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(bundle_folder, tmp_path, capsys, text, said):
    from marginroute.__main__ import main

    config = tmp_path / "settings.yaml"
    config.write_text(text)
    words = ["serve", str(bundle_folder), "--log", str(tmp_path / "log.jsonl"), "--config", str(config)]
    assert main([*words, "--uds", str(tmp_path / "s.sock")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_example_client(server):
    words = [sys.executable, str(REPOSITORY / "examples/http/client.py"), server.uds, "How are you?"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30.0)
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "replica"
    done = subprocess.run([*words[:2], "nowhere.sock", "How?"], capture_output=True, text=True, timeout=30.0)
    assert done.returncode == 1 and "route as without it" in done.stdout


def test_a_sidecar_that_hangs_is_asked_once(tmp_path):
    with socket.socket(socket.AF_UNIX) as hangs:
        hangs.bind(str(tmp_path / "s.sock"))
        hangs.listen()
        hangs.settimeout(0.2)
        client = Sidecar(str(tmp_path / "s.sock"), timeout_s=0.05, rest_s=60.0)
        assert client.decide(prompt_tokens=5) is None and client.decide(prompt_tokens=5) is None
        hangs.accept()[0].close()
        with pytest.raises(TimeoutError):
            hangs.accept()


SCHEMATHESIS = os.environ.get("MARGINROUTE_SCHEMATHESIS") or shutil.which("schemathesis") or ""


@pytest.mark.skipif(not SCHEMATHESIS, reason="set MARGINROUTE_SCHEMATHESIS to its command (pip install schemathesis)")
def test_it_keeps_its_own_document_under_fuzzing(bundle_folder, tmp_path):
    """Schemathesis makes requests of /openapi.json, legal and not, and looks for answers that break it."""
    port = free_port()
    (tmp_path / "token").write_text(TOKEN)
    words = ("--port", str(port), "--token-file", str(tmp_path / "token"))
    server = Server(bundle_folder, tmp_path / "fuzz", *words).wait()
    try:
        url, shown = f"http://127.0.0.1:{port}/openapi.json", f"Authorization: Bearer {TOKEN}"
        words = [SCHEMATHESIS, "run", url, "-H", shown, "--seed", "1", "--max-examples", "20", "--no-color"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600.0, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-5000:]
    finally:
        server.stop()
    assert "failed" not in server.output.read_text()
