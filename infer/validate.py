"""`python -m infer.validate --model EXPORT --against RUN`: is what runs what was trained?

python -m infer.validate --model exports/hf --against runs/latest
python -m infer.validate --model exports/hf --against runs/latest --drafter runs/draft/model --layers
python -m infer.validate --model exports/hf --against runs/latest --text wiki.jsonl.gz --documents 32 --length 1024

Along real text, the runtime's logits (its kernels, its cache, packed experts) are held against those of the trainer's
model (core.models.load), computed in FP32. What rounding alone costs is measured beside it: the trainer's model in the
runtime's own dtype. Checks:

    logits      mean KL to the FP32 model at most 1.5 times that of the trainer's model in the same dtype
    top token   the share of positions with the same argmax, at most half a point below that of the trainer's model
    perplexity  within 1 % of the FP32 model's, 1.5 times the trainer's own distance in that dtype, or two standard
                errors of the difference over positions, whichever is most
    greedy      text of some prompts, the same as the FP32 model's wherever its two best logits are further apart than
                twice the largest error measured; exceptions are counted
    drafter     tokens a round at least 70 % of what training reported (report.json beside the drafter's folder)

--layers adds the relative error of the residual stream after every layer. The exit status is 0 where all checks hold,
1 where one does not, 2 where it could not be told.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from core.checkpoint.writer import write_text
from core.errors import ConfigError
from infer.command import check_writable, ending
from infer.options import EngineOptions, add_options, options_of

NAME = "infer.validate"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="what the runtime loads")
    parser.add_argument("--against", required=True, metavar="RUN", help="training run, or its model folder")
    parser.add_argument("--drafter", metavar="DIR", help="DFlash drafter folder, or its training run")
    parser.add_argument("--text", metavar="FILE", help=".txt or .jsonl[.gz] (default: Python's standard library)")
    parser.add_argument("--documents", type=int, default=8, help="texts to compare (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--replies", type=int, default=8, help="greedy replies (default: %(default)s)")
    parser.add_argument("--reply-tokens", type=int, default=64, help="tokens of each (default: %(default)s)")
    parser.add_argument("--layers", action="store_true", help="also compare after every layer")
    parser.add_argument("--out", metavar="FILE", help="write the figures as JSON")
    add_options(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    return ending(NAME, lambda: run(options))


def run(options: argparse.Namespace) -> int:
    for name in ("documents", "length", "replies", "reply_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least 1")
    check_writable("--out", options.out)
    options.drafter = model_of(Path(options.drafter), "drafter") if options.drafter else None
    engine, against = options_of(options), model_of(Path(options.against), "against")
    from core.config import check_name_clash

    check_name_clash()
    found = measured(engine, against, options)
    if found is None:  # another rank reports
        return 0
    from infer.compare import verdict

    rows = verdict(found)
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{'pass' if row.good else 'FAIL' if row.good is False else '    '}  {row.what:{width}}  {row.text}")
    if options.out:
        write_text(Path(options.out), json.dumps(asdict(found), indent=1) + "\n")
    bad = [row.what for row in rows if row.good is False]
    print(f"{NAME}: " + (f"{', '.join(bad)}: not what was trained" if bad else "the runtime computes what was trained"))
    return int(bool(bad))


def measured(engine_options: EngineOptions, against: Path, options: argparse.Namespace):
    """Figures on rank 0; None on the others, which only take part in the runtime's steps."""
    from core.models.load import load_tokenizer
    from infer.build import build_engine, join
    from infer.compare import Plan, compare, texts_of, trained_tau
    from infer.parallel import together

    tokenizer = load_tokenizer(engine_options.model) or load_tokenizer(against)
    if tokenizer is None:
        raise ConfigError(f"neither {engine_options.model} nor {against} has a tokenizer.json; copy the base model's")
    ranks = join(engine_options)
    with together(ranks):
        engine = build_engine(engine_options, ranks)
        length = min(options.length, engine.max_length)
        documents = texts_of(options.text, tokenizer, options.documents, length)
        prompts = [d[: max(1, min(32, len(d) // 2))] for d in documents][: options.replies]
        tau = trained_tau(engine_options.drafter) if engine_options.drafter else None
        plan = Plan(
            documents,
            prompts,
            min(options.reply_tokens, engine.max_length - max(map(len, prompts))),
            options.layers,
            tau,
        )
        found = compare(engine, against, plan)
    return found if ranks.first else None


def model_of(folder: Path, what: str) -> Path:
    """The model of a run, or the folder itself."""
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--{what} {folder}: neither a run (model/config.json) nor a model folder (config.json)")
    return folder


if __name__ == "__main__":
    sys.exit(main())
