"""Sums up the portions of `make chaos`: python tests/chaos/figures.py build/chaos"""

import json
import sys
from collections import Counter
from pathlib import Path

SUMMED = (
    "freezes", "jobs", "cancelled", "variants", "artifacts", "events", "reconnects",
    "unreferenced", "half_written", "seconds",
)  # fmt: skip


def main(folder: Path) -> None:
    for database in ("sqlite", "postgresql"):
        portions = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{database}-*"))]
        kills: Counter[str] = Counter()
        for portion in portions:
            kills.update(portion["kills"])
        sums = {name: round(sum(p.get(name, 0) for p in portions), 1) for name in SUMMED}
        loads = [portion["load"] for portion in portions]
        print(database, "portions:", len(portions), "kills:", kills.total(), dict(kills))
        print("  ", sums, "load average:", [round(load, 1) for load in loads])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
