"""Takes the pictures of the report in the docs, beside this file, with a headless Chromium.

python evaluate.py --policy runs/quickstart --bound --report report.html
python docs/images/screens.py report.html
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, EDGE = 940, 16000, 12
SHOWN = {"report": ("body", "#waterfall"), "report_sensitivity": ("#tornado", "#tornado")}
"""First and last part of the page on each picture; a part begins with its heading."""
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars "
    f"--virtual-time-budget=60000 --window-size={WIDTH},{HEIGHT}"
)
BOXES = """<script>addEventListener("load", () => setTimeout(() => {
  const box = q => { const e = document.querySelector(q), r = (e.closest("section") || e).getBoundingClientRect();
                     return [q, [r.top, r.bottom]]; };
  document.documentElement.dataset.boxes = JSON.stringify(Object.fromEntries(SELECTORS.map(box)));
}, 5000));</script>"""


def chromium(page: Path, folder: Path, *flags: str) -> str:
    """What Chromium prints of a page."""
    browser = next((x for x in ("chromium", "chromium-browser", "google-chrome") if shutil.which(x)), None)
    if browser is None:
        raise SystemExit("error: no Chromium on this machine; legal is one called chromium or google-chrome")
    command = [browser, *FLAGS.split(), f"--user-data-dir={folder}/profile", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def main() -> None:
    """Takes all pictures of the page that is named."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("error: legal is one word, the page: python docs/images/screens.py report.html")
    selectors = sorted({selector for pair in SHOWN.values() for selector in pair})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, page = Path(name), Path(name, "page.html")
        script = BOXES.replace("SELECTORS", json.dumps(selectors))
        page.write_text(Path(sys.argv[1]).read_text().replace("</head>", f"{script}</head>", 1))
        found = re.search(r'data-boxes="([^"]*)"', chromium(page, folder, "--dump-dom"))
        if found is None:
            raise SystemExit("error: the page has no figures; legal is one that evaluate.py --report wrote")
        boxes = json.loads(found[1].replace("&quot;", '"'))
        chromium(page, folder, f"--screenshot={folder}/shot.png")
        shot = Image.open(folder / "shot.png").convert("RGB")
        for target, (first, last) in SHOWN.items():
            top, bottom = max(boxes[first][0] - EDGE, 0), min(boxes[last][1] + EDGE, HEIGHT)
            picture = shot.crop((0, int(top), WIDTH, int(bottom)))
            picture.quantize(128).save(Path(__file__).with_name(f"{target}.png"), optimize=True)


if __name__ == "__main__":
    main()
