"""Tokens/s of the runtime on real prompts, beside transformers on the same folder.

    python -m benchmarks.engine --model DIR [--drafter DIR] [--prompts FILE.jsonl(.gz)] [--rows 1 8 64] [--tokens 128]
                                [--no-peer] [--device auto] [--json FILE]

For each number of concurrent requests: the engine plain, with the drafter, and as peers transformers' batched
`generate` (left padding) and its continuous batching, in one run. Everyone is greedy, goes on after end tokens, reads
the same prompts and writes the same number of tokens; a pass over them all comes first, unmeasured. tokens/s is new
tokens over the time of the whole pass, the reading of prompts included; loading, set-up and recording of CUDA graphs
are not. No prompt is taken from a prefix cache. ms a step (a round, with the drafter) is the mean over the engine's
steps in which no prompt is read. Packed exports are dequantised for the peers: transformers has no MXFP4 experts for
them.

The tokens are compared before speeds are shown. In BF16 a tie is broken by the order of sums, so replies may part from
transformers'; the figures of its two peers among themselves say how often that happens anyway. Without --prompts: the
files eval/*.jsonl.gz under FP4FLASH_DATA.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import publish
from benchmarks.engine_peers import CONTINUOUS, GENERATE, Figure, Ids, Load, measure_peers, progress, timed
from core.errors import ConfigError, Fp4FlashError
from core.models.load import load_tokenizer
from core.train.config import DataConfig, DataSource, Source
from core.train.data.chat import plain
from core.train.data.documents import ENVIRONMENT, jsonl_files, jsonl_records
from draft_training.prompts import chat_ids
from infer.build import build_engine
from infer.options import DTYPES, EngineOptions
from infer.parallel import device_of
from infer.request import FAILED, Request, SamplingParams

NAME = "benchmarks.engine"
PLAIN, DRAFTED = "engine", "engine + drafter"
SPARE, DRAFT_SPARE = 16, 160  # positions a request writes beyond its end, at most


def read_prompts(files: list[Path], tokenizer: Any, count: int, most: int) -> list[Ids]:
    """`count` prompts of at most `most` tokens, all different, drawn from the files in an order that is always the
    same.

    Raises:
        ConfigError: there are fewer.
    """
    records = [record for file in files for record in jsonl_records(file)]
    random.Random(0).shuffle(records)
    found: dict[tuple[int, ...], None] = {}
    for record in records:
        for ids in prompts_of(record, tokenizer, most):
            if 0 < len(ids) <= most:
                found[tuple(ids)] = None
            if len(found) == count:
                return [list(ids) for ids in found]
    raise ConfigError(f"--prompts: {len(found)} of at most {most} tokens, and {count} are needed; give more, or longer")


def prompts_of(record: dict[str, Any], tokenizer: Any, most: int) -> list[Ids]:
    """A chat through the template, or its first question where there is none; every fourth piece of a plain text."""
    if "messages" in record and tokenizer.chat_template:
        return [chat_ids(record, tokenizer)]
    if "messages" in record:
        asked = next((plain(m.get("content")) for m in record["messages"] if m["role"] == "user"), "")
        return [list(tokenizer(asked, verbose=False)["input_ids"])]
    ids = list(tokenizer(record.get("text", ""), verbose=False)["input_ids"])
    return [ids[at : at + most] for at in range(0, len(ids), 4 * most)]


def files_of(given: str | None) -> list[Path]:
    if given is None and ENVIRONMENT not in os.environ:
        raise ConfigError(f"no --prompts, and {ENVIRONMENT} names no data bundle; give one of the two")
    everything = DataConfig(source=DataSource.jsonl)
    return [Path(given)] if given else jsonl_files(everything, Source("eval/*.jsonl.gz"))


class EngineRun:
    """Passes over one load by one engine; `before` and `steps` are of the last pass."""

    def __init__(self, options: argparse.Namespace, load: Load, drafter: Path | None) -> None:
        spare = DRAFT_SPARE if drafter else SPARE
        given = EngineOptions(
            Path(options.model), drafter, device=options.device, dtype=options.dtype, rows=load.rows,
            kv_tokens=load.rows * (load.longest + spare), prefix_cache=False, force_drafter=options.force_drafter,
        )  # fmt: skip
        self.load, self.engine, self.passes = load, build_engine(given), 0
        self.before = self.engine.stats()
        self.steps: list[float] = []  # seconds of those that read no prompt

    def __call__(self) -> list[Ids]:
        engine, load = self.engine, self.load
        self.passes += 1
        self.before, self.steps = engine.stats(), []
        names = [f"{self.passes}-{n}" for n in range(len(load.prompts))]
        replies: dict[str, Ids] = {name: [] for name in names}
        params = SamplingParams(max_tokens=load.tokens, ignore_eos=True)
        for name, ids in zip(names, load.prompts, strict=True):
            engine.add(Request(name, ids, params))
        while engine.busy:
            self.step(replies)
        return [replies[name] for name in names]

    def step(self, replies: dict[str, Ids]) -> None:
        read, began = self.engine.stats().prompt_tokens, time.perf_counter()
        outputs = self.engine.step()
        took = time.perf_counter() - began
        if self.engine.stats().prompt_tokens == read:
            self.steps.append(took)
        for output in outputs:
            if output.finish == FAILED:
                raise ConfigError(f"{output.id}: {output.error}")
            replies[output.id].extend(output.ids)

    def tau(self) -> float | None:
        """Tokens a round; None without a drafter."""
        before, after = self.before, self.engine.stats()
        rounds = after.rounds - before.rounds
        return 1 + (after.accepted - before.accepted) / rounds if rounds else None


def measure_engine(options: argparse.Namespace, load: Load, drafter: Path | None) -> Figure:
    run = EngineRun(options, load, drafter)
    replies, seconds = timed(run, load)
    step_ms = statistics.mean(run.steps) * 1e3 if run.steps else None
    return Figure(DRAFTED if drafter else PLAIN, load, replies, seconds, step_ms, run.tau())


def parted(one: list[Ids], other: list[Ids]) -> list[int]:
    """Where the replies that are not equal part, the first differing position of each."""
    return [
        next(n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b)
        for x, y in zip(one, other, strict=True)
        if x != y
    ]


def agreement(figures: list[Figure]) -> Iterator[dict[str, Any]]:
    """Every arm against transformers' generate, and the drafter's against the engine without."""
    at = {(f.what, f.load.rows): f for f in figures}
    for what, against in ((PLAIN, GENERATE), (DRAFTED, PLAIN), (CONTINUOUS, GENERATE)):
        for (name, rows), figure in at.items():
            other = at.get((against, rows))
            if name == what and other is not None:
                places = parted(figure.replies, other.replies)
                total = len(figure.replies)
                yield {"what": what, "against": against, "rows": rows, "equal": total - len(places), "of": total,
                       "parted_at": places}  # fmt: skip


def table(figures: list[Figure]) -> list[dict[str, Any]]:
    """One row a figure; ratios to the peers at as many requests."""
    speed = {(f.what, f.load.rows): f.speed for f in figures}
    rows = []
    for f in sorted(figures, key=lambda f: f.load.rows):
        row = {"rows": f.load.rows, "what": f.what, "requests": len(f.replies), "tokens_per_s": f.speed,
               "step_ms": f.step_ms, "tau": f.tau}  # fmt: skip
        for name, peer in (("of_generate", GENERATE), ("of_continuous", CONTINUOUS)):
            other = speed.get((peer, f.load.rows))
            row[name] = f.speed / other if other else None
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], compared: list[dict[str, Any]], missing: dict[str, str]) -> None:
    for c in compared:
        text = f"{c['what']} = {c['against']}, {c['rows']} at once: {c['equal']} of {c['of']} replies equal"
        print(text + (f", the others part at token {sorted(c['parted_at'])}" if c["parted_at"] else ""))
    for what, why in missing.items():
        name = "continuous batching" if what == CONTINUOUS else "generate"
        print(f"transformers' {name}: not measured ({why})")
    print(f"{'rows':>4}  {'':23} {'tokens/s':>10} {'ms a step':>9} {'tau':>5} {'x generate':>10} {'x continuous':>12}")
    for r in rows:
        cells = [f"{'' if r[k] is None else format(r[k], '.2f'):>{w}}"
                 for k, w in (("step_ms", 9), ("tau", 5), ("of_generate", 10), ("of_continuous", 12))]  # fmt: skip
        print(f"{r['rows']:4}  {r['what']:23} {r['tokens_per_s']:10,.1f}", *cells)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder with its tokenizer")
    parser.add_argument("--drafter", metavar="DIR", help="DFlash drafter folder for that model")
    parser.add_argument("--force-drafter", action="store_true", help="take a drafter of another target")
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines with `messages` or `text`, plain or .gz")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="longer prompts are left out")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64], help="requests at once")
    parser.add_argument("--requests", type=int, default=8, help="of a measurement, at least; and one for each row")
    parser.add_argument("--tokens", type=int, default=128, help="of every reply")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave transformers out")
    parser.add_argument("--device", default="auto", help="auto | cuda | cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--json", help="also write the result to this file")
    options = parser.parse_args()
    if min(*options.rows, options.tokens, options.requests, options.prompt_tokens) < 1:
        parser.error("--rows, --tokens, --requests and --prompt-tokens: expected at least 1")
    return options


def run(options: argparse.Namespace) -> None:
    if not Path(options.model).is_dir():
        raise ConfigError(f"--model {options.model}: no such folder")
    tokenizer = load_tokenizer(Path(options.model))
    if tokenizer is None:
        raise ConfigError(f"--model {options.model} has no tokenizer.json; copy the base model's")
    counts = [max(rows, options.requests) for rows in options.rows]
    prompts = read_prompts(files_of(options.prompts), tokenizer, max(counts), options.prompt_tokens)
    loads = [Load(prompts[:n], rows, options.tokens) for n, rows in zip(counts, options.rows, strict=True)]
    drafters = [Path(options.drafter), None] if options.drafter else [None]  # a wrong one is said at once
    figures = [progress(measure_engine(options, load, drafter)) for drafter in drafters for load in loads]
    figures.sort(key=lambda f: f.what)
    missing = dict.fromkeys((GENERATE, CONTINUOUS), "--no-peer")
    if options.peer:
        found, missing = measure_peers(options, loads)
        figures += found
    compared, rows = list(agreement(figures)), table(figures)
    show(rows, compared, missing)
    about = {key: getattr(options, key) for key in ("model", "drafter", "tokens", "dtype")}
    lengths = {"prompt_tokens": [len(p) for p in prompts], "ran_on": str(device_of(options.device))}
    result = {"agreement": compared, "not_measured": missing, "table": rows}
    publish("engine", about | lengths | result, options.json)


def main() -> int:
    options = arguments()
    try:
        run(options)
    except Fp4FlashError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
