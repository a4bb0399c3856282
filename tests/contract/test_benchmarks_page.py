"""`python -m benchmarks`: the page of figures is written whole, and what is not rerun stays."""

import json
import subprocess

import pytest

from benchmarks import __main__ as page

DOCUMENT = {
    "benchmark": "decision",
    "machine": {"cpu": "A CPU", "cores": 2, "python": "3.11.0", "system": "Linux"},
    "commit": "abc1234",
    "figures": {"median_us_16": 51.234, "quality_us": {"1000": 12.5}, "requests": 1234567, "equal": True, "none": None},
}


@pytest.fixture
def runs(monkeypatch):
    """Calls of benchmarks; by name: the exit code and the figures that they end with."""
    calls, ends = [], {}

    def run(words, **_):
        calls.append(words[1:])
        code = ends.get(words[2].removeprefix("benchmarks."), 0)
        document = {**DOCUMENT, "benchmark": words[2].removeprefix("benchmarks.")}
        return subprocess.CompletedProcess(words, code, stdout="" if code else json.dumps(document))

    monkeypatch.setattr(subprocess, "run", run)
    return calls, ends


def test_every_figure_stands_beside_machine_commit_and_command(runs, tmp_path):
    out = tmp_path / "figures.md"
    assert page.main(["--quick", "--only", "decision", "--out", str(out)]) == 0
    text = out.read_text()
    assert runs[0] == [["-m", "benchmarks.decision", "--quick"]]
    assert "`python -m benchmarks.decision --quick` (a quick run: rough); A CPU, 2 cores" in text and "abc1234" in text
    for row in (
        "| median_us_16 | 51.23 |",
        "| quality_us 1000 | 12.5 |",
        "| requests | 1,234,567 |",
        "| equal | True |",
    ):
        assert row in text


def test_rows_of_one_kind_are_a_table():
    figures = {
        "cpu_s": 2,
        "rows": [{"replicas": 1, "mode": "base"}, {"replicas": 16, "mode": "parity"}],
        "odd": [{"a": 1}, 2],
    }
    text = page.section("python -m benchmarks.x", {**DOCUMENT, "figures": figures}, quick=False)
    assert "| cpu_s | 2 |\n| odd 0 a | 1 |\n| odd 1 | 2 |\n" in text
    assert "\n\n| replicas | mode |\n| --- | --- |\n| 1 | base |\n| 16 | parity |\n" in text


def test_what_is_not_rerun_stays_and_what_cannot_run_is_said(runs, tmp_path, capsys):
    calls, ends = runs
    out = tmp_path / "figures.md"
    assert page.main(["--only", "simulator", "--out", str(out), "-q"]) == 0
    before = out.read_text()
    ends.update(vidur_parity=2)
    assert page.main(["--only", "vidur_parity", "--set", "vidur_parity:--truth 'a b'", "--out", str(out), "-q"]) == 0
    assert calls[-1] == ["-m", "benchmarks.vidur_parity", "--truth", "a b"]
    text = out.read_text()
    assert before.removeprefix(page.HEAD) in text and "has not been run here" in text
    ends.update(decision=1)
    assert page.main(["--only", "decision", "--out", str(out), "-q"]) == 1
    ends.clear()
    assert page.main(["--out", str(out), "-q"]) == 0
    assert [name for name, _ in page.SECTION.findall(out.read_text())] == list(page.NAMES)


@pytest.mark.parametrize("words", [["--only", "decison"], ["--set", "decision"], ["--set", "decison:--quick"]])
def test_unknown_names_are_refused(words, tmp_path, capsys):
    assert page.main([*words, "--out", str(tmp_path / "figures.md")]) == 2
    assert "legal" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_every_benchmark_is_on_the_page():
    assert {"simulator", "training", "decision", "gateway", "vidur_parity", "off_policy"} <= set(page.NAMES)
    assert not {"__main__", "common", "dynamo_worker", "gateway_envoy"} & set(page.NAMES)
