"""Feedback without labels: the posterior finds a known truth, and stays where nothing is known."""

import dataclasses
import json

import numpy as np
import pytest
from bundles import small_bundle

from marginroute import bundle as bundles
from marginroute import view as v
from marginroute.__main__ import main
from marginroute.errors import InputError
from marginroute.facts import Facts, Outcome
from marginroute.feedback import CHANNELS, PRIOR_SD, QualityPosterior, load_posterior, shifted
from marginroute.gateway import Gateway
from marginroute.record_log import RecordLog
from marginroute.telemetry import GatewayState

TRUE_SHIFT = np.array([[-1.2, 0.0], [0.6, 1.0]])  # tiers x tasks


def signals_of(rng, good, channels, connected=1.0):
    """Signals of one answer; each channel is connected with a probability."""
    found = {}
    for channel in channels:
        if rng.random() < connected:
            known = CHANNELS[channel]
            found[channel] = str(rng.choice(list(known), p=[pair[0 if good else 1] for pair in known.values()]))
    return found


def play(n, seed, channels=("thumb", "regenerated", "validation", "escalated"), connected=1.0, greedy=False):
    """n answers; greedy: the tier of the larger predicted P(good) less a price answers, and only it is seen."""
    rng, posterior = np.random.default_rng(seed), QualityPosterior(("small", "large"), ("chat", "code"))
    outcomes = [[[] for _ in range(2)] for _ in range(2)]
    for _ in range(n):
        task, hard = int(rng.integers(2)), rng.standard_normal()
        p = 1.0 / (1.0 + np.exp(-(np.array([0.3, 1.5]) - np.array([1.5, 0.8]) * hard)))
        tier = int(np.argmax(p - [0.0, 0.2])) if greedy else int(rng.integers(2))
        good = rng.random() < 1.0 / (1.0 + np.exp(-(np.log(p[tier] / (1 - p[tier])) + TRUE_SHIFT[tier, task])))
        outcomes[tier][task].append(good)
        posterior.update(tier, task, p[tier], signals_of(rng, good, channels, connected))
    return posterior, np.array([[np.mean(cell) for cell in row] for row in outcomes])


def test_no_data_moves_nothing():
    posterior = QualityPosterior(("small", "large"), ("chat", "code"))
    for _ in range(100):
        posterior.update(0, 0, 0.3, {})
    mean, deviation = posterior.shift()
    assert (mean == 0.0).all() and posterior.answers.sum() == 0
    assert deviation == pytest.approx(np.full((2, 2), PRIOR_SD), abs=1e-3)
    p = np.array([0.123456789, 0.987654321])
    assert (shifted(p, mean[:, 0]) == p).all()


def test_one_cell_moves_alone():
    posterior = QualityPosterior(("small", "large"), ("chat", "code"))
    posterior.update(1, 0, 0.7, {"validation": "failed"})
    mean, deviation = posterior.shift()
    assert mean[1, 0] < 0.0 and np.count_nonzero(mean) == 1
    assert deviation[1, 0] < deviation[0, 0]


@pytest.mark.parametrize("greedy", [False, True])
def test_it_converges_to_the_truth(greedy):
    """Also where hard prompts go to the large tier and only the chosen one is seen."""
    errors = []
    for n in (300, 10_000):
        posterior, _ = play(n, 0, greedy=greedy)
        mean, deviation = posterior.shift()
        errors.append(np.abs(mean - TRUE_SHIFT).mean())
        assert (np.abs(mean - TRUE_SHIFT) < 3.5 * deviation).all()
    assert errors[1] < 0.15 and errors[1] < errors[0]
    assert deviation.max() < 0.15


def test_selection_would_fool_plain_counts():
    """The share of good answers of the tier that gets the hard prompts is not its quality."""
    _, everywhere = play(10_000, 1)
    posterior, chosen = play(10_000, 1, greedy=True)
    assert np.abs(chosen - everywhere).max() > 0.05
    assert np.abs(posterior.shift()[0] - TRUE_SHIFT).max() < 0.35


def test_a_tenth_of_the_signals_is_enough():
    posterior, _ = play(12_000, 2, connected=0.1)
    mean, deviation = posterior.shift()
    assert (np.abs(mean - TRUE_SHIFT) < 3.5 * deviation).all()
    assert np.abs(mean - TRUE_SHIFT).mean() < 0.35


def test_silence_on_a_connected_channel_is_evidence_as_stated():
    """Few vote, and the dissatisfied vote more: with `none` counted the mean stays true; votes alone would mislead."""
    posterior, _ = play(40_000, 3, channels=("thumb",))
    assert np.abs(posterior.shift()[0] - TRUE_SHIFT).mean() < 0.3


def test_labels_outweigh_hints():
    labels, _ = play(400, 4, channels=("label",))
    hints, _ = play(400, 4, channels=("thumb",))
    assert labels.shift()[1].mean() < 0.6 * hints.shift()[1].mean()


def test_old_evidence_fades():
    posterior = QualityPosterior(("only",), ("all",), half_life=50.0)
    for signal, sign in (("failed", -1), ("passed", 1)):
        for _ in range(400):
            posterior.update(0, 0, 0.5, {"validation": signal})
        assert sign * posterior.shift()[0][0, 0] > 0.8


@pytest.mark.parametrize(
    ("signals", "words"),
    [
        ({"mood": "good"}, "channel 'mood' is unknown"),
        ({"thumb": "sideways"}, "thumb = 'sideways'; legal: up, down, none"),
    ],
)
def test_unknown_signals_are_refused(signals, words):
    posterior = QualityPosterior(("only",), ("all",))
    with pytest.raises(InputError, match=words):
        posterior.update(0, 0, 0.5, signals)
    assert posterior.answers.sum() == 0


