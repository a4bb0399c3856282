"""`python -m envs schema`: JSON Schemas of the configuration files, generated from the models that check them.

An editor with a YAML language server reads the line `# yaml-language-server: $schema=...` at the top of a file, and
then completes keys, shows what they mean, and marks what is not legal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from agents.config import TrainingConfig
from envs.scenario import Scenario
from envs.scenario_files import SECTIONS
from envs.scenario_fleet import FleetSection
from envs.scenario_plans import PlansSection
from envs.scenario_workload import WorkloadSection
from marginroute.whole_file import write_whole

MODELS = {
    "scenario": Scenario,
    "fleet": FleetSection,
    "plans": PlansSection,
    "workload": WorkloadSection,
    "training": TrainingConfig,
}


def schemas() -> dict[str, dict[str, Any]]:
    """The schema of each kind of file, by name."""
    found = {name: model.model_json_schema() for name, model in MODELS.items()}
    scenario = found["scenario"]
    scenario["required"].remove("name")  # left out, it is the file's
    for section in SECTIONS:  # a name or path stands for a file's content
        inline = scenario["properties"][section]
        words = inline.pop("description")
        scenario["properties"][section] = {"description": words, "anyOf": [inline, {"type": "string"}]}
    for name, schema in found.items():
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        schema["title"] = f"marginroute {name}"
    return found


def run(arguments: argparse.Namespace) -> int:
    """Writes one file per kind."""
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        write_whole(folder / f"{name}.json", json.dumps(schema, indent=1, ensure_ascii=False) + "\n")
    print(f"{folder}: {', '.join(f'{name}.json' for name in MODELS)}")
    return 0
