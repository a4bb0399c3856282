"""Progress on stderr: a bar on terminals, a few lines elsewhere, nothing on stdout."""

import os
import pty
import subprocess
import sys

from evaluation import progress


def test_pipes_get_few_lines_and_a_last_one(capsys, monkeypatch):
    now_s = iter(range(0, 1000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now_s)))
    with progress.progress_bar("held-out episodes") as report:
        for done in range(11):
            report(done, 10)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert 2 <= len(lines) <= 5
    assert "s left" in lines[0]
    assert lines[-1].startswith("held-out episodes: 10/10 in ")


def test_a_terminal_gets_a_bar_with_the_time_left():
    code = (
        "from evaluation.progress import progress_bar\n"
        "with progress_bar('held-out') as report:\n"
        "    report(1, 4); report(4, 4)\n"
    )
    controller, terminal = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", code], stderr=terminal, env=env, check=True, timeout=60)
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert "held-out" in shown
    assert "4/4" in shown
    assert "left" in shown
