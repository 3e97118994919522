"""Records as they lie on disk, one source at a time: the standard library, JSON lines, or a hub dataset.

A record is {"text": ...} or {"messages": [...], "tools": [...]}; `path` and `line` of a bad one are in the error.
"""

import ast
import gzip
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DataError
from core.train.config import DataConfig, DataSource, Source

SKIPPED_PARTS = {"test", "tests", "site-packages", "dist-packages", "idlelib", "ensurepip", "lib2to3", "__pycache__", "pydoc_data"}
HELD_OUT_SHARE = 10  # one file in ten
ENVIRONMENT = "FP4FLASH_DATA"
Record = dict[str, Any]


def domain_of(source: Source) -> str:
    """The name of a source in reports."""
    return source.domain or Path(source.path).name.split(".")[0]


def embedded_sources(validation: bool) -> list[Source]:
    """The mixture of `data=embedded`: library code to train on; held-out code, docstrings and comments to evaluate on."""
    if validation:
        return [Source(path=f"stdlib:{part}", domain=part) for part in ("code", "docstrings", "comments")]
    return [Source(path="stdlib:code", domain="code")]


def read_records(config: DataConfig, source: Source, validation: bool) -> Iterator[Record]:
    """Every record of one source, in order.

    Raises:
        ConfigError: no root for relative paths. DataError: missing, damaged or malformed file, named with its line.
    """
    if config.source is DataSource.embedded:
        yield from stdlib_records(source.path.split(":")[1], validation, config.max_bytes)
    elif config.source is DataSource.jsonl:
        for file in jsonl_files(config, source):
            yield from jsonl_records(file)
    else:
        yield from hub_records(source)


def stdlib_files(validation: bool) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if not SKIPPED_PARTS & set(p.relative_to(root).parts[:-1])]

    def held_out(path: Path) -> bool:
        return hashlib.sha256(str(path.relative_to(root)).encode()).digest()[0] % HELD_OUT_SHARE == 0

    return [p for p in files if held_out(p) == validation]


def stdlib_records(part: str, validation: bool, max_bytes: int) -> Iterator[Record]:
    """Held-out or training files as `code`, or what is in them as prose: `docstrings`, `comments`."""
    files = sorted(stdlib_files(validation), key=lambda p: hashlib.sha256(p.name.encode()).digest())
    taken = 0
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few library files are in other encodings on purpose
        if part == "docstrings":
            text = "\n\n".join(docstrings(text))
        elif part == "comments":
            text = "\n".join(line.strip().lstrip("# ") for line in text.splitlines() if line.strip().startswith("#"))
        if text.strip():
            taken += len(text)
            yield {"text": text}
        if max_bytes and taken >= max_bytes:
            return


def docstrings(code: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(code)) if isinstance(node, kinds))
    return [text for text in found if text]


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


def jsonl_records(path: Path) -> Iterator[Record]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read after line {number} ({error}); fetch or write it again") from error


def parse(path: Path, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} line {number} is not JSON ({error}); repair or drop the line") from error
    if not isinstance(record, dict) or not ({"messages", "text"} & set(record) or "prompt_only" in record):
        raise DataError(f"{path} line {number} has neither `messages` nor `text`; see --help for the record format")
    return record


def hub_records(source: Source) -> Iterator[Record]:
    """A hub dataset or a local folder of parquet or JSON, streamed."""
    import datasets

    try:
        stream = datasets.load_dataset(source.path, name=source.subset, split=source.split, streaming=True)
        for row in stream:
            yield {"messages": row["messages"]} if "messages" in row else {"text": row[source.text_field]}
    except KeyError as error:
        raise DataError(f"data source {source.path} has no field {error}; set its text_field") from error
    except Exception as error:  # noqa: BLE001  (the hub client raises a dozen unrelated types)
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data source {source.path} could not be read ({type(error).__name__}: {detail}); run the command again, it continues"
        ) from error
