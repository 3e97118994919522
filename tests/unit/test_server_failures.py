"""What goes wrong at a server: bad requests, limits, keys, clients that leave, engines that fail, shutdown."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest

from infer.serve import arguments as serve_arguments
from infer.serve import main, settings_of
from tests.fake_engine import FakeEngine, make_tokenizer
from tests.serving import Served, eventually, serving

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "a"}]
ENDLESS = {"prompt": "fox", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer") / "t"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    made = make_tokenizer(folder)
    made.save_pretrained(folder)
    return made


@pytest.fixture
def served(tokenizer: Any) -> Iterator[Served]:
    with serving(FakeEngine(tokenizer.eos_token_id, delay=0.002), tokenizer, max_waiting=8) as found:
        yield found


def refused(served: Served, path: str, body: Any, status: int, param: str | None, words: str = "") -> dict[str, Any]:
    """The whole shape of an OpenAI error object."""
    got, reply, _ = served.ask(path, body)
    assert got == status, reply
    assert set(reply) == {"error"} and set(reply["error"]) == {"message", "type", "param", "code"}
    error = reply["error"]
    assert error["param"] == param and words in error["message"] and "\n" not in error["message"], error
    return error


BOTH = [
    ({"temperature": -1}, "temperature"), ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"), ({"n": 0}, "n"), ({"n": 9}, "n"),
    ({"n": 1000}, "n"), ({"n": 1.0}, "n"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"), ({"stop": ["a", 1]}, "stop"), ({"stop": ["a"] * 65}, "stop"), ({"stop": {}}, "stop"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -5}, "max_tokens"), ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 1e3}, "max_tokens"), ({"stream": 1}, "stream"), ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"presence_penalty": -1}, "presence_penalty"),
    ({"min_p": 0.1}, "min_p"), ({"guided_json": {}}, "guided_json"), ({"temprature": 0}, "temprature"),
    ({"stop_token_ids": [True]}, "stop_token_ids"), ({"model": 5}, "model"),
]  # fmt: skip
COMPLETION = [
    ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"), ({"prompt": [[1], "a"]}, "prompt"), ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"echo": True}, "echo"), ({"suffix": "x"}, "suffix"),
    ({"best_of": 3}, "best_of"), ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"),
    ({"messages": CHAT}, "messages"),
]  # fmt: skip
OF_CHAT = [
    ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "a"}, "messages"),
    ({"messages": [{"content": "a"}]}, "messages[0]"), ({"messages": [*CHAT, 5]}, "messages[1]"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "bad", "content": "a"}]}, "messages"), ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logprobs": 3}, "logprobs"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"), ({"tools": [5]}, "tools"), ({"tools": {}}, "tools"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"), ({"prompt": "a"}, "prompt"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"tool_choice": {"type": "function"}}, "tool_choice"),
]  # fmt: skip


def test_bad_fields_are_named(served: Served) -> None:
    for fields, param in (*BOTH, *COMPLETION):
        refused(served, "/v1/completions", {"prompt": "a"} | fields, 400, param)
    for fields, param in (*BOTH, *OF_CHAT):
        refused(served, "/v1/chat/completions", {"messages": CHAT} | fields, 400, param)
    assert not served.engine.seen, "none of them reached the engine"
    assert served.ask("/v1/completions", {"prompt": "a"})[0] == 200


def test_fields_switched_off_or_null_are_accepted(served: Served) -> None:
    off = {"response_format": {"type": "text"}, "logit_bias": {}, "presence_penalty": 0.0, "stop": None, "seed": None}
    assert served.ask("/v1/completions", {"prompt": "a", "echo": False, "suffix": None, "best_of": 1} | off)[0] == 200
    more = {"functions": None, "chat_template": None, "new_field": None, "metadata": {"a": "b"}, "tools": []}
    assert served.ask("/v1/chat/completions", {"messages": CHAT} | off | more)[0] == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b'{"temperature": Infinity}', b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}", b'{"prompt": "\\ud800"}', b'{"prompt": "a" "b"}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(served: Served, raw: bytes) -> None:
    error = refused(served, "/v1/completions", raw, 400, None, "the body is")
    assert error["type"] == "invalid_request_error"


def test_context_too_long_says_the_numbers(served: Served, tokenizer: Any) -> None:
    ids = [5] * 500
    error = refused(served, "/v1/completions", {"prompt": ids, "max_tokens": 13}, 400, "prompt", "512")
    assert error["code"] == "context_length_exceeded" and "500 tokens of prompt and 13 of reply" in error["message"]
    assert served.ask("/v1/completions", {"prompt": ids, "max_tokens": 12})[0] == 200
    long = [{"role": "user", "content": "fox " * 600}]
    refused(served, "/v1/chat/completions", {"messages": long}, 400, "messages", "512")


def test_what_the_engine_refuses_is_the_clients_fault(served: Served) -> None:
    refused(served, "/v1/completions", {"prompt": [5, 329, 330]}, 400, None, "beyond the vocabulary")
    refused(served, "/v1/completions", {"prompt": [330], "stream": True}, 400, None, "beyond the vocabulary")
    assert served.ask("/v1/completions", {"prompt": "a"})[0] == 200


def test_a_tokenizer_without_template(tokenizer: Any, folder: Path) -> None:
    from core.models.load import load_tokenizer

    bare = load_tokenizer(folder)
    bare.chat_template = None
    with serving(FakeEngine(bare.eos_token_id), bare) as served:
        refused(served, "/v1/chat/completions", {"messages": CHAT}, 400, "messages", "no chat template")
        assert served.ask("/v1/completions", {"prompt": "a"})[0] == 200


def test_the_templates_own_message(served: Served) -> None:
    body = {"messages": [{"role": "bad", "content": "a"}]}
    refused(served, "/v1/chat/completions", body, 400, "messages", "no role bad")


def test_large_bodies(tokenizer: Any) -> None:
    with serving(FakeEngine(tokenizer.eos_token_id), tokenizer, max_body=2000) as served:
        assert served.ask("/v1/completions", {"prompt": "a" * 400})[0] == 200
        refused(served, "/v1/completions", {"prompt": "a" * 2000}, 413, None, "2,000 bytes")
        announced = HTTPConnection("127.0.0.1", served.port, timeout=5)
        announced.putrequest("POST", "/v1/completions")
        announced.putheader("Content-Length", str(10**9))
        announced.endheaders()
        assert announced.getresponse().status == 413  # without waiting for it
        chunked = served.open_request("/v1/completions", b"", {"Transfer-Encoding": "chunked"})
        for _ in range(3):
            chunked.send(b"3e8\r\n" + b"a" * 1000 + b"\r\n")  # a length that was not announced
        chunked.send(b"0\r\n\r\n")
        assert chunked.getresponse().status == 413


def test_the_key(tokenizer: Any) -> None:
    with serving(FakeEngine(tokenizer.eos_token_id), tokenizer, api_key="sésame") as served:
        paths = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/v1/nothing")
        for given in (None, "Bearer", "Bearer x", "Bearer sésam", "Basic sésame", "sésame"):
            headers = {} if given is None else {"Authorization": given.encode().decode("latin-1")}
            for path in paths:
                body = None if path.endswith(("models", "nothing")) else {"prompt": "a"}
                status, reply, got = served.ask(path, body, headers)
                assert status == 401 and reply["error"]["code"] == "invalid_api_key"
                assert got["WWW-Authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer sésame".encode().decode("latin-1")}
        assert served.ask("/v1/completions", {"prompt": "a"}, headers)[0] == 200
        assert [served.ask(p)[0] for p in ("/health", "/ready", "/metrics", "/version")] == [200] * 4
        assert len(served.engine.seen) == 1


def test_a_full_queue(tokenizer: Any) -> None:
    with serving(FakeEngine(tokenizer.eos_token_id, places=2), tokenizer, max_waiting=3) as served:
        served.engine.paused = True
        held = [served.open_request("/v1/completions", {"prompt": "a"}) for _ in range(3)]
        eventually(lambda: served.server.engine.waiting == 3)
        status, reply, headers = served.ask("/v1/completions", {"prompt": "a"})
        assert status == 429 and headers["Retry-After"] == "1" and reply["error"]["code"] == "queue_full"
        assert served.ask("/ready")[0] == 429 and served.ask("/health")[0] == 200
        with pytest.raises(openai.RateLimitError):
            served.client.completions.create(model="tiny", prompt="a")
        served.engine.paused = False
        assert [c.getresponse().status for c in held] == [200] * 3
        assert served.ask("/v1/completions", {"prompt": "a"})[0] == 200
        refused(served, "/v1/completions", {"prompt": ["a", "b"], "n": 2}, 400, "n", "at most 3")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_requests(served: Served, stream: bool) -> None:
    connection = served.open_request("/v1/completions", ENDLESS | {"stream": stream, "n": 2})
    if stream:
        assert connection.getresponse().read(10)
    eventually(lambda: len(served.engine.running) == 2)
    connection.close()
    if stream:
        connection.sock = None
    eventually(lambda: len(served.engine.cancelled) == 2 and not served.engine.busy)
    assert served.server.engine.waiting == 0 and not served.server.engine._live
    text = served.ask("/metrics")[1]
    assert 'request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in text


def test_a_client_that_leaves_while_waiting(served: Served) -> None:
    held = [served.open_request("/v1/completions", ENDLESS) for _ in range(5)]
    eventually(lambda: len(served.engine.waiting) == 1)
    held.pop().close()
    eventually(lambda: not served.engine.waiting or len(served.engine.cancelled) == 1)
    for connection in held:
        connection.close()
    eventually(lambda: not served.engine.busy and not served.server.engine._live)


def test_one_failing_request_leaves_the_others_alone(served: Served) -> None:
    served.engine.poison = 7
    other = served.open_request("/v1/completions", {"prompt": "fox", "max_tokens": 100, "ignore_eos": True})
    status, reply, _ = served.ask("/v1/completions", {"prompt": [7]})
    assert status == 500 and reply["error"]["type"] == "server_error" and "poison" in reply["error"]["message"]
    with pytest.raises(openai.InternalServerError, match="poison"):
        served.client.completions.create(model="tiny", prompt=[7], stream=True)
    assert other.getresponse().status == 200
    assert served.ask("/health")[0] == 200


def test_an_error_after_the_first_tokens_is_an_event(served: Served) -> None:
    connection = served.open_request("/v1/chat/completions", {"messages": CHAT, "ignore_eos": True, "stream": True})
    reply = connection.getresponse()
    reply.readline()
    served.engine.broken = 1
    frames = reply.read().decode().split("\n\n")
    error = json.loads(frames[-3].strip().removeprefix("data: "))["error"]
    assert "a step broke" in error["message"] and frames[-2:] == ["data: [DONE]", ""]


def test_a_step_that_raises_fails_what_was_in_flight_and_only_that(served: Served) -> None:
    held = [served.open_request("/v1/completions", ENDLESS) for _ in range(5)]
    eventually(lambda: len(served.engine.running) == 4 and served.engine.waiting)
    served.engine.broken = 1
    replies = [c.getresponse() for c in held]
    assert [r.status for r in replies] == [500] * 5
    assert "a step broke" in json.loads(replies[0].read())["error"]["message"]
    assert len(served.engine.cancelled) == 5
    assert served.ask("/health")[0] == 200
    assert served.ask("/v1/completions", {"prompt": "a"})[1]["choices"][0]["text"] == "a"


def test_steps_that_fail_now_and_then_do_not_kill_the_engine(served: Served) -> None:
    for _ in range(5):
        served.engine.broken = 1
        assert served.ask("/v1/completions", {"prompt": "a"})[0] == 500
        assert served.ask("/v1/completions", {"prompt": "a"})[0] == 200


def test_an_engine_that_keeps_failing_is_dead_and_the_server_says_so(served: Served) -> None:
    served.engine.broken = 100
    served.engine.cancel = lambda request_id: None  # and it forgets nothing
    assert served.ask("/v1/completions", {"prompt": "a"})[0] == 500
    eventually(lambda: served.ask("/health")[0] == 503)
    error = refused(served, "/v1/completions", {"prompt": "a"}, 503, None, "not running")
    assert error["code"] == "engine_dead"
    assert served.ask("/metrics")[0] == 200 and served.ask("/ready")[0] == 503


def test_an_engine_that_dies_ends_those_who_wait_for_it(served: Served) -> None:
    def lost(request_id: str) -> None:
        raise RuntimeError("device lost")

    held = served.open_request("/v1/completions", ENDLESS)
    eventually(lambda: served.engine.running)
    leaves = served.open_request("/v1/completions", ENDLESS)
    eventually(lambda: len(served.engine.running) == 2)
    served.engine.cancel = lost
    leaves.close()
    assert held.getresponse().status == 500
    assert served.ask("/health")[0] == 503


def test_an_add_that_raises_concerns_one_request(served: Served) -> None:
    usual = served.engine.add

    def add(request: Any) -> None:
        if len(request.ids) == 2:
            raise RuntimeError("no room in the table")
        usual(request)

    served.engine.add = add
    assert served.ask("/v1/completions", {"prompt": [5, 6]})[0] == 500
    assert served.ask("/v1/completions", {"prompt": [5]})[0] == 200


def test_shutdown_refuses_new_requests_and_lets_the_others_end(served: Served) -> None:
    held = served.open_request("/v1/completions", ENDLESS | {"max_tokens": 60})
    eventually(lambda: served.engine.running)
    drained = asyncio.run_coroutine_threadsafe(served.server.engine.drain(10), served.loop)
    eventually(lambda: served.server.engine.draining)
    error = refused(served, "/v1/completions", {"prompt": "a"}, 503, None, "shutting down")
    assert error["code"] == "shutting_down" and served.ask("/ready")[0] == 503 and served.ask("/health")[0] == 200
    reply = held.getresponse()
    assert reply.status == 200 and json.loads(reply.read())["usage"]["completion_tokens"] == 60
    assert drained.result(5) is None and not served.engine.cancelled


def test_after_the_grace_requests_are_ended(served: Served) -> None:
    whole = served.open_request("/v1/completions", ENDLESS)
    streamed = served.open_request("/v1/completions", ENDLESS | {"stream": True})
    reply = streamed.getresponse()
    eventually(lambda: len(served.engine.running) == 2)
    served.on_loop(served.server.engine.drain(0.05))
    assert whole.getresponse().status == 503
    frames = reply.read().decode().split("\n\n")
    assert json.loads(frames[-3].removeprefix("data: "))["error"]["code"] == "shutting_down"
    eventually(lambda: len(served.engine.cancelled) == 2)


# The command itself, in a process of its own, with the fake engine in place of a model's.
COMMAND = """
import sys
from core.errors import ConfigError
import infer.serve as serve
from tests.fake_engine import FakeEngine
options = serve.arguments(sys.argv[1:])
tokenizer = serve.tokenizer_of(serve.Path(options.model))
engine = FakeEngine(tokenizer.eos_token_id, delay=0.01)
server = serve.Server(engine, tokenizer, serve.settings_of(options))
serve.asyncio.run(serve.serve(server, options))
print("ended in order")
"""


def started(*words: str) -> tuple[subprocess.Popen[str], int]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--port", "0", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith("serving "), line + process.stderr.read()
    return process, int(line.rsplit(":", 1)[1].split("/")[0])


@pytest.mark.parametrize(("grace", "tokens"), [("20", 60), ("0.2", 400)])
def test_sigterm_ends_the_process_in_order(folder: Path, tokenizer: Any, grace: str, tokens: int) -> None:
    process, port = started("--model", str(folder), "--grace", grace)
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(ENDLESS | {"max_tokens": tokens, "stream": True}))
    reply = connection.getresponse()
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text = reply.read().decode()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out.endswith("ended in order\n")
    assert text.endswith("data: [DONE]\n\n") and ("shutting_down" in text) == (grace == "0.2")
    assert time.monotonic() - begun < 10


def test_a_second_signal_does_not_wait(folder: Path, tokenizer: Any) -> None:
    process, port = started("--model", str(folder), "--grace", "60", "--host", "0.0.0.0")
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/v1/completions", json.dumps(ENDLESS))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert connection.getresponse().status == 503
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "without an API key" in err


def test_the_commands_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["--port", "70000"], ["--max-waiting", "0"], ["--max-body-mb", "0"], ["--grace", "-1"]):
        assert main(["--model", str(tmp_path), *words]) == 2
        assert words[0] in capsys.readouterr().err
    assert main(["--model", str(tmp_path)]) == 2
    assert "no tokenizer" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "none")]) == 2
    monkeypatch.setenv("FP4FLASH_API_KEY", "from the environment")
    found = settings_of(serve_arguments(["--model", "a/b/", "--max-body-mb", "0.5"]))
    assert (found.names, found.api_key, found.max_body) == (("b",), "from the environment", 2**19)
    names = ["--served-model-name", "x", "y", "--api-key", "k"]
    assert settings_of(serve_arguments(["--model", "m", *names])).names == ("x", "y")
    monkeypatch.setenv("FP4FLASH_API_KEY", "of a file\n")  # no header could carry that line's end
    assert settings_of(serve_arguments(["--model", "m"])).api_key == "of a file"
    monkeypatch.setenv("FP4FLASH_API_KEY", "")
    assert main(["--model", str(tmp_path)]) == 2
    assert "is empty" in capsys.readouterr().err
