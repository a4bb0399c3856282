"""Shell habits: help with examples, nearest words, -v and -q, colours, completion, signals, and output nobody takes."""

import contextlib
import importlib
import multiprocessing.util
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks
import evaluate
import train
from agents.run import Run
from agents.workers import shared_out
from evaluation.progress import progress_bar
from marginroute import cli
from marginroute.cli import Parser, main_guard, note

ROOT = Path(__file__).parents[2]
MAINS = {name: importlib.import_module(name).main for name in ("train", "evaluate", "export")}
MAINS |= {name: importlib.import_module(f"{name}.__main__").main for name in ("envs", "agents", "marginroute")}
BENCHMARKS = [
    module.name
    for module in pkgutil.iter_modules(benchmarks.__path__)
    if "@main_guard" in (ROOT / "benchmarks" / f"{module.name}.py").read_text()
]


def reachable(name):
    """Words of every command and subcommand of a `main`, the command itself first."""
    module = importlib.import_module(name if name in ("train", "evaluate", "export") else f"{name}.__main__")

    def walk(parser, words):
        yield words
        for action in parser._actions:
            for word, below in (action.choices or {}).items() if isinstance(action.choices, dict) else ():
                yield from walk(below, [*words, word])

    return list(walk(module.parser(), []))


COMMANDS = [(name, tuple(words)) for name in MAINS for words in reachable(name)]


def shown(main, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_help_ends_with_examples(name, words, capsys):
    text = shown(MAINS[name], [*words, "--help"], capsys)
    examples = text.rpartition("Try:\n")[2].splitlines()
    assert len(text) > len("".join(examples)) and examples
    assert all(line.startswith("  ") for line in examples)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_of_benchmarks_ends_with_examples(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    text = shown(importlib.import_module(f"benchmarks.{name}").main, ["--help"], capsys)
    called = f"python -m benchmarks.{name}".removesuffix(".__main__")
    assert text.startswith(f"usage: {called} ") and "Try:\n  python -m benchmarks" in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--epsiodes", "3"], "unknown option --epsiodes; did you mean --episodes?"),
        (["--baseline=all"], "unknown option --baseline; did you mean --baselines?"),
        (["quickstart", "shaky"], "'shaky' is one word too many"),
        (["--episodes", "x"], "--episodes: invalid int value: 'x'"),
    ],
)
def test_a_word_that_is_nearly_legal(words, hint, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(words)
    sentence = capsys.readouterr().err
    assert end.value.code == 2 and sentence.startswith("error: ") and sentence.count("\n") == 1
    assert hint.rstrip("?") in sentence and sentence.endswith("see evaluate.py --help\n")


def test_a_subcommand_suggests_its_own_options(capsys):
    with pytest.raises(SystemExit):
        MAINS["marginroute"](["serve", "bundle", "--tokenfile", "x"])
    assert "did you mean --token-file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        MAINS["envs"](["simulat"])
    assert "did you mean simulate" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "lines"), [((), 2), (("-q",), 0), (("-v",), 4)])
def test_quiet_and_verbose(flag, lines, capsys):
    """A note and the last line of a stage; -v adds what the stage and the whole took."""

    @main_guard
    def main(argv):
        parser = Parser(prog="x")
        parser.add_verbosity()
        parser.parse_args(argv)
        note("a note")
        with progress_bar("stage") as progress:
            progress(1, 1)
        print("result")
        return 0

    assert main(list(flag)) == 0
    out, err = capsys.readouterr()
    assert out == "result\n" and len(err.splitlines()) == lines, err
    assert ("s of CPU" in err) == (flag == ("-v",))


def test_quiet_and_verbose_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        train.main(["-q", "-v"])
    assert "not allowed with" in capsys.readouterr().err


def test_bars_have_no_colour_where_none_is_wanted(monkeypatch, capsys):
    from evaluation import progress as module

    for no_colour in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_forced", [True])
            patch.setenv("TERM", "xterm-256color")
            patch.delenv("NO_COLOR", raising=False)
            if no_colour:
                patch.setenv("NO_COLOR", "1")
            with progress_bar("stage") as progress:
                progress(1, 1)
        coloured = any(f"\x1b[{code}" in capsys.readouterr().err for code in ("3", "38;", "1;3"))
        assert coloured != no_colour


def complete(line, script):
    """What a shell with argcomplete is offered for a line."""
    pytest.importorskip("argcomplete")
    words = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": " "}
    command = f"{sys.executable} {script} 8>&1 9>/dev/null >/dev/null"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, **words}, capture_output=True, text=True, timeout=60
    )
    return done.stdout.split()


def test_shells_complete_options_commands_and_scenarios():
    assert "--episodes" in complete("evaluate.py --ep", "evaluate.py")
    assert complete("train.py quick", "train.py") == ["quickstart"]
    assert complete("marginroute ins", "-m marginroute") == ["inspect"]


@pytest.mark.parametrize("path", ["train.py", "evaluate.py", "export.py", "envs/__main__.py", "agents/__main__.py"])
def test_commands_are_marked_for_completion(path):
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / path).read_text()[:1024]


