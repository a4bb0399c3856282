"""Docs do not rot: links and anchors lead somewhere, commands parse, named files exist, the site builds."""

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from marginroute.cli import Parser

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SCRIPTS = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "export.py": "export",
    "examples/practice_log.py": "practice_log",
}
TOOLS = ("pip", "venv", "pytest", "mkdocs", "ruff", "mypy")  # modules that are not ours


def name_of(page):
    return str(page.relative_to(ROOT))


def slug(heading):
    """The anchor of a heading, as GitHub and mkdocs make it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[`*]", "", text).strip().lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text))


def anchors(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{name_of(page)}: {link}; anchors are {sorted(anchors(path))}"


NAMED = re.compile(r"`((?:tests|envs|agents|evaluation|marginroute|benchmarks|configs|docs|examples)/[\w./-]+\.\w+)`")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_named_files_exist(page):
    missing = [path for path in NAMED.findall(page.read_text()) if not (ROOT / path).exists()]
    assert missing == []


def commands_in(text):
    """(command, whole) of every command that is shown: in a shell block, on an indented line, or between backticks."""
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S):
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            for part in re.split(r"\s*&&\s*|\s*;\s*", line.strip()):
                yield part, True
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    for line in re.findall(r"^    ((?:\.venv/bin/)?(?:(?:python3?|make|pip) |marginroute [a-z-]).*)$", rest, re.M):
        yield re.split(r"\s{3,}", line)[0], True  # what follows is said of it
    for line in re.findall(r"`((?:(?:python3?|make|pip) |marginroute [a-z-])[^`]*)`", re.sub(r"\s*\n\s*", " ", rest)):
        yield line, False


def words_of(command):
    """The words, without comments, environment, redirections and the path of an environment's programs."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return []
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    words = [word for word in words if not re.match(r"^(&|\d?[<>].*)$", word)]
    return [re.sub(r"^[\w./-]*bin/", "", words[0]), *words[1:]] if words else []


class ParsedError(Exception):
    """The command line was understood."""


def parse(words, whole, monkeypatch):
    """Gives a command of ours to its own parser; a placeholder stands for a value. Raises AssertionError."""
    if words[0].startswith("python"):
        if len(words) > 2 and words[1] == "-m":
            name, rest = words[2], words[3:]
            if name.split(".")[0] in TOOLS:
                return
            module = name if name.startswith(("benchmarks.", "envs.")) else f"{name}.__main__"
        elif len(words) > 1 and words[1] in SCRIPTS:
            if "practice_log" in words[1]:
                monkeypatch.syspath_prepend(ROOT / "examples")
            module, rest = SCRIPTS[words[1]], words[2:]
        else:
            assert len(words) > 1 and (words[1] == "-c" or (ROOT / words[1]).exists()), words
            return
    elif words[0] == "marginroute":
        module, rest = "marginroute.__main__", words[1:]
    else:
        return
    main = importlib.import_module(module).main
    real = Parser.parse_args

    def parse_args(self, args=None, namespace=None):
        real(self, args, namespace)
        raise ParsedError

    def error(self, message):
        raise AssertionError(f"{shlex.join(words)}: {message}")

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse_args)
        patch.setattr(Parser, "error", error)
        try:
            main(rest)
        except ParsedError:
            pass
        except SystemExit as end:
            assert not end.code
        except AssertionError as refused:
            if whole or not re.search(r"arguments are required|expected (one|at least)", str(refused)):
                raise


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_commands_parse(page, monkeypatch, capsys):
    for command, whole in commands_in(page.read_text()):
        words = words_of(command)
        if not words or any(re.search(r"\.\.\.|[|\[\]]", word) for word in words if "=" not in word):
            continue
        if words[0] == "pip" or words[1:3] == ["-m", "pip"]:
            for extra in re.findall(r"\.\[([\w,]+)\]", command):
                assert set(extra.split(",")) <= set(EXTRAS), command
        elif words[0] == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
            assert {word for word in words[1:] if word.islower()} <= set(targets), command
        else:
            parse(words, whole, monkeypatch)


def test_the_check_of_commands_finds_what_is_wrong(monkeypatch):
    """The test above can fail."""
    for command in ("python train.py --epsodes 3", "marginroute inspekt x", "python -m benchmarks.decision --slow"):
        with pytest.raises(AssertionError, match=r"did you mean|unknown"):
            parse(words_of(command), True, monkeypatch)
    text = "```sh\nA=1 .venv/bin/python train.py \\\n  --list  # c\n```\n"
    text += "and `marginroute inspect BUNDLE`\n\n    python x.py\n"
    found = [(words_of(command), whole) for command, whole in commands_in(text)]
    assert found == [
        (["python", "train.py", "--list"], True),
        (["python", "x.py"], True),
        (["marginroute", "inspect", "BUNDLE"], False),
    ]


@pytest.mark.parametrize("command", ["python train.py --list", "marginroute --version", "python -m envs fetch --list"])
def test_cheap_commands_run(command):
    words = ["-m", *command.split()] if command.startswith("marginroute") else command.split()[1:]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_page_of_the_bundle_names_every_term_and_feature():
    from envs.economics.plans import TERMS
    from marginroute.features import CANDIDATE_FEATURES, CONTEXT_FEATURES

    page = (ROOT / "docs" / "bundle.md").read_text()
    names = [*TERMS.names, *(feature.name for feature in (*CANDIDATE_FEATURES, *CONTEXT_FEATURES))]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason='pip install -e ".[docs]"')
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= {
        path.name for path in (tmp_path / "site").iterdir()
    }
    assert "load_scenario" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_the_picture_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "images")
    assert importlib.import_module("idea").picture() == (ROOT / "docs" / "images" / "idea.svg").read_text()
