"""`python -m draft_training.acceptance`: how many tokens a round a drafter commits, with intervals.

  python -m draft_training.acceptance --target MODEL --drafter DRAFTER
  python -m draft_training.acceptance --target MODEL --drafter DRAFTER --eval code,math --sweep window=64,128
  python -m draft_training.acceptance target.path=MODEL drafter.path=A drafter.other=B      paired, on the same text
  python -m draft_training.acceptance target.path=A target.other=B drafter.path=DRAFTER     each on its own text
  python -m draft_training.acceptance ... sampling.temperatures=[0,1] distribution.prefixes=10 latency.prompts=8

A run writes runs/<name>: report.md, report.json, plots, and the round log rounds.jsonl, from which all of it follows.
"""

import sys

from core.config import Command, entry
from draft_training.acceptance_config import AcceptanceConfig, check

COMMAND = Command("draft_training.acceptance", "acceptance", AcceptanceConfig, __doc__ or "", check)
PATHS = {"--target": "target.path", "--drafter": "drafter.path"}
LISTS = {"--eval": "eval", "--temperature": "sampling.temperatures"}


def overrides(arguments: list[str]) -> list[str]:
    """The flag spelling as key=value; anything else, and a flag without its value, is left for `entry` to judge."""
    found: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in {*PATHS, *LISTS, "--sweep"} or not (equals or waiting):
            found.append(word)
            continue
        value = value if equals else waiting.pop(0)
        if flag in PATHS:
            quoted = value.replace("\\", "\\\\").replace("'", "\\'")
            found.append(f"{PATHS[flag]}='{quoted}'")
        elif flag in LISTS:
            found.append(f"{LISTS[flag]}=[{value}]")
        else:
            key, _, values = value.partition("=")
            found.append(f"sweep.{key}=[{values}]")
    return found


def main(config: AcceptanceConfig, resolved: str) -> int:
    from draft_training.acceptance_run import measure

    print(measure(config, resolved))
    return 0


if __name__ == "__main__":
    sys.exit(entry(COMMAND, main, overrides(sys.argv[1:])))
