"""Configuration files: strict YAML, composition by name, overrides, and errors as one sentence.

The sentence names the file (or the override), the key path, the value, and what is legal.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from marginroute.errors import InputError, suggestion

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SECTIONS = {"fleet": "fleets", "plans": "plans", "workload": "workloads"}
FOLDER_OF = {**SECTIONS, "scenario": "scenarios", "profile": "fleets/profiles"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and keys that are no names, and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # keys of the mapping itself win over merged ones
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float)):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is no name", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); legal is a readable YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; legal is a YAML file") from None
    data = parse_yaml(text, _relative(path))
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds {_shown(data)}; legal is a mapping of keys to values")
    return data


def parse_yaml(text: str, source: str) -> Any:
    """One YAML value; `source` names it in errors."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{source}, line {line}: {error.problem}; legal is well-formed YAML, each key once") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]}; legal is YAML") from None


def locate(name_or_path: str | Path, kind: str) -> Path:
    """The file of a scenario, fleet, plans, workload or profile given by name or by path."""
    text = str(name_or_path)
    folder = CONFIGS / FOLDER_OF[kind]
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
        if not path.is_file():
            raise InputError(f"{kind} {text}: no such file; legal is a YAML file or a name in {_relative(folder)}")
        return path
    path = folder / f"{text}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        raise InputError(f"{kind} {text!r}: not in {_relative(folder)}{suggestion(text, names)}")
    return path


def compose(raw: dict[str, Any], path: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Replaces section names by the files' content.

    Returns:
        The whole mapping and, for each section, the file it came from ("" is the scenario itself).
    """
    data, files = dict(raw), {"": _relative(path)}
    for section in SECTIONS:
        if isinstance(overrides.get(section), str):
            data[section] = overrides[section]
        if isinstance(data.get(section), str):
            found = locate(data[section], section)
            data[section], files[section] = read_yaml(found), _relative(found)
    return data, files


def apply_overrides(model: type[BaseModel], data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Sets dotted keys; strings are parsed as YAML; an unknown key is an error with the nearest legal ones."""
    for dotted, value in overrides.items():
        if dotted in SECTIONS and isinstance(value, str):
            continue
        parsed = parse_yaml(value, f"--set {dotted}={value}") if isinstance(value, str) else value
        data = _with(model, data, dotted.split("."), parsed, dotted)
    return data


def _with(annotation: Any, data: Any, keys: list[str], value: Any, dotted: str) -> Any:
    """A copy of `data` with the value at the key path."""
    key, rest = keys[0], keys[1:]
    if isinstance(data, (list, tuple)):
        index = int(key) if key.isdigit() else -1
        if not 0 <= index < len(data):
            raise InputError(f"--set {dotted}: {key!r} is no index here; legal is 0 to {len(data) - 1}")
        inner = _with(item_type(annotation), data[index], rest, value, dotted) if rest else value
        return [*data[:index], inner, *data[index + 1 :]]
    if data is not None and not isinstance(data, dict):
        raise InputError(f"--set {dotted}: {key!r} lies below {_shown(data)}; legal is a key of a mapping")
    data = dict(data or {})
    model = model_of(annotation, data)
    names = list(model.model_fields) if model else list(data)
    if key not in names:
        raise InputError(f"--set {dotted}: unknown key {key!r}{suggestion(key, names)}")
    below = model.model_fields[key].annotation if model else item_type(annotation)
    data[key] = _with(below, data.get(key), rest, value, dotted) if rest else value
    return data


def model_of(annotation: Any, data: Any) -> type[BaseModel] | None:
    """The section class behind a type; among several the one whose `kind` the data has."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return model_of(typing.get_args(annotation)[0], data)
    if origin not in (typing.Union, UnionType):
        return None
    models = [found for part in typing.get_args(annotation) if (found := model_of(part, data))]
    kind = data.get("kind") if isinstance(data, dict) else None
    for model in models:
        if "kind" in model.model_fields and kind in typing.get_args(model.model_fields["kind"].annotation):
            return model
    return models[0] if len(models) == 1 else None


def item_type(annotation: Any) -> Any:
    """The type of a mapping's values or a sequence's items."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        annotation = next((part for part in typing.get_args(annotation) if part is not type(None)), Any)
        return item_type(annotation)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return arguments[1]
    return arguments[0] if arguments else Any


def input_error(
    error: ValidationError, model: type[BaseModel], data: Any, files: Mapping[str, str], overrides: Iterable[str]
) -> InputError:
    """The first problem of a validation as one sentence, with the number of the others."""
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    path, owner, value = _walk(model, data, first["loc"])
    sentence = f"{place(path, files, overrides)}: {_problem(first, path, owner, value)}"
    return InputError(sentence + _others(len(problems) - 1))


def cross_error(problems: list[tuple[str, str]], files: Mapping[str, str], overrides: Iterable[str]) -> InputError:
    """The first contradiction between sections as one sentence, with the number of the others."""
    dotted, sentence = problems[0]
    return InputError(f"{place(dotted.split('.'), files, overrides)}: {sentence}{_others(len(problems) - 1)}")


def _others(count: int) -> str:
    return f" (and {count} more problem{'s' if count > 1 else ''})" if count else ""


def _walk(model: type[BaseModel], data: Any, loc: tuple[Any, ...]) -> tuple[list[str], type[BaseModel] | None, Any]:
    """Key path without union tags, the section that holds the last key, and the value there."""
    path: list[str] = []
    annotation: Any = model
    owner: type[BaseModel] | None = model
    for index, key in enumerate(loc):
        found = model_of(annotation, data)
        last = index == len(loc) - 1
        if isinstance(data, dict) and key not in data and not (last and found and key in found.model_fields):
            continue  # the tag of a union, or a marker such as [key]
        path.append(str(key))
        owner = found
        field = found.model_fields.get(key) if found else None
        annotation = field.annotation if field else item_type(annotation)
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, (list, tuple)) and isinstance(key, int) and key < len(data):
            data = data[key]
    return path, owner, data


