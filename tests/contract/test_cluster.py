"""A Ray cluster of two nodes on this machine: the numbers of one process, also when a process or a node is killed."""

import importlib.util
import json
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from jobs import start_squares, start_suicide
from sizes import TINY, TINY_TRAINING

import evaluate
import train
from agents.archive import load_archive
from agents.cluster import Cluster, connected, identity
from agents.config import load_training
from agents.objective import Objective
from agents.run import Run
from agents.train import train as train_router
from agents.workers import Crew
from marginroute.errors import InputError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install -e ".[ray]"')
TESTS = str(Path(__file__).parents[1])
EVALUATION = ["quickstart", "--episodes", "20", "--no-cache", "--set", *(f"{key}={x}" for key, x in TINY.items())]


@pytest.fixture(scope="module")
def nodes():
    """Two node processes of one CPU each, whose workers find the jobs of `jobs`."""
    from ray.cluster_utils import Cluster as Nodes

    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TESTS)
        patch.setenv("RAY_worker_niceness", "0")  # else 15: other tests run beside these
        found = Nodes(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        found.add_node(**small)
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def crew(nodes):
    with connected(nodes.address), Crew(Cluster()) as found:
        yield found


@needs_ray
def test_an_evaluation_by_a_cluster_writes_the_same_document(nodes, tmp_path, tuned_cache):
    documents = []
    for name, where in (("one", ["--workers", "1"]), ("ray", ["--ray", nodes.address, "--workers", "1"])):
        words = ["--baselines", "least-in-flight,round-robin", "--json", str(tmp_path / f"{name}.json")]
        assert evaluate.main([*EVALUATION, *words, *where]) == 0
        documents.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert documents[0] == documents[1] and documents[0]["episodes"] == 20


@needs_ray
def test_errors_of_the_work_come_back_as_they_are(crew):
    assert crew.size == 2
    with pytest.raises(InputError, match=r"^2 is not legal$"):
        list(crew.job(start_squares, (3,)).each([5, 2, 4]))


@needs_ray
def test_a_killed_process_is_replaced(crew, tmp_path):
    done = dict(crew.job(start_suicide, (tmp_path / "once",)).each(range(6)))
    assert sorted(done) == list(range(6)) and done[3] != int((tmp_path / "once").read_text())


@needs_ray
def test_a_training_survives_the_loss_of_a_node(nodes, crew, tmp_path, tiny_plant, tiny_tuned):
    """The node goes in the middle of the second of four rollouts; a population is played by who is left."""
    config = load_training(None, TINY_TRAINING | {"n_envs": 40, "steps": 40 * 32 * 4, "validations": 1})
    advice = tiny_tuned[0]["bid-price-fitted"].policy

    def kill(done, total):
        if done == 40 * 32:
            threading.Timer(0.05, lambda: nodes.remove_node(nodes.worker_nodes.copy().pop(), False)).start()

    weights = []
    for name, others, progress in (("one", None, lambda *_: None), ("ray", crew, kill)):
        run = Run(tmp_path / name)
        run.create(tiny_plant.scenario, config, 1, "a test")
        train_router(tiny_plant, advice, config, run, 1, progress=progress, crew=others)
        weights.append(load_archive(run.newest_checkpoint(), None).policy.state_dict())
    assert not nodes.worker_nodes
    for name, ours in weights[0].items():
        np.testing.assert_array_equal(ours.numpy(), weights[1][name].numpy(), err_msg=name)
    rules = [advice] * 3
    np.testing.assert_array_equal(
        Objective(tiny_plant, "train", range(2), crew)(rules), Objective(tiny_plant, "train", range(2))(rules)
    )


@needs_ray
def test_nodes_with_other_code_are_refused():
    staff = object.__new__(Cluster)
    staff._identity = identity()
    staff.welcome(("node7", identity()))
    with pytest.raises(InputError, match="node7 has no checkout of marginroute at"):
        staff.welcome(("node7", None))
    for name, words in (("numpy", "has numpy '1.0'"), ("code", "has code '1.0'")):
        with pytest.raises(InputError, match="legal is the same on all nodes") as refused:
            staff.welcome(("node7", identity() | {name: "1.0"}))
        assert words.replace("'", "") in str(refused.value)


def error_of(main, arguments, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    return message


@needs_ray
def test_an_address_that_nobody_answers_at(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    for address, words in (
        ("nonsense", "is not an address; legal is auto"),
        ("ray://127.0.0.1:10001", "is not an address; legal is auto"),
        (f"127.0.0.1:{closed}", "cannot be reached"),
        ("host.invalid:6379", "cannot be reached"),
    ):
        assert words in error_of(evaluate.main, [*EVALUATION, "--ray", address], capsys)
    run = tmp_path / "run"
    assert "cannot be reached" in error_of(train.main, ["--ray", f"127.0.0.1:{closed}", "--out", str(run)], capsys)
    assert not run.exists()


@needs_ray
def test_a_server_that_is_no_cluster(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            line, _ = server.accept()
            line.recv(100)
            line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert "is not a Ray cluster" in error_of(evaluate.main, [*EVALUATION, "--ray", address], capsys)


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    for main, words in ((evaluate.main, EVALUATION), (train.main, ["--out", str(tmp_path / "run")])):
        assert 'pip install -e ".[ray]"' in error_of(main, [*words, "--ray", "auto"], capsys)
    assert not (tmp_path / "run").exists()
