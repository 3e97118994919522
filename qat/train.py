"""`python -m qat.train +experiment=mimo_fp4`: teach a model's experts to live in MXFP4, and report what it cost.

    base model -> selection -> teacher -> the step loop (snap after step) -> model/ -> report

Heavy imports stay inside `main`, so that --help and configuration errors are immediate.
"""

from core.config import Command, entry
from core.leave import leave
from qat.config import QATConfig, check

HELP = """Selective MXFP4 quantisation-aware training.

  python -m qat.train +experiment=mimo_fp4                              the demo model, on any machine
  python -m qat.train +experiment=mimo_fp4 model=mimo_v2_flash model.path=DIR
  python -m qat.train +experiment=mimo_fp4 dry_run=true model=mimo_v2_5_pro     plan and memory, no weights
  python -m qat.train run.resume=latest                                 continue after an interruption
  torchrun --nproc-per-node 8 -m qat.train +experiment=mimo_fp4 parallel=zero3 model=... model.path=...

A run writes runs/<name>: config.yaml, run.json, metrics.jsonl, checkpoints/, model/, report.md, report.json, plots."""

COMMAND = Command("qat.train", "qat", QATConfig, HELP, check)


def main(config: QATConfig, resolved: str) -> int:
    from qat.pipeline import dry_run, train

    if config.dry_run:
        print(dry_run(config))
        return 0
    train(config, resolved)
    return 0


if __name__ == "__main__":
    leave(entry(COMMAND, main))
