"""A drafter run from configuration to report: the stages of `draft_training.train`, in order.

target (frozen, quantised) -> its replies -> features in the same process -> the step loop -> model/ -> acceptance
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.generate.decode import PlainGenerator
from core.generate.target import Target
from core.models.dflash_io import save_drafter, target_identity
from core.models.drafters import AnyDrafter, empty
from core.models.fingerprint import fingerprint
from core.models.load import LoadedModel
from core.models.ops import EAGER
from core.run import Run, start_run, write_json
from core.train.device import device
from core.train.engine import Engine
from core.train.engines import build_engine, check_graph, start_processes
from core.train.loop import Loop, NoHook, rows_per_rank
from core.train.tracker import make_tracker
from draft_training.build import (
    compile_layers,
    drafter_config,
    load_target,
    make_drafter,
    shape_text,
    target_folder,
    target_of,
)
from draft_training.config import DraftTrainConfig
from draft_training.data import DraftData, make_data
from draft_training.features import FeatureStream, write_features
from draft_training.losses import make_loss
from draft_training.prompts import load_prompts
from draft_training.regenerate import settings_of, stop_ids, write_replies
from draft_training.replay import replay, rounds_along
from draft_training.replies import Text, check_target, whose


def train(config: DraftTrainConfig, resolved: str) -> Run:
    """Train a drafter, save it, measure it on held-out replies; returns the run."""
    place = device(config.train)
    check_graph(config.graph, config.parallel, place)
    rank, world = start_processes(config.parallel, place)
    folder = target_folder(config.target, config.run.root)
    if rank == 0:
        print(f"Target: {folder}")
    seed_everything(config, place)
    loaded = load_target(config.target, folder, place)
    made_for = fingerprint(loaded.model)
    config = with_replies(config, loaded, made_for, rank)
    replies = check_target(config.replies, made_for) if config.replies.path else None
    if rank == 0:
        print(whose(replies))
    drafter = make_drafter(config.draft, loaded, place)
    data = make_data(config, loaded.tokenizer, drafter.config.vocab_size, drafter.config.drafts, rank, world)
    if rank == 0:
        print(plan_text(config, drafter, loaded, data))
    run = start_run(config.run, "draft", config.draft.kind.value, resolved, config.train.seed, rank)
    run.update(target=str(folder.resolve()), target_fingerprint=made_for)
    target = target_of(loaded, drafter)
    run.update(replies=replies)
    micro = config.train.batch_size // world // rows_per_rank(config.train, world)
    if config.train.compile:
        compile_layers(drafter, target)
    engine = build_engine(
        drafter, make_loss(target, config.loss), config.optim, config.parallel, micro_batches=micro, device=place,
        graph=config.graph,
    )  # fmt: skip
    stream = data.stream
    if config.features.path:
        stream = stored_features(config, data, target, loaded.tokenizer, made_for, rank, world)
    evaluator = Evaluator(target, drafter, data.held_out)
    tracker = make_tracker(config.tracker, run.folder, rank)
    Loop(engine, stream, config.train, config.optim, run, NoHook(), evaluator, tracker, title="drafter").run()
    tracker.close()
    tensors = dict(working_tensors(engine))
    if rank == 0:
        pairing = {"target": target_identity(loaded.model, made_for), "target_folder": str(folder.resolve()),
                   "steps": config.train.steps, "loss": plain(asdict(config.loss)), "replies": replies}  # fmt: skip
        save_drafter(tensors, drafter.config, run.model, pairing)
        print(finish(run, evaluator))
    engine.close()
    return run


def plain(value: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(value, default=lambda v: v.value))


def working_tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    yield from engine.full_tensors()


def with_replies(config: DraftTrainConfig, loaded: LoadedModel, made_for: str, rank: int) -> DraftTrainConfig:
    """The configuration with `replies.path` set; writes the replies first where `replies.auto` asks for it."""
    replies = config.replies
    if replies.path or not replies.auto:
        return config
    prompts = load_prompts(config.data, replies, loaded.tokenizer, config.train.seed)
    settings = settings_of(replies, config.train.seed, made_for, prompts)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    out = Path(config.run.cache) / f"replies-{key}"
    if rank == 0:
        print(f"Replies of the target: {out}")
        eos = stop_ids(loaded)
        generator = PlainGenerator(Target(loaded.model), rows=replies.rows, eos=eos)
        made = write_replies(out, generator, prompts, settings, replies.sampling(config.train.seed))
        if made.replies:
            print(made.line(eos, replies.max_new_tokens))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return replace(config, replies=replace(replies, path=str(out)))


def stored_features(
    config: DraftTrainConfig, data: DraftData, target: Target, tokenizer: Any, made_for: str, rank: int, world: int
) -> FeatureStream:
    """Rank 0 writes the rows that are missing; every rank reads its own."""
    folder, rows, train = Path(config.features.path or ""), config.features.rows, config.train
    if rank == 0:
        text = {"replies": config.replies.path, "data": plain(asdict(config.data)), "seed": train.seed}
        settings = {"target": made_for, "taps": list(target.taps), "seq_len": config.data.seq_len, "text": text}
        size = target.embedding.weight.shape[0]
        whole = make_data(config, tokenizer, size, data.stream.drafts).rows if world > 1 else data.rows
        write_features(folder, whole, target, rows, settings)
    if world > 1:
        torch.distributed.barrier()
    return FeatureStream(folder, rows, config.anchors, data.stream.drafts, train.batch_size, train.seed, rank, world)


class Evaluator:
    """Teacher-forced acceptance on held-out replies: pooled tau by domain."""

    def __init__(self, target: Target, drafter: AnyDrafter, held_out: dict[str, list[Text]]) -> None:
        self.target, self.drafter, self.held_out = target, drafter, held_out

    def __call__(self, step: int) -> dict[str, Any]:  # noqa: ARG002
        found = self.measure()
        values = {f"tau_{d}": row["tau"] for d, row in found.items()}
        return values | ({"tau": sum(values.values()) / len(values)} if values else {})

    def measure(self) -> dict[str, dict[str, Any]]:
        """By domain: pooled tau, rounds, and acceptance of each position among all rounds."""
        was, ops = self.drafter.training, self.drafter.ops
        self.drafter.eval()
        self.drafter.ops = EAGER  # flex_attention compiles for every shape, and here they all differ
        result = {}
        for domain, texts in self.held_out.items():
            pairs = [(t.prompt, t.reply) for t in texts]
            with torch.compiler.set_stance("force_eager"):  # nor layers: every shape would be compiled anew
                rounds = [r for one in replay(self.target, self.drafter, pairs) for r in rounds_along(one)]
            if not rounds:
                continue
            drafts = self.drafter.config.drafts
            position = [sum(r.accepted > k for r in rounds) / len(rounds) for k in range(drafts)]
            result[domain] = {
                "tau": sum(r.committed for r in rounds) / len(rounds), "rounds": len(rounds), "position": position,
            }  # fmt: skip
        self.drafter.train(was)
        self.drafter.ops = ops
        return result


def finish(run: Run, evaluator: Evaluator) -> str:
    """report.json, and what to print."""
    found = evaluator.measure()
    write_json(run.folder / "report.json", {"schema": 1, "teacher_forced": found})
    run.update(state="finished")
    lines = [f"\n{'domain':14}{'tau':>8}{'rounds':>9}   accepted at position 1, 2, ..."]
    for domain, row in found.items():
        shares = " ".join(f"{p:.2f}" for p in row["position"])
        lines.append(f"{domain:14}{row['tau']:>8.3f}{row['rounds']:>9,}   {shares}")
    if found:
        mean = sum(row["tau"] for row in found.values()) / len(found)
        lines.append(f"{'mean':14}{mean:>8.3f}   tokens a round on held-out replies, teacher-forced, bonus included")
    else:
        lines = ["No held-out replies: the text is not the target's own; measure with draft_training.acceptance"]
    return "\n".join([*lines, f"\nWritten: {run.folder} (model/, report.json, metrics.jsonl)"])


def plan_text(config: DraftTrainConfig, drafter: AnyDrafter, loaded: LoadedModel, data: DraftData | None) -> str:
    """Geometry, what is trained, and the sizes that decide memory."""
    c = drafter.config
    trained = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    rows = config.train.micro_batch_size or config.train.batch_size
    slots = rows * config.anchors * c.drafts
    features = rows * config.data.seq_len * len(c.taps) * c.hidden_size * 2
    held = sum(len(t) for t in data.held_out.values()) if data else 0
    return (
        f"Drafter: {len(drafter.decoder_layers())} layers of width {c.hidden_size}, {trained:,} trained parameters; "
        f"{shape_text(c)}\n"
        f"A step: {config.train.batch_size} rows x {config.data.seq_len} tokens, {config.anchors} anchors a row; a "
        f"forward: {slots:,} slots, {features / 1e6:,.0f} MB of features, about "
        f"{16 * trained / 1e6:,.0f} MB for weights and optimiser\n"
        f"Target: {sum(p.numel() for p in loaded.model.parameters()):,} parameters, frozen; held-out replies: {held}\n"
    )


def dry_run(config: DraftTrainConfig) -> str:
    """The plan; the target is built without its weights."""
    from core.models.load import load_tokenizer, meta_model

    folder = target_folder(config.target, config.run.root)
    model, carried = meta_model(folder)
    loaded = LoadedModel(model, model.config, load_tokenizer(folder), (), folder)
    del carried
    with torch.device("meta"):
        drafter = empty(drafter_config(config.draft, loaded))
    return f"Target: {folder}\n{plan_text(config, drafter, loaded, None)}"


def seed_everything(config: DraftTrainConfig, place: torch.device) -> None:
    random.seed(config.train.seed)
    torch.manual_seed(config.train.seed)
    if config.train.deterministic and place.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
