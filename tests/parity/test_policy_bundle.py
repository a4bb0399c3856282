"""Bundles: a round trip changes nothing, and nothing that was changed is taken."""

import dataclasses
import hashlib
import io
import json
import pickle
import shutil

import numpy as np
import pytest
from scorers import random_scorer

from agents.export import export
from envs.rule_kernel import default_advice
from envs.worlds import FleetWorlds
from marginroute import bundle as bundles
from marginroute.bundle_files import digest_of
from marginroute.errors import InputError
from marginroute.heuristics import to_dict
from marginroute.policy import Network, ResidualPolicy
from marginroute.rules import LeastInFlight


@pytest.fixture(scope="module")
def exported(tmp_path_factory, small_plant, tiny_config):
    """(bundle as made, its folder) of a learned policy."""
    advice = default_advice(small_plant)
    policy, spec = random_scorer(small_plant, tiny_config, advice, seed=0)
    folder = tmp_path_factory.mktemp("bundle") / "learned"
    fallback, evaluation = LeastInFlight("least-in-flight"), {"gate": {"learned": True}}
    made = export(small_plant, policy, advice, spec, fallback, folder, evaluation, {"seed": 0})
    return made, folder


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the bundle to spoil."""
    return shutil.copytree(exported[1], tmp_path / "copy")


def test_round_trip(exported, small_plant):
    made, folder = exported
    read = bundles.load(folder)
    assert read.learned == "residual" and read.policy.name == made.policy.name == "marginroute"
    for name, weights in made.policy.network.arrays().items():
        np.testing.assert_array_equal(weights, read.policy.network.arrays()[name])
        assert read.policy.network.arrays()[name].dtype == np.float32
    assert read.policy.spec.to_dict() == made.policy.spec.to_dict()
    assert to_dict(read.policy.advice) == to_dict(made.policy.advice)
    assert to_dict(read.fallback) == to_dict(made.fallback)
    for name in ("static_signals", "slots", "output_tokens"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    for name in ("terms", "scenario", "evaluation", "provenance", "limits"):
        assert getattr(read, name) == getattr(made, name)
    assert read.layout.to_dict() == made.layout.to_dict() and read.prior.to_dict() == made.prior.to_dict()
    assert len(read.digest) == 64


def test_the_loaded_policy_decides_as_the_exported_one(exported, small_plant):
    made, folder = exported
    read = bundles.load(folder).guarded()
    worlds = FleetWorlds(small_plant, 2)
    worlds.load_all([small_plant.scenario.generate(seed, "heldout") for seed in range(2)])
    while not worlds.done.any():
        view = worlds.view()
        choices = made.policy.decide_batch(view)
        np.testing.assert_array_equal(read.decide_batch(view), choices)
        worlds.step(choices)


def test_terms_without_a_limit_survive_json(exported):
    """Infinity is no JSON: it is written as a word, and read as a number."""
    text = (exported[1] / "manifest.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    terms = bundles.load(exported[1]).terms
    assert any(np.isinf(row["slo_e2e_s"]) for row in terms.values())


def test_an_exported_heuristic_has_no_weights(tmp_path, small_plant):
    advice = default_advice(small_plant)
    export(small_plant, None, advice, None, LeastInFlight("least-in-flight"), tmp_path / "plain", {}, {})
    read = bundles.load(tmp_path / "plain")
    assert read.learned == "none" and read.policy.name == "marginroute"
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["manifest.json"]


def refused(folder, words):
    with pytest.raises(InputError, match=words) as caught:
        bundles.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["weights.npz", "policy.onnx", "parity.npz"])
def test_one_flipped_bit_is_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    refused(copy, f"{name} does not match the sha256")


@pytest.mark.parametrize("name", ["manifest.json", "weights.npz", "policy.onnx", "parity.npz"])
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    refused(copy, f"{name} is missing")


@pytest.mark.parametrize("name", ["manifest.json", "weights.npz", "policy.onnx", "parity.npz"])
def test_a_truncated_file_is_refused(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    refused(copy, name)


def rewrite(folder, change, sign=True):
    """Changes the manifest; with a digest that fits, if `sign`."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if sign:
        manifest["digest"] = digest_of(manifest)
    path.write_text(json.dumps(manifest))


