"""`python -m infer.generate --model DIR [--drafter DIR] "prompt" ...`: replies to prompts, streamed.

python -m infer.generate --model exports/hf "The sky is"
python -m infer.generate --model exports/hf --drafter exports/drafter --chat --stats "Why is the sky blue?"
torchrun --nproc-per-node 8 -m infer.generate --model exports/hf "The sky is"      one model over eight GPUs
python -m infer.generate --model exports/hf --prompts prompts.txt --out replies.jsonl --temperature 0.7 --seed 1

One prompt is streamed. Several, or --prompts (one a line), are generated together and printed, or written to --out as
JSON lines, in their order.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from core.checkpoint.writer import write_text
from core.errors import ConfigError
from infer.command import check_writable, ending
from infer.options import add_options, options_of
from infer.request import EngineStats, SamplingParams

NAME = "infer.generate"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="*", help="prompts; - reads one from standard input")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder with its tokenizer")
    parser.add_argument("--drafter", metavar="DIR", help="DFlash drafter folder: speculative decoding")
    parser.add_argument("--prompts", metavar="FILE", help="one prompt a line")
    parser.add_argument("--out", metavar="FILE", help="write JSON lines instead of printing")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")
    parser.add_argument("--stats", action="store_true", help="print tokens/s, ms per round and accepted drafts")
    add_sampling(parser)
    add_options(parser)
    return parser.parse_args(words)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256, help="of a reply (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0, help="0: off")
    group.add_argument("--seed", type=int, help="the same seed gives the same text (default: a random one)")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="string that ends a reply; may be given again"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")


def sampling_of(options: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, max_tokens=options.max_tokens,
        stop=tuple(options.stop), seed=options.seed, ignore_eos=options.ignore_eos,
    )  # fmt: skip


def prompts_of(options: argparse.Namespace) -> list[str]:
    """Raises ConfigError where there is none."""
    if "-" in options.prompt and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("prompt '-': several processes have no common standard input; give it in --prompts FILE")
    given = [sys.stdin.read() if p == "-" else p for p in options.prompt]
    if options.prompts:
        try:
            given += [line for line in Path(options.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {options.prompts} cannot be read: {error}") from error
    if not given or not all(given):
        raise ConfigError("no prompt: give one behind the options, or --prompts FILE with one a line")
    return given


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    return ending(NAME, lambda: run(options))


def run(options: argparse.Namespace) -> int:
    params, engine = sampling_of(options), options_of(options)
    if options.dry_run:
        from infer.plan import plan_text

        print(plan_text(engine))
        return 0
    texts = prompts_of(options)
    check_writable("--out", options.out)
    from infer.llm import LLM

    given = {k: v for k, v in vars(engine).items() if k not in ("model", "drafter")}
    with LLM(engine.model, drafter=engine.drafter, **given) as llm:
        ids = [llm.encode_chat([{"role": "user", "content": t}]) if options.chat else llm.encode(t) for t in texts]
        begun = time.perf_counter()
        if len(ids) == 1 and options.out is None:
            status = stream(llm, ids[0], params)
        else:
            made = llm.generate(ids, params, progress=True)
            status = int(any(c.finish == "failed" for c in made))
            if llm.ranks.first:
                show(texts, made, options.out)
        if options.stats and llm.ranks.first:
            print(statistics(llm.stats(), time.perf_counter() - begun), file=sys.stderr)
    return status


def stream(llm, ids: list[int], params: SamplingParams) -> int:
    error = ""
    for text, completion in llm.stream(ids, params):
        error = completion.error
        if llm.ranks.first:
            print(text, end="", flush=True)
    if llm.ranks.first:
        print()
        if error:
            print(f"{NAME}: {error}", file=sys.stderr)
    return int(bool(error))


def show(texts: list[str], made: list, out: str | None) -> None:
    lines = [
        json.dumps(
            {"prompt": t, "text": c.text, "finish": c.finish, "ids": c.ids, "error": c.error}, ensure_ascii=False
        )
        for t, c in zip(texts, made, strict=True)
    ]  # fmt: skip
    if out is not None:
        write_text(Path(out), "\n".join(lines) + "\n")
        print(f"Written: {out} ({len(lines)} replies)")
        return
    for text, completion in zip(texts, made, strict=True):
        print(f"--- {text}\n{completion.text or completion.error}")


def statistics(stats: EngineStats, seconds: float) -> str:
    """tokens/s, and with a drafter tau (tokens a round, the target's own included) and ms a round."""
    lines = [
        f"{stats.generated_tokens:,} tokens in {seconds:.2f} s, {stats.generated_tokens / seconds:,.1f} tokens/s; "
        f"{stats.prompt_tokens:,} prompt tokens computed, {stats.prefix_hits:,} from the prefix cache"
    ]
    if stats.rounds:
        at = " ".join(f"{n / stats.rounds:.2f}" for n in stats.accepted_at)
        lines.append(
            f"tau {1 + stats.accepted / stats.rounds:.2f} over {stats.rounds:,} rounds, "
            f"{stats.drafted / stats.rounds:.1f} drafts a round; accepted at position 1, 2, ...: {at}"
        )
        lines.append(f"{seconds / stats.rounds * 1e3:.2f} ms a round and request, prompts included")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
