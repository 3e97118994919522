"""Reply files: reading them, and whether it was this target that said them.

One JSON object a line: id, domain, prompt_ids, reply_ids, stop. The ids are what a target read and said, not a text
that is tokenised again. draft_training.regenerate writes parts of them beside replies.json, which names the target by
its fingerprint; a file or folder of such lines without replies.json may be used too, as replies of an unknown target.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DataError
from core.generate.interface import Prompt, Reply
from draft_training.config import RepliesConfig

SETTINGS = "replies.json"
UNKNOWN = "unknown target"
AGAIN = "python -m draft_training.regenerate"


@dataclass(frozen=True)
class Text:
    """A prompt and the target's reply to it."""

    domain: str
    prompt: Prompt
    reply: Reply


def read_settings(folder: Path) -> dict[str, Any] | None:
    """replies.json of a folder; None where there is none.

    Raises:
        DataError: it is damaged, or names no target.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); write the replies into another folder with {AGAIN}") from error
    if not isinstance(found, dict) or not isinstance(found.get("target"), str):
        raise DataError(f"{path} names no target; write the replies into another folder with {AGAIN}")
    return found


def check_target(config: RepliesConfig, fingerprint: str) -> dict[str, Any]:
    """Who wrote `replies.path`, as run.json and drafter.json record it: path, target, forced.

    Args:
        fingerprint: of the target in use (core.models.fingerprint).
    Raises:
        ConfigError: another target did, and `replies.force` is not set. DataError: replies.json is damaged.
    """
    settings = read_settings(Path(config.path or ""))
    said_by = settings["target"] if settings else UNKNOWN
    another = settings is not None and said_by != fingerprint
    if another and not config.force:
        raise ConfigError(
            f"replies.path={config.path} was said by target {said_by[:12]}, and target.path is {fingerprint[:12]}: a "
            f"drafter learns what its own target says; write replies with {AGAIN}, or set replies.force=true"
        )
    return {"path": config.path, "target": said_by, "forced": another}


def whose(found: dict[str, Any] | None) -> str:
    """A line about what `check_target` returned; None: there are no replies."""
    if found is None:
        return "Text: data, not the target's own replies"
    named = {True: f"ANOTHER target ({found['target'][:12]}), as replies.force allows", False: "this target"}
    return f"Replies: {found['path']}, said by {UNKNOWN if found['target'] == UNKNOWN else named[found['forced']]}"


def reply_files(path: Path) -> list[Path]:
    """The file, or the folder's *.jsonl and *.jsonl.gz in the order of their names."""
    if path.is_file():
        return [path]
    return sorted(p for end in ("jsonl", "jsonl.gz") for p in path.glob(f"*.{end}"))


def read_replies(config: RepliesConfig, vocabulary: int) -> Iterator[Text]:
    """Every reply of `replies.path`, in the order of its files.

    Args:
        vocabulary: rows of the target's embedding; a token id beyond it is an error.
    Raises:
        DataError: no replies there, a damaged file or line (named), or fewer replies than regenerate set out to write.
    """
    path = Path(config.path or "")
    files = reply_files(path)
    if not files:
        raise DataError(f"replies.path={path} holds no replies; write them with {AGAIN}")
    count = 0
    for file in files:
        remedy = f"delete the file and run {AGAIN} again" if (path / SETTINGS).is_file() else "repair or drop the line"
        before = count
        for number, row in numbered_rows(file, remedy):
            wrong = problem(row, vocabulary)
            if wrong:
                raise DataError(f"{file} line {number} {wrong}; {remedy}")
            count += 1
            yield Text(
                row["domain"], Prompt(row["id"], row["prompt_ids"]), Reply(row["id"], row["reply_ids"], row["stop"])
            )
        if count == before:
            raise DataError(f"{file} is empty; {remedy}")
    wanted = (read_settings(path) or {}).get("count", count)
    if count != wanted and not config.force:
        raise DataError(
            f"replies.path={path} holds {count:,} of {wanted:,} replies; run {AGAIN} again to write the others, or set "
            "replies.force=true to train on these"
        )


def numbered_rows(file: Path, remedy: str) -> Iterator[tuple[int, Any]]:
    """(line number, what its JSON says) of a plain or gzipped file."""
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} line {number} is not JSON ({error}); {remedy}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{file} cannot be read after line {number} ({error}); {remedy}") from error


def problem(row: Any, vocabulary: int) -> str | None:
    """What is wrong with a reply, as the end of a sentence; None when it can be used."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, not an object with prompt_ids and reply_ids"
    for key in ("id", "domain", "stop"):
        if not isinstance(row.get(key), str):
            return (
                f"has no `{key}`" if key not in row else f"has `{key}` of type {type(row[key]).__name__}, not a string"
            )
    return next(
        (wrong for key in ("prompt_ids", "reply_ids") if (wrong := ids_problem(key, row.get(key), vocabulary))), None
    )


def ids_problem(key: str, ids: Any, vocabulary: int) -> str | None:
    if not isinstance(ids, list) or not ids:
        return f"has no token in `{key}`"
    odd = set(map(type, ids)) - {int}
    if odd:
        return f"has a {odd.pop().__name__} in `{key}`, not only token ids"
    beyond = next((i for i in (min(ids), max(ids)) if not 0 <= i < vocabulary), None)
    return None if beyond is None else f"has token {beyond} in `{key}`, and the target has tokens 0 to {vocabulary - 1}"


def held_out(text: Text, share: int) -> bool:
    """Whether a reply is one of every `share`-th, by its id alone."""
    return zlib.crc32(text.prompt.id.encode()) % share == 0
