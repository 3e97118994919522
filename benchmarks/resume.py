"""Kill a run with SIGKILL at random moments, resume it, and compare it bit for bit with one that was left alone.

    python -m benchmarks.resume [--kills 10] [--seed 0] [--json FILE]

Uses the demo at its smallest (`+debug=tiny`). Every kill is a trial of its own: start, wait a random time, SIGKILL,
resume with `run.resume`, compare model files, masters and metrics (fields that measure time left out).
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import publish

CLOCK_FIELDS = ("wall_s", "tokens_per_s")


def command(root: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "qat.train", "+experiment=mimo_fp4", "+debug=tiny", "train.steps=300",
        "train.save_every=3", "train.eval_every=50", f"run.root={root}", f"run.cache={root.parent / 'cache'}", *more,
    ]  # fmt: skip


def fingerprint(run: Path) -> dict[str, str]:
    """Hash of every model and checkpoint tensor file, and the metrics without their clocks."""
    found = {}
    for path in sorted([*run.glob("model/*.safetensors"), *run.glob("checkpoints/*/**/*.safetensors")]):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clean = [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]
    found["metrics"] = hashlib.sha256(json.dumps(clean, sort_keys=True).encode()).hexdigest()
    return found


def trial(root: Path, name: str, delay: float, expected: dict[str, str]) -> dict[str, Any]:
    """Start, kill after `delay` seconds, resume until done, compare."""
    process = subprocess.Popen(command(root, f"run.name={name}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.kill()
    process.wait()
    run = root / name
    lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
    again = f"run.resume={name}" if (run / "run.json").exists() else f"run.name={name}"
    done = subprocess.run(command(root, again), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"delay_s": delay, "equal": False, "error": done.stderr.strip().splitlines()[-1:]}
    return {"delay_s": round(delay, 2), "logged_before_kill": lines, "equal": fingerprint(run) == expected}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        subprocess.run(command(root, "run.name=warm", "train.steps=3"), check=True, stdout=subprocess.DEVNULL)
        began = time.monotonic()
        subprocess.run(command(root, "run.name=whole"), check=True, stdout=subprocess.DEVNULL)
        whole = time.monotonic() - began
        expected = fingerprint(root / "whole")
        draw = random.Random(options.seed)
        trials = [trial(root, f"killed-{i}", draw.uniform(0.2, 0.98) * whole, expected) for i in range(options.kills)]
    equal = sum(t["equal"] for t in trials)
    publish(
        "resume",
        {"kills": options.kills, "bit_identical": equal, "uninterrupted_s": whole, "trials": trials},
        options.json,
    )
    return 0 if equal == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
