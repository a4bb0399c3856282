"""Who may import whom: the table of levels, held by walking the syntax trees and by looking at real processes."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train", "evaluate", "export")
PACKAGES = ("marginroute", "envs", "agents", "evaluation", "benchmarks")
HEAVY = ("torch", "numba", "stable_baselines3")

# A layer: prefix of its modules (the longest that fits), own modules that it may import, libraries that it may import.
LEVEL_0 = ("marginroute",)
KERNELS = (*LEVEL_0, "envs.kernels")  # how functions are compiled, of use to all of envs
LEVELS_0_2 = (*KERNELS, "envs.workload", "envs.economics", "envs.fleet")
ENVIRONMENT = ("gymnasium", "numba", "numpy", "pydantic", "stable_baselines3.common.vec_env", "yaml")
LEARNING = ("onnx", "optuna", "rich", "scipy", "sklearn", "stable_baselines3", "tensorboard", "torch", "wandb")
LAYERS = {
    "marginroute": (LEVEL_0, ("numpy",)),
    "envs.kernels": ((), ("numba",)),
    "envs.workload": ((*KERNELS, "envs.workload"), ("numba", "numpy")),
    "envs.workload.traces": ((*KERNELS, "envs.workload"), ("numba", "numpy", "polars", "pyarrow")),
    "envs.economics": ((*KERNELS, "envs.economics"), ("numba", "numpy")),
    "envs.fleet": ((*KERNELS, "envs.workload", "envs.fleet"), ("numba", "numpy")),
    "envs": ((*LEVEL_0, "envs"), ENVIRONMENT),
    "agents": ((*LEVEL_0, "envs", "agents"), (*ENVIRONMENT, *LEARNING)),
    "evaluation": (
        (*LEVEL_0, "envs", "agents", "evaluation"),
        ("numpy", "plotly", "polars", "rich", "scipy"),
    ),
}
TOP = ("envs.__main__", "agents.__main__", "benchmarks", *SCRIPTS)  # may import everything; nothing imports them

# Libraries that may be absent: imported inside functions only.
OPTIONAL = {
    "marginroute.cli": ("argcomplete",),
    "marginroute.adapters.litellm": ("litellm",),
    "marginroute.adapters.envoy": ("envoy", "grpc", "grpc_health", "yaml"),
    "marginroute.adapters.envoy_messages": ("envoy",),
    "marginroute.adapters.http": ("httptools", "prometheus_client", "uvicorn"),
    "marginroute.adapters.listen": ("uvloop",),
    "marginroute.adapters.metrics": ("prometheus_client",),
    "marginroute.adapters.metrics_server": ("prometheus_client",),
    "marginroute.shared": ("redis",),
    "marginroute.spans": ("opentelemetry",),
    "marginroute.operation_file": ("yaml",),
    "envs.scenario_compile": ("genai_prices",),
    "envs.emulator": ("uvicorn",),
    "envs.live_view": ("PIL",),
    "envs.describe": ("rich",),
    "envs.describe_page": ("plotly",),
    "envs.calibrate_aiconfigurator": ("aiconfigurator_core",),
    "agents.cluster": ("ray",),
}


def modules():
    """(name, tree) of every module of the project, scripts included."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text())
    for script in SCRIPTS:
        yield script, ast.parse((ROOT / f"{script}.py").read_text())


MODULES = dict(modules())


def imports(tree):
    """(module, inside a function) of every import statement; names taken from a package of ours count as modules."""
    found = []

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            deeper = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                found.extend((name if name in MODULES else child.module, inside) for name in names)
            walk(child, deeper)

    walk(tree, False)
    return found


def belongs(module, prefixes):
    """Whether a module is one of the named ones or inside one of them."""
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def layer_of(name):
    """The longest prefix that the module falls under; `envs.workload.traces` also covers `traces_csv` beside it."""
    fits = [prefix for prefix in LAYERS if belongs(name, [prefix])]
    fits += [prefix for prefix in LAYERS if prefix.count(".") == 2 and name.startswith(f"{prefix}_")]
    return LAYERS[max(fits, key=len)]


def offences(name, tree):
    """Imports of a module that its layer does not allow."""
    own, libraries = layer_of(name)
    optional = OPTIONAL.get(name, ())
    for module, inside in imports(tree):
        if belongs(module, PACKAGES) or module in SCRIPTS:
            if belongs(module, TOP) or not belongs(module, own):
                yield f"{name} imports {module}"
        elif module.split(".")[0] in sys.stdlib_module_names or belongs(module, libraries):
            continue
        elif not (inside and belongs(module, optional)):
            yield f"{name} imports {module}" + (" inside a function" if inside else "")


