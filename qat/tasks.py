"""Task accuracy beside the losses, where the evaluation set carries references.

gsm8k  eval/math: the last number of the reply equals the reference's
code   eval/code: HumanEval and MBPP tests pass in the sandbox
tools  eval/agent: the function calls match the permitted ones

Replies are generated greedily, in batches padded on the left. With the few dozen prompts of a quick run accuracy is
coarse: read the interval, and KL for anything finer.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from core.errors import ConfigError, DataError
from core.train.data.chat import conversation
from core.train.data.documents import Record, jsonl_records
from qat.config import EvalConfig
from qat.grade import right_calls, right_number, right_program

BATCH = 16
Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Task:
    """`file` under the bundle; `key`: records without it are left out; `right`: (record, reply) -> solved."""

    file: str
    key: str
    right: Callable[[Record, str], bool]


TASKS = {
    "gsm8k": Task("eval/math.jsonl.gz", "final_answer", right_number),
    "code": Task("eval/code.jsonl.gz", "tests", right_program),
    "tools": Task("eval/agent.jsonl.gz", "gold_calls", right_calls),
}


@dataclass(frozen=True)
class TaskResult:
    """`low`, `high`: Wilson's 95 % interval over prompts; `solved`: ids, to compare arms prompt by prompt."""

    task: str
    count: int
    accuracy: float
    low: float
    high: float
    solved: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); stays within [0, 1] and is honest at 0 and at all."""
    share, z2 = right / count, Z * Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def task_records(name: str, root: Path, limit: int) -> list[Record]:
    """Up to `limit` records with references, evenly spread over the task's file.

    Raises:
        ConfigError: no such task. DataError: the file is missing, damaged, or has no record with references.
    """
    if name not in TASKS:
        raise ConfigError(f"eval.tasks has {name!r}; expected some of {', '.join(TASKS)}")
    task = TASKS[name]
    found = [r for r in jsonl_records(root / task.file) if task.key in r]
    if not found:
        raise DataError(f"{root / task.file} has no record with `{task.key}`; take {name} out of eval.tasks")
    count = min(limit, len(found)) if limit > 0 else len(found)
    return [found[i * len(found) // count] for i in range(count)]


def score_tasks(model: nn.Module, tokenizer: Any, config: EvalConfig, root: Path) -> list[TaskResult]:
    """Accuracy of one arm on every task of `eval.tasks`.

    Args:
        model: a causal LM with `generate`. tokenizer: with a chat template. root: the data bundle.
    Raises:
        ConfigError: unknown task, or no chat template. DataError: no such file. UnsupportedError: no sandbox.
    """
    if config.tasks and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("eval.tasks asks in chat form, but the tokenizer has no chat template; set eval.tasks=[]")
    chosen = {name: task_records(name, root, config.task_limit) for name in config.tasks}
    return [score(model, tokenizer, config, name, records) for name, records in chosen.items()]


def score(model: nn.Module, tokenizer: Any, config: EvalConfig, name: str, records: list[Record]) -> TaskResult:
    replies = generate(model, tokenizer, [prompt_ids(r, tokenizer) for r in records], config.max_new_tokens, name)
    solved = tuple(
        str(r.get("id", i))
        for i, (r, reply) in enumerate(zip(records, replies, strict=True))
        if TASKS[name].right(r, reply)
    )
    low, high = wilson(len(solved), len(records))
    return TaskResult(name, len(records), len(solved) / len(records), low, high, solved)


def prompt_ids(record: Record, tokenizer: Any) -> list[int]:
    messages, tools = conversation(record, tokenizer)
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Any, prompts: list[list[int]], new_tokens: int, title: str) -> list[str]:
    """Greedy replies, in the order of `prompts`; batches hold prompts of similar length, longest first."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies = [""] * len(prompts)
    for at in tqdm(range(0, len(order), BATCH), desc=f"task {title}", unit="batch", leave=False):
        chosen = order[at : at + BATCH]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for i, row in zip(chosen, out[:, width:], strict=True):
            replies[i] = tokenizer.decode(row, skip_special_tokens=True)
    model.train(training)
    return replies
