"""From a dense model to a healed MoE model, with the two commands that the README names."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from convert.upcycle import main
from core.models.load import save_model
from core.train.config import DataConfig
from core.train.data import document_texts
from core.train.tokenizer import train_tokenizer
from tests.integration.conftest import Cli
from tests.integration.test_bad_input import one_line

SHORT = ("data.max_bytes=200000", "data.seq_len=128", "data.eval_rows=2", "train.steps=40", "train.batch_size=8",
         "train.log_every=1", "optim.lr=1e-3")  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense folder, upcycled folder); random weights, large enough for the FFNs to matter."""
    root = tmp_path_factory.mktemp("upcycle")
    tokenizer = train_tokenizer(document_texts(DataConfig(max_bytes=100_000)), 400, root / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, initializer_range=0.12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).to(torch.bfloat16)
    save_model(dense.state_dict().items(), config, root / "dense", tokenizer=tokenizer)
    words = ["--always-on", "2", "--routed", "6", "--top-k", "2", "--tokens", "1024", "--out", str(root / "moe")]
    assert main(["--from", str(root / "dense"), *words]) == 0
    return root / "dense", root / "moe"


def test_healing_brings_the_model_closer_to_its_parent(cli: Cli, models: tuple[Path, Path]) -> None:
    dense, moe = models
    paths = (f"model.path={moe}", f"loss.teacher_path={dense}")
    done = cli("+experiment=heal", *paths, *SHORT, "run.name=heal")
    assert done.returncode == 0, done.stderr
    report = json.loads((cli.root / "heal" / "report.json").read_text())
    assert set(report["arms"]) == {"teacher", "start", "trained"}
    kl = {name: sum(d["kl"] for d in arm.values()) for name, arm in report["arms"].items()}
    assert kl["teacher"] == 0 and kl["trained"] < 0.9 * kl["start"]
    assert report["kl_removed"]["trained"]["value"] > 0.1
    assert "of start's KL to the teacher model" in done.stdout and "PTQ" not in done.stdout
    healed = AutoModelForCausalLM.from_pretrained(cli.root / "heal" / "model")
    before = AutoModelForCausalLM.from_pretrained(moe)
    moved = [not torch.equal(a, b) for a, b in zip(healed.parameters(), before.parameters(), strict=True)]
    assert all(moved), "everything is trained, the router too"


def test_healing_without_the_parent_is_refused_in_one_line(cli: Cli, models: tuple[Path, Path]) -> None:
    one_line(cli("+experiment=heal", f"model.path={models[1]}", *SHORT), "loss.teacher_path=DIR")
