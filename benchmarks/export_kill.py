"""Kill an export with SIGKILL at random moments, run it again, and compare with one that was left alone.

    python -m benchmarks.export_kill [--kills 20] [--gb 2] [--seed 0] [--json FILE]

After each kill the output folder must be absent, or whole and right already; the second run must give the same bytes.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import publish
from benchmarks.export import grid_weights
from benchmarks.load_memory import config
from core.models.load import save_model

SHARD = 2**25  # bytes: many shards, so that kills land between them too


def command(source: Path, out: Path) -> list[str]:
    words = ["-m", "convert.export", "--to", "hf", "--from", str(source), "--out", str(out)]
    return [sys.executable, *words, "--ptq", "even", "--shard-gb", str(SHARD / 2**30)]


def fingerprint(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def trial(source: Path, out: Path, delay: float, expected: dict[str, str]) -> dict[str, Any]:
    process = subprocess.Popen(command(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.kill()
    process.wait()
    journal = out.with_name(f".{out.name}.journal")
    kept = len(list(journal.glob("*.json"))) if journal.is_dir() else 0
    appeared = out.is_dir()
    wrong = appeared and fingerprint(out) != expected
    if not appeared:
        subprocess.run(command(source, out), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    same = fingerprint(out) == expected
    left = [p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}")]
    subprocess.run(["rm", "-r", str(out)], check=True)
    return {
        "delay_s": round(delay, 2),
        "shards_kept": kept,
        "finished_before": appeared,
        "equal": same and not wrong,
        "left": left,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "source"
        made = config(options.gb)
        save_model(grid_weights(made), made, source)
        began = time.monotonic()
        subprocess.run(command(source, Path(place) / "whole"), check=True, stdout=subprocess.DEVNULL)
        whole = time.monotonic() - began
        expected = fingerprint(Path(place) / "whole")
        draw = random.Random(options.seed)
        trials = [
            trial(source, Path(place) / f"killed-{n}", draw.uniform(0.3, 1.0) * whole, expected)
            for n in range(options.kills)
        ]
    equal = sum(t["equal"] for t in trials)
    result = {"kills": options.kills, "equal": equal, "uninterrupted_s": whole, "trials": trials}
    publish("export_kill", result, options.json)
    return 0 if equal == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
