"""`calibrate endpoint` against the emulator: the true profile comes back; what cannot be measured is refused."""

import http.server
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from envs.__main__ import main
from envs.endpoint_measure import _seconds_of_chunks, _seconds_per_token
from envs.fleet.iteration import batch_seconds
from envs.fleet.profile import compact_profile
from envs.fleet.replay import replay
from envs.fleet.spec import FleetSpec, PoolSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from served import FLEET, ROOT, served

SPEED = "2"


def _latencies(profile, gap_s):
    """Median TTFT and TPOT of a mixed load on one replica."""
    rng = np.random.default_rng(1)
    arrived_at_s = np.cumsum(rng.exponential(gap_s, 300))
    prompt, output = rng.integers(50, 900, 300), rng.integers(20, 120, 300)
    pool = PoolSpec("p", profile, kv_blocks=20000, max_num_seqs=16, max_num_batched_tokens=512)
    done = replay(FleetSpec((pool,)), arrived_at_s, prompt, output).requests[0]
    ttft_s = done["first_token_at_s"] - done["dispatched_at_s"]
    tpot_s = (done["completed_at_s"] - done["first_token_at_s"]) / (output - 1)
    return np.array([np.median(ttft_s), np.mean(ttft_s), np.median(tpot_s), np.mean(tpot_s)])


@pytest.mark.slow  # measures wall-clock token gaps: needs idle cores
def test_the_true_profile_comes_back(tmp_path, capsys):
    fleet, out = tmp_path / "fleet.yaml", tmp_path / "profile.yaml"
    fleet.write_text(FLEET.replace("kv_blocks: 2000", "kv_blocks: 20000"))
    with served(fleet, "--speed", SPEED) as (url, _):
        few = ["--max-requests", "60", "--max-context", "512"]
        assert main(["calibrate", "endpoint", f"{url}/pool-1", "--out", str(out), *few]) == 2
        assert "raise the limits" in capsys.readouterr().err
        flags = ["--speed", SPEED, "--max-concurrency", "16", "--max-context", "1024", "--repeats", "5"]
        assert main(["calibrate", "endpoint", f"{url}/pool-0/v1", "--out", str(out), *flags]) == 0
    assert "measurements, about" in capsys.readouterr().err
    data = yaml.safe_load(out.read_text())
    assert data["endpoint"]["max_num_batched_tokens"] == 512
    assert data["kv_cache"] == {"block_size_tokens": 16, "blocks": 20000}
    assert data["fit"]["median_error_pct"] < 3.0

    fitted = compact_profile("fitted", data)
    path = ROOT / "configs/fleets/profiles/llama-3.1-8b-h100.yaml"
    true = compact_profile("true", yaml.safe_load(path.read_text()))
    errors = []
    for n in (1, 2, 5, 8, 12, 16):
        for m in (100, 300, 600, 1000):
            for chunks in ([], [(20, 0)], [(100, 0)], [(250, 0)], [(450, 0)], [(400, 512)], [(150, 0), (200, 0)]):
                decodes = np.full(n, m)
                errors.append(batch_seconds(fitted, decodes, chunks) / batch_seconds(true, decodes, chunks) - 1.0)
    assert np.median(np.abs(errors)) < 0.02
    assert np.quantile(np.abs(errors), 0.95) < 0.05
    assert np.max(np.abs(errors)) < 0.08  # alone on a machine below 0.04
    for gap_s in (0.5, 0.15):
        assert _latencies(fitted, gap_s) == pytest.approx(_latencies(true, gap_s), rel=0.05)


def test_chunks_are_found_among_late_tokens():
    """Exact times plus one-sided delays, some of them long."""
    rng = np.random.default_rng(0)
    seconds = np.full(80, 0.006)
    at = list(range(10, 74, 7))
    seconds[[j - 1 for j in at]], seconds[at] = 0.040, 0.012
    exact = np.cumsum(seconds)
    late = exact + rng.exponential(0.0001, 80) + 0.004 * (rng.random(80) < 0.05)
    assert _seconds_of_chunks(late, at, 2) == pytest.approx([0.040, 0.012], rel=0.03)
    plain = 0.006 * np.arange(64) + rng.exponential(0.0002, 64)
    assert _seconds_per_token(plain) == pytest.approx(0.006, rel=0.005)


class _Other(http.server.BaseHTTPRequestHandler):
    """Lists a model; its answers are not streamed."""

    status = 200

    def _say(self, body):
        self.send_response(self.status if self.command == "POST" else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._say(b'{"data": [{"id": "m"}]}')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(b'{"choices": []}')

    def log_message(self, *words):
        pass


@pytest.fixture
def other():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _refused(url, out, capsys, *flags):
    assert main(["calibrate", "endpoint", url, "--out", str(out), *flags]) == 2
    assert not out.exists()
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_what_cannot_be_measured_is_refused(other, tmp_path, capsys, monkeypatch):
    out = tmp_path / "p.yaml"
    assert "not streamed" in _refused(other, out, capsys)
    monkeypatch.setattr(_Other, "status", 500)
    assert "HTTP status 500" in _refused(other, out, capsys)
    assert "cannot be reached" in _refused("http://127.0.0.1:9", out, capsys)
    assert "http://HOST:PORT" in _refused("ftp://x", out, capsys)
    assert "--speed" in _refused(other, out, capsys, "--speed", "0")
    assert "--api-key-env" in _refused(other, out, capsys, "--api-key-env", "NO_SUCH_VARIABLE_HERE")
