"""A byte-level BPE tokenizer as GGUF's `tokenizer.*` fields, and back.

tokenizer.json describes how text is split before merging by a regular expression; GGUF names one of the splitters that
llama.cpp has built in. `SPLITTERS` and `PLAIN` pair the two. A tokenizer that splits otherwise is refused: llama.cpp
would cut its text into other tokens, silently.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.checkpoint.index import read_json
from core.errors import CheckpointError, UnsupportedError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPLITTERS = {
    "qwen2": rf"{ENDINGS}|{WORD}|\p{{N}}|{SYMBOLS}|{TAIL}",
    "llama-bpe": rf"{ENDINGS}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}|{TAIL}",
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDINGS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{TAIL}",
}
PLAIN = {"gpt-2": False, "smollm": True}  # the byte-level splitter alone; True: digits are cut apart first
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def tokenizer_fields(folder: Path, config: Any) -> dict[str, Any]:
    """Fields for the tokenizer in `folder`; without one, llama.cpp takes token numbers only.

    Raises:
        UnsupportedError: not byte-level BPE, or split by a rule that llama.cpp has no name for.
    """
    ids = {
        key: getattr(config, f"{end}_token_id", None)
        for key, end in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"))
    }
    ids = {key: value[0] if isinstance(value, list) else value for key, value in ids.items()}
    if not (folder / "tokenizer.json").is_file():
        if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
            raise UnsupportedError(
                f"--to gguf: {folder} has a tokenizer without tokenizer.json; save it as a fast tokenizer"
            )
        return {"tokenizer.ggml.model": "none"} | numbered(ids)
    raw = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    model, added = raw.get("model") or {}, raw.get("added_tokens") or []
    pre = splitter(raw, folder)
    names = {index: token for token, index in model["vocab"].items()} | {t["id"]: t["content"] for t in added}
    if max(names) >= config.vocab_size:
        raise CheckpointError(
            f"{folder}: token {max(names)} is beyond vocab_size={config.vocab_size}; not this model's tokenizer"
        )
    kinds = dict.fromkeys(names, NORMAL) | {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in added}
    back = {token: index for index, token in names.items()}
    for key, setting in SPECIAL.items():
        token = settings.get(setting)
        token = token.get("content") if isinstance(token, dict) else token
        ids[key] = back.get(token, ids.get(key))
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(config.vocab_size)],
        "tokenizer.ggml.token_type": [kinds.get(i, UNUSED) for i in range(config.vocab_size)],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.add_bos_token": adds_bos(raw, ids.get("bos"), names),
    }
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return fields | numbered(ids) | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def numbered(ids: dict[str, Any]) -> dict[str, int]:
    return {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items() if isinstance(value, int)}


def splitter(raw: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of a tokenizer.json's pre-tokenizer."""
    if (raw.get("model") or {}).get("type") != "BPE" or (raw.get("decoder") or {}).get("type") != "ByteLevel":
        kind = (raw.get("model") or {}).get("type")
        raise UnsupportedError(f"--to gguf: {folder} has a {kind} tokenizer; byte-level BPE is what is written")
    pre = raw.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds, last = [s.get("type") for s in steps], steps[-1]
    byte_level = kinds[-1] == "ByteLevel" and not last.get("add_prefix_space")
    if byte_level and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        found = next((name for name, known in SPLITTERS.items() if known == pattern), None)
        if found and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return found
    if byte_level and last.get("use_regex", True):
        digits = kinds == ["Digits", "ByteLevel"] and bool(steps[0].get("individual_digits"))
        found = next((name for name, cut in PLAIN.items() if cut is digits), None)
        if found and (digits or kinds == ["ByteLevel"]):
            return found
    raise UnsupportedError(
        f"--to gguf: {folder}/tokenizer.json splits text by {steps[:-1]}, which is none of llama.cpp's "
        f"{', '.join((*SPLITTERS, *PLAIN))}; it would make other tokens"
    )


def adds_bos(raw: dict[str, Any], bos: int | None, names: dict[int, str]) -> bool:
    """Whether the tokenizer puts `bos` before every text."""
    post = raw.get("post_processor") or {}
    steps = post.get("processors", [post])
    singles = [s["single"][0] for s in steps if s.get("type") == "TemplateProcessing" and s.get("single")]
    return any(bos is not None and s.get("SpecialToken", {}).get("id") == names.get(bos) for s in singles)


def read_tokenizer(fields: dict[str, Any], path: Path, length: int) -> PreTrainedTokenizerFast | None:
    """The file's tokenizer; None when it has none that is byte-level BPE split by a known rule."""
    pre = fields.get("tokenizer.ggml.pre")
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre not in (*SPLITTERS, *PLAIN):
        return None
    tokens, kinds = fields.get("tokenizer.ggml.tokens") or [], fields.get("tokenizer.ggml.token_type") or []
    merges = [tuple(m.split(" ")) for m in fields.get("tokenizer.ggml.merges") or []]
    if not tokens or len(tokens) != len(kinds) or any(len(m) != 2 for m in merges):
        raise CheckpointError(
            f"{path}: {len(tokens)} tokens, {len(kinds)} types and odd merges; the tokenizer is damaged"
        )
    extra = {t: kind == CONTROL for t, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)}
    vocabulary = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:
        raise CheckpointError(
            f"{path}: the tokenizer's merges do not fit its tokens ({error}); it is damaged"
        ) from error
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in PLAIN)]
    if pre in SPLITTERS:
        steps.insert(0, pre_tokenizers.Split(Regex(SPLITTERS[pre]), "isolated"))
    elif PLAIN[pre]:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, s in extra.items() if s])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, s in extra.items() if not s])
    ids = {setting: fields.get(f"tokenizer.ggml.{key}_token_id") for key, setting in SPECIAL.items()}
    special = {s: tokens[i] for s, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        **special,
    )
