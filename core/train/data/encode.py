"""From records to token ids with a mask of the tokens that carry loss."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import ConfigError, DataError
from core.train.config import DataConfig
from core.train.data.documents import Record

BATCH = 256


@dataclass(frozen=True)
class Document:
    """`ids` int32 [n]; `carries` bool [n]: whether the token, as a prediction target, has loss."""

    ids: np.ndarray
    carries: np.ndarray


def encode_all(records: Iterable[Record], tokenizer: Any, config: DataConfig) -> list[Document]:
    """Every usable record as a document ending in EOS; records without a reply (`prompt_only`) are left out."""
    if config.loss_on not in {"all", "assistant"}:
        raise ConfigError(f"data.loss_on={config.loss_on}: expected all or assistant")
    found: list[Document] = []
    texts: list[str] = []
    for record in records:
        if record.get("prompt_only"):
            continue
        if "messages" in record and config.loss_on == "assistant":
            found.append(assistant_only(record, tokenizer))
            continue
        texts.append(chat_text(record, tokenizer) if "messages" in record else record["text"])
    for at in range(0, len(texts), BATCH):
        for ids in tokenizer(texts[at : at + BATCH], add_special_tokens=False)["input_ids"]:
            if ids:
                found.append(whole(ids, tokenizer))
    return found


def whole(ids: list[int], tokenizer: Any) -> Document:
    if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return Document(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))


def with_tools(record: Record, tokenizer: Any) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages and tools for the template; a template that knows no tools drops them, so they go to the system message."""
    messages, tools = record["messages"], record.get("tools")
    if not tools or "tools" in str(tokenizer.chat_template):
        return messages, tools or None
    import json

    listing = "You may call these functions:\n" + "\n".join(json.dumps(t, sort_keys=True) for t in tools)
    if messages and messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{messages[0]['content']}\n\n{listing}"}
        return [first, *messages[1:]], None
    return [{"role": "system", "content": listing}, *messages], None


def chat_text(record: Record, tokenizer: Any, upto: int | None = None) -> str:
    if not tokenizer.chat_template:
        raise DataError("a record has `messages`, but the tokenizer has no chat template; use `text` records or another model")
    messages, tools = with_tools(record, tokenizer)
    return tokenizer.apply_chat_template(normal(messages)[:upto], tools=tools, tokenize=False)


def normal(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A missing or null content becomes an empty string; tool calls are written out for templates without them."""
    import json

    fixed = []
    for message in messages:
        content = message.get("content") or ""
        if message.get("tool_calls"):
            calls = "\n".join(f"<tool_call>{json.dumps(c.get('function', c))}</tool_call>" for c in message["tool_calls"])
            content = f"{content}\n{calls}".strip()
        fixed.append({"role": message["role"], "content": content})
    return fixed


def assistant_only(record: Record, tokenizer: Any) -> Document:
    """Loss on assistant turns only, found by templating ever longer prefixes of the conversation."""
    messages, _ = with_tools(record, tokenizer)
    shift = len(messages) - len(record["messages"])
    pieces: list[tuple[str, bool]] = []
    before = ""
    for count in range(1, len(messages) + 1):
        text = chat_text(record, tokenizer, upto=count) if count > shift else ""
        if not text.startswith(before):
            raise DataError("data.loss_on=assistant needs a chat template whose output grows with each message; use loss_on=all")
        pieces.append((text[len(before) :], messages[count - 1]["role"] == "assistant"))
        before = text or before
    ids: list[int] = []
    carries: list[bool] = []
    for text, loss in pieces:
        part = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += part
        carries += [loss] * len(part)
    return Document(np.array(ids, dtype=np.int32), np.array(carries, dtype=bool))
