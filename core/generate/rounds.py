"""The round log: one JSON line for each draft and verification, from which every acceptance figure is derived.

request   id of the prompt        context    tokens before the anchor (the anchor's position)
round     0, 1, ... in a request  drafted    K
accepted  leading drafts kept     committed  tokens this round added to the reply, the last round cut to what was
agree     for each draft, whether it is the target's argmax after the tokens before it in the block (so entries after
          the first miss say what the target would have answered to a wrong draft)
hit       for each slot, rank of the emitted token among the drafter's candidates (-1: not among them, or unknown)
stop      "" | eos | length: why the request ended with this round
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from core.errors import DataError


@dataclass(frozen=True)
class Round:
    request: str
    round: int
    context: int
    drafted: int
    accepted: int
    committed: int
    agree: list[bool] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)  # the drafter's, of each draft
    hit: list[int] = field(default_factory=list)
    stop: str = ""


def write_rounds(path: Path, rounds: Iterable[Round]) -> None:
    """Write a whole log, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        for one in rounds:
            file.write(json.dumps(asdict(one), separators=(",", ":")) + "\n")
    partial.replace(path)


def read_rounds(path: Path) -> Iterator[Round]:
    """Raises DataError naming the line that is no round."""
    with path.open() as file:
        for number, line in enumerate(file, 1):
            try:
                yield Round(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise DataError(f"{path}:{number}: not a round of this log ({error}); measure again") from error
