"""The live view: pictures that follow the world, and a clip that is written whole."""

import numpy as np
import pytest
from PIL import Image

import evaluate
from envs.fleet_env import FleetEnv
from envs.live_view import DECODING, MARGIN, save_clip
from evaluation.clip import pictures
from marginroute.errors import InputError
from marginroute.rules import LeastInFlight


def count(frame, colour):
    """Pixels of a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((frame == np.array(wanted)).all(axis=-1).sum())


def test_the_environment_draws_itself(small_scenario):
    env = FleetEnv(small_scenario, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
    for _ in range(60):
        env.step(0)  # everything to one replica
    later = env.render()
    assert later.shape == first.shape
    assert count(later, DECODING) > count(first, DECODING) + 100  # its batch grows
    env.reset(seed=1)
    assert count(env.render(), DECODING) == count(first, DECODING)


def test_pictures_follow_the_episode(small_scenario):
    frames = pictures(small_scenario, LeastInFlight("least-in-flight"), frames=12)
    assert 8 <= len(frames) <= 13
    assert len({frame.tobytes() for frame in frames}) == len(frames)
    assert count(frames[-1], MARGIN) > count(frames[1], MARGIN)  # the curve grows


@pytest.fixture
def one_heuristic(monkeypatch):
    known = {"least-in-flight": LeastInFlight("least-in-flight")}
    monkeypatch.setattr("agents.baselines.baselines_for", lambda scenario, run_dir=None: dict(known))


SMALL = ["--set", "horizon_s=10", "requests_per_episode=40"]


def test_the_command_saves_a_clip(one_heuristic, tmp_path, capsys):
    assert evaluate.main([*SMALL, "--render", str(tmp_path / "clip.gif")]) == 0
    with Image.open(tmp_path / "clip.gif") as clip:
        assert clip.is_animated and clip.n_frames > 10
    assert "pictures of held-out episode 0 under least-in-flight" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--render", "clip.mp4"], "legal is a file that ends in .gif"),
        (["--render", "/nonexistent/clip.gif"], "is not a folder that can be written to"),
        (["--track"], "--track needs --render"),
    ],
)
def test_bad_flags(words, sentence, capsys):
    assert evaluate.main(words) == 2
    assert sentence in capsys.readouterr().err


def test_a_clip_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_clip(tmp_path / "folder.gif", [np.zeros((4, 4, 3), dtype=np.uint8)] * 2, 8.0)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.gif"]
