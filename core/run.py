"""The run folder: everything needed to know, repeat and resume a run.

runs/<name>/config.yaml     resolved configuration
           /run.json        command, versions, git state, seed, hardware, state (running | finished)
           /metrics.jsonl   one JSON object a line; wall-clock fields end in `_s` or `per_s`
           /checkpoints/step-<n>/   resumable state;  /model/  the result;  /report.*  the numbers
runs/latest                 link to the newest run
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, ConfigError
from core.train.config import RunConfig

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "safetensors", "triton", "hydra-core")


def write_json(path: Path, value: Any) -> None:
    """Atomic: a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            json.dump(value, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}; the previous file is kept") from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> list[str]:
    """The words that start this process again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.executable, "-m", spec.name, *sys.argv[1:]] if spec else [sys.executable, *sys.argv]


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and whether files differ from it; empty outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))} if commit else {}


@dataclass(frozen=True)
class Run:
    """A run folder. Only rank 0 writes; other ranks hold the same object and every write is a no-op there."""

    folder: Path
    rank: int = 0

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    def update(self, **fields: Any) -> None:
        """Merge `fields` into run.json."""
        if self.rank == 0:
            write_json(self.folder / "run.json", self.info() | fields)

    def log(self, **fields: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.rank != 0:
            return
        try:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.metrics_path}: {error.strerror}; free space and resume"
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl (a kill may leave half a line at the end)."""
        if not self.metrics_path.exists():
            return []
        with self.metrics_path.open() as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, so that a resumed run's log equals an uninterrupted one's."""
        if self.rank != 0:
            return
        kept = [row for row in self.metrics() if row.get("step", 0) <= step]
        partial = self.metrics_path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.metrics_path)


def start_run(config: RunConfig, command: str, label: str, resolved: str, seed: int, rank: int = 0) -> Run:
    """Create the folder of a new run, or open the one named by `run.resume`.

    Raises:
        ConfigError: the name is taken, or the run to resume does not exist.
    """
    root = Path(config.root)
    if config.resume:
        return open_run(root, config.resume, rank)
    if config.name and (Path(config.name).name != config.name or config.name in ("latest", "cache")):
        raise ConfigError(f"run.name={config.name!r}: expected a plain folder name, not a path, `latest` or `cache`")
    folder = root / (config.name or unused(root, f"{command}-{label}-{time.strftime('%Y%m%d-%H%M%S')}"))
    run = Run(folder, rank)
    if rank != 0:
        return run
    if (folder / "run.json").exists():
        raise ConfigError(
            f"run.name={folder.name} exists in {root}; choose another name or set run.resume={folder.name}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(resolved)
    except OSError as error:
        raise CheckpointError(f"cannot create {folder}: {error.strerror}") from error
    write_json(
        folder / "run.json",
        {
            "command": command_line(),
            "kind": command,
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
            "seed": seed,
            "host": {"machine": platform.machine(), "cpus": os.cpu_count()},
            "state": "running",
        },
    )
    link_latest(root, folder)
    return run


def unused(root: Path, name: str) -> str:
    """`name`, or with a number behind it where a run of the same second has it."""
    count = 1
    while (root / (tried := name if count == 1 else f"{name}-{count}")).exists():
        count += 1
    return tried


def open_run(root: Path, name: str, rank: int = 0) -> Run:
    """The run called `name` under `root` (or at that path); `latest` follows the link."""
    for folder in (root / name, Path(name)):
        if (folder / "run.json").exists():
            return Run(folder.resolve(), rank)
    known = sorted(p.parent.name for p in root.glob("*/run.json") if p.parent.name != "latest")[-5:]
    raise ConfigError(f"run {name!r} not found under {root}; runs there: {', '.join(known) or 'none'}")


def link_latest(root: Path, folder: Path) -> None:
    """Point <root>/latest at `folder`, atomically."""
    link = root / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(root / "latest")
