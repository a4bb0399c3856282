"""Work that others share gives the numbers of one process, also where a worker dies: rollouts, populations, trials."""

import os
import resource

import numpy as np
import pytest
from jobs import Here, start_hunger, start_squares, start_suicide
from sizes import TINY_TRAINING

from agents.archive import load_archive
from agents.config import load_training
from agents.objective import Objective
from agents.processes import Processes
from agents.rollouts import Whereabouts, shares
from agents.run import Run
from agents.search import Budget
from agents.train import train
from agents.tuning import tune_margin_rules
from agents.workers import Crew, shared_out
from marginroute.errors import InputError, WorkError
from marginroute.heuristics import to_dict
from marginroute.margin_rule import MarginParameters, MarginRule

FOUR_ROLLOUTS = TINY_TRAINING | {"n_envs": 40, "rollout_steps": 32, "steps": 40 * 32 * 4, "validations": 1}


def test_every_item_is_done_once_by_whoever_is_there():
    for size in (1, 2, 3, 9):
        staff = Here(size)
        with Crew(staff) as crew:
            assert sorted(crew.job(start_squares, (0,)).each(range(7))) == [x * x for x in range(7)]
            assert sorted(crew.job(start_squares, (0,)).each([])) == []
        assert sorted(staff.did) == list(range(7)) and len(staff.members) == min(size, 7)


def test_what_a_lost_member_had_is_done_by_another(capsys):
    staff = Here(2, dies_of=[3, 1])
    with Crew(staff) as crew:
        assert sorted(crew.job(start_squares, (0,)).each(range(9))) == [x * x for x in range(9)]
    assert len(staff.members) == 4 and sorted(staff.did) == list(range(9))
    assert capsys.readouterr().err.count("a worker was lost") == 2


def test_work_that_kills_everybody_ends():
    with Crew(Here(2, dies_of=[1] * 9)) as crew, pytest.raises(WorkError, match="3 workers died of the same work"):
        list(crew.job(start_squares, (0,)).each([1]))


def test_the_sentence_says_how_they_died():
    sentence = r"3 workers died of the same work \(killed by SIGKILL, out of memory\?\); try fewer --workers"
    with Crew(Processes(2)) as crew, pytest.raises(WorkError, match=sentence):
        list(crew.job(start_suicide, (None,)).each([3]))
    with Crew(Here(2)) as crew, pytest.raises(WorkError, match="a worker ran out of memory; try fewer --workers"):
        list(crew.job(start_hunger, ()).each([1]))


def test_no_room_for_a_process():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Crew(Processes(3)) as crew, pytest.raises(WorkError) as refused:
        job = crew.job(start_squares, (0,))
        next(iter(job.each([1])))  # one can start
        try:
            os.close(free := os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, limits[1]))
            list(job.each(range(9)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert str(refused.value) == "a worker process cannot be started (Too many open files); try fewer --workers"


def test_an_error_of_the_work_is_the_callers():
    for workers in (1, Crew(Here(2))):
        with pytest.raises(InputError, match="2 is not legal"):
            list(shared_out(start_squares, (3,), [5, 2, 4], workers))


def test_a_killed_process_is_replaced(tmp_path):
    with Crew(Processes(2)) as crew:
        job = crew.job(start_suicide, (tmp_path / "once",))
        first = dict(job.each(range(6)))
        killed = int((tmp_path / "once").read_text())
        assert sorted(first) == list(range(6)) and first[3] != killed
        again = dict(job.each(range(6)))  # the members stay
        assert sorted(again) == list(range(6)) and killed not in again.values()


def test_whereabouts_follow_the_episodes():
    where = Whereabouts.at_the_start(3)
    where.went_on(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[False, True, False], [False, False, True]]))
    assert where.rounds.tolist() == [0, 1, 1] and where.lengths.tolist() == [2, 1, 0]
    assert where.actions[0].tolist() == [1, 4] and where.actions[1, 0] == 5
    assert where.starts.tolist() == [False, False, True]
    where.went_on(np.array([[7, 8, 9]]), np.array([[False, True, False]]))
    assert where.rounds.tolist() == [0, 2, 1] and where.lengths.tolist() == [3, 0, 1]
    assert where.actions[0].tolist() == [1, 4, 7] and where.actions[2, 0] == 9
    part = where.of(slice(1, 3))
    assert part.lengths.tolist() == [0, 1] and part.actions.shape == (2, 1)


@pytest.mark.parametrize(("n", "piece", "members"), [(128, 16, 3), (40, 16, 2), (8, 16, 4), (5, 2, 9), (16, 16, 1)])
def test_worlds_are_shared_out_in_whole_pieces(n, piece, members):
    found = shares(n, piece, members)
    assert [x.start for x in found] == [0, *(x.stop for x in found[:-1])] and found[-1].stop == n
    assert all(x.start % piece == 0 and x.stop > x.start for x in found)
    assert len(found) == min(members, -(-n // piece))


@pytest.fixture(scope="module")
def config():
    return load_training(None, FOUR_ROLLOUTS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_plant, tiny_tuned, config):
    """Trains with a crew, or without; returns the history and the final weights."""
    advice = tiny_tuned[0]["bid-price-fitted"].policy

    def make(crew=None):
        run = Run(tmp_path_factory.mktemp("run") / "run")
        run.create(tiny_plant.scenario, config, 1, "a test")
        train(tiny_plant, advice, config, run, 1, crew=crew)
        last = load_archive(run.newest_checkpoint(), None).policy
        return run.info()["history"], {name: x.numpy().copy() for name, x in last.state_dict().items()}

    return make


@pytest.fixture(scope="module")
def alone(trained):
    return trained()


@pytest.mark.parametrize(
    ("size", "dies_of"), [(1, ()), (3, ()), (2, (-1, 3)), (1, (4,))], ids=["1", "3", "2-dies", "1-dies"]
)
def test_rollouts_of_a_crew_are_those_of_one_process(trained, alone, size, dies_of):
    """Bit by bit, over four rollouts in which every world ends an episode; a lost member's worlds are played up."""
    staff = Here(size, dies_of)
    with Crew(staff) as crew:
        history, weights = trained(crew)
    assert history == alone[0]
    assert all(np.array_equal(weights[name], x) for name, x in alone[1].items())
    assert len(staff.members) == size + len([n for n in dies_of if n > 0])
    assert abs(weights["scorer.head.weight"]).max() > 0.0  # it did learn


def test_a_population_earns_what_it_earns_in_one_process(small_plant):
    stations = len(small_plant.layout.station_names)
    rules = [
        MarginRule("rule", MarginParameters(station_usd_per_s=(10.0**-x,) * stations, fill_power=x)) for x in range(5)
    ]
    whole = Objective(small_plant, "train", range(3))(rules)
    for size in (1, 2, 5):
        with Crew(Here(size)) as crew:
            np.testing.assert_array_equal(Objective(small_plant, "train", range(3), crew)(rules), whole)


def test_tuning_by_a_crew_finds_the_same_rules(tiny_plant, tiny_tuned):
    tuned, budget = tiny_tuned
    assert isinstance(budget, Budget)
    with Crew(Here(2)) as crew:
        shared = tune_margin_rules(tiny_plant, budget, crew=crew)
    for name, found in shared.items():
        assert to_dict(found.policy) == to_dict(tuned[name].policy)
