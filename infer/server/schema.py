"""What a completion request may say, read strictly.

A field that this server does not know, or knows but cannot honour, is refused by name: a client that asked for a JSON
schema and got free text would be worse off than one that got an error. Fields that cannot change the reply (`user`,
`metadata`, …) are accepted; fields that would are accepted at the value that does not (`presence_penalty: 0`).
Sources: platform.openai.com/docs/api-reference; top_k, ignore_eos and stop_token_ids as in vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError
from infer.request import MAX_LOGPROBS, SamplingParams
from infer.server.errors import bad

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024
COMPLETION_TOKENS = 16  # what the dialect gives /v1/completions without max_tokens
NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
}
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {"echo": (False,), "suffix": ("",)}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "a number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "true or false": lambda v: isinstance(v, bool),
    "a string": lambda v: isinstance(v, str),
    "an object": lambda v: isinstance(v, dict),
    "a list": lambda v: isinstance(v, list),
}
Prompt = str | list[int]


@dataclass(frozen=True)
class Job:
    """One HTTP request: `n` choices for each prompt, or for the one conversation.

    params.max_tokens None: up to the context's end. include_usage: a last event with the counts.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    limit_field: str  # the name under which the client gave max_tokens

    @property
    def chat(self) -> bool:
        return self.messages is not None


