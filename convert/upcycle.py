"""`python -m convert.upcycle --from DENSE --always-on S --routed R --top-k K`: a small MoE model out of a dense one.

    python -m convert.upcycle --from SMOLLM2 --always-on 8 --routed 16 --top-k 8 --out SMOLLM2-MOE
    python -m qat.train +experiment=heal model.path=SMOLLM2-MOE loss.teacher_path=SMOLLM2 data=jsonl data.root=DATA

Every FFN of a Llama-type model becomes S experts that are always on and R routed ones, all of one width, in MiMo-V2
architecture. The flags count experts: a token uses S + K. Nothing else changes, so with all experts on and router scale
0 the model computes what the dense one does; the table at the end says what routing costs, which healing then removes.
It needs the model in FP32 and its FFNs once more: about 8 bytes of memory a parameter.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.command import ended
from core.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from core.train.batch import Batch

NOTES = "upcycle.json"
SEQ_LEN, ROWS = 512, 2  # of a batch
HELD_OUT_ROWS = 4  # of each source
CHARACTERS_PER_TOKEN = 16  # of embedded text to read; ample


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m convert.upcycle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="folder", required=True, help="checkpoint folder of a Llama-type model")
    parser.add_argument("--always-on", type=int, required=True, metavar="S", help="experts that every token uses")
    parser.add_argument("--routed", type=int, required=True, metavar="R", help="experts that the router chooses among")
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="routed experts that a token uses")
    parser.add_argument(
        "--router-scale", type=float, default=0.05, help="standard deviation of a routed expert's logit (default: 0.05)"
    )
    parser.add_argument("--out", help="folder to write (default: beside the source, named after it)")
    parser.add_argument("--data", help="folder, or .jsonl(.gz) file, of calibration text (default: Python's library)")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens (default: 8192)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="print the geometry and stop; reads only config.json")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    return ended("convert.upcycle", run, arguments(words), "nothing was written, run the same command again")


def run(options: argparse.Namespace) -> None:
    from convert.dense_to_moe import Split, geometry, moe_config
    from core.models.build import read_config

    folder = Path(options.folder)
    split = Split(options.always_on, options.routed, options.top_k, options.router_scale, options.seed)
    config = moe_config(read_config(folder), split)
    out = Path(options.out) if options.out else folder.resolve().with_name(f"{folder.resolve().name}-moe")
    print(f"From {folder} to {out}: {geometry(config, split)}")
    if options.dry_run:
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"--out {out} is not an empty folder; choose another, or remove it first")
    notes = split_and_save(options, folder, config, split, out)
    print(f"\n{table(notes['held_out'], split)}\n\nWritten: {out}; heal it with:")
    print(f"python -m qat.train +experiment=heal model.path={out} loss.teacher_path={folder} data=jsonl data.root=DIR")


def split_and_save(options: argparse.Namespace, folder: Path, config: Any, split: Any, out: Path) -> dict[str, Any]:
    """Calibrate, split, measure and write; returns what upcycle.json says."""
    from dataclasses import asdict

    import torch

    from convert.dense_to_moe import calibrate, every_expert_on, held_out, upcycled
    from core.checkpoint.writer import replacing, write_text
    from core.models.load import LoadedModel, load_model, save_model

    dense = load_model(folder, dtype=torch.float32)
    if dense.tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer, so no text can be read for calibration; copy it there")
    calibration, batches = texts(options, dense.tokenizer)
    model = upcycled(dense.model, config, split, calibrate(dense.model, calibration))
    arms = {"dense": dense.model, "all on, scale 0": every_expert_on(model), "as shipped": model}
    notes = {
        "source": str(folder), **asdict(split), "data": options.data or "embedded",
        "calibration_tokens": sum(b.input_ids_BT.numel() for b in calibration),
        "held_out_tokens": sum(b.num_targets for b in batches),
        "held_out": held_out(arms, dense.model, batches),
    }  # fmt: skip
    tensors = ((n, t if n.endswith("bias") else t.to(torch.bfloat16)) for n, t in model.state_dict().items())
    with replacing(out) as part:
        save_model(tensors, LoadedModel(model, config, None, (), folder), part)
        write_text(part / NOTES, json.dumps(notes, indent=2) + "\n")
    return notes


def texts(options: argparse.Namespace, tokenizer: Any) -> "tuple[list[Batch], list[Batch]]":
    """(calibration, held-out) rows: other files of the embedded text; of --data, rows that come later in it."""
    from core.train.config import DataConfig, DataSource, Source
    from core.train.data import eval_batches, train_stream

    if options.tokens < 1:
        raise ConfigError(f"--tokens {options.tokens}: expected at least 1")
    data = DataConfig(seq_len=SEQ_LEN, eval_rows=HELD_OUT_ROWS)
    data.max_bytes = max(1_000_000, CHARACTERS_PER_TOKEN * options.tokens)
    if options.data:
        data.source = DataSource.jsonl
        data.train = [Source(path=str(f)) for f in jsonl_files(Path(options.data).resolve())]
    stream = train_stream(data, tokenizer, batch_size=ROWS, seed=options.seed)
    calibration = [next(stream) for _ in range(-(-options.tokens // (SEQ_LEN * ROWS)))]
    if options.data:
        later = [next(stream) for _ in range(HELD_OUT_ROWS * len(data.train))]
    else:
        later = [b for found in eval_batches(data, tokenizer, ROWS).values() for b in found]
    if any(i.epoch for i in stream.ingredients):
        raise DataError(
            f"--data {options.data} is too short for --tokens {options.tokens} and as many rows to measure on"
        )
    return calibration, later


def jsonl_files(path: Path) -> list[Path]:
    files = sorted(f for f in path.rglob("*.jsonl*") if f.suffix in (".jsonl", ".gz")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"--data {path} holds no .jsonl or .jsonl.gz file; name a folder or file that does")
    return files


def table(errors: dict[str, dict[str, float]], split: Any) -> str:
    lines = [f"{'held-out text':<40}{'loss':>10}{'KL to dense':>14}"]
    says = {"as shipped": f"as shipped, top {split.top_k} of {split.routed}, scale {split.router_scale:g}"}
    lines += [f"{says.get(n, n):<40}{e['loss']:>10.4f}{e['kl']:>14.2e}" for n, e in errors.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
