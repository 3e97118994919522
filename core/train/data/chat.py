"""Chat records as text, through the tokenizer's own template, and which characters of it an assistant wrote.

Templates differ in what they know. What one does not know is put where it can be seen: tools go to the system message,
tool calls are written into the content, and a system message that a template refuses goes to the first user turn.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from core.errors import ConfigError, DataError
from core.train.data.documents import Record

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Message = dict[str, Any]


def knows(tokenizer: Any, word: str) -> bool:
    return word in str(tokenizer.chat_template)


def with_tools(record: Record, tokenizer: Any) -> tuple[list[Message], list[Any] | None]:
    """Messages and tools for the template; tools that it would drop silently go to the system message."""
    messages, tools = record["messages"], record.get("tools")
    if not tools or knows(tokenizer, "tools"):
        return messages, tools or None
    listing = "You may call these functions:\n" + "\n".join(json.dumps(t, sort_keys=True) for t in tools)
    if messages and messages[0]["role"] == "system":
        first = messages[0] | {"content": f"{plain(messages[0].get('content'))}\n\n{listing}"}
        return [first, *messages[1:]], None
    return [{"role": "system", "content": listing}, *messages], None


def plain(content: Any) -> str:
    """Null is empty; the text parts of a list of parts are joined."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def normal(messages: list[Message], native_calls: bool = False) -> list[Message]:
    """Content as a string; tool calls, `arguments` as an object, kept (`native_calls`) or written into it."""
    fixed = []
    for message in messages:
        content = plain(message.get("content"))
        calls = [as_object(c) for c in message.get("tool_calls") or []]
        kept = {k: v for k, v in message.items() if k != "tool_calls"} if native_calls else {"role": message["role"]}
        if calls and native_calls:
            kept["tool_calls"] = calls
        elif calls:
            written = "\n".join(f"<tool_call>{json.dumps(c.get('function', c))}</tool_call>" for c in calls)
            content = f"{content}\n{written}".strip()
        fixed.append(kept | {"content": content})
    return fixed


def as_object(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments that come as JSON text (the OpenAI wire form) as an object: templates serialise them themselves."""
    inner = call.get("function", call)
    if isinstance(inner, dict) and isinstance(inner.get("arguments"), str):
        try:
            inner = inner | {"arguments": json.loads(inner["arguments"])}
        except ValueError:
            return call
    return call | {"function": inner} if "function" in call else inner


def conversation(record: Record, tokenizer: Any) -> tuple[list[Message], list[Any] | None]:
    """Messages and tools in the form this tokenizer's template takes."""
    messages, tools = with_tools(record, tokenizer)
    return normal(messages, native_calls=knows(tokenizer, "tool_calls")), tools


def system_into_user(messages: list[Message]) -> list[Message] | None:
    """The same conversation for templates that refuse a system message; None where there is nothing to fold."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    return [messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]


@dataclass(frozen=True)
class Chat:
    """A rendered conversation, and what it was rendered from."""

    text: str
    messages: list[Message]
    tools: list[Any] | None


def render(record: Record, tokenizer: Any) -> Chat:
    """The conversation as text.

    Raises:
        DataError: no template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError("a record has `messages`, but the tokenizer has no chat template; use `text` records")
    messages, tools = conversation(record, tokenizer)
    failure: Exception | None = None
    for attempt in (messages, system_into_user(messages)):
        if attempt is None:
            continue
        try:
            return Chat(tokenizer.apply_chat_template(attempt, tools=tools, tokenize=False), attempt, tools)
        except (TemplateError, TypeError, KeyError) as error:
            failure = failure or error
    name = record.get("id", "without id")
    raise DataError(f"the chat template refuses record {name} ({failure}); drop it or change the template")


def assistant_tokens(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of the whole conversation, and whether an assistant wrote them (end marker included, header not).

    By `{% generation %}` where the template has it, else by rendering the conversation up to each assistant turn. The
    text is tokenised once and in one piece: the ids are those of the plain tokenisation.
    """
    if GENERATION.search(str(tokenizer.chat_template)):
        found = tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]]
    if not tokenizer.is_fast:
        raise ConfigError("data.loss_on=assistant needs a fast tokenizer (character offsets); set data.loss_on=all")
    spans = assistant_spans(chat, tokenizer)
    found = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    carries = [any(a < stop and b > start for start, stop in spans) for a, b in found["offset_mapping"]]
    return list(found["input_ids"]), carries


def assistant_spans(chat: Chat, tokenizer: Any) -> list[tuple[int, int]]:
    """Character ranges of the assistant turns. Only prefixes that end at such a turn are looked at: between others
    (several tool results, say) templates open and close brackets in ways that are no prefix of the whole."""

    def prefix(count: int, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            chat.messages[:count], tools=chat.tools, tokenize=False, add_generation_prompt=prompt
        )
        return text if chat.text.startswith(text) else ""

    spans = []
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        whole = prefix(turn + 1, prompt=False)
        before = (prefix(turn, prompt=True) or prefix(turn, prompt=False)) if turn else ""
        start = len(before) if turn else chat.text.find(message["content"])
        stop = len(whole.rstrip())
        if not whole or start < 0 or stop < start or (turn and start == 0):
            raise DataError(
                "data.loss_on=assistant needs a chat template with {% generation %} or one whose output grows with "
                "each turn; this one rewrites earlier turns: set data.loss_on=all"
            )
        spans.append((start, stop))
    return spans
