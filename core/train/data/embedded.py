"""Text that every machine has: the sources of Python's standard library, split by file into training and held-out."""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from core.train.config import Source

SKIPPED_PARTS = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "ensurepip", "lib2to3", "__pycache__", "pydoc_data",
    "encodings",  # code-page tables
}  # fmt: skip
HELD_OUT_SHARE = 10  # one file in ten
TABLE_ROW = re.compile(r"^\s*[\[({]?\s*(?:[bru]?[\"'].*|[-\d].*),\s*(?:#.*)?$")
TABLE_SHARE = 0.4  # of the lines of a file


def embedded_sources(validation: bool) -> list[Source]:
    """The mixture of `data=embedded`: code to train on; held-out code, docstrings and comments to evaluate on."""
    if validation:
        return [Source(path=f"stdlib:{part}", domain=part) for part in ("code", "docstrings", "comments")]
    return [Source(path="stdlib:code", domain="code")]


def stdlib_files(validation: bool) -> list[Path]:
    """Library modules of one split, in an order that depends on their names alone."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not SKIPPED_PARTS & set(p.relative_to(root).parts[:-1])]
    digest = {p: hashlib.sha256(p.relative_to(root).as_posix().encode()).digest() for p in files}
    return sorted((p for p in files if (digest[p][0] % HELD_OUT_SHARE == 0) == validation), key=lambda p: digest[p][1:])


def stdlib_records(part: str, validation: bool, max_bytes: int) -> Iterator[dict[str, str]]:
    """Held-out or training files as `code`, or what is in them as prose: `docstrings`, `comments`."""
    taken = 0
    for path in stdlib_files(validation):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few library files are in other encodings on purpose
        if is_table(text):
            continue
        if part == "docstrings":
            text = "\n\n".join(docstrings(text))
        elif part == "comments":
            text = "\n".join(line.strip().lstrip("# ") for line in text.splitlines() if line.strip().startswith("#"))
        if text.strip():
            taken += len(text)
            yield {"text": text}
        if max_bytes and taken >= max_bytes:
            return


def is_table(text: str) -> bool:
    """Whether a module is mostly literals, one a line (HTML entities, token numbers): no language to learn."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(bool(TABLE_ROW.match(line)) for line in lines) > TABLE_SHARE * len(lines)


def docstrings(code: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in library strings
        tree = ast.parse(code)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]
