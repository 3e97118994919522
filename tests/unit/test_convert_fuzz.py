"""Mutated folders end in success or in one of core.errors' classes: no traceback, no hang, no memory beyond the files.

Seeds are fixed, so a failure names the mutation that made it. `slow` runs ten thousand more.
"""

import copy
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from convert import export
from core.checkpoint import fp8, index, reader
from core.errors import Fp4FlashError
from core.models.load import load_model, save_model
from core.mxfp4 import ScaleRule
from tests.convert_cases import CONFIGS, checkpoint, digest, exported, values_of

VALUES: list[Any] = [
    None, True, 0, -1, 1, 3, 2**31 - 1, 2**40, 10**30, -(2**63), 0.5, 1e308, float("nan"), "", "x", "\n", "../x", "U8",
    "/etc/passwd", "even", "floor", "full_attention", [], [0], [[]], [-1, 2**40], {}, {"a": 1}, {"name": "x"},
]  # fmt: skip
TEXTS = ("header", "index", "config.json", "manifest.json")
LIMIT = 64 * 2**20  # bytes in one allocation; the folders are below 1 MB
SECONDS = 20


class Crossed(BaseException):
    """A limit of this test; caught by nothing but it."""


def place(generator: random.Random, value: Any) -> tuple[Any, Any] | None:
    """A random (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in pairs:
            found.append((node, key))
            waiting.append(child)
    # half of the time among the outermost: deep lists would drown them
    outer = [f for f in found if f[0] is value]
    return generator.choice(outer if outer and generator.random() < 0.5 else found) if found else None


def mutate_json(generator: random.Random, value: Any) -> None:
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        spot = place(generator, value)
        if spot is None:
            return
        node, key = spot
        action = generator.random()
        if action < 0.6:
            node[key] = copy.deepcopy(generator.choice(VALUES))
        elif action < 0.75 and isinstance(node[key], int | float):
            node[key] = node[key] * generator.choice((-1, 2, 3, 10**6)) + generator.choice((-1, 0, 1))
        elif action < 0.9:
            del node[key]
        elif isinstance(node, dict):
            node[generator.choice(("x", "", "model.norm.weight", "\0", "__metadata__"))] = copy.deepcopy(node[key])
        else:
            node.append(copy.deepcopy(node[key]))


def mutate_bytes(generator: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    action = generator.random()
    if action < 0.5 and changed:
        for _ in range(generator.choice((1, 3, 30))):
            where = generator.randrange(min(len(changed), generator.choice((8, 64, len(changed)))))
            changed[where] = generator.randrange(256)
    elif action < 0.75:
        del changed[generator.randrange(len(changed) + 1) :]
    else:
        at = generator.randrange(len(changed) + 1)
        changed[at:at] = generator.randbytes(generator.choice((1, 8, 1000)))
    return bytes(changed)


def mutate(generator: random.Random, folder: Path) -> str:
    """Change one thing in the folder; returns what."""
    shards = sorted(folder.glob("*.safetensors"))
    what = generator.choice((*TEXTS, *TEXTS, "shard", "text"))
    if what in ("shard", "text"):
        path = generator.choice(shards if what == "shard" else sorted(folder.glob("*.json")))
        path.write_bytes(mutate_bytes(generator, path.read_bytes()))
    elif what == "header":
        path = generator.choice(shards)
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + size])
        mutate_json(generator, parsed)
        text = json.dumps(parsed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    else:
        path = folder / (index.INDEX if what == "index" else what)
        if path.is_file():
            parsed = json.loads(path.read_text())
            mutate_json(generator, parsed)
            path.write_text(json.dumps(parsed))
    return what


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails on an allocation above LIMIT in the checkpoint readers, and on an open file outside the folder."""
    empty, opened = torch.empty, Path.open
    allowed = (folder.parent.resolve(), Path(sys.prefix).resolve())  # transformers looks into installed packages

    def small_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        size = torch.Size(kwargs.get("size", shape)).numel() * (kwargs.get("dtype") or torch.float32).itemsize
        meta = str(kwargs.get("device", "cpu")) == "meta" or torch.get_default_device().type == "meta"
        if not meta and size > LIMIT:
            raise Crossed(f"{size} bytes")
        return empty(*args, **kwargs)

    def inside(self: Path, *args: Any, **kwargs: Any) -> Any:
        if not any(self.resolve().is_relative_to(p) for p in allowed):
            raise Crossed(f"{self} is outside")
        return opened(self, *args, **kwargs)

    with patch.object(torch, "empty", small_empty), patch.object(Path, "open", inside):
        yield


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of several shards in several layouts, each with a manifest where the format has one."""
    root = tmp_path_factory.mktemp("pristine")
    folders = []
    for family, to in (("qwen3_moe", "hf"), ("mimo", "mimo"), ("gpt_oss", "gpt-oss"), ("mimo pro", "quark")):
        source = checkpoint(root / f"{to}-model", family, carried="mimo" in family)
        folders.append(exported(source, to, root / to, "--shard-gb", str(60_000 / 2**30)))
    config = CONFIGS["deepseek_v3"]()
    save_model(values_of(config, ScaleRule.even).items(), config, root / "bf16", shard_bytes=50_000)
    return [*folders, root / "bf16"]


def attempt(seed: int, pristine: list[Path], root: Path) -> bool:
    """One mutation; True if the folder was still good."""
    generator = random.Random(seed)
    folder = root / "case" / "model"
    shutil.rmtree(root / "case", ignore_errors=True)
    (root / "case").mkdir()
    shutil.copytree(generator.choice(pristine), folder)
    what = mutate(generator, folder)
    act: Callable[[], Any] = generator.choice(
        (
            lambda: export.run(options(folder, root / "case" / "out", "hf")),
            lambda: export.run(options(folder, root / "case" / "out", "bf16")),
            lambda: load_model(folder),
        )
    )
    start = time.monotonic()
    try:
        with watched(folder):
            act()
    except Fp4FlashError as error:
        assert "\n" not in str(error) and len(str(error)) < 5000, (seed, what, str(error))
        assert sorted(p.name for p in (root / "case").iterdir()) == ["model"], (seed, what, "left something")
        return False
    except (Exception, Crossed) as error:
        raise AssertionError(f"seed {seed}, {what}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        assert time.monotonic() - start < SECONDS, (seed, what)
    return True


def options(folder: Path, out: Path, to: str) -> Any:
    return export.arguments(["--to", to, "--from", str(folder), "--out", str(out), "--workers", "1"])


def campaign(seeds: range, pristine: list[Path], root: Path) -> None:
    before = [digest(p) for p in pristine]
    good = sum(attempt(seed, pristine, root) for seed in seeds)
    assert 0 < good < len(seeds)
    assert [digest(p) for p in pristine] == before


def test_a_few_hundred_mutations(pristine: list[Path], tmp_path: Path) -> None:
    campaign(range(250), pristine, tmp_path)


@pytest.mark.slow
def test_ten_thousand_mutations(pristine: list[Path], tmp_path: Path) -> None:
    campaign(range(1000, 11_000), pristine, tmp_path)


def test_the_watch_sees() -> None:
    """The allocation limit would notice a header that is believed."""
    with pytest.raises(Crossed, match="bytes"), watched(Path()):
        reader.torch.empty(LIMIT + 1, dtype=torch.uint8)
    assert fp8.torch is torch
