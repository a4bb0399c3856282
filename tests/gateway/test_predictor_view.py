"""A bundle with a quality predictor: its P(good) is what the View shows, and what was changed is refused."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from bundles import small_bundle
from test_litellm_observer import DEPLOYMENTS, kwargs_of, logger  # noqa: F401

from marginroute import bundle as bundles
from marginroute import prompt
from marginroute import view as v
from marginroute.card import model_card
from marginroute.errors import InputError
from marginroute.predictor import QualityPredictor
from marginroute.telemetry import GatewayState


def predictor(models=("large", "elsewhere")):
    rng, t = np.random.default_rng(1), len(models)
    shape = (len(prompt.SURFACE_NAMES), t)
    vectors = [rng.normal(0.0, 0.3, t), np.ones(t), np.full(t, 0.2), rng.normal(0.0, 0.3, t)]
    weight, surface = rng.normal(0.0, 1.0, (1 << 10, t)), rng.normal(0.0, 0.1, shape)
    return QualityPredictor(models, weight, surface, *vectors, np.array([0.3, 0.9]), np.full(t, 0.7), "a test")


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predicting") / "bundle"
    bundles.save(dataclasses.replace(small_bundle(), predictor=predictor()), folder)
    return folder


def test_the_view_shows_the_prediction_and_the_prior_of_other_tiers(bundle):
    state, text = GatewayState(bundle), "Prove that 7 is prime."
    expected, signal = predictor().predict(text)
    view = state.view(30, prompt=text)
    p_good = view.signals[v.P_GOOD_PRIOR]
    np.testing.assert_array_equal(p_good[1:3], expected[0])
    assert p_good[0] == bundle.prior.p_good(signal)[0]
    assert view.request[v.DIFFICULTY_SIGNAL] == signal
    other = state.view(30, prompt="Hello!").signals[v.P_GOOD_PRIOR]
    assert other[1] != p_good[1]


def test_without_a_text_the_prior_is_shown(bundle):
    view = GatewayState(bundle).view(30, difficulty_signal=0.5)
    np.testing.assert_array_equal(view.signals[v.P_GOOD_PRIOR, :2], bundle.prior.p_good(0.5))


def test_a_bundle_without_a_predictor_ignores_the_text(tmp_path):
    bundles.save(small_bundle(), tmp_path / "plain")
    plain = bundles.load(tmp_path / "plain")
    assert plain.predictor is None and not (tmp_path / "plain" / "quality.npz").exists()
    with_text, without = (GatewayState(plain).view(30, prompt=text) for text in ("Prove it.", None))
    np.testing.assert_array_equal(with_text.signals[v.P_GOOD_PRIOR], without.signals[v.P_GOOD_PRIOR])


def test_litellm_asks_for_the_last_user_message(logger):  # noqa: F811
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "Prove that 7 is prime."}, {"type": "image_url"}]},
    ]
    for id, asked in (("a", messages), ("b", None)):
        body = {"proxy_server_request": {"body": {"prompt": "Prove that 7 is prime."}}}
        asyncio.run(logger.async_filter_deployments("chat", DEPLOYMENTS, asked, kwargs_of(id) | body))
    assert logger.marginroute.errors == {}
    logger.marginroute.gateway.close()
    with open(logger.marginroute.settings.log) as file:
        text = file.read()
    signals = [json.loads(line)["request"]["difficulty_signal"] for line in text.splitlines()]
    assert signals == [predictor().predict("Prove that 7 is prime.")[1]] * 2
    assert "prime" not in text  # prompts are not kept


def test_the_card_names_it(bundle_folder):
    card = model_card(bundle_folder)
    assert "Predictor of P(good answer)" in card and "models: [large, elsewhere]" in card


def test_a_changed_predictor_is_refused(bundle_folder, tmp_path):
    import shutil

    copy = shutil.copytree(bundle_folder, tmp_path / "copy")
    (copy / "quality.npz").write_bytes(predictor(("large", "other")).to_bytes())
    with pytest.raises(InputError, match="does not match the sha256"):
        bundles.load(copy)
    (copy / "quality.npz").unlink()
    with pytest.raises(InputError, match="missing or unreadable"):
        bundles.load(copy)


def test_models_must_be_tiers(tmp_path):
    with pytest.raises(InputError, match="legal is at least one of the tiers small, large"):
        bundles.save(dataclasses.replace(small_bundle(), predictor=predictor(("a", "b"))), tmp_path / "x")
    assert not (tmp_path / "x").exists()
