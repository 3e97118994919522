"""`python -m draft_training.train +experiment=mimo_dflash`: a sliding-window DFlash drafter for a quantised target.

Heavy imports stay inside `main`, so that --help and configuration errors are immediate.
"""

from core.config import Command, entry
from core.leave import leave
from draft_training.config import DraftTrainConfig, check

HELP = """Train a drafter (DFlash, or its autoregressive baseline) against the model it will draft for.

  python -m draft_training.train +experiment=mimo_dflash                    for the newest QAT run, on any machine
  python -m draft_training.train +experiment=mimo_dflash target.path=DIR replies.path=REPLIES
  python -m draft_training.train +experiment=mimo_dflash draft=hf           what transformers computes, for its export
  python -m draft_training.train +experiment=mimo_eagle                     the baseline: one layer, chained
  python -m draft_training.train run.resume=latest                          continue after an interruption
  python -m draft_training.regenerate target.path=DIR data=jsonl out=REPLIES    the target's own replies first
  python -m draft_training.acceptance target.path=DIR drafter.path=RUN          measure what came out

A run writes runs/<name>: config.yaml, run.json, metrics.jsonl, checkpoints/, model/ (the drafter), report.json."""

COMMAND = Command("draft_training.train", "draft_train", DraftTrainConfig, HELP, check)


def main(config: DraftTrainConfig, resolved: str) -> int:
    from draft_training.pipeline import dry_run, train

    if config.dry_run:
        print(dry_run(config))
        return 0
    train(config, resolved)
    return 0


if __name__ == "__main__":
    leave(entry(COMMAND, main))
