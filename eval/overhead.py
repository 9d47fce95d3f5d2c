"""What proof costs: the quickstart with the default gates and its report, beside the same without validation.

    python eval/overhead.py [--times 3]

Each is the command as a user types it, in a process of its own, one after the other; the difference of their wall times
is the overhead. Then the parts of validation in the run in the middle, by results.json. For an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Without gates of its own, a recipe has those of its scheme.
KINDS = {"without": "validate=none", "with": "validate={}"}


def seconds(out: Path, change: str) -> float:
    """Wall time of the quickstart. Raises SystemExit when it fails."""
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    command = [sys.executable, "-m", "quantkit", "quantize", recipe, "--out", str(out), "--set", change]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="runs of each")
    args = parser.parse_args()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(args.times):
            for kind, change in KINDS.items():
                out = Path(scratch) / f"{kind}-{i}"
                found[kind].append(seconds(out, change))
            parts.append(json.loads((out / "results.json").read_text())["seconds"]["validate"])
    middle = {kind: statistics.median(took) for kind, took in found.items()}
    for kind, took in found.items():
        print(f"{kind:8} {middle[kind]:7.1f} s  ({', '.join(f'{x:.1f}' for x in sorted(took))})")
    print(f"overhead {middle['with'] - middle['without']:7.1f} s")
    for part, spent in sorted(parts[len(parts) // 2].items(), key=lambda item: -item[1]):
        print(f"  {spent:7.1f} s  {part}")


if __name__ == "__main__":
    main()
