"""The bundle's ONNX graph is its network: by onnx's own evaluator here, and by onnxruntime in Node.js."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from test_policy_bundle import arrays_of, exported, rewrite  # noqa: F401

from marginroute import bundle as bundles
from marginroute.errors import InputError
from marginroute.features import split

ROOT = Path(__file__).parents[2]
NODE = shutil.which("node")
EXAMPLE = ROOT / "examples" / "node"


def test_the_graph_reproduces_the_parity_vectors(exported):  # noqa: F811
    _, folder = exported
    policy = bundles.load(folder).policy
    parity = arrays_of(folder, "parity.npz")
    n_candidates = parity["logits"].shape[1]
    candidate, context, advice, legal = split(parity["observation"], n_candidates, policy.spec)
    graph = ReferenceEvaluator(onnx.load(folder / "policy.onnx"))
    feeds = {"candidate": candidate, "context": context, "advice": advice, "legal": legal > 0.5}
    logits, choice = graph.run(None, feeds)
    np.testing.assert_allclose(logits[legal > 0.5], parity["logits"][legal > 0.5], rtol=0.0, atol=1e-5)
    assert (logits[legal < 0.5] == -np.inf).all() and (legal < 0.5).any()
    np.testing.assert_array_equal(choice, np.where(legal > 0.5, parity["logits"], -np.inf).argmax(-1))


def test_it_takes_any_number_of_requests_and_candidates(exported):  # noqa: F811
    made, folder = exported
    spec, rng = made.policy.spec, np.random.default_rng(0)
    graph = ReferenceEvaluator(onnx.load(folder / "policy.onnx"))
    for b, c in ((1, 1), (3, 40)):
        candidate = rng.normal(size=(b, c, spec.n_candidate)).astype(np.float32)
        context, advice = (rng.normal(size=(b, n)).astype(np.float32) for n in (spec.n_context, c))
        feeds = {"candidate": candidate, "context": context, "advice": advice, "legal": np.ones((b, c), dtype=bool)}
        logits, _ = graph.run(None, feeds)
        np.testing.assert_allclose(logits, made.policy.folded.logits(candidate, context, advice), atol=1e-4)


def test_a_file_that_is_no_part_of_a_bundle_is_not_read(exported, tmp_path):  # noqa: F811
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    rewrite(copy, lambda manifest: manifest["sha256"].__setitem__("../../secret", "0" * 64))
    with pytest.raises(InputError, match="no part of a bundle"):
        bundles.load(copy)


@pytest.fixture
def run():
    if NODE is None:
        pytest.skip("no node on this machine")
    if not (EXAMPLE / "node_modules" / "onnxruntime-node").is_dir():
        pytest.skip("run npm install --ignore-scripts in examples/node")

    def parity(folder):
        return subprocess.run([NODE, EXAMPLE / "parity.mjs", folder], capture_output=True, text=True, timeout=60.0)

    return parity


@pytest.mark.integration
def test_node_reproduces_the_parity_vectors(exported, run):  # noqa: F811
    done = run(exported[1])
    assert done.returncode == 0, done.stderr
    assert "64 of 64 choices are the same" in done.stdout


@pytest.mark.integration
def test_node_refuses_a_changed_graph(exported, run, tmp_path):  # noqa: F811
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    data = bytearray((copy / "policy.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "policy.onnx").write_bytes(data)
    done = run(copy)
    assert done.returncode == 1 and "does not match the sha256" in done.stderr
