"""A measurement from configuration to report.

    prompts -> the target's greedy text -> served rounds, teacher-forced rounds -> figures -> comparisons -> report

Every arm (another drafter, another target, another window) has the same prompts, so that all differences are paired.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from core.errors import ConfigError, DataError
from core.generate.decode import PlainGenerator
from core.generate.interface import Prompt
from core.generate.rounds import write_rounds
from core.generate.target import Target
from core.models.fingerprint import fingerprint
from core.models.load import LoadedModel, load_model
from core.run import Run, start_run
from core.train.config import DataConfig, DataSource, Source, TrainConfig
from core.train.device import device
from draft_training.acceptance_config import EMBEDDED, AcceptanceConfig
from draft_training.acceptance_report import Arm, Found, write_report
from draft_training.build import target_folder
from draft_training.config import RepliesConfig, TargetConfig
from draft_training.controls import OracleProposer, RandomProposer
from draft_training.distribution import Distribution, distribution
from draft_training.drafters import Opened, drafter_folder, dtype_name, open_drafter, pairs_of, trained_for
from draft_training.estimators import Bootstrap, Rounds
from draft_training.latency import Latency, latency
from draft_training.measure import Replies, decode, log_of, plain_text, same_text, served, teacher_forced
from draft_training.prompts import DomainPrompt, distinct, load_prompts, prompts_hash
from draft_training.regenerate import stop_ids


@dataclass(frozen=True)
class Job:
    """What every part of a measurement needs: one target, its prompts and how they are decoded."""

    config: AcceptanceConfig
    loaded: LoadedModel
    prompts: list[Prompt]
    eos: tuple[int, ...]

    @property
    def model(self) -> Any:
        return self.loaded.model

    def open(self, path: str) -> Opened:
        replay = self.config.replay
        return open_drafter(path, self.model, row_tokens=replay.row_tokens, anchors=replay.anchors)

    def plain(self, title: str) -> Replies:
        sampling = self.config.sampling.at(0.0, self.config.seed)
        return plain_text(self.model, self.prompts, sampling, self.config.rows, self.eos, title)

    def served(self, opened: Opened, temperature: float, title: str) -> Replies:
        sampling = self.config.sampling.at(temperature, self.config.seed)
        return served(self.model, opened, self.prompts, sampling, self.config.rows, self.eos, title)

    def forced(self, opened: Opened, text: Replies, title: str) -> Rounds | None:
        return teacher_forced(self.model, opened, self.prompts, text, title)


def load(config: AcceptanceConfig, path: str | None) -> LoadedModel:
    settings = TargetConfig(path, config.target.attention, config.target.experts)
    folder = target_folder(settings, config.run.root)
    loaded = load_model(
        folder,
        dtype=getattr(torch, config.target.dtype),
        device=device(TrainConfig(device=config.device)),
        attention=settings.attention,
        experts=settings.experts,
    )
    loaded.model.requires_grad_(False)
    return loaded


def eval_prompts(config: AcceptanceConfig, tokenizer: Any) -> list[DomainPrompt]:
    """Prompts of every domain of `eval`, at most `prompts.limit` of each; ids are made to differ.

    Raises:
        ConfigError: no data folder. DataError: a domain has no file or no usable prompt.
    """
    replies = RepliesConfig(count=config.prompts.limit, prompt_tokens=config.prompts.max_tokens)
    found: list[DomainPrompt] = []
    for domain in config.eval:
        if domain == EMBEDDED:
            data = DataConfig(max_bytes=config.prompts.max_bytes)
        else:
            source = Source(path=f"eval/{domain}.jsonl.gz", domain=domain)
            data = DataConfig(source=DataSource.jsonl, root=config.prompts.root, val=[source])
        found += [
            replace(p, domain=domain) for p in load_prompts(data, replies, tokenizer, config.seed, validation=True)
        ]
    return distinct(found)


def measure(config: AcceptanceConfig, resolved: str) -> str:
    """Measure and write the report; returns what to print."""
    folder = drafter_folder(config.drafter.path or "")
    for other in filter(None, [config.drafter.other]):
        drafter_folder(other)
    if config.target.other:
        target_folder(TargetConfig(config.target.other), config.run.root)
    loaded = load(config, config.target.path)
    if loaded.tokenizer is None:
        raise ConfigError(f"target.path={loaded.folder} has no tokenizer; copy its files there")
    chosen = eval_prompts(config, loaded.tokenizer)
    job = Job(config, loaded, [p.prompt for p in chosen], stop_ids(loaded))
    opened = job.open(str(folder))
    refuse_strangers(config, loaded)
    print(f"Target: {loaded.folder}\nDrafter: {folder}\nPrompts: {len(chosen)} of {', '.join(config.eval)}")
    boot = Bootstrap([p.domain for p in chosen], config.bootstrap, config.seed)
    run = start_run(config.run, "acceptance", folder.resolve().parent.name, resolved, config.seed)
    text = job.plain("target's text")
    cut = sum(reply.stop == "length" for reply in text.values())
    found = Found(boot, setup_of(job, opened, chosen) | {"replies_cut": cut})
    found.arms["drafter"] = arm(job, opened, text, "drafter")
    sweep(job, opened, text, found)
    if config.drafter.other:
        found.arms["other drafter"] = arm(job, job.open(config.drafter.other), text, "other drafter", [0.0])
    found.controls = controls(job, opened.drafts, text)
    found.latency = latencies(job, opened)
    found.distribution = sampled(job, opened)
    if config.target.other:
        other_target(job, text, found)
    write_logs(run, found)
    run.update(state="finished")
    return write_report(run, found)


def refuse_strangers(config: AcceptanceConfig, loaded: LoadedModel) -> None:
    """ConfigError for a drafter that was trained for another target, unless `drafter.force` is set."""
    own = fingerprint(loaded.model)
    for key, path in (("drafter.path", config.drafter.path), ("drafter.other", config.drafter.other)):
        named = trained_for(drafter_folder(path)) if path else None
        if named and named != own and not config.drafter.force:
            raise ConfigError(
                f"{key}={path} was trained for target {named[:12]}, and target.path={loaded.folder} is {own[:12]}: "
                "few drafts would be accepted; take its own target, or set drafter.force=true"
            )


def arm(job: Job, opened: Opened, text: Replies, title: str, temperatures: list[float] | None = None) -> Arm:
    """Served at every temperature, and teacher-forced along the target's greedy text."""
    done = Arm(opened.name, opened.facts, opened.made_for_this)
    chosen = job.config.sampling.temperatures if temperatures is None else temperatures
    for temperature in chosen:
        replies = job.served(opened, temperature, f"{title}, served at {temperature:g}")
        done.served[temperature] = log_of(replies)
        if temperature == 0:
            done.same = same_text(text, replies)
    done.forced = job.forced(opened, text, f"{title}, teacher-forced")
    return done


