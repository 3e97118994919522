"""From what a client sends to token ids, and the limits that can be told before the engine sees a request.

Conversations go through the model's own template in the form that training gave it (core.train.data.chat): tools that a
template does not know go to the system message instead of being dropped.
"""

from typing import Any

from jinja2 import TemplateError

from core.train.data.chat import conversation
from infer.request import SamplingParams
from infer.server.errors import ApiError, bad
from infer.server.schema import Job, Prompt


class Prompts:
    """All tokenising of one server. Used by one thread at a time: tokenizers are not made for more."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def of(self, job: Job) -> list[list[int]]:
        """The ids of each prompt of `job`, checked against the context.

        Raises:
            ApiError: 400; a template refuses the conversation, a prompt is empty or too long.
        """
        if job.messages is not None:
            prompts = [self.chat(job.messages, job.tools)]
        else:
            prompts = [self.encode(p) for p in job.prompts]
        where = "messages" if job.chat else "prompt"
        for ids in prompts:
            self.check(ids, job.params, where, job.limit_field)
        return prompts

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return list(self.tokenizer(prompt, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, generation_prompt: bool = True
    ) -> list[int]:
        if not self.tokenizer.chat_template:
            raise bad(
                "this model's tokenizer has no chat template; use /v1/completions", "messages", "no_chat_template"
            )
        try:
            turns, known = conversation({"messages": messages, "tools": tools}, self.tokenizer)
            text = self.tokenizer.apply_chat_template(
                turns, tools=known, tokenize=False, add_generation_prompt=generation_prompt
            )
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise bad(f"the model's chat template refuses these messages: {error}", "messages", "template") from error
        return self.encode(text, add_special_tokens=False)

    def check(self, ids: list[int], params: SamplingParams, where: str, limit_field: str) -> None:
        if not ids:
            raise bad(f"{where}: no token in it; the model needs at least one", where)
        most, limit = self.max_length, params.max_tokens
        if limit is not None and limit > most:
            raise bad(f"{limit_field}={limit:,}: this model's context has {most:,} tokens", limit_field)
        if len(ids) + (limit or 1) > most:
            wanted = f"{len(ids):,} tokens of {where} and {limit or 1:,} of reply"
            raise context_too_long(f"this model's context has {most:,} tokens; asked for {wanted}", where)


def context_too_long(message: str, where: str) -> ApiError:
    return bad(message, where, "context_length_exceeded")
