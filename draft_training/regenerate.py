"""`python -m draft_training.regenerate`: the target's own replies to prompts, for training its drafter.

    python -m draft_training.regenerate target.path=RUN data=jsonl data.root=DIR out=REPLIES
    python -m draft_training.train +experiment=mimo_dflash target.path=RUN replies.path=REPLIES

Replies are written in parts of some thousand prompts, each whole or not at all; the same command continues after an
interruption. replies.json says how they were sampled and by which model; other settings need another folder.
"""

import gzip
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.config import Command, entry
from core.errors import CheckpointError, ConfigError
from draft_training.config import RegenerateConfig, RepliesConfig, check_regenerate

PART = 2048  # prompts

COMMAND = Command("draft_training.regenerate", "regenerate", RegenerateConfig, __doc__ or "", check_regenerate)


@dataclass
class Made:
    """What one call of `write_replies` generated; stopped: replies that ended with an end token."""

    replies: int = 0
    tokens: int = 0
    stopped: int = 0

    def line(self, eos: tuple[int, ...], limit: int) -> str:
        """How the replies ended. A target that never stops is told from one whose end token is not known."""
        cut = self.replies - self.stopped
        said = (
            f"Ended by the target: {self.stopped:,} of {self.replies:,}; cut at replies.max_new_tokens={limit}: {cut:,}"
        )
        if self.stopped or not cut:
            return said
        if not eos:
            return f"{said}. The target names no end token: set eos_token_id in its generation_config.json"
        return (
            f"{said}. It never said its end token ({', '.join(map(str, eos))}); right for plain text, wrong for chats"
        )


def write_part(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Under a temporary name, then renamed: whole or not at all. The same rows are the same bytes.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as raw:
            with gzip.GzipFile("", "wb", 3, raw, mtime=0) as file:
                for row in rows:
                    file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
            raw.flush()
            os.fsync(raw.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}; free space and run the command again") from error


def settings_of(replies: RepliesConfig, seed: int, fingerprint: str, prompts: list[Any]) -> dict[str, Any]:
    """What replies.json says; the same for every run that may continue a folder: the prompts in this order."""
    from draft_training.prompts import prompts_hash

    sampling = asdict(replies.sampling(seed))
    return {"sampling": sampling, "target": fingerprint, "prompts": prompts_hash(prompts, ordered=True), "part": PART}


def write_replies(out: Path, generator: Any, prompts: list[Any], settings: dict[str, Any], replies: Any) -> Made:
    """Generate what is missing in `out`; returns what was generated now.

    Args:
        generator: implements core.generate.interface.Generator. prompts: draft_training.prompts.DomainPrompt.
        settings: from `settings_of`. replies: core.generate.sampling.Sampling.
    Raises:
        ConfigError: `out` holds replies made with other settings; names the first. DataError: its replies.json is
        damaged. CheckpointError: the disk is full or not writable.
    """
    from tqdm import tqdm

    prepare(out, settings, len(prompts))
    made, began = Made(), time.perf_counter()
    domain = {p.prompt.id: p.domain for p in prompts}
    ids = {p.prompt.id: p.prompt.ids for p in prompts}
    with tqdm(total=len(prompts), desc="replies", unit="reply") as bar:
        for at in range(0, len(prompts), PART):
            part = prompts[at : at + PART]
            path = out / f"part-{at // PART:05d}.jsonl.gz"
            if path.exists():
                bar.update(len(part))
                continue
            found = {}
            for reply in generator.generate([p.prompt for p in part], replies):
                found[reply.id] = reply
                made.replies, made.tokens = made.replies + 1, made.tokens + len(reply.ids)
                made.stopped += reply.stop == "eos"
                bar.update()
                bar.set_postfix(tok_s=f"{made.tokens / (time.perf_counter() - began):,.0f}", refresh=False)
            rows = [
                {"id": i, "domain": domain[i], "prompt_ids": ids[i], "reply_ids": found[i].ids, "stop": found[i].stop}
                for i in (p.prompt.id for p in part)
            ]
            write_part(path, rows)
    return made


def prepare(out: Path, settings: dict[str, Any], count: int) -> None:
    """The folder with its replies.json, or the folder of a run that this one may continue."""
    from core.run import write_json
    from draft_training.replies import SETTINGS, read_settings

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot create out={out}: {error.strerror}; choose another folder") from error
    have = read_settings(out)
    if have is None and any(out.glob("part-*.jsonl.gz")):
        raise ConfigError(
            f"out={out} holds replies without {SETTINGS}, so whose they are is unknown; choose another out="
        )
    if have is None:
        write_json(out / SETTINGS, settings | {"count": count})
        return
    for key, value in settings.items():
        if have.get(key) != value:
            raise ConfigError(f"{out} holds replies with {key}={have.get(key)}, not {value}; choose another out=")


def main(config: RegenerateConfig, resolved: str) -> int:  # noqa: ARG001
    from core.generate.decode import PlainGenerator
    from core.generate.target import Target
    from core.models.fingerprint import fingerprint
    from core.train.device import device
    from draft_training.build import load_target, target_folder
    from draft_training.prompts import load_prompts

    folder = target_folder(config.target, config.run.root)
    out = Path(config.out) if config.out else Path(config.run.root) / f"replies-{folder.resolve().parent.name}"
    if config.dry_run:
        print(f"Target {folder}; replies to {out}: {config.replies.sampling(config.train.seed)}")
        return 0
    loaded = load_target(config.target, folder, device(config.train))
    prompts = load_prompts(config.data, config.replies, loaded.tokenizer, config.train.seed)
    settings = settings_of(config.replies, config.train.seed, fingerprint(loaded.model), prompts)
    eos = stop_ids(loaded)
    generator = PlainGenerator(Target(loaded.model), rows=config.replies.rows, eos=eos)
    made = write_replies(out, generator, prompts, settings, config.replies.sampling(config.train.seed))
    print(f"Written: {out} ({len(prompts):,} replies, {made.tokens:,} tokens now)")
    if made.replies:
        print(made.line(eos, config.replies.max_new_tokens))
    return 0


def stop_ids(loaded: Any) -> tuple[int, ...]:
    """EOS ids of the generation config, the model's config or the tokenizer, the first that says."""
    for source in (getattr(loaded.model, "generation_config", None), loaded.config, loaded.tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (found,)
    return ()


if __name__ == "__main__":
    sys.exit(entry(COMMAND, main))