def _problem(problem: Any, path: list[str], owner: type[BaseModel] | None, value: Any) -> str:
    kind, message, context = problem["type"], problem["msg"], problem.get("ctx") or {}
    key = path[-1] if path else ""
    if kind == "missing":
        return f"is missing; legal is {_wanted(owner, key)}"
    if kind == "extra_forbidden":
        names = list(owner.model_fields) if owner else []
        return f"unknown key{suggestion(key, names)}"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "union_tag_invalid":
        return f"kind {context.get('tag')!r} is not legal; legal is {context.get('expected_tags')}"
    if kind == "literal_error":
        return f"{_shown(value)} is not legal; legal is {context.get('expected')}"
    if kind == "union_tag_not_found":
        return f"has no {context.get('discriminator', 'kind')}; legal is a mapping with that key"
    if kind == "too_short":
        return f"has {context.get('actual_length')} entries; legal is at least {context.get('min_length')}"
    wanted = re.sub(r"^Input should be (a valid |an? valid )?|^String should |^Value should ", "", message)
    wanted = wanted.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return f"{_shown(value)} is not legal; legal is {wanted}"


def _wanted(owner: type[BaseModel] | None, key: str) -> str:
    field = owner.model_fields.get(key) if owner else None
    return f"a value for it: {field.description.rstrip('.')}" if field and field.description else "a value for it"


def place(path: list[str], files: Mapping[str, str], overrides: Iterable[str]) -> str:
    """Where a key stands: the override that set it, or its file and key path there."""
    dotted = ".".join(path)
    for key in overrides:
        if key in files:
            continue  # replaced a whole section by a file, which is named instead
        if dotted == key or dotted.startswith(f"{key}.") or (dotted and key.startswith(f"{dotted}.")):
            return f"--set {key}" if dotted == key else f"--set {key}, {dotted}"
    if path and path[0] in files:
        return f"{files[path[0]]}: {'.'.join(path[1:])}".removesuffix(": ")
    return f"{files.get('', 'scenario')}: {dotted}".removesuffix(": ")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _relative(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(CONFIGS.parent))
    except ValueError:
        return str(path)
