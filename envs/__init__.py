"""The world: what happens whether or not anyone learns.

Importing this package registers `marginroute/Fleet-v0` and `marginroute/Control-v0` with Gymnasium (an environment is
imported only when it is made) and chooses where Numba keeps compiled kernels.
"""

import hashlib
import os
import shutil
import sys
import time
from functools import cache
from pathlib import Path

from marginroute.cli import note

KEEP_KERNELS_S = 3 * 86400.0  # folders of other states of the sources are removed after that
_ROOT = Path(__file__).resolve().parent.parent


def _use_kernel_cache() -> None:
    """Points Numba at a cache folder of its own for this state of the sources.

    Numba notices a change of the file that a kernel is in, but not of the kernels that it calls in other files; a
    folder per state of all sources rules out stale machine code.
    """
    sources = [*sorted((_ROOT / "envs").rglob("*.py")), *sorted((_ROOT / "marginroute").glob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    kernels = _cache_root() / "kernels"
    os.environ.setdefault("NUMBA_CACHE_DIR", str(kernels / digest))
    if kernels.is_dir():
        for old in kernels.iterdir():
            if old.name != digest and old.stat().st_mtime < time.time() - KEEP_KERNELS_S:
                shutil.rmtree(old, ignore_errors=True)


def _cache_root() -> Path:
    """The checkout, or the user's cache where the checkout may not be written to."""
    if os.access(_ROOT, os.W_OK):
        return _ROOT / ".marginroute_cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "marginroute"


@cache
def announce_compilation() -> None:
    """Says on stderr, once, that the world is about to be compiled; small kernels may have been already."""
    if not any(Path(os.environ["NUMBA_CACHE_DIR"]).glob("*/world.step-*.nbi")):
        note("compiling the simulator: once after each change of its sources, about a minute")


def register() -> None:
    """Registers the environments with Gymnasium; safe to call again."""
    import gymnasium

    if "marginroute/Fleet-v0" not in gymnasium.registry:
        gymnasium.register(
            id="marginroute/Fleet-v0",
            entry_point="envs.fleet_env:FleetEnv",
            vector_entry_point="envs.vector_env:FleetVectorEnv",
        )
    if "marginroute/Control-v0" not in gymnasium.registry:
        gymnasium.register(
            id="marginroute/Control-v0",
            entry_point="envs.control_env:ControlEnv",
            vector_entry_point="envs.control_env:ControlVectorEnv",
        )


_use_kernel_cache()
if sys.argv[:1] != ["-m"]:  # what Python puts there while it looks for the module of `python -m envs`
    register()