@pytest.mark.parametrize("name", [name for name in MODULES if not belongs(name, TOP)])
def test_a_module_imports_what_its_layer_may(name):
    assert list(offences(name, MODULES[name])) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("marginroute.view", "import numba"),
        ("marginroute.view", "import envs"),
        ("marginroute.view", "def f():\n    import yaml"),
        ("marginroute.adapters.litellm", "import litellm"),
        ("envs.economics.ledger", "from envs import fleet"),
        ("envs.economics.ledger", "from envs.fleet import engine"),
        ("envs.economics.ledger", "def f():\n    from envs.fleet import engine"),
        ("envs.fleet.engine", "from envs.economics.ledger import ACCOUNTS"),
        ("envs.fleet.engine", "import yaml"),
        ("envs.workload.generator", "import polars"),
        ("envs.vector_env", "from stable_baselines3 import PPO"),
        ("envs.worlds", "import agents.tuning"),
        ("agents.train", "def f():\n    from evaluation.progress import silent"),
        ("evaluation.gate", "import train"),
        ("evaluation.gate", "import torch"),
        ("envs.worlds", "from envs.__main__ import main"),
    ],
)
def test_the_walk_finds_offences(name, source):
    """The test above can fail."""
    assert len(list(offences(name, ast.parse(source)))) == 1


def test_optional_libraries_are_all_needed():
    for name, libraries in OPTIONAL.items():
        inside = {module.split(".")[0] for module, deep in imports(MODULES[name]) if deep}
        assert set(libraries) <= inside, name


def python(*words, **environment):
    """Runs Python at the root; returns (CPU seconds, completed process)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


LOADED = "import sys, runpy; sys.argv = {argv!r}\ntry: {run}\nexcept SystemExit as end: assert not end.code\nfinally: print('LOADED', *sys.modules)"  # noqa: E501


def loaded(statement, argv=("x",)):
    """Top-level packages in sys.modules after a statement."""
    _, done = python("-c", LOADED.format(argv=list(argv), run=statement))
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.partition("LOADED ")[2].split()}


BENCHMARKS = (
    "simulator", "training", "ablations", "decision", "vidur_parity", "dynamo_replay", "fit_accuracy", "gateway",
    "cluster",
)  # fmt: skip
COMMANDS = [
    *(("-m", f"benchmarks.{name}") for name in BENCHMARKS),
    ("train.py",),
    ("evaluate.py",),
    ("export.py",),
    ("-m", "envs"),
    ("-m", "agents"),
    ("-m", "marginroute"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_help_is_fast(words):
    """Half a second of CPU, the best of three: other work on the machine does not count."""
    seconds = []
    for _ in range(3):
        cpu_s, done = python(*words, "--help")
        assert done.returncode == 0 and done.stdout.startswith("usage: ")
        seconds.append(cpu_s)
        if cpu_s < 0.5:
            break
    assert min(seconds) < 0.5


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1])
def test_help_imports_nothing_heavy(words):
    name = words[-1]
    call = f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    if words[0] != "-m":
        call = f"runpy.run_path({name!r}, run_name='__main__')"
    assert not loaded(call, (name, "--help")) & {*HEAVY, "pydantic", "polars"}


def test_help_of_the_worlds_tools_does_not_even_import_gymnasium():
    _, done = python("-X", "importtime", "-m", "envs", "--help")
    assert "argparse" in done.stderr and "gymnasium" not in done.stderr and "numpy" not in done.stderr


def test_marginroute_needs_numpy_alone():
    """Every module a gateway host may import, in one process."""
    names = [name for name in MODULES if belongs(name, ["marginroute"]) and name != "marginroute.__main__"]
    assert len(names) > 10
    packages = loaded(f"import importlib; [importlib.import_module(name) for name in {names!r}]")
    assert "numpy" in packages
    own = {"marginroute", "__main__"}
    foreign = {p for p in packages - own - {"numpy"} if p not in sys.stdlib_module_names and not p.startswith("_")}
    assert foreign <= site_packages(), foreign - site_packages()


def site_packages():
    """What a bare interpreter loads by itself (.pth files of editable installs and the like)."""
    return {name for name in loaded("pass") if name not in sys.stdlib_module_names}


def test_the_environment_registers_without_loading_it():
    """`import envs` announces Fleet-v0 to Gymnasium; kernels and frameworks load when it is made."""
    assert not loaded("import envs") & {*HEAVY, "pydantic"}
