"""`python -m draft_training.regenerate`: the target's own replies to prompts, for training its drafter.

    python -m draft_training.regenerate target.path=RUN data=jsonl data.root=DIR out=REPLIES
    python -m draft_training.train +experiment=mimo_dflash target.path=RUN replies.path=REPLIES

Replies are written in parts of some thousand prompts, each whole or not at all; the same command continues after an
interruption. replies.json says how they were sampled and by which model; other settings need another folder.
"""

import gzip
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.config import Command, entry
from core.errors import ConfigError
from draft_training.config import RegenerateConfig, RepliesConfig, check_regenerate

PART = 2048  # prompts

COMMAND = Command("draft_training.regenerate", "regenerate", RegenerateConfig, __doc__ or "", check_regenerate)


def write_part(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Under a temporary name, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    with gzip.open(partial, "wt", compresslevel=3) as file:
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
    partial.replace(path)


def settings_of(replies: RepliesConfig, seed: int, fingerprint: str, prompts: str) -> dict[str, Any]:
    """What replies.json says; the same for every run that may continue a folder."""
    sampling = asdict(replies.sampling(seed))
    return {"sampling": sampling, "target": fingerprint, "prompts": prompts, "part": PART}


def write_replies(out: Path, generator: Any, prompts: list[Any], settings: dict[str, Any], replies: Any) -> int:
    """Generate what is missing in `out`; returns the number of tokens generated now.

    Args:
        generator: implements core.generate.interface.Generator. prompts: draft_training.prompts.DomainPrompt.
        settings: from `settings_of`. replies: core.generate.sampling.Sampling.
    Raises:
        ConfigError: `out` holds replies made with other settings; names the first.
    """
    from tqdm import tqdm

    from core.run import write_json

    out.mkdir(parents=True, exist_ok=True)
    stored = out / "replies.json"
    if stored.exists():
        have = json.loads(stored.read_text())
        for key, value in settings.items():
            if have.get(key) != value:
                raise ConfigError(f"{out} holds replies with {key}={have.get(key)}, not {value}; choose another out=")
    else:
        write_json(stored, settings)
    made, began = 0, time.perf_counter()
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
                made += len(reply.ids)
                bar.update()
                bar.set_postfix(tok_s=f"{made / (time.perf_counter() - began):,.0f}", refresh=False)
            rows = [
                {"id": i, "domain": domain[i], "prompt_ids": ids[i], "reply_ids": found[i].ids, "stop": found[i].stop}
                for i in (p.prompt.id for p in part)
            ]
            write_part(path, rows)
    return made


def main(config: RegenerateConfig, resolved: str) -> int:  # noqa: ARG001
    from core.generate.decode import PlainGenerator
    from core.generate.target import Target
    from core.models.fingerprint import fingerprint
    from core.train.device import device
    from draft_training.build import load_target, target_folder
    from draft_training.prompts import load_prompts, prompts_hash

    folder = target_folder(config.target, config.run.root)
    out = Path(config.out) if config.out else Path(config.run.root) / f"replies-{folder.resolve().parent.name}"
    if config.dry_run:
        print(f"Target {folder}; replies to {out}: {config.replies.sampling(config.train.seed)}")
        return 0
    loaded = load_target(config.target, folder, device(config.train))
    prompts = load_prompts(config.data, config.replies, loaded.tokenizer, config.train.seed)
    settings = settings_of(config.replies, config.train.seed, fingerprint(loaded.model), prompts_hash(prompts))
    generator = PlainGenerator(Target(loaded.model), rows=config.replies.rows, eos=stop_ids(loaded))
    made = write_replies(out, generator, prompts, settings, config.replies.sampling(config.train.seed))
    print(f"Written: {out} ({len(prompts):,} replies, {made:,} tokens now)")
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
