"""The server as clients see it: the openai package, raw events, counts, log probabilities, figures."""

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infer.request import Request
from tests.fake_engine import FakeEngine, make_tokenizer
from tests.serving import Served, eventually, serving

TEXT = "The quick brown fox größer 日本語 🎉 END lazy dog."
ROUNDS = pytest.mark.parametrize("per_step", [1, 3])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture
def served(tokenizer: Any) -> Iterator[Served]:
    with serving(FakeEngine(tokenizer.eos_token_id), tokenizer) as found:
        yield found


def count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def events(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """Server-sent events, framed exactly: `data: ...`, an empty line, [DONE] last."""
    status, text, headers = served.ask(path, body | {"stream": True})
    assert status == 200 and headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *frames, rest = text.split("\n\n")
    assert rest == "" and frames[-1] == "data: [DONE]"
    assert all(f.startswith("data: ") and "\n" not in f for f in frames)
    return [json.loads(f.removeprefix("data: ")) for f in frames[:-1]]


@ROUNDS
def test_completion_whole_and_streamed_are_the_same(tokenizer: Any, per_step: int) -> None:
    with serving(FakeEngine(tokenizer.eos_token_id, per_step=per_step), tokenizer) as served:
        whole = served.client.completions.create(model="tiny", prompt=TEXT, max_tokens=400)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (TEXT, "stop")
        assert whole.object == "text_completion" and whole.model == "tiny"
        size = count(tokenizer, TEXT)
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (size, size + 1)  # and the end token
        assert whole.usage.total_tokens == 2 * size + 1
        assert whole.usage.prompt_tokens_details.cached_tokens == size // 16 * 16
        stream = served.client.completions.create(
            model="other", prompt=TEXT, max_tokens=400, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = list(stream)
        assert "".join(c.choices[0].text for c in chunks) == TEXT
        assert all("\ufffd" not in c.choices[0].text for c in chunks)
        assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
        assert all(c.choices[0].finish_reason is None for c in chunks[:-1]) and all(c.usage is None for c in chunks)
        assert last.choices == [] and last.usage == whole.usage and last.model == "other"


def test_chat_goes_through_the_template(served: Served, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": TEXT}]},
    ]
    reply = served.client.chat.completions.create(model="tiny", messages=messages)
    prompt = f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(served.engine.seen[0].ids) == prompt
    shown = prompt.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert reply.choices[0].message.content == shown and reply.choices[0].message.role == "assistant"
    assert reply.object == "chat.completion" and reply.usage.prompt_tokens == len(served.engine.seen[0].ids)
    stream = served.client.chat.completions.create(model="tiny", messages=messages, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == shown
    assert chunks[-1].choices[0].finish_reason == "stop" and len({c.id for c in chunks}) == 1


def test_tools_reach_the_template_unless_they_are_switched_off(served: Served, tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "1+1"}], "tools": [tool]}
    served.client.chat.completions.create(**ask)
    assert tokenizer.decode(served.engine.seen[-1].ids).startswith('tools:[{"type": "function"')
    served.client.chat.completions.create(**ask, tool_choice="none")
    assert tokenizer.decode(served.engine.seen[-1].ids).startswith("<|im_start|>user")
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        served.client.chat.completions.create(**ask, tool_choice="required")


def test_prompts_of_all_forms_and_several_choices(served: Served, tokenizer: Any) -> None:
    ids = [tokenizer(t)["input_ids"] for t in ("one", "two fox")]
    for prompt in (["one", "two fox"], ids):
        reply = served.client.completions.create(model="tiny", prompt=prompt, n=2, seed=7)
        assert [(c.index, c.text) for c in reply.choices] == [(0, "one"), (1, "one"), (2, "two fox"), (3, "two fox")]
        assert reply.usage.prompt_tokens == sum(map(len, ids))
        assert reply.usage.completion_tokens == 2 * sum(len(i) + 1 for i in ids)
    shared = served.client.completions.create(model="tiny", prompt=[[5] * 40], n=3).usage
    assert (shared.prompt_tokens, shared.prompt_tokens_details.cached_tokens) == (40, 32), "a prompt counts once"
    assert served.client.completions.create(model="tiny", prompt=ids[0]).choices[0].text == "one"
    assert [r.params.seed for r in served.engine.seen[:4]] == [7, 8, 7, 8]
    stream = served.client.completions.create(model="tiny", prompt=["one", "two fox"], n=2, stream=True)
    texts = ["", "", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["one", "one", "two fox", "two fox"]


def test_sampling_fields_reach_the_engine(served: Served) -> None:
    body = {
        "model": "tiny", "prompt": "a", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3,
        "ignore_eos": True, "stop_token_ids": [9], "stop": "zz", "user": "me", "presence_penalty": 0, "n": 1,
    }  # fmt: skip
    status, reply, _ = served.ask("/v1/completions", body)
    assert status == 200 and reply["choices"][0] == {
        "index": 0,
        "text": "aaaaa",
        "logprobs": None,
        "finish_reason": "length",
    }
    (request,) = served.engine.seen
    given = {name: getattr(request.params, name) for name in ("temperature", "top_p", "top_k", "seed", "ignore_eos")}
    assert given == {name: body[name] for name in given}
    assert (request.params.stop_token_ids, request.params.stop, request.params.max_tokens) == ((9,), ("zz",), 5)
    served.ask("/v1/completions", {"prompt": "a", "temperature": 0, "top_k": -1})
    served.ask("/v1/completions", {"prompt": "a"})
    served.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    params = [r.params for r in served.engine.seen[1:]]
    assert [(p.temperature, p.top_k, p.max_tokens) for p in params] == [(0, 0, 16), (1.0, 0, 16), (1.0, 0, None)]
    served.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 2})
    assert served.engine.seen[-1].params.max_tokens == 2


