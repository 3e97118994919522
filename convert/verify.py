"""`python -m convert.verify DIR`: decode everything and hold it against its source, or against the manifest's hashes.

    python -m convert.verify runs/latest/hf
    python -m convert.verify DIR --source MODEL     compare bit for bit with this checkpoint

Checks: every file against its header, the index against the files, names, shapes and dtypes against the format's plan,
divisibility into blocks, scale bytes, decoded values. Then a table of engines and what each does with this folder.
Status 0: all equal; 1: something differs; 2: the folder cannot be read.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, FormatError, Fp4FlashError


@dataclass(frozen=True)
class Check:
    what: str
    found: str
    good: bool


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m convert.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="an exported folder")
    parser.add_argument("--source", help="checkpoint it was made from (default: model/ beside it, where there is one)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    folder = Path(options.folder)
    try:
        name, checks = verify(folder, Path(options.source) if options.source else beside(folder))
    except Fp4FlashError as error:
        print(f"convert.verify: {error}", file=sys.stderr)
        return 2
    from convert.engines import engine_table

    for check in checks:
        print(f"{'ok' if check.good else 'WRONG':<7}{check.what:<22}{check.found}")
    print(f"\nEngines, for --to {name}\n{engine_table(name)}")
    return 0 if all(c.good for c in checks) else 1


def beside(folder: Path) -> Path | None:
    """The model/ of the run that `folder` lies in."""
    run = folder.resolve().parent
    return run / "model" if (run / "run.json").is_file() and (run / "model" / "config.json").is_file() else None


def verify(folder: Path, origin: Path | None) -> tuple[str, list[Check]]:
    """(format name, checks made).

    Raises:
        CheckpointError and its kin: the folder is damaged beyond comparison.
    """
    if (folder / ".metadata").is_file():
        from convert.formats.dcp import unpacked

        with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".dcp-") as place:
            return "dcp", compare(unpacked(folder, Path(place) / "unpacked"), "bf16", origin)
    from convert.formats.gguf_read import gguf_in, unpacked_gguf

    if file := gguf_in(folder):
        with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".gguf-") as place:
            layout, name = unpacked_gguf(file, Path(place) / "unpacked")
            return "gguf", compare(layout, name, origin)
    from core.checkpoint.index import read_json

    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    if manifest.get("what") == "drafter":
        from convert.drafter import verify_drafter

        return f"drafter, {manifest.get('format')}", [Check(*row) for row in verify_drafter(folder, manifest, origin)]
    name = manifest.get("format") or guess(folder)
    return name, compare(folder, name, origin)


def compare(folder: Path, name: str, origin: Path | None) -> list[Check]:
    """Every check of one safetensors folder in the format `name`."""
    from convert.formats import FORMATS
    from convert.plan import make_plan
    from convert.source import open_source

    if name not in FORMATS:
        raise CheckpointError(f"{folder}: format {name!r} is none of {', '.join(FORMATS)}; no rule to check it by")
    source = open_source(folder)
    checks = [Check("files and index", f"{len(source.checkpoint.entries):,} tensors, every byte accounted for", True)]
    checks.append(layout(source, make_plan(FORMATS[name], source)))
    checks.append(configuration(source, FORMATS[name].config(source)))
    hashes = decoded(source)
    checks.append(Check("decoded", f"{len(hashes):,} tensors finite, {len(source.quantised):,} of them MXFP4", True))
    if source.manifest:
        checks += against_manifest(source, hashes)
    if origin is not None:
        checks.append(against_source(source, hashes, origin))
    elif not source.manifest:
        checks.append(Check("values", "no manifest.json and no --source: nothing to compare with", False))
    return checks


def guess(folder: Path) -> str:
    """The format of a folder without a manifest, from config.json."""
    from core.checkpoint.index import read_json

    quantisation = read_json(folder / "config.json").get("quantization_config") or {}
    known = {"compressed-tensors": "hf", "quark": "quark", "mxfp4": "gpt-oss", "fp8": "mimo"}
    return known.get(quantisation.get("quant_method"), "bf16")


def layout(source: Any, plan: Any) -> Check:
    """Names, dtypes and shapes of the files against what the format writes for this model."""
    wanted = {o.name: (o.dtype, o.shape) for j in plan.jobs for o in j.outputs}
    found = {name: (e.dtype, e.shape) for name, e in source.checkpoint.entries.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            return Check("names, shapes, dtypes", f"{name}: {found.get(name)} here, {wanted.get(name)} expected", False)
    for item in source.items:
        listed = source.manifest.get("tensors", {}).get(item.name, {})
        now = {"dtype": str(item.dtype).removeprefix("torch."), "shape": list(item.shape)}
        if listed and any(listed.get(key) != value for key, value in now.items()):
            return Check("names, shapes, dtypes", f"{item.name}: {now} here, the manifest says otherwise", False)
    return Check("names, shapes, dtypes", f"{len(found):,} as the format writes them", True)


def configuration(source: Any, wanted: dict[str, Any]) -> Check:
    """config.json's quantization_config, key by key."""
    found = source.checkpoint.config.get("quantization_config") or {}
    expected = wanted.get("quantization_config") or {}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            return Check(
                "quantization_config", f"{key}: {found.get(key)!r} here, {expected.get(key)!r} expected", False
            )
    return Check("quantization_config", "as the format writes it" if expected else "absent, as it must be", True)


