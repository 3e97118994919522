"""The Python API.

    from infer.llm import LLM
    from infer.request import SamplingParams

    llm = LLM("exports/hf", drafter="exports/drafter")
    for reply in llm.generate(["The sky is"], SamplingParams(max_tokens=32)):
        print(reply.text)

Under torchrun every rank runs the same script and gets every reply; use `with LLM(...) as llm:`, at whose end the ranks
wait for each other.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from jinja2 import TemplateError
from tqdm import tqdm

from core.config import check_name_clash
from core.errors import ConfigError
from core.models.load import load_tokenizer
from infer.build import build_engine, join
from infer.options import EngineOptions
from infer.parallel import Ranks, together
from infer.request import STOP, Engine, EngineStats, Output, Request, SamplingParams, TokenLogprob
from infer.text import TextStream

Text = str | Sequence[int]


@dataclass
class Completion:
    """ids: every token generated; text: of them, cut at a stop string and without end token and special tokens.

    finish: stop | length | failed (then `error` says why). cached: prompt tokens taken from the prefix cache.
    """

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0
    error: str = ""


@dataclass
class Running:
    """news: text of outputs that its own iteration has not handed out yet."""

    completion: Completion
    stream: TextStream | None
    news: deque[str] = field(default_factory=deque)


class LLM:
    """A model, with its drafter if one is given, ready to generate.

    Args:
        model: a folder that `convert.export` wrote, a run's model, or a published one of a family of the runtime.
        drafter: a DFlash drafter folder for that model.
        options: as infer.options.EngineOptions (device, dtype, rows, kv_tokens, ...).
    Raises:
        ConfigError, CheckpointError, UnsupportedError: one line each.
    """

    def __init__(self, model: Path | str, *, drafter: Path | str | None = None, **options: Any) -> None:
        check_name_clash()
        given = EngineOptions(Path(model), Path(drafter) if drafter else None, **options)
        self.ranks: Ranks = join(given)
        self.engine: Engine = build_engine(given, self.ranks)
        self.tokenizer = load_tokenizer(Path(model))
        self.count = 0
        self.live: dict[str, Running] = {}  # of all iterations: each steps the engine for every other

    def encode(self, prompt: Text) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        return list(self.need_tokenizer()(prompt, verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """A conversation through the model's own template, up to where the assistant speaks.

        Raises:
            ConfigError: there is no template, or it refuses the conversation.
        """
        tokenizer = self.need_template()
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError) as error:
            raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ConfigError("the model's folder has no tokenizer (tokenizer.json): give prompts as token ids")
        return self.tokenizer

    def need_template(self) -> Any:
        tokenizer = self.need_tokenizer()
        if not tokenizer.chat_template:
            raise ConfigError("this model's tokenizer has no chat template: use plain prompts")
        return tokenizer

    def generate(
        self,
        prompts: Text | Sequence[Text],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """Replies in the order of the prompts; all of them share the engine's batches.

        Args:
            prompts: texts or lists of token ids, or a single one. params: for all, or one for each.
        """
        several = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(several)
        if len(each) != len(several):
            raise ConfigError(f"params has {len(each)} entries for {len(several)} prompts: give one, or one for each")
        running: dict[str, Running] = {}
        try:
            for prompt, one in zip(several, each, strict=True):
                self.start(running, self.encode(prompt), one)  # type: ignore[arg-type]
            made = [r.completion for r in running.values()]
            with tqdm(total=len(made), disable=not (progress and self.ranks.first), unit="reply") as bar:
                for completion, _ in self.steps(running):
                    bar.update(bool(completion.finish))
                    bar.set_postfix(tokens=f"{self.engine.stats().generated_tokens:,}", refresh=False)
        finally:
            self.abandon(running)
        return made

    def stream(self, prompt: Text, params: SamplingParams | None = None) -> Iterator[tuple[str, Completion]]:
        """Pieces of text as they become final, with the completion so far; closing the iterator ends the request."""
        running: dict[str, Running] = {}
        try:
            self.start(running, self.encode(prompt), params or SamplingParams())
            with closing(self.steps(running)) as steps:
                for completion, text in steps:
                    yield text, completion
        finally:
            self.abandon(running)

    def start(self, running: dict[str, Running], ids: list[int], params: SamplingParams) -> None:
        self.count += 1
        name = f"llm-{self.count}"
        if params.stop:
            self.need_tokenizer()
        self.engine.add(Request(name, ids, params))
        stream = None if self.tokenizer is None else TextStream(self.tokenizer, params.stop, ids)
        running[name] = self.live[name] = Running(Completion(ids), stream)

    def steps(self, running: dict[str, Running]) -> Iterator[tuple[Completion, str]]:
        """Run the engine until all of `running` have ended; what each output added."""
        while running:
            if not any(one.news for one in running.values()):
                self.step()
            for name, one in list(running.items()):
                while one.news:
                    text = one.news.popleft()
                    if one.completion.finish and not one.news:
                        del running[name]
                    yield one.completion, text

    def step(self) -> None:
        """One step of the engine for everybody who waits for tokens."""
        for output in self.engine.step():
            one = self.live.get(output.id)
            if one is not None:
                one.news.append(self.take(one, output))
                if one.completion.finish:
                    del self.live[output.id]

    def take(self, one: Running, output: Output) -> str:
        """Add an output to its completion; the text that became final. An end token has none."""
        done, stream = one.completion, one.stream
        done.ids.extend(output.ids)
        done.logprobs.extend(output.logprobs)
        done.cached, done.finish, done.error = output.cached, output.finish or "", output.error
        text = ""
        if stream is not None:
            text = stream.push(output.ids[:-1] if output.finish == STOP else output.ids).text
            if output.finish is not None:
                text += stream.finish()
            if stream.stopped:
                if output.finish is None:
                    self.engine.cancel(output.id)
                done.finish = STOP
        done.text += text
        return text

    def abandon(self, running: dict[str, Running]) -> None:
        for name in running:
            self.engine.cancel(name)
            self.live.pop(name, None)
        running.clear()

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def __enter__(self) -> "LLM":
        self.group = together(self.ranks)
        self.group.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Needed under torchrun only: wait for the other ranks and end the group."""
        self.group.__exit__(kind, error, trace)
