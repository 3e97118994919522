"""GGUF exports in llama.cpp itself: the logits and greedy tokens of transformers, and the tokens of each tokenizer.

Needs llama-cpp-python (written with 0.3.36). Models are tiny and run on the CPU; llama.cpp's cache is kept in F32.
"""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from convert import export
from convert.formats import format_named
from convert.plan import make_plan
from convert.source import open_source
from core.models.load import load_model
from core.models.mimo_v2_config import MiMoV2Config
from tests.unit.test_convert_gguf import MODELS, saved
from tests.unit.test_convert_gguf_read import fast_tokenizer, split_by
from tests.unit.test_families import MIMO, SIZE

MISSING = importlib.util.find_spec("llama_cpp") is None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING, reason="llama-cpp-python is not installed")]
DEEP = {"num_hidden_layers": 4, "num_key_value_heads": 2}
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "head_dim": 16}
QWEN = SIZE | ROUTED | {"moe_intermediate_size": 64, "num_experts": 4, "norm_topk_prob": True}
GPT_OSS = SIZE | DEEP | ROUTED | {"num_local_experts": 4, "sliding_window": 5}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0, "truncate": True,
}  # fmt: skip
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CONFIGS: dict[str, PreTrainedConfig] = {
    "mimo2": MODELS["mimo2"],
    "mimo2 pro": MODELS["mimo2 pro"],
    "mimo2 deep": MiMoV2Config(**MIMO | DEEP | {"layer_types": WINDOWS}),
    "qwen3moe": Qwen3MoeConfig(**QWEN),
    "qwen3moe tied": Qwen3MoeConfig(**QWEN | DEEP, tie_word_embeddings=True, rope_parameters=YARN),
    "gpt-oss": GptOssConfig(**GPT_OSS, rope_parameters=YARN),
}
PROMPT = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(3)).tolist()  # longer than any window
TOKENS = 24  # generated
ERROR = 0.12  # of logits that are about 1; 0.09 was seen


@contextmanager
def engine(file: Path, **more: Any) -> Iterator[Any]:
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    opened = llama_cpp.Llama(
        str(file), n_ctx=128, n_threads=2, logits_all=True, type_k=f32, type_v=f32, verbose=False, **more
    )
    with closing(opened):
        yield opened


def generated(file: Path, count: int) -> tuple[list[int], Tensor]:
    """The prompt with `count` greedy tokens behind it, and llama.cpp's logits at every position but the last."""
    with engine(file) as llama:
        tokens = [*PROMPT, *(t for _, t in zip(range(count), llama.generate(PROMPT, temp=0.0), strict=False))]
        if not count:
            llama.eval(PROMPT)
        return tokens, torch.from_numpy(llama.scores[: llama.n_tokens].copy())


@torch.no_grad()
def wanted(model: Path, tokens: list[int]) -> Tensor:
    return load_model(model, dtype=torch.float32).model(input_ids=torch.tensor([tokens])).logits[0]


def plain(config: PreTrainedConfig, root: Path) -> tuple[Path, Path]:
    """A checkpoint all in F32, and its export without any quantisation."""
    model = saved(config, root / "model", quantised=False, dtype=torch.float32)
    source = open_source(model, [])
    format = format_named("gguf", source)
    export.write(source, format, make_plan(format, source, 2**30), root / "out")
    return model, root / "out" / "model.gguf"


@pytest.mark.parametrize("name", list(CONFIGS))
def test_architecture(name: str, tmp_path: Path) -> None:
    """Without quantisation only the order of F32 sums differs: 8e-6 was seen, of logits that are about 1."""
    model, file = plain(CONFIGS[name], tmp_path)
    tokens, logits = generated(file, 0)
    assert (logits - wanted(model, tokens)).abs().max() < 2e-5


def test_llama_cpp_rounds_the_ends_of_yarns_ramp(tmp_path: Path) -> None:
    """What docs/formats.md says of truncate=False; once this fails, llama.cpp does as the hub's GPT-OSS asks."""
    config = GptOssConfig(**GPT_OSS, rope_parameters=YARN | {"truncate": False})
    model, file = plain(config, tmp_path)
    tokens, logits = generated(file, 0)
    assert (logits - wanted(model, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_tokens(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The command's own export; `dtype`: of all but the experts.

    llama.cpp rounds what goes into an MXFP4 matrix to Q8_0 (by at most 1/254 of a block's largest), and what goes into
    a BF16 matrix to BF16. Every expert takes part, so that no rounding changes the choice; test_architecture chooses.
    """
    config = copy.deepcopy(CONFIGS[name])
    config.num_experts_per_tok = 4
    model = saved(config, tmp_path / "model", dtype=dtype)
    assert export.main(["--to", "gguf", "--from", str(model), "--out", str(tmp_path / "out")]) == 0
    tokens, logits = generated(tmp_path / "out" / "model.gguf", TOKENS)
    reference = wanted(model, tokens[:-1])
    error = (logits - reference).abs()
    here = slice(len(PROMPT) - 1, None)
    best = reference[here].topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 2 * ERROR
    assert error.max() < ERROR
    assert clear.sum() >= TOKENS // 3
    assert torch.equal(torch.tensor(tokens)[len(PROMPT) :][clear], best.indices[clear, 0])


TEXT = (
    "the cat sat on the mats in 1234567 days; the hat's END\r\n\n  I'LL  say: größer, 日本語, naïve 🎉!?\n\tif x//y:\n"
    "    return '12' + \"ab\"   \n"
)


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "gpt-4o", "gpt-2", "smollm"])
def test_tokenizers(name: str, tmp_path: Path) -> None:
    """A text of words, digits, white space, other scripts and special tokens."""
    fast = fast_tokenizer(290, split_by(name))
    config = Qwen3MoeConfig(**QWEN | {"vocab_size": 300})
    saved(config, tmp_path / "model", tokenizer=fast)
    assert export.main(["--to", "gguf", "--from", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 0
    with engine(tmp_path / "out" / "model.gguf", vocab_only=True) as llama:
        for text in (TEXT, f"<|start|>{TEXT}<tool> the mat<|end|>", *TEXT.split()):
            assert llama.tokenize(text.encode(), special=True) == fast(text).input_ids, text
