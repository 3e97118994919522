"""Prompts for a target: chats up to their first reply, or prefixes of plain text where there are no chats."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from jinja2 import TemplateError

from core.errors import DataError
from core.generate.interface import Prompt
from core.train.config import DataConfig, Source
from core.train.data import mixture
from core.train.data.chat import conversation, system_into_user
from core.train.data.documents import domain_of, read_records
from draft_training.config import RepliesConfig


@dataclass(frozen=True)
class DomainPrompt:
    domain: str
    prompt: Prompt


def load_prompts(
    data: DataConfig, replies: RepliesConfig, tokenizer: Any, seed: int, validation: bool = False
) -> list[DomainPrompt]:
    """Prompts of every source of `data.train` (or `data.val`), in an order fixed by the seed; at most `replies.count`.

    Raises:
        DataError: no source has a usable prompt.
    """
    sources = mixture(data, validation)
    every = [p for source in sources for p in chats(data, source, tokenizer, validation)]
    if not every:
        every = [p for source in sources for p in prefixes(data, source, replies.prompt_tokens, tokenizer, validation)]
    found = [p for p in every if len(p.prompt.ids) <= replies.prompt_tokens]
    long = len(every) - len(found)
    if long:
        print(f"prompts: left out {long:,} longer than replies.prompt_tokens={replies.prompt_tokens}")
    if not found:
        where = "data.val" if validation else "data.train"
        names = ", ".join(s.path for s in sources)
        raise DataError(
            f"{where} ({names}) has no usable prompt; name sources with `messages`, or plain text to continue"
        )
    found = distinct(found)
    random.Random(seed).shuffle(found)
    return found[: replies.count or None]


def distinct(prompts: list[DomainPrompt]) -> list[DomainPrompt]:
    """The same prompts; an id that was there before gets a number: replies are known by the id of their prompt."""
    seen: set[str] = set()
    unique = []
    for one in prompts:
        name, count = one.prompt.id, 1
        while name in seen:
            count += 1
            name = f"{one.prompt.id}#{count}"
        seen.add(name)
        unique.append(replace(one, prompt=Prompt(name, one.prompt.ids)))
    return unique


def chats(data: DataConfig, source: Source, tokenizer: Any, validation: bool = False) -> Iterator[DomainPrompt]:
    """The conversations of a source; its plain texts are left out."""
    domain = domain_of(source)
    for number, record in enumerate(read_records(data, source, validation)):
        ids = chat_ids(record, tokenizer) if "messages" in record else []
        if ids:
            yield DomainPrompt(domain, Prompt(f"{domain}/{record.get('id', number)}", ids))


def chat_ids(record: dict[str, Any], tokenizer: Any) -> list[int]:
    """The conversation up to its first reply, with the template's opening of a reply; [] where nobody asks anything."""
    messages, tools = conversation(record, tokenizer)
    first = next((n for n, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    asked = messages[:first]
    if not any(m["role"] == "user" for m in asked):
        return []
    failure: Exception | None = None
    for attempt in (asked, system_into_user(asked)):
        if attempt is None:
            continue
        try:
            text = tokenizer.apply_chat_template(attempt, tools=tools, tokenize=False, add_generation_prompt=True)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        except (TemplateError, TypeError, KeyError) as error:
            failure = failure or error
    raise DataError(f"prompt {record.get('id', 'without id')}: the chat template refuses it: {failure}")


def prefixes(
    data: DataConfig, source: Source, size: int, tokenizer: Any, validation: bool = False
) -> Iterator[DomainPrompt]:
    """Pieces of `size` tokens from all over each text, every fourth, for the target to continue."""
    domain = domain_of(source)
    for number, record in enumerate(read_records(data, source, validation)):
        ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"] if "text" in record else []
        for at in islice(range(0, max(len(ids) - size, 0) + 1, 4 * size), 64):
            if len(ids) > at + 1:
                yield DomainPrompt(domain, Prompt(f"{domain}/{number}@{at}", ids[at : at + size]))


def prompts_hash(prompts: list[DomainPrompt], ordered: bool = False) -> str:
    """Names the exact prompts, in any order or in this one."""
    digest = hashlib.sha256()
    lines = [f"{p.prompt.id} {p.prompt.ids}" for p in prompts]
    for line in lines if ordered else sorted(lines):
        digest.update(line.encode())
    return digest.hexdigest()
