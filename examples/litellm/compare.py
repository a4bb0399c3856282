"""What a decision log says: `python compare.py decisions.jsonl`; answers by the bundle's choice and by who served."""

from __future__ import annotations

import json
import sys
from collections import Counter

if len(sys.argv) != 2:
    raise SystemExit(__doc__)
try:
    with open(sys.argv[1]) as log:
        records = [json.loads(line) for line in log]
except (OSError, ValueError) as error:
    raise SystemExit(f"error: {sys.argv[1]}: {error}") from None
pairs = Counter((r["choice"], r["served_by"] or r["status"] or "no outcome") for r in records)
for (choice, served), count in pairs.most_common():
    print(f"{count:6}  bundle: {choice:<12} gateway: {served}")
agreed = sum(count for (choice, served), count in pairs.items() if choice == served)
print(f"{len(records)} requests, {agreed} routed as the bundle would have")