@ROUNDS
@pytest.mark.parametrize("stop", ["END", ["never", "語 🎉", "END"]])
def test_stop_strings_cut_the_text_and_end_the_request(tokenizer: Any, per_step: int, stop: Any) -> None:
    with serving(FakeEngine(tokenizer.eos_token_id, per_step=per_step), tokenizer) as served:
        cut = TEXT[: TEXT.index("END" if stop == "END" else "語 🎉")]
        body = {"prompt": TEXT, "max_tokens": 400, "stop": stop, "ignore_eos": True}
        _, reply, _ = served.ask("/v1/completions", body)
        assert (reply["choices"][0]["text"], reply["choices"][0]["finish_reason"]) == (cut, "stop")
        ids, end = tokenizer(TEXT)["input_ids"], cut + ("END" if stop == "END" else "語 🎉")
        wanted = next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).startswith(end))
        assert reply["usage"]["completion_tokens"] == wanted  # up to the token that completed the stop string
        eventually(lambda: len(served.engine.cancelled) == 1)
        chunks = events(served, "/v1/completions", body)
        assert "".join(c["choices"][0]["text"] for c in chunks) == cut
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        eventually(lambda: len(served.engine.cancelled) == 2 and not served.engine.running)


def test_logprobs_of_completions(served: Served, tokenizer: Any) -> None:
    reply = served.client.completions.create(model="tiny", prompt=TEXT, logprobs=2, max_tokens=400)
    found = reply.choices[0].logprobs
    ids = tokenizer(TEXT)["input_ids"]
    assert (
        len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == len(found.top_logprobs) == len(ids)
    )
    assert set(found.token_logprobs) == {-0.5}
    assert [found.text_offset[i] for i in (0, 1)] == [0, len(found.tokens[0])]
    assert all(len(top) == 2 and top[t] == -0.5 for t, top in zip(found.tokens, found.top_logprobs, strict=True))
    raw = b"".join(
        bytes(int(b, 16) for b in t.removeprefix("bytes:\\x").split("\\x")) if t.startswith("bytes:") else t.encode()
        for t in found.tokens
    )
    assert raw.decode() == TEXT
    chunks = events(served, "/v1/completions", {"prompt": TEXT, "logprobs": 2, "max_tokens": 400})
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [v for p in parts for v in p[name]] == getattr(found, name)


