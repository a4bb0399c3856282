"""JSON Schemas for editors: up to date, and of one mind with the models about every shipped file."""

import json

import jsonschema
import pytest

from agents.schema import schemas
from envs.__main__ import main
from envs.scenario_files import CONFIGS, read_yaml

FOLDERS = {
    "scenario": "scenarios",
    "fleet": "fleets",
    "plans": "plans",
    "workload": "workloads",
    "training": "training",
}
FILES = [(kind, path) for kind, folder in FOLDERS.items() for path in sorted((CONFIGS / folder).glob("*.yaml"))]


def test_the_committed_schemas_are_those_of_the_models(tmp_path, capsys):
    assert main(["schema", "--out", str(tmp_path)]) == 0
    ours = {path.name: path.read_text() for path in (CONFIGS / "schema").iterdir()}
    assert ours == {path.name: path.read_text() for path in tmp_path.iterdir()}, "run: python -m envs schema"


@pytest.mark.parametrize(("kind", "path"), FILES, ids=lambda x: getattr(x, "stem", x))
def test_shipped_files_name_their_schema_and_obey_it(kind, path):
    first = path.read_text().splitlines()[0]
    target = first.removeprefix("# yaml-language-server: $schema=")
    assert target != first and (path.parent / target).resolve() == CONFIGS / "schema" / f"{kind}.json"
    jsonschema.validate(json.loads(json.dumps(read_yaml(path))), schemas()[kind])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("scenario", {"horizon": 3.0}),
        ("scenario", {"horizon_s": -1.0}),
        ("scenario", {"fleet": 3}),
        ("plans", {"classes": {}, "plan": 1}),
        ("training", {"gae_lambda": 2.0}),
    ],
)
def test_an_editor_marks_what_is_not_legal(kind, change):
    path = next(path for name, path in FILES if name == kind)
    data = json.loads(json.dumps({**read_yaml(path), **change}))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schemas()[kind])


def test_every_key_is_explained():
    """Completion shows what a key means and its unit."""
    for kind, schema in schemas().items():
        for name, part in {kind: schema, **schema.get("$defs", {})}.items():
            for key, field in part.get("properties", {}).items():
                assert field.get("description") or key == "kind", f"{kind}: {name}.{key}"
