"""Tensor parallel: engines that span several GPUs, shipped with their source and paid for all their GPUs."""

import pytest

from envs.plant import Plant
from envs.scenario import load_scenario
from envs.scenario_files import CONFIGS, read_yaml
from marginroute.errors import InputError

PARALLEL = {"qwen3-32b-h100-tp2": 2, "llama-3.1-70b-h100-tp4": 4}


@pytest.mark.parametrize(("name", "gpus"), PARALLEL.items())
def test_profiles_that_span_gpus_say_where_they_come_from(name, gpus):
    data = read_yaml(CONFIGS / "fleets" / "profiles" / f"{name}.yaml")
    memory = data["kv_cache"]
    assert "aiconfigurator" in data["source"] and memory["gpus"] == gpus and str(gpus) in data["title"]
    room = (gpus * memory["gpu_memory_gb"] * memory["memory_utilisation"] - memory["weights_gb"]) * 1e9
    blocks = room / (memory["bytes_per_token"] * memory["block_size_tokens"])
    assert memory["blocks"] == pytest.approx(
        blocks, rel=0.08
    )  # what else an engine keeps in memory is not the KV cache


def test_every_gpu_of_every_replica_is_paid():
    """Starter: 1.5484 on one L40S; 2.95 each on two, then four H100."""

    def usd_per_hour(**changes):
        overrides = {f"fleet.pools.{name.replace('__', '.')}": value for name, value in changes.items()}
        return float(Plant(load_scenario("quickstart", overrides)).gpu_usd_per_s.sum()) * 3600.0

    assert usd_per_hour() == pytest.approx(1.5484 + (2 + 4) * 2.95)
    assert usd_per_hour(large__replicas=3) == pytest.approx(1.5484 + (2 + 3 * 4) * 2.95)
    assert usd_per_hour(large__gpus_per_replica=8) == pytest.approx(1.5484 + (2 + 8) * 2.95)


def test_an_engine_cannot_hold_fewer_gpus_than_its_profile_spans():
    with pytest.raises(InputError, match=r"fleet.pools.medium.gpus_per_replica.*legal is at least 2"):
        load_scenario("quickstart", {"fleet.pools.medium.gpus_per_replica": 1})