def test_logprobs_of_chat_and_what_a_stop_string_cuts(served: Served) -> None:
    messages = [{"role": "user", "content": TEXT}]
    ask = {"model": "tiny", "messages": messages, "logprobs": True, "top_logprobs": 3, "stop": ["END"]}
    reply = served.client.chat.completions.create(**ask)
    entries = reply.choices[0].logprobs.content
    text = b"".join(bytes(e.bytes) for e in entries if not e.token.startswith("<|")).decode()
    content = reply.choices[0].message.content
    assert content.endswith("🎉 ") and text.startswith(content)
    assert len(text) - len(entries[-1].token) < len(content), "the last token's first character is in the text"
    assert all(len(e.top_logprobs) == 3 and e.top_logprobs[0].token == e.token for e in entries)
    chunks = list(served.client.chat.completions.create(**ask, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.model_dump() for e in streamed] == [e.model_dump() for e in entries]


def test_a_token_behind_the_cut_has_no_entry(served: Served, tokenizer: Any) -> None:
    ids = tokenizer(["The", " fox", " dog"])["input_ids"]
    served.engine.answer = lambda request: [i for word in ids for i in word]
    found = complete(served, logprobs=0, stop=" fox").choices[0]
    assert found.text == "The" and len(found.logprobs.tokens) == len(ids[0])


def test_the_model_is_named_and_unknown_ones_are_not_found(served: Served) -> None:
    models = served.client.models.list()
    assert [m.id for m in models] == ["tiny", "other"] and models.data[0].model_dump()["max_model_len"] == 512
    assert served.client.models.retrieve("other").id == "other"
    for call in (lambda: served.client.models.retrieve("gpt"), lambda: complete(served, model="gpt")):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found" and "tiny" in caught.value.message


def complete(served: Served, **fields: Any) -> Any:
    return served.client.completions.create(**{"model": "tiny", "prompt": "a"} | fields)


def test_tokenize_and_back(served: Served, tokenizer: Any) -> None:
    status, reply, _ = served.ask("/tokenize", {"prompt": TEXT})
    ids = tokenizer(TEXT)["input_ids"]
    assert status == 200 and reply == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    assert served.ask("/detokenize", {"tokens": ids})[1] == {"prompt": TEXT}
    chat = served.ask("/tokenize", {"messages": [{"role": "user", "content": "x"}]})[1]["tokens"]
    assert tokenizer.decode(chat) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    for body in ({"tokens": [VOCAB_END]}, {"tokens": [-1]}, {"tokens": ["a"]}, {"tokens": 1}):
        assert served.ask("/detokenize", body)[0] == 400
    assert served.ask("/tokenize", {})[0] == 400


VOCAB_END = 10**6


def samples(served: Served) -> dict[str, float]:
    """Every sample of /metrics, named with its labels but the model's."""
    status, text, headers = served.ask("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name.startswith("process_"):
                continue
            assert sample.name.startswith("fp4flash:")
            assert sample.labels["model_name"] == "tiny"
            rest = ",".join(v for k, v in sample.labels.items() if k != "model_name")
            found[f"{sample.name.removeprefix('fp4flash:')}{rest and '/' + rest}"] = sample.value
    return found


@ROUNDS
def test_figures(served: Served, tokenizer: Any, per_step: int) -> None:
    served.engine.per_step = per_step
    before = samples(served)
    assert before["num_requests_running"] == before["request_success_total/stop"] == 0
    ids = count(tokenizer, TEXT)
    complete(served, prompt=TEXT, max_tokens=400)
    complete(served, prompt=TEXT, max_tokens=3)
    complete(served, prompt=TEXT, max_tokens=400, stop="END")
    eventually(lambda: not served.engine.busy)
    after = samples(served)
    assert after["request_success_total/stop"] == 2 and after["request_success_total/length"] == 1
    assert after["prompt_tokens_total"] == after["prefix_cache_queries_total"] == 3 * ids
    assert after["generation_tokens_total"] == served.engine.made
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert after[f"{name}_seconds_count"] == 3, name
        assert 0 <= after[f"{name}_seconds_sum"] < 20
    assert after["request_prompt_tokens_sum"] == 3 * ids
    first = 3 * per_step  # each request's first round is its time to the first token
    assert after["inter_token_latency_seconds_count"] == after["request_generation_tokens_sum"] - first
    assert after["spec_decode_num_accepted_tokens_per_pos_total/0"] == after["spec_decode_num_drafts_total"] > 0
    assert after["spec_decode_num_accepted_tokens_per_pos_total/1"] == 1
    assert after["kv_cache_usage_perc"] == 0


def test_small_endpoints(served: Served) -> None:
    assert served.ask("/health")[:2] == (200, {"status": "ok"})
    assert served.ask("/ready")[0] == 200
    assert served.ask("/version")[1]["version"]
    status, reply, _ = served.ask("/v1/nothing")
    assert status == 404 and reply["error"]["message"] == "GET /v1/nothing: no such path"
    status, reply, _ = served.ask("/v1/completions")
    assert status == 405 and "POST" in reply["error"]["message"]


def test_an_idle_engine_is_left_alone(served: Served) -> None:
    complete(served)
    eventually(lambda: not served.engine.busy)
    time.sleep(0.05)
    before = served.engine.steps, served.engine.polls
    served.ask("/metrics")
    time.sleep(0.05)
    assert (served.engine.steps, served.engine.polls) == before


def test_minus_infinity_is_a_number_in_json(served: Served) -> None:
    usual = served.engine.logprob
    served.engine.logprob = lambda token, n: type(usual(token, n))(token, float("-inf"), ((5, float("-inf")),))
    reply = complete(served, logprobs=1)
    assert reply.choices[0].logprobs.token_logprobs == [-9999.0]


def test_the_first_words_blank_is_kept(served: Served, tokenizer: Any) -> None:
    served.engine.answer = lambda request: tokenizer(" fox")["input_ids"]
    assert complete(served, prompt="The").choices[0].text == " fox"


def test_ids_of_requests_are_distinct(served: Served) -> None:
    served.client.completions.create(model="tiny", prompt=["a", "b"], n=3)
    names = [r.id for r in served.engine.seen if isinstance(r, Request)]
    assert len(set(names)) == len(names) == 6
