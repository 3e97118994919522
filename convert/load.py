"""`python -m convert.load --from DIR --out OUT`: any format, back into a BF16 checkpoint that every trainer takes.

    python -m convert.load --from MIMO-FP4 --out model        hf, mimo, gpt-oss, quark, FP8 (128x128), BF16, FP32
    python -m convert.load --from model.gguf --out model      GGUF
    python -m convert.load --from DCP-FOLDER --out model      torch.distributed.checkpoint
    python -m convert.load --from DRAFTER --target MODEL --out drafter    a DFlash drafter of z-lab, vLLM, MiMo, hf

MXFP4 values are exact in BF16, so nothing is lost: exporting the result again gives the same codes and scales (by the
rules even and floor; rceil gives the same values, sometimes by another pair of code and scale). FP8 becomes BF16.
fp4flash's own trainers also read the safetensors formats directly; this is for everything else.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from convert.command import ended
from core.errors import ConfigError


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m convert.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="folder", required=True, help="folder, or .gguf file")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--target", help="for a drafter: the model it drafts for")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode ahead of the writer")
    parser.add_argument("--shard-gb", type=float, default=4.0, help="largest file, in GiB")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    return ended("convert.load", run, arguments(words), "the same command continues")


def run(options: argparse.Namespace) -> None:
    folder, out = Path(options.folder), Path(options.out)
    if drafter(folder, out, options):
        return
    if (folder / ".metadata").is_file():
        from convert.formats.dcp import unpacked

        with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".dcp-") as temporary:
            convert(unpacked(folder, Path(temporary) / folder.name), out, options)
        return
    from convert.formats.gguf_read import gguf_in, unpacked_gguf

    if file := gguf_in(folder):
        with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".gguf-") as temporary:
            convert(unpacked_gguf(file, Path(temporary) / file.stem)[0], out, options)
    else:
        convert(folder, out, options)


def drafter(folder: Path, out: Path, options: argparse.Namespace) -> bool:
    """Whether `folder` is a drafter's; if so it has been imported."""
    from convert.drafter_load import import_drafter, is_drafter
    from core.checkpoint.index import read_json

    if not (folder / "config.json").is_file() or not is_drafter(read_json(folder / "config.json")):
        if options.target:
            raise ConfigError(f"--target is for drafters, and {folder} is none; leave it out")
        return False
    target = Path(options.target) if options.target else None
    config = import_drafter(folder, out, target, options.dry_run)
    print(f"Drafter of {config.num_hidden_layers} layers, block {config.block_size}, window {config.window}")
    print("Nothing written (--dry-run)" if options.dry_run else f"Written: {out}")
    return True


def convert(folder: Path, out: Path, options: argparse.Namespace) -> None:
    from convert.export import summary, write
    from convert.formats import FORMATS
    from convert.plan import make_plan, table
    from convert.source import MANIFEST, open_source

    # without a manifest only what is stored as MXFP4 is quantised
    source = open_source(folder, None if (folder / MANIFEST).is_file() or (folder / "run.json").is_file() else [])
    plan = make_plan(FORMATS["bf16"], source, int(options.shard_gb * 2**30))
    print(f"From {source.folder} to {out}, BF16\n{summary(plan, source, None)}")
    if options.dry_run:
        print(table(plan))
        return
    write(source, FORMATS["bf16"], plan, out, workers=options.workers)
    print(f"Written: {out}; train it with: python -m qat.train +experiment=mimo_fp4 model=path model.path={out}")


if __name__ == "__main__":
    sys.exit(main())
