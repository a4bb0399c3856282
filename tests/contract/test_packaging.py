"""What is installed: the wheel on bare machines, pinned constraints, and figures of its weight."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from marginroute import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = ("3.11", "3.12", "3.13")
SECONDS, MIB = 0.15, 40.0
GATEWAY_SECONDS = 0.5  # of a bundle and a gateway beside numpy; 0.11 to 0.15 at rest, more on a busy core


def sh(*words, cwd=ROOT, **environment):
    clean = {key: x for key, x in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "marginroute", source / "marginroute", ignore=shutil.ignore_patterns("__pycache__"))
    done = sh(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, source)
    if done.returncode:
        assert "network" in done.stderr.lower() or "could not find a version" in done.stderr.lower(), done.stderr
        pytest.skip("no package index to fetch setuptools from")
    [path] = folder.glob("*.whl")
    return path


def interpreter(version):
    """A Python of this version, or None."""
    if found := shutil.which(f"python{version}"):
        done = sh(found, "--version")
        if done.returncode == 0:  # else a shim without that version
            return found
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    return next((str(path) for path in sorted(homes.glob(f"{version}.*/bin/python"))), None)


MEASURE = """
import json, os, resource, sys, time
def rss(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20
before, times = rss(), [time.process_time()]
import marginroute
times.append(time.process_time())
import numpy
times.append(time.process_time())
import marginroute.bundle, marginroute.gateway
times.append(time.process_time())
found = dict(zip(("alone_s", "numpy_s", "s"), (b - a for a, b in zip(times, times[1:]))))
packages = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)
print(json.dumps({"version": marginroute.__version__, "mib": rss() - before, "packages": sorted(packages), **found}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("version", TESTED)
def test_the_wheel_on_a_bare_machine(wheel, tmp_path, version):
    """Installs numpy and nothing else, and takes little time and memory: bundle and gateway beside numpy, too."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    assert sh(python, "-m", "venv", tmp_path / "venv").returncode == 0
    own = tmp_path / "venv" / "bin" / "python"
    done = sh(own, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
    assert done.returncode == 0, done.stderr
    listed = json.loads(sh(own, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check").stdout)
    assert {row["name"] for row in listed} - {"pip", "setuptools"} == {"marginroute", "numpy"}
    runs = [sh(own, "-c", MEASURE, cwd=tmp_path, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1") for _ in range(5)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    found = [json.loads(run.stdout) for run in runs]
    assert found[0]["version"] == __version__
    assert {name for name in found[0]["packages"] if not name.startswith("_")} == {"marginroute", "numpy"}
    best = {key: min(x[key] for x in found) for key in ("alone_s", "numpy_s", "s", "mib")}
    print(f"Python {version}: {best}")
    assert best["alone_s"] < SECONDS and best["s"] < GATEWAY_SECONDS and best["mib"] < MIB
    command = tmp_path / "venv" / "bin" / "marginroute"
    assert sh(command, "--version", cwd=tmp_path).stdout == f"marginroute {__version__}\n"
    refused = sh(command, "inspect", "nowhere", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")


def test_the_wheel_holds_marginroute_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"marginroute", f"marginroute-{__version__}.dist-info"}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "marginroute").rglob("*.py")}
    assert ours == {name for name in names if name.endswith(".py")}


def test_classifiers_name_what_is_tested():
    named = [
        x.rpartition(" ")[2] for x in PROJECT["classifiers"] if x.startswith("Programming Language :: Python :: 3.")
    ]
    assert tuple(named) == TESTED


def test_versions_agree():
    assert PROJECT["version"] == __version__
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_requirement_within_its_range():
    packaging = pytest.importorskip("packaging.requirements")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *(x for name in ("train", "envoy", "http", "test", "docs", "dev") for x in extras[name]),
    ]
    for requirement in map(packaging.Requirement, wanted):
        if requirement.name != PROJECT["name"] and (requirement.marker is None or requirement.marker.evaluate()):
            assert requirement.specifier.contains(pins[normal(requirement.name)]), requirement


def test_what_runs_here_is_installed_as_stated():
    """Every library that the layers may import stands in an extra."""
    stated = {
        normal(re.split(r"[\[<>=;~! ]", x)[0]) for rows in PROJECT["optional-dependencies"].values() for x in rows
    }
    for name in ("torch", "stable-baselines3", "gymnasium", "numba", "scipy", "scikit-learn", "optuna", "pydantic"):
        assert name in stated and importlib.metadata.version(name)