def decoded(source: Any) -> dict[str, str]:
    """Hash of every canonical tensor; raises on NaN, Inf, wrong shapes and scale byte 255."""
    from tqdm import tqdm

    from convert.packer import sha256, value_of
    from core.mxfp4 import on_grid

    hashes = {}
    total = sum(i.nbytes for i in source.items)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", dynamic_ncols=True, leave=False) as bar:
        for item in source.items:
            value = value_of(source, item)
            if item.quantised and not item.packed and not on_grid(value, -2 if item.transposed else -1):
                raise FormatError(f"{item.name} should be MXFP4 values in {value.dtype}, and is off the grid")
            hashes[item.name] = sha256(value)
            bar.update(item.nbytes)
    return hashes


def against_manifest(source: Any, hashes: dict[str, str]) -> list[Check]:
    from convert.manifest import model_hash
    from convert.packer import sha256

    manifest = source.manifest
    listed = {name: entry.get("sha256") for name, entry in manifest.get("tensors", {}).items()}
    wrong = sorted(n for n in listed.keys() | hashes.keys() if listed.get(n) != hashes.get(n))
    reencoded = manifest.get("reencoded", {})
    total = model_hash({**hashes, **reencoded})
    carried = {e.name: sha256(source.checkpoint.read(e.name)) for e in source.carried}
    return [
        Check(
            "manifest hashes",
            f"{len(wrong)} differ, first {wrong[0]}" if wrong else f"{len(listed):,} equal",
            not wrong,
        ),
        Check("model hash", total[:16], total == manifest.get("model_hash")),
        Check("carried tensors", f"{len(carried):,} byte-identical", carried == manifest.get("carried", {})),
    ]


def against_source(source: Any, hashes: dict[str, str], origin: Path) -> Check:
    """Bit for bit against the checkpoint it was made from; what a lossy format encoded anew is counted apart."""
    from convert.source import open_source

    reencoded = source.manifest.get("reencoded", {})
    theirs = decoded(open_source(origin, [i.model_name for i in source.quantised]))
    if source.manifest.get("method") == "ptq":
        return Check("source", f"{origin}: not compared, this folder was rounded from it (ptq)", True)
    names = theirs.keys() | hashes.keys()
    wrong = sorted(n for n in names if theirs.get(n) not in (hashes.get(n), reencoded.get(n, hashes.get(n))))
    text = f"{len(wrong)} differ, first {wrong[0]}" if wrong else f"{len(theirs) - len(reencoded):,} bit-equal"
    again = f", {len(reencoded):,} encoded anew (FP8, lossy)" if reencoded else ""
    return Check("source", f"{text}{again}, {origin}", not wrong)


if __name__ == "__main__":
    sys.exit(main())
