"""Grading of replies, the sandbox, and greedy generation with left padding."""

import gzip
import json
import os
import time
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.errors import ConfigError, DataError
from qat.config import EvalConfig
from qat.grade import last_number, parse_calls, program, right_calls, right_number, right_program
from qat.sandbox import Limits, run_program
from qat.tasks import generate, score_tasks, task_records, wilson

HUMANEVAL = {
    "raw_prompt": 'import math\n\ndef root(x):\n    """Whole square root.\n    >>> root(9)\n    3\n    """\n',
    "reference": "    return math.isqrt(x)\n",
    "tests": "def check(candidate):\n    assert candidate(16) == 4\n",
    "entry_point": "root",
}
MBPP = {"reference": "def double(x):\n  return 2 * x", "tests": ["assert double(K) == 6"], "test_setup": "K = 3"}
TOOLS = {
    "gold_calls": [
        {"weather.at": {"city": ["Paris", "Paris, FR"], "days": [2], "unit": ["C", ""]}},
        {"send": {"to": [["a@b.c"]], "body": [{"text": ["hi"], "loud": [True, ""]}]}},
    ]
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 3 and #### 1,234.50", "1234.50"), ("#### -$7", "-7"), ("It is 5-3", "3"), ("costs $20.", "20"),
        ("first 8 ####", "8"), ("no digits", None), ("10% of 50 is 5.", "5"),
    ],
)  # fmt: skip
def test_last_number(text: str, value: str | None) -> None:
    assert last_number(text) == (None if value is None else Decimal(value))


def test_final_answer_compares_values() -> None:
    assert right_number({"final_answer": "1000"}, "#### 1,000.0")
    assert not right_number({"final_answer": "1000"}, "#### 1001")
    assert not right_number({"final_answer": "1000"}, "I do not know")


@pytest.mark.parametrize("record", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
def test_programs(record: dict) -> None:
    assert right_program(record, record["reference"])
    whole = record.get("raw_prompt", "") + record["reference"]
    assert right_program(record, f"Sure:\n```python\n{whole}\n```\nDone.")
    assert not right_program(record, "```python\ndef root(x): return 1\ndef double(x): return 1\n```")
    assert not right_program(record, "I cannot help with that.")


ESCAPES = {
    "endless loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    "other program": "import os; os.execv('/bin/sh', ['sh'])",
    "network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "memory": "x = bytearray(8 << 30)",
    "huge output": "while True: print('x' * 100_000)",
    "result channel": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'y' * 100_000)\n  except OSError: pass",
    "early exit": "import os; os._exit(0)",
    "quiet exit": "raise SystemExit(0)",
    "kill the parent": "import os; os.kill(os.getppid(), 9)",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (999, 999))",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_sandbox_stops(source: str) -> None:
    began = time.monotonic()
    assert not run_program(source, Limits(seconds=1.0)).passed
    assert time.monotonic() - began < 10