class Fields:
    """A JSON object whose fields are taken one by one; `end` refuses what nobody took. null is the same as absent."""

    def __init__(self, body: dict[str, Any], where: str = "") -> None:
        self.body, self.where, self.seen = body, where, set[str]()

    def take(self, name: str, kind: str, default: Any = None) -> Any:
        self.seen.add(name)
        value = self.body.get(name)
        if value is None:
            return default
        if not KINDS[kind](value):
            raise bad(f"{self.where}{name}={short(value)}: expected {kind}", self.where + name)
        return value

    def neutral(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Accept a feature that this server lacks only where it is switched off."""
        self.seen.add(name)
        value = self.body.get(name)
        if value is not None and not any(
            value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed
        ):
            raise bad(f"{name}={short(value)} is not supported by this server; leave it out", name, "unsupported_field")

    def end(self) -> None:
        unknown = sorted(n for n, value in self.body.items() if value is not None and n not in self.seen)
        if unknown:
            name = self.where + unknown[0]
            raise bad(f"{name} is not a field that this server knows; leave it out", name, "unknown_field")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def completion_job(body: dict[str, Any]) -> Job:
    """POST /v1/completions. Raises ApiError (400) that names the field."""
    fields = Fields(body)
    prompts = read_prompts(body.get("prompt"))
    fields.seen.add("prompt")
    logprobs = fields.take("logprobs", "an integer")
    limit = fields.take("max_tokens", "an integer", COMPLETION_TOKENS)
    best_of = fields.take("best_of", "an integer")
    for name, allowed in NEUTRAL_COMPLETION.items():
        fields.neutral(name, allowed)
    job = common(fields, limit, logprobs, prompts=prompts, messages=None, tools=None, limit_field="max_tokens")
    if best_of not in (None, job.n):
        raise bad(f"best_of={best_of} with n={job.n} is not supported by this server; leave it out", "best_of")
    return job


def chat_job(body: dict[str, Any]) -> Job:
    """POST /v1/chat/completions. Raises ApiError (400) that names the field."""
    fields = Fields(body)
    if body.get("chat_template") is not None or body.get("chat_template_kwargs") is not None:
        name = next(n for n in ("chat_template", "chat_template_kwargs") if body.get(n) is not None)
        raise bad(f"{name}: templates are programs; only the model's own is run, as it is", name, "unsupported_field")
    fields.seen |= {"chat_template", "chat_template_kwargs"}
    messages = read_messages(fields.take("messages", "a list"))
    tools = read_tools(fields)
    old, new = fields.take("max_tokens", "an integer"), fields.take("max_completion_tokens", "an integer")
    if None not in (old, new) and old != new:
        raise bad(f"max_tokens={old} and max_completion_tokens={new} differ; give one", "max_tokens")
    name = "max_tokens" if new is None else "max_completion_tokens"
    wanted = fields.take("logprobs", "true or false", False)
    top = fields.take("top_logprobs", "an integer", 0)
    if top and not wanted:
        raise bad(f"top_logprobs={top} needs logprobs=true", "top_logprobs")
    if not 0 <= top <= MAX_LOGPROBS:
        raise bad(f"top_logprobs={top}: expected 0 to {MAX_LOGPROBS}", "top_logprobs")
    for field, allowed in NEUTRAL_CHAT.items():
        fields.neutral(field, allowed)
    given = {"prompts": (), "messages": messages, "tools": tools, "limit_field": name}
    return common(fields, old if new is None else new, top if wanted else None, **given)


def common(fields: Fields, limit: int | None, logprobs: int | None, **given: Any) -> Job:
    """Fields of both dialects. A value out of range is refused with the rule of SamplingParams."""
    n = fields.take("n", "an integer", 1)
    if not 1 <= n <= MAX_CHOICES:
        raise bad(f"n={n}: expected 1 to {MAX_CHOICES}", "n")
    stream = fields.take("stream", "true or false", False)
    top_k = fields.take("top_k", "an integer", 0)
    settings = {
        "temperature": fields.take("temperature", "a number", 1.0),
        "top_p": fields.take("top_p", "a number", 1.0),
        "top_k": 0 if top_k == -1 else top_k,
        "seed": fields.take("seed", "an integer"),
        "ignore_eos": fields.take("ignore_eos", "true or false", False),
        "stop": read_stop(fields),
        "stop_token_ids": tuple(read_ids(fields.take("stop_token_ids", "a list", []), "stop_token_ids")),
    }
    job = {
        "model": fields.take("model", "a string"),
        "n": n,
        "stream": stream,
        "include_usage": include_usage(fields, stream),
    }
    for name, allowed in NEUTRAL.items():
        fields.neutral(name, allowed)
    fields.seen.update(NO_EFFECT)
    fields.end()
    try:
        params = SamplingParams(max_tokens=limit, logprobs=logprobs, **settings)
    except ConfigError as error:
        name = str(error).split("=")[0]
        shown = given["limit_field"] if name == "max_tokens" else name
        raise bad(str(error).replace(name, shown, 1), shown) from error
    return Job(params=params, **job, **given)


def include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.take("stream_options", "an object")
    if options is None:
        return False
    if not stream:
        raise bad("stream_options needs stream=true", "stream_options")
    inner = Fields(options, "stream_options.")
    wanted = inner.take("include_usage", "true or false", False)
    inner.neutral("include_obfuscation", (False,))
    inner.end()
    return wanted


def read_stop(fields: Fields) -> tuple[str, ...]:
    fields.seen.add("stop")
    given = fields.body.get("stop")
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise bad(f"stop={short(given)}: expected a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS or any(not 1 <= len(s) <= MAX_STOP_LENGTH for s in stops):
        rule = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"
        raise bad(f"stop={short(given)}: expected {rule}", "stop")
    return tuple(stops)


def read_ids(given: list[Any], name: str) -> list[int]:
    for value in given:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise bad(f"{name}: {short(value)} is no token id", name)
    return given


def read_prompts(given: Any) -> tuple[Prompt, ...]:
    """One prompt or several, each a string or a list of token ids."""
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list) or not given:
        raise bad(f"prompt={short(given)}: expected a string, token ids, or a list of these", "prompt")
    if all(isinstance(p, str) for p in given):
        return tuple(given)
    if all(isinstance(p, list) for p in given):
        return tuple(read_ids(p, "prompt") for p in given)
    return (read_ids(given, "prompt"),)


def read_messages(given: Any) -> list[dict[str, Any]]:
    """Checked for the form only; what roles may follow each other is the template's business."""
    if not given:
        raise bad("messages: expected a list of at least one message", "messages")
    for at, message in enumerate(given):
        where = f"messages[{at}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise bad(f"{where}={short(message)}: expected an object with a role", where)
        read_content(message.get("content"), f"{where}.content")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
            raise bad(f"{where}.tool_calls={short(calls)}: expected a list of objects", f"{where}.tool_calls")
    return given


def read_content(given: Any, where: str) -> None:
    if given is None or isinstance(given, str):
        return
    if not isinstance(given, list):
        raise bad(f"{where}={short(given)}: expected a string or a list of text parts", where)
    for at, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad(f"{where}[{at}]={short(part)}: this server takes parts of type text only", f"{where}[{at}]")


def read_tools(fields: Fields) -> list[dict[str, Any]] | None:
    """The tools for the template. tool_choice none hides them; a forced call needs a grammar, which is not there."""
    tools = fields.take("tools", "a list")
    if tools and not all(isinstance(t, dict) for t in tools):
        raise bad(f"tools={short(tools)}: expected a list of objects", "tools")
    fields.seen.add("tool_choice")
    choice = fields.body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise bad(f"tool_choice={short(choice)}: this server takes auto and none", "tool_choice", "unsupported_field")
    return None if choice == "none" else tools or None