def sweep(job: Job, opened: Opened, text: Replies, found: Found) -> None:
    """The same weights with other windows: teacher-forced, and served where asked for."""
    for window in job.config.sweep.window:
        if opened.windowed is None:
            raise ConfigError(f"sweep.window={window}: this kind of drafter has no window; leave it out")
        changed = opened.windowed(window)
        done = Arm(opened.name, changed.facts, opened.made_for_this)
        if job.config.sweep.served or changed.replayed is None:
            done.served[0.0] = log_of(job.served(changed, 0.0, f"window {window}, served"))
        done.forced = job.forced(changed, text, f"window {window}")
        found.sweep[window] = done


def other_target(job: Job, text: Replies, found: Found) -> None:
    """Each target's own text served, and the first one's text along both. The first model is let go before."""
    config = job.config
    vocabulary = job.model.get_input_embeddings().weight.shape[0]
    job.loaded.model.to("meta")
    loaded = load(config, config.target.other)
    size = loaded.model.get_input_embeddings().weight.shape[0]
    if size != vocabulary:
        raise ConfigError(f"target.other={config.target.other} has vocabulary {size}, target.path has {vocabulary}")
    second = Job(config, loaded, job.prompts, stop_ids(loaded))
    opened = second.open(config.drafter.path or "")
    own = second.plain("other target's text")
    found.arms["other target"] = arm(second, opened, own, "other target", [0.0])
    found.first_text_on_other = second.forced(opened, text, "first target's text on the other")
    found.setup["other_target"] = target_facts(loaded)
    found.setup["other_target_same_text"] = same_text(text, own).equal