def replace_arrays(folder, name, arrays):
    """Replaces an npz and its sha256."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (folder / name).write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    rewrite(folder, lambda manifest: manifest["sha256"].__setitem__(name, digest))


def arrays_of(folder, name):
    with np.load(folder / name) as archive:
        return {key: archive[key].copy() for key in archive.files}


@pytest.mark.parametrize("key", ["guard", "policy", "static_signals", "terms", "advice", "evaluation"])
def test_an_edited_manifest_is_refused(copy, key):
    rewrite(copy, lambda manifest: manifest.__setitem__(key, manifest["digest"]), sign=False)
    refused(copy, "does not match its digest")


def test_another_feature_version_is_refused(copy):
    rewrite(copy, lambda manifest: manifest.__setitem__("feature_version", 999))
    refused(copy, "feature version 999; this marginroute computes version .*train and export")


def test_another_format_is_refused(copy):
    rewrite(copy, lambda manifest: manifest.__setitem__("format", 2))
    refused(copy, "format 2")


def test_other_signals_are_refused(copy):
    rewrite(copy, lambda manifest: manifest["signals"].reverse())
    refused(copy, "other View signals")


def test_a_manifest_without_a_part_is_refused(copy):
    rewrite(copy, lambda manifest: manifest.pop("slots"))
    refused(copy, "slots")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "no json"])
def test_something_else_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    refused(copy, "is not a bundle manifest")


def test_weights_that_do_not_give_the_parity_vectors_are_refused(copy):
    weights = arrays_of(copy, "weights.npz")
    weights["head"][0] += 0.01
    replace_arrays(copy, "weights.npz", weights)
    refused(copy, "does not reproduce its parity vectors")


def test_weights_that_are_not_numbers_are_refused(copy):
    """Nothing but NaN comes out, and NaN is no legal logit."""
    weights = arrays_of(copy, "weights.npz")
    weights["head"][:] = np.nan
    replace_arrays(copy, "weights.npz", weights)
    refused(copy, "parity")


@pytest.mark.parametrize("missing", ["head", "kappa"])
def test_incomplete_weights_are_refused(copy, missing):
    weights = arrays_of(copy, "weights.npz")
    del weights[missing]
    replace_arrays(copy, "weights.npz", weights)
    refused(copy, missing)


def test_weights_of_another_shape_are_refused(copy):
    weights = arrays_of(copy, "weights.npz")
    weights["candidate"] = weights["candidate"][:-1]
    replace_arrays(copy, "weights.npz", weights)
    refused(copy, "lacks something")


def test_nothing_is_unpickled(copy):
    class Explodes:
        def __reduce__(self):
            return (pytest.fail, ("the bundle executed something",))

    buffer = io.BytesIO()
    pickle.dump(Explodes(), buffer)
    (copy / "weights.npz").write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    rewrite(copy, lambda manifest: manifest["sha256"].__setitem__("weights.npz", digest))
    refused(copy, "weights.npz is not a plain npz archive")


def test_saving_refuses_what_loading_would(exported, tmp_path):
    """A policy whose network gives no numbers is not exported, and nothing is left behind."""
    made, folder = exported
    weights = {name: np.full_like(x, np.nan) for name, x in made.policy.network.arrays().items()}
    policy = ResidualPolicy("broken", made.policy.advice, made.policy.spec, Network(**weights))
    broken = dataclasses.replace(made, policy=policy)
    with pytest.raises(InputError):
        bundles.save(broken, tmp_path / "new" / "broken", arrays_of(folder, "parity.npz"))
    assert list((tmp_path / "new").iterdir()) == []


def test_saving_again_replaces_the_bundle(exported, tmp_path, small_plant):
    made, folder = exported
    target = tmp_path / "twice"
    parity, onnx = arrays_of(folder, "parity.npz"), (folder / "policy.onnx").read_bytes()
    bundles.save(made, target, parity, onnx)
    (target / "note.txt").write_text("of an earlier export")
    bundles.save(made, target, parity, onnx)
    names = ["manifest.json", "parity.npz", "policy.onnx", "weights.npz"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert bundles.load(target).digest == bundles.load(folder).digest
    assert [path.name for path in tmp_path.iterdir()] == ["twice"]


def test_other_peoples_folders_and_files_are_left_alone(exported, tmp_path):
    made, folder = exported
    parity = arrays_of(folder, "parity.npz")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose")
    (tmp_path / "file").write_text("neither")
    for target in ("full", "file", "file/below"):
        with pytest.raises(InputError):
            bundles.save(made, tmp_path / target, parity)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "do not lose"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
