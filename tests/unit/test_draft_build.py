"""The drafter of a configuration: its mask token, taps and block, and what is refused in one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.config import load
from core.errors import CheckpointError, ConfigError
from core.models.dflash_config import spread_taps
from core.models.load import LoadedModel
from core.train.tokenizer import SPECIALS, train_tokenizer
from draft_training.build import drafter_config, make_drafter, mask_id
from draft_training.config import DraftConfig
from draft_training.train import COMMAND

VOCAB, LAYERS, PAD = 300, 4, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The demo's tokenizer: EOS 0, marks of a chat 1 and 2, padding 3; the model has 8 more rows than it has tokens."""
    folder = tmp_path_factory.mktemp("target")
    tokenizer = train_tokenizer(["some text to learn bytes from"] * 3, VOCAB - 8, folder / "tokens")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LoadedModel(LlamaForCausalLM(config), config, tokenizer, (), folder)


def draft(**changes: Any) -> DraftConfig:
    return DraftConfig(num_hidden_layers=1, tap_count=2, window=16, **changes)


def test_the_mask_is_a_token_that_text_has_not(loaded: LoadedModel) -> None:
    assert loaded.tokenizer.convert_ids_to_tokens(PAD) == SPECIALS[-1]
    assert drafter_config(draft(), loaded).mask_token_id == PAD
    for chosen in (PAD, VOCAB - 1):  # of the tokenizer, and a row that no token has
        assert drafter_config(draft(mask_token_id=chosen), loaded).mask_token_id == chosen


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("token", "named"), [(40, "'"), (0, "<|endoftext|>"), (1, "<|im_start|>"), (2, "<|im_end|>")])
def test_a_mask_that_is_a_real_token_is_refused(token: int, named: str, learned: bool, loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=rf"^draft\.mask_token_id={token} is '.*such as 3$") as error:
        drafter_config(draft(mask_token_id=token, learned_mask=learned), loaded)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_without_a_reserved_token_the_mask_must_be_learned() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "end": 2}, "a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end")
    assert mask_id(draft(), tokenizer, 3) == 2, "only a name: the embedding is the drafter's own"
    with pytest.raises(ConfigError, match=r"^draft\.mask_token_id=2 is 'end'.*; set draft\.learned_mask=true$"):
        mask_id(draft(learned_mask=False), tokenizer, 3)
    assert mask_id(draft(learned_mask=False), tokenizer, 8) == 7, "a row that no token has"


def test_a_mask_row_of_zeros_is_refused(loaded: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[VOCAB - 1] = 0.0
    with pytest.raises(CheckpointError, match=r"row 299 of the target's embedding.*draft\.learned_mask=true") as error:
        make_drafter(draft(mask_token_id=VOCAB - 1, learned_mask=False), loaded, CPU)
    assert "\n" not in str(error.value)
    mask = make_drafter(draft(mask_token_id=VOCAB - 1), loaded, CPU).mask_embedding
    assert mask.requires_grad and bool(mask.any()), "a learned one starts from chance"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"block_size": 1}, r"^drafter block_size=1: expected at least 2: the anchor and one draft$"),
        ({"block_size": 32}, r"^drafter window=16: expected at least block_size=32$"),
        ({"taps": [0, LAYERS]}, r"^drafter taps=\(0, 4\): expected ascending layer numbers of the target, 0 to 3$"),
        ({"taps": [2, 1]}, r"^drafter taps=\(2, 1\): expected ascending"),
        ({"taps": [-1, 2]}, r"^drafter taps=\(-1, 2\): expected ascending"),
        ({"mask_token_id": VOCAB}, rf"^drafter mask_token_id={VOCAB}: expected an id below vocab_size={VOCAB}$"),
        ({"full_layers": [1]}, r"^draft\.full_layers has 1; the drafter has 1 layers$"),
    ],
    ids=str,
)
def test_what_cannot_be_a_drafter_is_refused(changes: dict[str, Any], line: str, loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=line):
        drafter_config(draft(**changes), loaded)


def test_taps_of_the_measured_drafter_can_be_exported() -> None:
    """None at the last of SmolLM2's 30 layers: `--to hf` and `--to z-lab` refuse that one (refuse_last_tap)."""
    config, _ = load(COMMAND, ["+experiment=smollm2_dflash"])
    assert config.draft.taps == list(spread_taps(30, 5)) and config.draft.taps[-1] < 29


def test_drafters_compute_in_bfloat16(loaded: LoadedModel, tmp_path: Path) -> None:
    """Whatever the target's dtype: float16, in which drafters overflow, has no way in."""
    half = SimpleNamespace(model=loaded.model, config=loaded.config, tokenizer=loaded.tokenizer)
    try:
        loaded.model.half()
        drafter = make_drafter(draft(), half, CPU)
    finally:
        loaded.model.float()
    assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}
