"""The server with a model behind it: the openai client's text is the model's, and clients that leave cost no pages."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import ConfigError
from core.models.load import load_model, save_model
from core.mxfp4 import ScaleRule
from infer.serve import arguments, serve
from infer.server.app import Server, Settings
from tests import runtime_cases as cases
from tests.convert_cases import CONFIGS, values_of
from tests.drafter_cases import saved
from tests.fake_engine import VOCAB, make_tokenizer
from tests.serving import Served, eventually, serving

IGNORE = {"ignore_eos": True}


class Made:
    def __init__(self, place: Path) -> None:
        config = CONFIGS["mimo"]()
        config.vocab_size, config.eos_token_id = VOCAB, None
        self.folder = place / "model"
        save_model(values_of(config, ScaleRule.even).items(), config, self.folder)
        self.tokenizer = make_tokenizer(place / "t")
        self.model = load_model(self.folder, dtype=torch.float32, attention="eager").model
        self.drafter = saved(cases.taught(self.model, cases.prompts(), vocab_size=VOCAB), self.model, place / "drafter")

    def reply(self, prompt: str, tokens: int) -> str:
        ids = self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.decode(cases.greedy(self.model, [cases.Prompt("p", ids)], tokens)["p"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> Iterator[Made]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Made(tmp_path_factory.mktemp("server"))
    torch.set_num_threads(before)


@pytest.fixture
def served(made: Made) -> Iterator[Served]:
    engine = cases.engine(made.folder, made.drafter, rows=4, kv_tokens=256, page_size=8, step_tokens=48)
    with serving(engine, made.tokenizer) as found:
        yield found


def test_text_whole_streamed_and_at_once_is_the_models(served: Served, made: Made) -> None:
    prompts = ["import os", "def main():", "日本語 text", "x"]
    wanted = [made.reply(p, 20) for p in prompts]

    def ask(prompt: str, stream: bool) -> str:
        given = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "temperature": 0, "extra_body": IGNORE}
        if not stream:
            return served.client.completions.create(**given).choices[0].text
        return "".join(c.choices[0].text for c in served.client.completions.create(**given, stream=True))

    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: ask(prompts[i % 4], bool(i & 4))})) for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i].strip() for i in range(16)] == [wanted[i % 4].strip() for i in range(16)]
    text = served.ask("/metrics")[1]
    assert "spec" in text and served.engine.stats().accepted_at


def test_a_seed_repeats_and_a_chat_has_usage(served: Served) -> None:
    def once(**more: Any) -> Any:
        return served.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=12, temperature=1.0,
            extra_body=IGNORE, **more,
        )  # fmt: skip

    assert once(seed=3).choices[0].message.content == once(seed=3).choices[0].message.content
    usage = once(seed=4).usage
    assert usage.completion_tokens == 12 and usage.prompt_tokens > 3


def test_a_lost_device_is_reported(served: Served) -> None:
    """Between failing steps the engine reports what was cancelled: such a step is no sign of life."""

    def lost(work: Any) -> Any:
        raise RuntimeError("device lost")

    served.engine.runner.run = lost
    for _ in range(3):
        assert served.ask("/health")[0] == 200
        assert served.ask("/v1/completions", {"prompt": "import os"})[0] == 500
    eventually(lambda: served.ask("/health")[0] == 503)
    assert served.ask("/v1/completions", {"prompt": "import os"})[0] == 503


def test_what_does_not_fit_is_a_400_and_clients_that_leave_cost_nothing(served: Served) -> None:
    status, body, _ = served.ask("/v1/completions", {"model": "tiny", "prompt": "x " * 3000, "max_tokens": 1})
    assert status == 400 and "context" in body["error"]["message"]
    endless = {"model": "tiny", "prompt": "import os", "max_tokens": 150, "temperature": 0, "stream": True} | IGNORE
    for _ in range(12):
        connection = served.open_request("/v1/completions", endless)
        connection.getresponse().read(40)
        connection.close()
    eventually(lambda: served.engine.stats().running == served.engine.stats().waiting == 0, 30)
    assert served.engine.stats().kv_used == 0
    assert served.ask("/health")[0] == 200


def test_an_address_that_cannot_be_had(made: Made) -> None:
    options = arguments(["--model", "m", "--host", "127.0.0.1"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options.port = taken.getsockname()[1]
        server = Server(cases.engine(made.folder), made.tokenizer, Settings(("m",)))
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {options.port}: cannot listen there"):
            asyncio.run(serve(server, options))
