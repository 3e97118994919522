"""`python -m convert.export --to hf`: a trained checkpoint in the layout an engine loads.

python -m convert.export --to hf                        the latest finished run, written beside its model/
python -m convert.export --to mimo --from DIR --out OUT
python -m convert.export --to hf --from DIR --ptq even  a model that never saw QAT, rounded here and marked as such
python -m convert.export --to hf --dry-run              every tensor: source -> destination, dtype, bytes
python -m convert.export --to vllm --what drafter --from DRAFTER --target EXPORTED --out DIR
python -m convert.export --to mimo --what both --from MODEL --drafter DRAFTER --out DIR    DIR and DIR/dflash
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.command import ended
from core.errors import ConfigError

TARGETS = ("hf", "bf16", "mimo", "gpt-oss", "quark", "gguf", "dcp")
DRAFTER_ONLY = ("z-lab", "vllm")  # drafters also go to hf and mimo
DRAFTER_PLACE = "dflash"  # inside the target's folder, where --what both puts it
COPIED = (
    "generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
    "NOTICE.md", "README.md",
)  # fmt: skip


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m convert.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=(*TARGETS, *DRAFTER_ONLY),
        help="hf: compressed-tensors (GPT-OSS: its own layout)",
    )
    parser.add_argument("--from", dest="folder", help="run or checkpoint folder (default: the latest finished run)")
    parser.add_argument("--out", help="folder to write (default: beside the source, named after the format)")
    parser.add_argument("--what", choices=("target", "drafter", "both"), default="target")
    parser.add_argument("--target", help="with --what drafter: the exported target that it will draft for")
    parser.add_argument("--drafter", help="with --what both: the drafter's folder")
    parser.add_argument("--force", action="store_true", help="export a drafter for a target it was not trained with")
    parser.add_argument("--ptq", choices=("even", "floor", "rceil"), help="round an untrained model by this scale rule")
    parser.add_argument(
        "--select", nargs="+", help="with --ptq: fnmatch patterns of model tensors (default: all experts)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--workers", type=int, default=2, help="threads that pack ahead of the writer")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="largest file, in GiB")
    parser.add_argument("--runs", default="runs", help="where runs are")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    return ended("convert.export", run, arguments(words), "the same command continues")


def run(options: argparse.Namespace) -> None:
    wanted = {"target": (), "drafter": ("folder", "target", "out"), "both": ("drafter",)}[options.what]
    for name in ("target", "drafter"):
        if getattr(options, name) and name not in wanted:
            raise ConfigError(f"--{name} is not for --what {options.what}; leave it out")
    for name in wanted:
        if not getattr(options, name):
            raise ConfigError(f"--what {options.what} needs --{'from' if name == 'folder' else name} DIR")
    if options.what == "drafter":
        export_drafter(options)
    elif options.to in DRAFTER_ONLY:
        raise ConfigError(f"--to {options.to} is a layout of drafters; add --what drafter")
    else:
        export_target(options)


def export_drafter(options: argparse.Namespace) -> None:
    from convert.drafter import plan_drafter

    plan = plan_drafter(options.to, Path(options.folder), Path(options.target), force=options.force)
    out = Path(options.out)
    print(f"Drafter from {plan.folder} for {plan.pair.folder} to {out}, layout {options.to}\n{plan.summary()}")
    if options.dry_run:
        print(plan.table())
        return
    plan.write(out)
    print(f"Written: {out}; check it with: python -m convert.verify {out} --source {plan.folder}")


def export_target(options: argparse.Namespace) -> None:
    from convert.drafter import plan_drafter
    from convert.formats import format_named
    from convert.plan import make_plan, table

    if options.workers < 1 or not 0 < options.shard_gb < 2**20:
        raise ConfigError(f"--workers {options.workers} --shard-gb {options.shard_gb}: both must be positive numbers")
    folder = Path(options.folder) if options.folder else latest_run(Path(options.runs))
    source = opened(options, folder)
    format = format_named("bf16" if options.to == "dcp" else options.to, source)
    plan = make_plan(format, source, int(options.shard_gb * 2**30))
    name = "dcp" if options.to == "dcp" else format.name
    out = Path(options.out) if options.out else beside(folder, name)
    print(f"From {source.folder}{'' if options.folder else ' (the latest finished run)'} to {out}, format {name}")
    print(summary(plan, source, options.ptq))
    if format.one_file and source.carried:
        names = ", ".join(e.name for e in source.carried[:3])
        print(f"Left out: {len(source.carried):,} tensors that {name} has no place for here ({names}, ...)")
    drafter = None
    if options.what == "both":
        drafter = plan_drafter(options.to, Path(options.drafter), source.folder, force=options.force, hashed=False)
        print(f"Drafter from {drafter.folder} to {out / DRAFTER_PLACE}\n{drafter.summary()}")
    if options.dry_run:
        print(table(plan) + (f"\n{drafter.table()}" if drafter else ""))
        return
    manifest = (write_as_dcp if name == "dcp" else write)(
        source, format, plan, out, ptq=options.ptq, workers=options.workers
    )
    if drafter:
        drafter.write(out / DRAFTER_PLACE, manifest["model_hash"])
    print(f"Written: {out}; check it with: python -m convert.verify {out}")


def opened(options: argparse.Namespace, folder: Path) -> Any:
    """The source, with what will be quantised chosen.

    Raises:
        ConfigError: --select without --ptq, or a pattern that matches nothing.
    """
    from convert.source import open_source

    if options.ptq:
        return open_source(folder, chosen(folder, options.select))
    if options.select:
        raise ConfigError("--select is for --ptq; a trained model's selection is what it was trained with")
    source = open_source(folder)
    if options.to in ("bf16", "dcp") and source.rule is None and not on_the_grid(source):
        return open_source(folder, [])  # never quantised: baking needs no grid
    return source


def on_the_grid(source: Any) -> bool:
    """Whether the first tensor that would be quantised is; the others are checked as they are written."""
    from convert.packer import value_of
    from core.mxfp4 import on_grid

    first = next(iter(source.quantised), None)
    return first is not None and on_grid(value_of(source, first), -2 if first.transposed else -1)


def chosen(folder: Path, patterns: Sequence[str] | None) -> list[str]:
    """Model tensors to round: all experts, or what the patterns match."""
    from fnmatch import fnmatch

    from convert.source import RUN_MODEL
    from core.models.experts import find_experts
    from core.models.load import meta_model

    model = meta_model(folder / RUN_MODEL if (folder / "run.json").is_file() else folder)[0]
    if not patterns:
        return [e.name for e in find_experts(model)]
    names = [n for n, p in model.named_parameters() if p.dim() >= 2]
    for pattern in patterns:
        if not any(fnmatch(n, pattern) for n in names):
            raise ConfigError(f"--select {pattern!r} matches no matrix of {folder}; names look like {names[-2]}")
    return [n for n in names if any(fnmatch(n, p) for p in patterns)]


def latest_run(root: Path) -> Path:
    """The newest finished run under `root`.

    Raises:
        ConfigError: there is none.
    """
    from core.checkpoint.index import read_json

    found = [p.parent for p in root.glob("*/run.json") if not p.parent.is_symlink()]
    finished = [
        f for f in found if read_json(f / "run.json").get("state") == "finished" and (f / "selection.json").exists()
    ]
    if not finished:
        raise ConfigError(
            f"no finished run under {root}; train one (python -m qat.train +experiment=mimo_fp4), or name a folder "
            "with --from"
        )
    return max(finished, key=lambda f: (f / "run.json").stat().st_mtime)


def beside(folder: Path, name: str) -> Path:
    folder = folder.resolve()
    return folder / name if (folder / "run.json").is_file() else folder.with_name(f"{folder.name}-{name}")


def summary(plan: Any, source: Any, ptq: str | None) -> str:
    packed = source.quantised
    before = sum(i.nbytes for i in packed)
    after = sum(i.nbytes * 17 // 64 for i in packed)  # 4.25 of 16 bits
    how = f"rounded here by the {ptq} rule (PTQ)" if ptq else "as trained"
    lines = [f"{len(plan.jobs):,} tensors in {len(plan.shards)} files, {plan.nbytes / 1e9:.3f} GB"]
    if packed:
        share = f"{after / before:.2%}"
        lines.append(f"MXFP4: {len(packed):,} tensors, {before / 1e9:.3f} GB of BF16 in {share} of the bytes, {how}")
    return "\n".join(lines)


def write(
    source: Any, format: Any, plan: Any, out: Path, *, ptq: str | None = None, workers: int = 2, encoder: Any = None
) -> dict[str, Any]:
    """Write the export and return its manifest. `encoder`: a faster drop-in for core.mxfp4.encode.

    Raises:
        CheckpointError: `out` is not empty, or cannot be written. FormatError: a quantised tensor is off the grid.
    """
    from convert import write as files
    from convert.manifest import build
    from convert.packer import Packer
    from convert.source import MANIFEST
    from core.checkpoint.writer import write_text
    from core.mxfp4 import ScaleRule

    rule = ScaleRule(ptq) if ptq else source.rule
    if ptq and source.rule is not None:
        raise ConfigError(f"--ptq {ptq}: {source.folder} was quantised already ({source.rule.value}); leave --ptq out")
    packer = Packer(source, rule or ScaleRule.even, ptq is not None, **({"encoder": encoder} if encoder else {}))
    target = files.Target(out)
    target.check()
    with files.named_failures(target):
        files.begin(target, files.fingerprint(plan, source, {"format": format.name, "rule": str(rule), "ptq": ptq}))
        if format.one_file:
            format.write(source, plan, packer, target, workers)
        else:
            files.write_shards(plan, packer, target, workers)
            small_files(source, format, target)
            files.write_index(plan, target, format.index_metadata(source))
        coverage = {
            "quantised": len(source.quantised),
            "tensors": len(source.items),
            "carried": len(packer.carried),
            "left_out": len(source.carried) - len(packer.carried),
            "bytes": plan.nbytes,
        }
        named = rule.value if rule and source.quantised else None
        manifest = build(
            source, format.name, named, bool(ptq), packer.hashes, packer.reencoded, packer.carried, coverage
        )
        write_text(target.part / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        files.finish(target)
    return manifest


def small_files(source: Any, format: Any, target: Any) -> None:
    """config.json, tokenizer, licence, card: as they are now, whatever an interrupted try had copied."""
    from core.checkpoint.index import inside
    from core.checkpoint.writer import write_text
    from core.models.load import TOKENIZER_FILES

    for name in (*TOKENIZER_FILES, *COPIED):
        (target.part / name).unlink(missing_ok=True)
        if (source.folder / name).is_file():
            shutil.copyfile(inside(source.folder, name), target.part / name)
    write_text(target.part / "config.json", json.dumps(format.config(source), indent=2, sort_keys=True) + "\n")


def write_as_dcp(source: Any, format: Any, plan: Any, out: Path, **options: Any) -> dict[str, Any]:
    """Bake into BF16 in a temporary folder beside `out`, and save that through torch.distributed.checkpoint."""
    from convert import write as files
    from convert.formats.dcp import write_dcp
    from convert.source import MANIFEST
    from core.checkpoint.writer import write_text

    target = files.Target(out)
    target.check()
    baked = out.with_name(f".{out.name}.baked")  # a fixed name: a killed export continues there and leaves one copy
    with files.named_failures(target):
        shutil.rmtree(baked, ignore_errors=True)
        target.clear()
        manifest = write(source, format, plan, baked, **options) | {"format": "dcp"}
        files.begin(target, "")
        write_dcp(baked, target.part)
        write_text(target.part / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(baked)
        files.finish(target)
    return manifest


if __name__ == "__main__":
    sys.exit(main())
