# ruff: noqa: E501
"""Draws the idea in one picture: python docs/images/idea.py writes idea.svg beside it."""

from pathlib import Path

INK, MUTED, LINE, PAPER = "#16323a", "#5b737a", "#b8c9cc", "#ffffff"
TEAL, TEAL_PALE, GOLD, GOLD_PALE = "#0b7a75", "#e3f2f1", "#b7791f", "#fbf1dc"
WIDTH, HEIGHT = 1000, 400


def box(x: int, y: int, w: int, h: int, title: str, lines: list[str], fill: str, edge: str) -> str:
    """A rounded box with a title and lines of text."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="10" fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'
    ]
    parts.append(f'<text x="{x + w / 2}" y="{y + 26}" class="title" fill="{edge}">{title}</text>')
    parts += [f'<text x="{x + w / 2}" y="{y + 50 + 19 * i}" class="line">{line}</text>' for i, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(path: str, words: str = "", x: float = 0, y: float = 0) -> str:
    """An arrow along an SVG path, with words beside it."""
    text = f'<text x="{x}" y="{y}" class="word">{words}</text>' if words else ""
    return f'<path d="{path}" class="arrow" marker-end="url(#tip)"/>{text}'


def picture() -> str:
    """The whole picture."""
    style = (
        "text{font-family:Helvetica,Arial,sans-serif;text-anchor:middle}"
        ".title{font-size:16px;font-weight:bold}"
        f".line{{font-size:13px;fill:{INK}}}.word{{font-size:12px;fill:{MUTED}}}"
        f".arrow{{fill:none;stroke:{MUTED};stroke-width:1.8}}"
    )
    tip = f'<marker id="tip" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{MUTED}"/></marker>'
    top = 40
    parts = [
        box(20, top, 190, 130, "Scenario", ["your fleet", "plans, SLOs, refunds", "traffic, or its log"], GOLD_PALE, GOLD),
        box(280, top, 200, 130, "World", ["queues, batches, KV cache", "to the iteration", "a ledger to the cent"], TEAL_PALE, TEAL),
        box(550, top, 190, 130, "Policy", ["tuned heuristics", "PPO corrects the best", "runs on numpy alone"], TEAL_PALE, TEAL),
        box(800, top, 180, 130, "Examiner", ["same requests for all", "held out, paired, 95 %", "no class may pay"], TEAL_PALE, TEAL),
        box(280, 260, 460, 110, "Your gateway", ["LiteLLM, Envoy, or anything that calls HTTP",
            "shadow, then canary at 1 %, then live; back by itself when limits break"], GOLD_PALE, GOLD),
        arrow(f"M210,{top + 65} H272"),
        arrow(f"M480,{top + 50} H542", "state", 511, top + 42),
        arrow(f"M550,{top + 85} H488", "choice", 517, top + 104),
        arrow(f"M740,{top + 65} H792"),
        arrow(f"M890,{top + 130} V315 H748", "a bundle, if it is better", 818, 306),
        arrow(f"M280,315 H115 V{top + 138}", "its log comes back", 185, 306),
        '<text x="510" y="352" class="word">small model? large? an API? a stored answer? later? each has a price</text>',
    ]  # fmt: skip
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="marginroute">'
    )
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>'
    return "\n".join([head, f"<style>{style}</style>", f"<defs>{tip}</defs>", paper, *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text(picture())