@pytest.mark.parametrize("pair", [(0.0, 0.5), (0.9, 0.5), (1.2, 0.5)])
def test_weights_must_be_probabilities(pair):
    with pytest.raises(InputError, match="legal is above 0, adding up to 1"):
        QualityPosterior(("only",), ("all",), {"x": {"yes": pair, "no": (0.5, 0.5)}})


@pytest.fixture
def logged(bundle_folder, tmp_path):
    """A log of 300 requests at small/0, half of which failed their validator, and the feedback file."""
    shadow = Gateway(bundles.load(bundle_folder), RecordLog(tmp_path / "log.jsonl"))
    with open(tmp_path / "feedback.jsonl", "w") as file:
        for i in range(300):
            shadow.decide(Facts(f"r{i}", 100, "standard", "code"))
            shadow.sent(f"r{i}", "small/0", False)
            shadow.finished(f"r{i}", Outcome("completed", "small/0", e2e_s=1.0, prompt_tokens=100, output_tokens=9))
            if i < 200:
                file.write(json.dumps({"id": f"r{i}", "validation": "failed" if i % 4 else "passed"}) + "\n")
    shadow.close()
    return tmp_path


def command(folder, bundle_folder, *more):
    return main(["feedback", str(folder / "log.jsonl"), str(bundle_folder), *map(str, more)])


def test_the_command_learns_from_a_log(logged, bundle_folder, capsys):
    out = logged / "posterior.json"
    assert command(logged, bundle_folder, "--feedback", logged / "feedback.jsonl", "--out", out) == 0
    assert "200 answers with feedback" in capsys.readouterr().out
    posterior = load_posterior(str(out))
    mean, _ = posterior.shift()
    assert posterior.answers.tolist() == [[0, 200], [0, 0]] and mean[0, 1] < -0.5
    bundle = bundles.load(bundle_folder)
    plain, learned = GatewayState(bundle), GatewayState(bundle, posterior=posterior)
    before, after = (state.view(100, "standard", "code").signals[v.P_GOOD_PRIOR] for state in (plain, learned))
    np.testing.assert_allclose(after[0], shifted(before[0], mean[0, 1]), rtol=1e-12)
    np.testing.assert_array_equal(after[1:], before[1:])
    chat = [state.view(100, "standard", "chat").signals[v.P_GOOD_PRIOR] for state in (plain, learned)]
    np.testing.assert_array_equal(*chat)


def test_shifts_in_force_are_not_counted_twice(logged, bundle_folder):
    """A log written under a posterior, learned from on top of it, ends where both logs would have ended together."""
    first, words = logged / "first.json", ("--feedback", logged / "feedback.jsonl")
    assert command(logged, bundle_folder, *words, "--out", first) == 0
    in_force = load_posterior(str(first))
    shadow = Gateway(bundles.load(bundle_folder), RecordLog(logged / "more.jsonl"), posterior=in_force)
    for i in range(200):
        shadow.decide(Facts(f"r{i}", 100, "standard", "code"))
        shadow.finished(f"r{i}", Outcome("completed", "small/0", e2e_s=1.0, prompt_tokens=100, output_tokens=9))
    shadow.close()
    more = ["feedback", str(logged / "more.jsonl"), str(bundle_folder), "--feedback", str(logged / "feedback.jsonl")]
    assert main([*more, "--start", str(first), "--out", str(logged / "second.json")]) == 0
    together = QualityPosterior(in_force.tiers, in_force.tasks)
    p_good = float(bundles.load(bundle_folder).prior.p_good(0.0)[0])
    for i in range(400):
        together.update(0, 1, p_good, {"validation": "failed" if i % 4 else "passed"})
    np.testing.assert_allclose(load_posterior(str(logged / "second.json")).shift()[0], together.shift()[0], atol=2e-3)


def test_without_feedback_nothing_moves(logged, bundle_folder, capsys):
    assert command(logged, bundle_folder, "--out", logged / "none.json") == 0
    assert "0 answers with feedback" in capsys.readouterr().out
    assert (load_posterior(str(logged / "none.json")).shift()[0] == 0.0).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense\n", "line 1: no JSON object with an id"),
        ('{"id": "r0", "thumb": 1}\n', "thumb = 1; legal is a word"),
        ('{"id": "r0", "mood": "good"}\n', "channel 'mood' is unknown"),
        (None, "cannot be read"),
    ],
)
def test_bad_feedback_gives_one_sentence(text, words, logged, bundle_folder, capsys):
    path = logged / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    assert command(logged, bundle_folder, "--feedback", path, "--out", logged / "x.json") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (logged / "x.json").exists()


def test_feedback_of_another_bundle_is_refused(tmp_path):
    other = QualityPosterior(("a", "b"), ("chat", "code"))
    with pytest.raises(InputError, match="other tiers or tasks"):
        GatewayState(dataclasses.replace(small_bundle()), posterior=other)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(InputError, match="is not a feedback file"):
        load_posterior(str(tmp_path / "x.json"))


def test_litellm_loads_it(logged, bundle_folder, tmp_path):
    from marginroute.adapters import litellm as adapter
    from marginroute.adapters.litellm_request import Settings

    out = logged / "posterior.json"
    assert command(logged, bundle_folder, "--feedback", logged / "feedback.jsonl", "--out", out) == 0
    plain, learned = (
        adapter.build(Settings(str(bundle_folder), str(tmp_path / f"{i}.jsonl"), feedback=path)).gateway.state
        for i, path in enumerate(("", str(out)))
    )
    before, after = (state.view(100, "standard", "code").signals[v.P_GOOD_PRIOR, 0] for state in (plain, learned))
    assert after < before
