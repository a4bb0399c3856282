"""The measurements of benchmarks/training.py."""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from agents.config import load_training
from agents.network import ScorerPolicy, scorer_settings
from agents.train import make_model
from benchmarks import common
from envs.fleet_env import FleetEnv
from envs.plant import Plant
from envs.scenario import load_scenario
from envs.vector_env import FleetVecEnv
from marginroute import features


def cpu_seconds(model: Any, steps: int) -> float:
    """CPU-seconds of learning `steps` after a first rollout and update that compile and allocate."""
    model.learn(model.n_steps * model.n_envs)
    start = time.process_time()
    model.learn(steps, reset_num_timesteps=False)
    return time.process_time() - start


def native(steps: int, seed: int = 0, taught_share: float = 0.0) -> dict[str, float]:
    """The product's path, PPO or teaching: steps per CPU-second, and wall seconds."""
    torch.set_num_threads(1)
    config = load_training(None, {"taught_share": taught_share})
    plant = Plant(load_scenario("quickstart"))
    spec = features.feature_spec(plant.layout)
    env = FleetVecEnv(plant, config.n_envs, stagger=True)
    model = make_model(env, config, spec, seed, None)
    start = time.perf_counter()
    cpu_s = cpu_seconds(model, steps)
    return {"steps_per_cpu_s": steps / cpu_s, "wall_s": time.perf_counter() - start}


def dummy(steps: int, stock: bool) -> float:
    """Steps per CPU-second of the same environment in DummyVecEnv."""
    scenario = load_scenario("quickstart")
    env = DummyVecEnv([lambda: FleetEnv(scenario) for _ in range(8)])
    if stock:
        model = PPO("MlpPolicy", env, n_steps=256, batch_size=64, n_epochs=10, seed=0, device="cpu")
    else:
        config = load_training(None, {})
        spec = features.feature_spec(Plant(scenario).layout)
        model = PPO(
            ScorerPolicy,
            env,
            n_steps=config.n_envs * config.rollout_steps // 8,
            batch_size=config.minibatch,
            n_epochs=config.epochs,
            learning_rate=config.learning_rate,
            policy_kwargs=scorer_settings(config, spec),
            seed=0,
            device="cpu",
        )
    return steps / cpu_seconds(model, steps)


def sbx(steps: int) -> float | None:
    """Steps per CPU-second of Stable-Baselines3's PPO on JAX with `dummy`'s stock settings; None: not installed."""
    if importlib.util.find_spec("sbx") is None:
        return None
    import sbx

    scenario = load_scenario("quickstart")
    env = DummyVecEnv([lambda: FleetEnv(scenario) for _ in range(8)])
    return steps / cpu_seconds(sbx.PPO("MlpPolicy", env, n_steps=256, batch_size=64, n_epochs=10, seed=0), steps)


def wall_speedup(steps: int) -> float:
    """Two trainings at once against one, per wall second."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.starmap(native, [(1, 0), (1, 1)])
        start = time.perf_counter()
        pool.apply(native, (steps, 0))
        one_s = time.perf_counter() - start
        start = time.perf_counter()
        pool.starmap(native, [(steps, 0), (steps, 1)], chunksize=1)
        two_s = time.perf_counter() - start
    return 2.0 * one_s / two_s


def measured(quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures, and the settings of the training."""
    config = load_training(None, {})
    rollout = config.n_envs * config.rollout_steps
    steps = rollout * (2 if quick else 24)
    common.note("native path")
    ours = native(steps)["steps_per_cpu_s"]
    taught = native(steps, taught_share=1.0)["steps_per_cpu_s"]
    common.note("the same in DummyVecEnv")
    reference = dummy(rollout if quick else 4 * rollout, stock=False)
    common.note("stock Stable-Baselines3")
    stock = dummy(2048 if quick else 16384, stock=True)
    jax = sbx(2048 if quick else 16384)
    figures: dict[str, Any] = {
        "env_steps_per_cpu_s": round(ours),
        "taught_env_steps_per_cpu_s": round(taught),
        "dummy_vec_env_steps_per_cpu_s": round(reference),
        "ratio_to_dummy_vec_env": round(ours / reference, 2),
        "stock_sb3_steps_per_cpu_s": round(stock),
        "stock_sbx_steps_per_cpu_s": None if jax is None else round(jax),
    }
    if not quick:
        common.note("one and two processes")
        figures["wall_speedup_2_cores"] = round(wall_speedup(steps), 2)
    settings = {name: getattr(config, name) for name in ("n_envs", "rollout_steps", "epochs", "minibatch", "width")}
    return figures, settings
