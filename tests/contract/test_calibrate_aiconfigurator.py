"""`python -m envs calibrate aiconfigurator`, with a stand-in of known times and, where it is installed, the library."""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from envs import calibrate_aiconfigurator
from envs.__main__ import main
from envs.fleet.profile import compact_profile
from envs.tables import read_columns

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "configs/fleets/profiles").glob("*.yaml"))
TABLE = ROOT.parent / "shared/data/hardware/aiconfigurator/Meta-Llama-3.1-8B_h100_sxm_tp1_vllm.csv.gz"
INSTALLED = importlib.util.find_spec("aiconfigurator_core") is not None
needs_library = pytest.mark.skipif(not INSTALLED, reason="aiconfigurator-core is not installed (an optional extra)")
COMMAND = ["calibrate", "aiconfigurator", "Qwen/Qwen3-8B", "--system", "h200_sxm", "--gpu-memory-gb", "141", "--out"]


class Engine:
    """Times of a known engine in ms: 6 + 0.02 per token + 4e-5 per token attended to."""

    def decode_step_latency(self, batch, isl, osl):
        return 6.0 + 0.02 * batch + 4e-5 * batch * isl

    def predict_prefill_latency(self, batch, isl, prefix):
        chunk = isl - prefix
        return 6.0 + 0.02 * chunk + 4e-8 * chunk * (prefix + chunk / 2)

    def mixed_step_breakdown(self, chunk, batch, isl, osl):
        shared, context, decode = 6.0 + 0.02 * (chunk + batch), 2e-8 * chunk * isl, 4e-5 * batch * isl
        return shared + context + decode, shared, context, decode


def stand_in(monkeypatch, engine):
    """A library that compiles `engine` for Qwen models alone."""

    def compiled(model, system, backend, **parallel):
        if not model.startswith("Qwen"):
            raise ValueError("no such model")
        return engine

    estimator = types.SimpleNamespace(kv_bytes_per_token=lambda: 147_456, weight_bytes=lambda: 16.4e9)
    sdk = types.ModuleType("aiconfigurator_core.sdk")
    sdk.engine = types.SimpleNamespace(EngineHandle=types.SimpleNamespace(compile=compiled))
    sdk.memory = types.SimpleNamespace(
        NaiveKVCacheEstimator=types.SimpleNamespace(from_model_path=lambda *a, **k: estimator)
    )
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", types.ModuleType("aiconfigurator_core"))
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk", sdk)
    monkeypatch.setattr(calibrate_aiconfigurator.importlib.metadata, "version", lambda name: "0.0")


def test_a_known_engine_is_found(tmp_path, monkeypatch):
    stand_in(monkeypatch, Engine())
    assert main([*COMMAND, str(tmp_path / "p.yaml")]) == 0
    data = yaml.safe_load((tmp_path / "p.yaml").read_text())
    profile = compact_profile("p", data)
    # 64 decodes of 1,000 tokens with a chunk of 700: the attention of each is counted with its own length
    from envs.fleet.iteration import batch_seconds

    known_s = 1e-3 * (6.0 + 0.02 * 764 + 2e-8 * 700**2 + 4e-5 * 64_000)
    assert batch_seconds(profile, [1000] * 64, [(700, 0)]) == pytest.approx(known_s, rel=0.01)
    assert data["kv_cache"]["blocks"] == int((0.9 * 141 - 16.4 - 2.0) * 1e9 / (147_456 * 16))
    assert "aiconfigurator-core 0.0" in data["source"]


def test_what_the_library_does_not_know_is_one_sentence(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, Engine())
    command = [word.replace("Qwen/Qwen3-8B", "Nobody/none") for word in COMMAND]
    assert main([*command, str(tmp_path / "p.yaml")]) == 2
    message = capsys.readouterr().err
    assert "Nobody/none on 1 h200_sxm" in message and message.count("\n") == 1
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.skipif(INSTALLED, reason="aiconfigurator-core is installed")
def test_without_the_library_one_sentence_says_how_to_install_it(tmp_path, capsys):
    assert main([*COMMAND, str(tmp_path / "p.yaml")]) == 2
    assert "pip install aiconfigurator-core" in capsys.readouterr().err


@needs_library
def test_a_profile_of_another_pair(tmp_path):
    assert main([*COMMAND, str(tmp_path / "p.yaml")]) == 0
    fit = yaml.safe_load((tmp_path / "p.yaml").read_text())["fit"]
    assert fit["median_error_pct"] < 1.0 and fit["p95_error_pct"] < 5.0


@needs_library
@pytest.mark.skipif(not TABLE.is_file(), reason="recorded tables are not beside the checkout")
def test_answers_are_those_of_the_recorded_table():
    """Rows with one kind of request; the recorded mixed rows give the chunk the decodes' length."""
    from aiconfigurator_core.sdk.engine import EngineHandle

    ours = calibrate_aiconfigurator.table_of(
        EngineHandle.compile("meta-llama/Meta-Llama-3.1-8B", "h100_sxm", "vllm", tp_size=1)
    )
    recorded = read_columns(TABLE, text=("kind",))
    names = ("prefill_tokens", "prefill_prefix", "decode_batch", "mean_kv")
    found = dict(zip(zip(*(ours[name] for name in names), strict=True), ours["iter_ms"], strict=True))
    same = 0
    for *key, ms in zip(*(recorded[name] for name in names), recorded["iter_ms"], strict=True):
        if (key[0] == 0) != (key[2] == 0) and tuple(key) in found:
            assert found[tuple(key)] == pytest.approx(ms, rel=1e-3)
            same += 1
    assert same > 100


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles_name_their_source_and_error(path):
    data = yaml.safe_load(path.read_text())
    assert "aiconfigurator" in data["source"] and "Apache-2.0" in data["source"]
    assert 0 < data["fit"]["median_error_pct"] < 3 and data["fit"]["p95_error_pct"] < 10
    assert data["kv_cache"]["blocks"] > 1000
    assert len(path.read_text()) < 10_000


def test_six_or_more_profiles_are_shipped():
    assert len(PROFILES) >= 6
    assert np.unique([yaml.safe_load(path.read_text())["title"] for path in PROFILES]).size == len(PROFILES)
