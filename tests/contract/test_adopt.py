"""docs/adopt.md is walked through: every command of the week runs, small, in the order of the page."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from sizes import TINY, TINY_TRAINING
from test_docs import SCRIPTS, commands_in, words_of

from agents import baselines
from marginroute.adapters.http import HttpSettings
from marginroute.operation_file import settings_from

PAGE = Path(__file__).parents[2] / "docs" / "adopt.md"
TRAINING = TINY_TRAINING | {"steps": 256, "tuning_requests": 1}
SMALL = {
    "examples/practice_log.py": ["--minutes", "3"],
    "train.py": ["--set", *(f"{key}={x}" for key, x in TINY.items())]
    + [f"training.{key}={x}" for key, x in TRAINING.items()],
    "evaluate.py --bound": ["--episodes", "2", "--workers", "1"],
}
"""What makes a command small, by its script and by a flag that it has."""


def extra(words):
    """Words that make a command of the page small."""
    return [x for key, small in SMALL.items() if all(word in words for word in key.split()) for x in small]


def test_the_week_can_be_lived(tmp_path, monkeypatch, capsys):
    import importlib

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PAGE.parents[1] / "examples")
    monkeypatch.setattr(baselines, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("evaluation.calibration.FOLDER", tmp_path / "cache" / "verdicts")
    monkeypatch.setattr("evaluation.page_data.SWAPPED", 8)
    said = {}
    for command, whole in commands_in(PAGE.read_text()):
        words = words_of(command)
        if not whole or not words:
            continue
        script = words[1] if words[0] == "python" else "marginroute"
        module = SCRIPTS.get(script, "marginroute.__main__")
        rest = words[2:] if words[0] == "python" else words[1:]
        assert importlib.import_module(module).main([*rest, *extra(words)]) == 0, command
        said[shlex.join(words)] = capsys.readouterr().out
    assert len(said) == 7  # of three scripts and a gateway's command
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()] == ["bundles", "cache", "runs"]
    assert (tmp_path / "report.html").stat().st_size > 100_000
    for start, words in (
        ("python evaluate.py quickstart --log", "What the log has earned"),
        ("python train.py", "labelled answers move the tiers' abilities"),
        ("python evaluate.py --policy", "Upper bounds of the margin"),
        ("marginroute replay", "by the guard's fallback"),
        ("python evaluate.py --log", "logged: what the log itself earned"),
    ):
        assert any(key.startswith(start) and words in out for key, out in said.items()), (start, said)


def test_the_settings_of_day_five_are_legal(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "settings.yaml").write_text(block)
    environment = {"MARGINROUTE_CONFIG": str(tmp_path / "settings.yaml")}
    settings = settings_from(environment | {"MARGINROUTE_BUNDLE": "b", "MARGINROUTE_LOG": "l"}, HttpSettings)
    assert (settings.mode, settings.canary_share) == (yaml.safe_load(block)["mode"], 0.01)
    assert settings.modes().share == pytest.approx(0.01)