def test_sandbox_leaves_files_alone(tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.write_text("precious")
    tries = [
        f"open({str(new)!r}, 'w')", f"open({str(kept)!r}, 'a')", f"import os; os.unlink({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, {str(new)!r})", f"import os; os.mkdir({str(new)!r})",
        f"import os; os.chmod({str(kept)!r}, 0)", f"import os; os.truncate({str(kept)!r}, 0)",
    ]  # fmt: skip
    for source in tries:
        assert run_program(source).reason == "PermissionError", source
    assert kept.read_text() == "precious" and not new.exists()


def test_sandbox_runs_what_tests_need() -> None:
    assert run_program("import re, math, heapq, collections, random, datetime, itertools, decimal, asyncio").passed
    assert run_program("").passed
    assert run_program("assert 1 == 2").reason == "AssertionError"
    assert run_program("def broken(").reason == "SyntaxError"


def call(name: str, /, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_function_calls() -> None:
    weather, send = call("weather.at", city="paris FR", days=2.0), call("send", to=["a@b.c"], body={"text": "Hi"})
    assert right_calls(TOOLS, f"Let me see. {weather}\n{send}")
    assert right_calls(TOOLS, send + weather)  # any order
    assert not right_calls(TOOLS, weather)  # one is missing
    assert not right_calls(TOOLS, weather + send + send)  # one too many
    assert not right_calls(TOOLS, call("weather.at", city="Rome", days=2) + send)
    assert not right_calls(TOOLS, call("weather.at", city="Paris") + send)  # days may not be left out
    assert not right_calls(TOOLS, call("weather.at", city="Paris", days=2, extra=1) + send)
    assert not right_calls(TOOLS, call("weather.at", city="Paris", days=True) + send)
    assert right_calls({"gold_calls": []}, "None of these functions fits.")
    assert not right_calls({"gold_calls": []}, weather)
    assert not right_calls({"gold_calls": []}, "<tool_call>{broken")


def test_bare_json_calls() -> None:
    one = {"name": "f", "parameters": {"x": 1}}
    assert parse_calls(json.dumps(one)) == [("f", {"x": 1})]
    assert parse_calls(f"```json\n{json.dumps([one, one])}\n```") == [("f", {"x": 1})] * 2
    assert parse_calls(json.dumps({"function": {"name": "f", "arguments": '{"x": 1}'}})) == [("f", {"x": 1})]
    assert parse_calls('{"answer": 3}') == []


def test_wilson() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *["what", "is", "one", "two", "and", "?"], "user", "assistant", "<t>", *"123"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    found.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant"
    return found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=1
    )
    return LlamaForCausalLM(config).eval()


def test_generation_does_not_depend_on_the_batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]
    together = generate(model, tokenizer, prompts, 6, "test")
    assert together == [generate(model, tokenizer, [p], 6, "test")[0] for p in prompts]
    assert any(together)


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


def test_score_tasks(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "what is one and two ?"}]
    records = [{"id": str(i), "messages": ask, "final_answer": "99"} for i in range(5)]
    write(tmp_path / "eval/math.jsonl.gz", [*records, {"id": "none", "messages": ask}])
    found = score_tasks(model, tokenizer, EvalConfig(tasks=["gsm8k"], task_limit=3, max_new_tokens=2), tmp_path)
    assert [(r.task, r.count, r.accuracy, r.low, r.solved) for r in found] == [("gsm8k", 3, 0.0, 0.0, ())]
    assert [r["id"] for r in task_records("gsm8k", tmp_path, 0)] == ["0", "1", "2", "3", "4"]


def test_bad_tasks(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.tasks has 'chess'"):
        score_tasks(model, tokenizer, EvalConfig(tasks=["chess"]), tmp_path)
    write(tmp_path / "eval/agent.jsonl.gz", [{"id": "x", "text": "y"}])
    with pytest.raises(DataError, match="no record with `gold_calls`"):
        task_records("tools", tmp_path, 5)
    with pytest.raises(DataError):
        task_records("code", tmp_path, 5)


@pytest.mark.skipif("FP4FLASH_DATA" not in os.environ, reason="FP4FLASH_DATA is not set; no data bundle to check")
def test_reference_solutions_pass() -> None:
    root = Path(os.environ["FP4FLASH_DATA"])
    for record in task_records("code", root, 30):
        result = run_program(program(record, record["reference"]), Limits(seconds=20.0))
        assert result.passed, (record["id"], result.reason)
    for record in task_records("gsm8k", root, 60):
        if record["source"].startswith("gsm8k"):
            assert right_number(record, record["reference"]), record["id"]
    for record in task_records("tools", root, 60):
        calls = [
            call(name, **first_permitted(arguments))
            for gold in record["gold_calls"]
            for name, arguments in gold.items()
        ]
        assert right_calls(record, "\n".join(calls)), record["id"]


def first_permitted(arguments: dict) -> dict:
    found = {}
    for name, values in arguments.items():
        value = next((v for v in values if v != ""), "")
        found[name] = first_permitted(value) if isinstance(value, dict) else value
    return found
