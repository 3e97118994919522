"""Records as they lie on disk, one source at a time: the standard library, JSON lines, or a hub dataset.

A record is {"text": ...} or {"messages": [...], "tools": [...]}, with `prompt_only: true` where no reply is given.
A bad one ends the run in one line that names its file and line.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DataError
from core.train.config import DataConfig, DataSource, Source
from core.train.data.embedded import stdlib_records

ENVIRONMENT = "FP4FLASH_DATA"
STREAM_ABOVE = 256 * 2**20  # bytes on disk; a larger JSON-lines source is read as it is needed
Record = dict[str, Any]


def domain_of(source: Source) -> str:
    """The name of a source in reports."""
    return source.domain or Path(source.path).name.split(".")[0]


def read_records(config: DataConfig, source: Source, validation: bool) -> Iterator[Record]:
    """Every record of one source, in order.

    Raises:
        ConfigError: no root for relative paths. DataError: missing, damaged or malformed file, named with its line.
    """
    if config.source is DataSource.embedded:
        yield from stdlib_records(source.path.split(":")[1], validation, config.max_bytes)
    elif config.source is DataSource.jsonl:
        for file in jsonl_files(config, source):
            yield from jsonl_records(file, source.text_field)
    else:
        from core.train.data.hub import hub_records

        yield from hub_records(source)


def data_root(config: DataConfig) -> Path:
    root = config.root or os.environ.get(ENVIRONMENT)
    if not root:
        raise ConfigError(f"data.source=jsonl has relative paths but no folder; set data.root or {ENVIRONMENT}")
    return Path(root)


def jsonl_files(config: DataConfig, source: Source) -> list[Path]:
    path = Path(source.path)
    if not path.is_absolute():
        path = data_root(config) / path
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise DataError(f"data source {path} matches no file; correct its path, or data.root")
    return files


def jsonl_records(path: Path, text_field: str = "text") -> Iterator[Record]:
    """The records of one file, plain or .gz."""
    for _, record in numbered_records(path, text_field):
        yield record


def numbered_records(path: Path, text_field: str, after: int = 0) -> Iterator[tuple[int, Record]]:
    """(line number, record), from the line behind `after` on; the lines before it are not parsed."""
    opener = gzip.open if path.suffix == ".gz" else open
    number, found = 0, after > 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if number > after and line.strip():
                    found = True
                    yield number, parse(path, number, line, text_field)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {number} ({error}); fetch or write it again") from error
    if not found:
        raise DataError(f"{path} is empty; fetch it again or take it out of the mixture")


def parse(path: Path, number: int, line: str, text_field: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} line {number} is not JSON ({error}); repair or drop the line") from error
    if isinstance(record, dict) and "messages" not in record and text_field in record:
        record["text"] = record[text_field]
    wrong = problem(record, text_field)
    if wrong:
        raise DataError(f"{path} line {number} {wrong}; repair or drop the line")
    return record


def problem(record: Any, text_field: str = "text") -> str | None:
    """What is wrong with a record, as the end of a sentence; None when it can be used."""
    if not isinstance(record, dict):
        return f"is a {type(record).__name__}, not an object with `messages` or `{text_field}`"
    if "messages" not in record:
        if "text" in record and not isinstance(record["text"], str):
            return f"has `{text_field}` of type {type(record['text']).__name__}, not a string"
        return None if "text" in record or record.get("prompt_only") else f"has neither `messages` nor `{text_field}`"
    messages, tools = record["messages"], record.get("tools")
    if not isinstance(messages, list) or not messages:
        return "has `messages` that are not a list of at least one message"
    if tools is not None and not isinstance(tools, list):
        return f"has `tools` of type {type(tools).__name__}, not a list"
    return next((wrong for n, m in enumerate(messages) if (wrong := message_problem(n, m))), None)


def message_problem(number: int, message: Any) -> str | None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return f"has messages[{number}] without a `role`"
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list) else []
    if not (content is None or isinstance(content, str | list)) or not all(isinstance(p, dict) for p in parts):
        return f"has messages[{number}].content of type {type(content).__name__}, not a string"
    if calls is not None and not (isinstance(calls, list) and all(isinstance(c, dict) for c in calls)):
        return f"has messages[{number}].tool_calls that are not a list of objects"
    return None