@pytest.mark.parametrize("stage", ["evaluation.training.gate", "agents.export.export"], ids=["gate", "export"])
def test_an_interruption_at_any_stage_is_written_down(
    stage, tmp_path, tiny_arguments, tuned_cache, monkeypatch, capsys
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(stage, interrupt)
        assert train.main([*tiny_arguments, "--out", str(run)]) == 130
    assert Run(run).info()["status"] == "interrupted"
    assert f"train.py --resume {run}" in capsys.readouterr().err
    assert train.main(["--resume", str(run)]) == 0
    assert Run(run).info()["status"] == "finished"


def test_a_crash_is_written_down(tmp_path, tiny_arguments, tuned_cache, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("evaluation.training.gate", crash)
    with pytest.raises(RuntimeError, match="out of luck"):
        train.main([*tiny_arguments, "--out", str(tmp_path / "run")])
    assert Run(tmp_path / "run").info()["status"] == "failed"


def slow_start():
    time.sleep(30.0)
    return lambda item: item


@main_guard
def work_with_slow_workers(argv):
    list(shared_out(slow_start, (), [1, 2], 2))
    return 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_processes_start(number, code):
    """Ctrl-C reaches the whole group; children that are still importing must not turn it into a crash."""
    program = "import sys; sys.path[:0] = ['tests/contract']; import test_shell as t; print('go', flush=True)"
    program += "; sys.exit(t.work_with_slow_workers([]))"
    words = [sys.executable, "-c", program]
    run = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    run.stdout.readline()
    time.sleep(0.3)  # the children exist, and import
    os.killpg(run.pid, number) if number == signal.SIGINT else os.kill(run.pid, number)
    assert run.wait(60) == code
    assert "Traceback" not in run.stderr.read()


def work_with_a_signal_at_birth(argv):
    """SIGTERM comes when a child exists and has not been told yet what to do."""
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_and_signal(path, words, passed):
        pid = spawn(path, words, passed)
        if "--multiprocessing-fork" in map(os.fsdecode, words):
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    multiprocessing.util.spawnv_passfds = spawn_and_signal
    return work_with_slow_workers(argv)


def test_a_signal_at_the_birth_of_a_process():
    program = "import sys; sys.path[:0] = ['tests/contract']; import test_shell as t"
    program += "; sys.exit(t.work_with_a_signal_at_birth([]))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert run.returncode == 143
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("script", ["evaluate.py", "train.py"])
def test_processes_that_die_as_they_start(script, tmp_path):
    """One sentence, no file, and nobody is left; a training may be gone on with."""
    kill = "import os, sys\nif '--multiprocessing-fork' in sys.orig_argv: os.kill(os.getpid(), 9)\n"
    (tmp_path / "sitecustomize.py").write_text(kill)
    files = [tmp_path / name for name in ("x.json", "x.html")]
    words = {
        "evaluate.py": ["--baselines", "least-in-flight", "--no-cache", "--json", files[0], "--report", files[1]],
        "train.py": ["--retune", "--out", tmp_path / "run"],
    }[script]
    run = subprocess.Popen(
        [sys.executable, script, "--workers", "2", *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    shown, errors = run.communicate(timeout=300)
    assert run.returncode == 1 and shown == "" and "Traceback" not in errors
    sentence = "error: 3 workers died as they started (killed by SIGKILL, out of memory?); try fewer --workers"
    assert errors.splitlines()[-1].startswith(sentence)
    assert not any(path.exists() for path in files) and not list(tmp_path.glob(".*"))
    if script == "train.py":
        assert Run(tmp_path / "run").info()["status"] == "interrupted" and "--resume" in errors
    for _ in range(100):  # the last helper of multiprocessing ends by itself
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, 0)
            time.sleep(0.05)
            continue
        return
    raise AssertionError("somebody is left")


@pytest.mark.parametrize("name", ["train", "envs", "marginroute"])
@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 1), ("| true", 0)])
def test_help_that_nobody_takes(name, redirection, code):
    words = "train.py" if name == "train" else f"-m {name}"
    command = f"set -o pipefail; {sys.executable} {words} --help {redirection}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr


def test_exit_codes_are_documented():
    text = (ROOT / "docs" / "shell.md").read_text()
    for code in (cli.EXIT_FAILED, cli.EXIT_BAD_INPUT, cli.EXIT_INTERRUPTED, cli.EXIT_TERMINATED):
        assert f"| {code} |" in text


def test_compilation_is_announced_until_the_world_is_compiled(tmp_path, monkeypatch, capsys):
    import envs
    from envs.fleet_env import FleetEnv

    FleetEnv("quickstart").reset(seed=0)
    (compiled,) = Path(os.environ["NUMBA_CACHE_DIR"]).glob("*/world.step-*.nbi")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "iteration.token_seconds-40.py311.nbi").touch()  # `describe` was run before
    for words, path in (("compiling the simulator", None), ("", compiled)):
        if path is not None:
            (tmp_path / "fleet" / path.name).touch()
        envs.announce_compilation.cache_clear()
        envs.announce_compilation()
        assert (words in capsys.readouterr().err) if words else capsys.readouterr().err == ""


def test_a_table_that_nobody_reads_is_no_failure(tmp_path):
    code = (
        "from evaluation.columns import stdout_console\n"
        "from marginroute.cli import main_guard\n"
        "@main_guard\n"
        "def main(argv):\n"
        "    for _ in range(10_000):\n"
        "        stdout_console().print('a row of a table')\n"
        "    return 0\n"
        "raise SystemExit(main())\n"
    )
    (tmp_path / "rows.py").write_text(code)
    command = f"set -o pipefail; PYTHONPATH=. {sys.executable} {tmp_path / 'rows.py'} | head -n 1"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "a row of a table\n", "")
