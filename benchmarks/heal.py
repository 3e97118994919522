"""How close a healed MoE comes to the dense model it was cut from: perplexity on held-out text, MoE over dense.

    python -m benchmarks.smollm2 --out DENSE                                        once: the dense model
    python -m convert.upcycle --from DENSE --always-on 8 --routed 16 --top-k 8 --data BUNDLE/train --out MOE
    python -m benchmarks.heal --dense DENSE --moe MOE --data BUNDLE [--json FILE] [key=value ...]

The run is configs/experiment/heal.yaml on the data bundle (9.8M tokens); extra key=value go to it. Bar: the mean of the
ratio over domains is at most 1.15. Status 1 where it is missed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import publish

BAR = 1.15


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--moe", required=True)
    parser.add_argument("--data", required=True, help="folder with train/, val/ and text/")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--name", default=f"heal-{int(time.time())}")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    words = [
        "+experiment=heal", f"model.path={options.moe}", f"loss.teacher_path={options.dense}", "data=jsonl",
        f"data.root={options.data}", f"run.root={options.root}", f"run.name={options.name}", *options.overrides,
    ]  # fmt: skip
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "qat.train", *words], check=True)
    seconds = time.monotonic() - began
    arms = json.loads((Path(options.root) / options.name / "report.json").read_text())["arms"]
    perplexity = {arm: {d: row["perplexity"] for d, row in rows.items()} for arm, rows in arms.items()}
    ratio = {
        arm: {d: perplexity[arm][d] / dense for d, dense in perplexity["teacher"].items()}
        for arm in ("start", "trained")
    }
    mean = {arm: sum(found.values()) / len(found) for arm, found in ratio.items()}
    result = {"seconds": round(seconds, 1), "perplexity": perplexity, "ratio": ratio, "mean_ratio": mean}
    publish("heal", result | {"overrides": options.overrides}, options.json)
    return 0 if mean["trained"] <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
