"""Downloads against a server on this machine: whole and checked, or absent and one sentence."""

import hashlib
import http.server
import os
import re
import threading

import pytest

import envs.fetch_catalog
from envs.__main__ import main
from envs.fetch import fetch
from envs.fetch_catalog import CATALOG, Download
from envs.workload.traces import FORMATS
from marginroute.errors import InputError

CONTENT = b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"2023-11-16 18:15:46.6805900,374,44\n" * 9999


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/none.csv":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: len(CONTENT) // 2] if self.path == "/cut.csv" else CONTENT)

    def log_message(self, *arguments):
        """Quiet."""


@pytest.fixture(scope="module")
def home():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def failure(download, folder):
    with pytest.raises(InputError) as caught:
        fetch(download, folder)
    text = str(caught.value)
    assert "\n" not in text and "legal is" in text
    assert not folder.is_dir() or all(not name.startswith(".") for name in os.listdir(folder))
    return text


def test_a_whole_file_comes_with_its_digest(home, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    seen = []
    download = Download(f"{home}/a.csv", "none", "azure-llm", digest, len(CONTENT))
    path, sha256 = fetch(download, tmp_path / "new", lambda done, total: seen.append((done, total)))
    assert path.name == "a.csv" and path.read_bytes() == CONTENT and sha256 == digest
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert path.stat().st_mode & 0o444 == 0o444


def test_what_is_wrong_leaves_the_old_file(home, tmp_path):
    old = tmp_path / "a.csv"
    old.write_text("old")
    assert "as published" in failure(Download(f"{home}/a.csv", "", "", "0" * 64), tmp_path)
    assert old.read_text() == "old"
    assert "answers 404" in failure(Download(f"{home}/none.csv", "", ""), tmp_path)
    failure(Download(f"{home}/cut.csv", "", ""), tmp_path)
    assert os.listdir(tmp_path) == ["a.csv"]


def test_no_connection_is_one_sentence(tmp_path):
    assert "cannot be reached" in failure(Download("http://127.0.0.1:9/a.csv", "", ""), tmp_path)
    taken = tmp_path / "file"
    taken.write_text("")
    assert "cannot be written" in failure(Download("http://127.0.0.1:9/a.csv", "", ""), taken)


def test_the_command(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(envs.fetch_catalog.CATALOG, "here", Download(f"{home}/a.csv", "none", "azure-llm"))
    assert main(["fetch", "here", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "unverified" in out and hashlib.sha256(CONTENT).hexdigest() in out and "--trace-format azure-llm" in out
    assert main(["fetch", "--list"]) == 0
    assert "azure-2024-code" in capsys.readouterr().out
    assert main(["fetch", "nothing", "--out", str(tmp_path)]) == 2
    assert "legal is azure-2023-code" in capsys.readouterr().err


def test_the_catalog_is_well_formed():
    for name, download in CATALOG.items():
        assert download.url.startswith("https://") and download.trace_format in FORMATS, name
        assert download.sha256 == "" or re.fullmatch("[0-9a-f]{64}", download.sha256)
