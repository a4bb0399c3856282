"""The model card: what a bundle is, printed as plain text from its verified manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marginroute import bundle as bundles
from marginroute.bundle_files import read_manifest
from marginroute.card_evaluation import evaluation_lines
from marginroute.errors import InputError
from marginroute.view import KINDS


def model_card(folder: str | Path) -> str:
    """The card of the bundle in a folder, loaded once as a gateway would load it.

    Raises:
        InputError: missing, tampered with, incompatible, or not reproducing its parity vectors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a bundle is a folder written by export.py")
    bundles.load(folder)
    manifest = read_manifest(folder)
    learned = {"residual": "network that corrects its advice", "none": "nothing learned: the heuristic itself"}
    lines = [
        f"Bundle {folder}: verified",
        f"  policy        {manifest['policy']} ({learned.get(manifest['learned'], manifest['learned'])})",
        f"  scenario      {manifest['scenario'].get('name', '')} ({manifest['scenario'].get('hash', '')})",
        f"  digest        {manifest['digest']}",
        f"  made by       marginroute {manifest['marginroute_version']}, format {manifest['format']}, "
        f"feature version {manifest['feature_version']}",
        "",
        "Candidates",
        *_candidates(manifest["layout"]),
        "",
        "Customer classes, USD and seconds",
        *_classes(manifest["layout"]["class_names"], manifest["terms"]),
    ]
    for title, name in (
        ("Advice", "advice"),
        ("Fallback", "fallback"),
        ("Guard", "guard"),
        ("Rate limits of providers", "rate_limits"),
        ("Controller", "controller"),
        ("Prior of P(good answer), by tier", "prior"),
        ("Predictor of P(good answer)", "quality"),
        ("Evaluation", "evaluation"),
        ("Provenance", "provenance"),
        ("Files, sha256", "sha256"),
    ):
        data: dict[str, Any] | None = manifest.get(name)
        if name == "evaluation" and data is not None and "paired" in data:
            lines += ["", title, *evaluation_lines(data)]
            data, title = data.get("gate"), "Gate, on validation episodes"
        if name == "controller" and data:
            data = _controller(data) | {"gate": manifest["evaluation"].get("controller_gate")}
        lines += ["", title, *(_tree(data, "  ") or ["  (none)"])]
    return "\n".join(lines) + "\n"


def _candidates(layout: dict[str, Any]) -> Iterator[str]:
    width = max(len(name) for name in layout["names"])
    for name, kind, tier in zip(layout["names"], layout["kind"], layout["tier"], strict=True):
        model = f"tier {layout['tier_names'][tier]}" if tier >= 0 else ""
        yield f"  {name:<{width}}  {KINDS[kind]:<9} {model}".rstrip()


def _classes(names: list[str], terms: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Terms that say something: zero prices and infinite limits are left out."""
    for name in names:
        yield f"  {name}"
        yield from (f"    {key}: {_text(x)}" for key, x in terms[name].items() if x not in (0, "Infinity"))


def _controller(data: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a controller: its rule and what it may set, without the season."""
    layout, learned = data["layout"], {"residual": "network that corrects its rule", "none": "nothing learned: a rule"}
    pools = zip(layout["pool_names"], layout["min_replicas"], layout["max_replicas"], layout["slots"], strict=True)
    return {
        "policy": f"{data['name']} ({learned.get(data['learned'], data['learned'])})",
        "decides every": f"{layout['tick_s']:g} s",
        "replicas": {name: f"{low:g} to {high:g}, {slots:g} slots each" for name, low, high, slots in pools},
        "rule": data["rule"],
    }


def _tree(value: Any, indent: str) -> list[str]:
    """Nested data as indented lines, without empty parts; short lists stay on one."""
    if not isinstance(value, dict):
        return [f"{indent}{_text(value)}"] if value not in (None, "", []) else []
    lines = []
    for key, x in value.items():
        if isinstance(x, dict):
            lines += [f"{indent}{key}", *_tree(x, indent + "  ")] if x else []
        elif x is not None:
            lines.append(f"{indent}{key}: {_text(x)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(_text(x) for x in value)}]"
    return str(value)
