"""Tiny targets and drafters, a drafter taught one target's text, and both decoding loops with their drafts recorded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

from convert import export
from core.generate.decode import PlainGenerator
from core.generate.dflash import DFlashProposer
from core.generate.interface import Draft, Prompt
from core.generate.sampling import Sampling
from core.generate.target import Target
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import FULL, SLIDING, DFlashConfig
from core.models.dflash_io import save_drafter, target_identity
from core.models.fingerprint import fingerprint
from core.models.mimo_v2_config import MiMoV2Config
from draft_training.replay import hidden_at
from tests.convert_cases import MIMO

VOCAB, HIDDEN, LAYERS, MASK_TOKEN = 64, 64, 4, 7
DENSE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
TARGETS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**DENSE),
    "qwen3": lambda: Qwen3Config(**DENSE),
    "mimo": lambda: MiMoV2Config(
        **MIMO | {"num_hidden_layers": LAYERS, "layer_types": [FULL, SLIDING, SLIDING, FULL]}, initializer_range=0.3,
    ),
}  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "num_target_layers": LAYERS, "taps": (0, 1, 2),
    "mask_token_id": MASK_TOKEN, "block_size": 5, "window": 9, "learned_mask": False,
}  # fmt: skip


def target_folder(family: str, place: Path) -> Path:
    """A random target with peaked logits, as exported (BF16 values, so FP32 loads are exact)."""
    from core.models.build import build_meta
    from core.models.load import save_model

    torch.manual_seed(5)
    config = TARGETS[family]()
    values = {}
    for name, tensor in build_meta(config).state_dict().items():
        value = torch.randn(tensor.shape) * 0.3
        wide = name.endswith("e_score_correction_bias")
        values[name] = (1 + value if "norm" in name else value).to(torch.float32 if wide else torch.bfloat16)
    save_model(values.items(), config, place / "model")
    assert export.main(["--to", "bf16", "--from", str(place / "model"), "--out", str(place / "target")]) == 0
    return place / "target"


def loaded(folder: Path) -> Any:
    """transformers' own class, FP32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def fresh(model: Any, **changes: Any) -> Drafter:
    torch.manual_seed(3)
    config = DFlashConfig(**SMALL | changes)
    drafter = Drafter(config)
    init_drafter(drafter, model.get_input_embeddings().weight[config.mask_token_id].detach(), std=0.1)
    return drafter.eval()


def saved(drafter: Drafter, model: Any, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Our folder, paired with `model`."""
    pairing = {"target": target_identity(model, fingerprint(model)) if model is not None else {}, "steps": 3}
    save_drafter({n: t.to(dtype) for n, t in drafter.state_dict().items()}, drafter.config, out, pairing)
    return out


def teach(drafter: Drafter, model: Any, texts: list[list[int]], steps: int) -> None:
    """Overfit: every position of every text is an anchor."""
    target, size = Target(model, drafter.config.taps), drafter.config.block_size
    ids = torch.tensor(texts)
    position = torch.arange(ids.shape[1]).expand(len(ids), -1)
    _, features = target.packed(ids, position)
    anchors = torch.arange(2, ids.shape[1] - size).expand(len(ids), -1)
    labels = torch.stack([ids.gather(1, anchors + k) for k in range(1, size)], dim=-1)
    optimiser = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        hidden = hidden_at(drafter, target, ids, position, features, anchors)[:, :, 1:]
        loss = F.cross_entropy(target.head(hidden).flatten(0, 2), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


class Recorded(DFlashProposer):
    """Keeps what it drafted."""

    drafted: list[list[int]]

    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:
        draft = super().propose(anchor_R, position_R, sampling, noise)
        self.drafted.append(draft.tokens[0].tolist())
        return draft


def ours(model: Any, drafter: Drafter, prompt: list[int], tokens: int) -> tuple[list[int], list[list[int]], list[int]]:
    """(text, drafts of each round, accepted of each round) of our loop, one prompt."""
    target = Target(model, drafter.config.taps)
    proposer = Recorded(drafter, target)
    proposer.drafted = []
    made = PlainGenerator(target, proposer).generate([Prompt("p", prompt)], Sampling(max_new_tokens=tokens))
    reply = next(iter(made))
    return reply.ids, proposer.drafted, [r.accepted for r in reply.rounds]


def theirs(model: Any, assistant: Any, prompt: list[int], tokens: int) -> tuple[list[int], list[list[int]], list[int]]:
    """The same of transformers' loop; the last round's accepted count is not handed out there."""
    drafts: list[list[int]] = []
    accepted: list[int] = []
    original = DFlashTokenCandidateGenerator.get_candidates

    def spy(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        found, logits = original(self, input_ids, **kwargs)
        if drafts:
            accepted.append(int(kwargs["n_last_matches"]))
        if logits is not None:
            drafts.append(found[0, input_ids.shape[1] :].tolist())
        return found, logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DFlashTokenCandidateGenerator, "get_candidates", spy)
        text = generated(model, prompt, tokens, assistant_model=assistant, speculation_type="dflash")
    return text, drafts, accepted


def generated(model: Any, prompt: list[int], tokens: int, **more: Any) -> list[int]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0, **more
    )
    return out[0, len(prompt) :].tolist()


def assistant(folder: Path) -> Any:
    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def drafter_export(source: Path, target: Path, to: str, out: Path, *more: str) -> int:
    words = ["--what", "drafter", "--to", to, "--from", str(source), "--target", str(target), "--out", str(out)]
    return export.main([*words, *more])
