"""Whether one reply is right: a final number, a program that passes its tests, or the expected function calls."""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from core.train.data.documents import Record
from qat.sandbox import Limits, run_program

NUMBER = re.compile(r"(?P<sign>(?<![\w)])-\s?)?\$?(?P<digits>\d[\d,]*(?:\.\d+)?)")
FENCED = re.compile(r"```(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
MAY_BE_LEFT_OUT = ""  # among a gold argument's permitted values


def last_number(text: str) -> Decimal | None:
    """The last number after the last `####`, or in the whole text where nothing follows it; reads 1,234.50 and -$3."""
    tail = text.rsplit("####", 1)[-1]
    found = list(NUMBER.finditer(tail)) or list(NUMBER.finditer(text))
    if not found:
        return None
    try:
        value = Decimal(found[-1]["digits"].replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
    return -value if found[-1]["sign"] else value


def right_number(record: Record, reply: str) -> bool:
    """GSM8K, SVAMP: the reply's last number equals `final_answer`."""
    return last_number(reply) == last_number(record["final_answer"])


def program(record: Record, reply: str) -> str:
    """The program whose clean end means that the tests pass (the data bundle's own recipe for HumanEval and MBPP)."""
    blocks = FENCED.findall(reply)
    code = "\n\n".join(blocks) if blocks else reply
    if "entry_point" in record:
        # The prompt brings imports and helpers; a reply that defines the function anew replaces its empty one.
        return f"{record['raw_prompt']}{code}\n\n{record['tests']}\n\ncheck({record['entry_point']})\n"
    return "\n".join([code, record.get("test_setup") or "", *record["tests"]]) + "\n"


def right_program(record: Record, reply: str, limits: Limits | None = None) -> bool:
    """HumanEval, MBPP: the tests pass in the sandbox."""
    return run_program(program(record, reply), limits).passed


def parse_calls(reply: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Function calls of a reply: `<tool_call>` blocks (ChatML, Hermes), or a reply that is JSON as a whole.

    Returns:
        (name, arguments) in order, [] where nothing looks like a call, None where something does but cannot be read.
    """
    pieces = TOOL_CALL.findall(reply)
    bare = not pieces
    if bare:
        fenced = re.findall(r"```(?:json)?\s*\n(.*?)```", reply, re.DOTALL)
        pieces = [fenced[0] if fenced else reply]
    calls: list[tuple[str, dict[str, Any]]] = []
    for piece in pieces:
        try:
            value = json.loads(piece)
        except ValueError:
            return [] if bare else None
        for one in value if isinstance(value, list) else [value]:
            call = read_call(one)
            if call is None:
                return [] if bare else None
            calls.append(call)
    return calls


def read_call(value: Any) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(value, dict):
        return None
    value = value.get("function", value) if isinstance(value.get("function"), dict) else value
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def right_calls(record: Record, reply: str) -> bool:
    """Function calling: the calls match `gold_calls` one to one, in any order; gold [] means none should be made."""
    calls = parse_calls(reply)
    return calls is not None and len(calls) == len(record["gold_calls"]) and match_calls(record["gold_calls"], calls)


def match_calls(gold: list[dict[str, Any]], calls: list[tuple[str, dict[str, Any]]]) -> bool:
    if not gold:
        return True
    name, permitted = next(iter(gold[0].items()))
    return any(
        call[0] == name and permits_all(permitted, call[1]) and match_calls(gold[1:], calls[:i] + calls[i + 1 :])
        for i, call in enumerate(calls)
    )


def permits_all(permitted: dict[str, list[Any]], given: dict[str, Any]) -> bool:
    """Every given argument is permitted, and every one left out may be."""
    return all(k in permitted and permits(permitted[k], v) for k, v in given.items()) and all(
        k in given or MAY_BE_LEFT_OUT in values for k, values in permitted.items()
    )


def permits(values: list[Any], given: Any) -> bool:
    return any(same(value, given) for value in values)


def same(gold: Any, given: Any) -> bool:
    """BFCL's comparison: strings without case, blanks and punctuation; 2 and 2.0 are one; a dict's values are lists of
    permitted ones again."""
    if isinstance(gold, bool) or isinstance(given, bool):
        return gold is given
    if isinstance(gold, str) and isinstance(given, str):
        return plain(gold) == plain(given)
    if isinstance(gold, list) and isinstance(given, list):
        return len(gold) == len(given) and all(map(same, gold, given))
    if isinstance(gold, dict) and isinstance(given, dict):
        return permits_all({k: v if isinstance(v, list) else [v] for k, v in gold.items()}, given)
    return gold == given


def plain(text: str) -> str:
    return re.sub(r"[ ,./\-_*^()]", "", text).lower().replace("'", '"')
