"""Stable-Baselines3's archives of a training: written whole or not at all, and refused in one sentence."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TypeVar

from stable_baselines3.common.vec_env import VecEnv

from agents.ppo import MarginPPO
from agents.rollouts import SharedPPO, SharedVecEnv
from agents.run import check_archive
from envs.vector_env import FleetVecEnv
from marginroute.errors import InputError
from marginroute.whole_file import replacing

Algorithm = TypeVar("Algorithm", bound=MarginPPO)


def save_archive(model: MarginPPO, path: Path) -> None:
    """Saves Stable-Baselines3's archive completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        model.save(partial)


def algorithm_of(env: VecEnv | None) -> type[MarginPPO]:
    """What plays an environment's rollouts."""
    return SharedPPO if isinstance(env, SharedVecEnv) else MarginPPO


def load_archive(path: Path, env: FleetVecEnv | None) -> MarginPPO:
    """Loads the router's archive; raises InputError as `load_with`."""
    return load_with(algorithm_of(env), path, env)


def load_with(algorithm: type[Algorithm], path: Path, env: VecEnv | None) -> Algorithm:
    """Loads Stable-Baselines3's archive.

    Raises:
        InputError: missing, corrupt, or made for another observation or action space.
    """
    check_archive(path)
    try:
        return algorithm.load(path, env=env, device="cpu")
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path} cannot be loaded for this scenario ({reason}); train again") from None