def controls(job: Job, drafts: int, text: Replies) -> dict[str, Rounds]:
    """Random drafts and the text itself, served greedily: tau of about 1, and of B up to the cut last round."""
    prompts = job.prompts[: job.config.controls]
    if not prompts:
        return {}
    sampling = job.config.sampling.at(0.0, job.config.seed)
    vocabulary = job.model.get_input_embeddings().weight.shape[0]
    proposers = {
        "random drafts": RandomProposer(vocabulary, drafts),
        "the text itself": OracleProposer(pairs_of(prompts, text), drafts),
    }
    return {
        name: log_of(
            decode(PlainGenerator(Target(job.model), p, rows=job.config.rows, eos=job.eos), prompts, sampling, name)
        )
        for name, p in proposers.items()
    }


def latencies(job: Job, opened: Opened) -> dict[str, Latency | None]:
    prompts = job.prompts[: job.config.latency.prompts]
    if not prompts:
        return {}
    sampling = job.config.sampling.at(0.0, job.config.seed)
    arms: dict[str, Opened | None] = {"plain": None, "drafter": opened}
    if job.config.drafter.other:
        arms["other drafter"] = job.open(job.config.drafter.other)
    context = job.config.latency.context
    return {name: latency(job.model, one, prompts, sampling, job.eos, context) for name, one in arms.items()}


def sampled(job: Job, opened: Opened) -> Distribution | None:
    settings = job.config.distribution
    prompts = [p for p in job.prompts if len(p.ids) > 1][: settings.prefixes]
    if not settings.prefixes:
        return None
    if not prompts:
        raise DataError("distribution.prefixes needs prompts of at least two tokens; choose another eval")
    sampling = job.config.sampling.at(settings.temperature, job.config.seed)
    return distribution(job.model, opened, prompts, sampling, settings.samples, settings.rows)


def target_facts(loaded: LoadedModel) -> dict[str, Any]:
    # The files' own word: what was loaded is expanded, and its configuration names no quantisation any more.
    quantised = json.loads((loaded.folder / "config.json").read_text()).get("quantization_config") or {}
    method = " ".join(filter(None, (quantised.get("quant_method"), quantised.get("format"))))
    return {
        "folder": str(loaded.folder), "model_type": loaded.config.model_type, "fingerprint": fingerprint(loaded.model),
        "dtype": dtype_name(loaded.model), "stored_quantisation": method or "none",
    }  # fmt: skip


def setup_of(job: Job, opened: Opened, chosen: list[DomainPrompt]) -> dict[str, Any]:
    """What a reader needs to repeat the measurement, or to tell it from another one."""
    config = job.config
    template = getattr(job.loaded.tokenizer, "chat_template", None)
    weight = job.model.get_input_embeddings().weight
    return {
        "target": target_facts(job.loaded),
        "drafter": {"folder": opened.name, "made_for_this_target": opened.made_for_this, **opened.facts},
        "temperatures": config.sampling.temperatures, "top_p": config.sampling.top_p, "top_k": config.sampling.top_k,
        "max_new_tokens": config.sampling.max_new_tokens, "seed": config.seed, "rows": config.rows,
        "prompts": len(chosen), "prompt_hash": prompts_hash(chosen), "max_prompt_tokens": config.prompts.max_tokens,
        "template_hash": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        "kv_dtype": str(weight.dtype).removeprefix("torch."), "device": weight.device.type, "eos": list(job.eos),
        "bootstrap": config.bootstrap,
    }  # fmt: skip


def write_logs(run: Run, found: Found) -> None:
    """rounds.jsonl: the drafter served at the first temperature. The others: rounds-<what>.jsonl."""
    for name, log in logs(found):
        write_rounds(run.folder / f"{name}.jsonl", chain.from_iterable(log.values()))


def logs(found: Found) -> Iterator[tuple[str, Rounds]]:
    named = {**found.arms, **{f"window {w}": a for w, a in found.sweep.items()}}
    for name, one in named.items():
        word = "rounds" if name == "drafter" else f"rounds-{name.replace(' ', '_')}"
        for number, (temperature, log) in enumerate(one.served.items()):
            yield (word if number == 0 else f"{word}-t{temperature:g}"), log
        if one.forced is not None:
            yield f"{word}-teacher_forced", one.forced
    if found.first_text_on_other is not None:
        yield "rounds-first_text_on_other_target", found.first_text_on_other
    for name, log in found.controls.items():
        yield f"rounds-control-{name.replace(' ', '_')}", log
