"""Drafters on a GPU: block-sparse attention against the written-out mask; the fused loss; recorded steps."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import UnsupportedError
from core.generate.interface import Prompt
from core.generate.target import Target
from core.models.dflash import Drafter, init_drafter
from core.models.dflash_config import FULL, SLIDING, DFlashConfig
from core.models.dflash_mask import additive, dense, sparse
from core.models.eagle import EagleDrafter, init_eagle
from core.models.eagle_config import EagleConfig
from core.models.ops import EAGER, FLEX
from core.train.batch import IGNORE, Batch
from core.train.config import OptimConfig, OptimName
from core.train.graph import GraphedWork
from core.train.local import LocalEngine
from draft_training.anchors import DraftBatch, draw_anchors
from draft_training.config import LossConfig
from draft_training.drafters import dflash, eagle
from draft_training.eagle import trained_chains
from draft_training.losses import best_of, chunk_loss, compiled, make_loss
from draft_training.round_graph import fixed_round, graphed, record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch sees none"),
]


def outputs(
    drafter: Drafter, x: Tensor, place: Tensor, features: Tensor, position: Tensor, masks: dict[str, object]
) -> list[Tensor]:
    """Hidden states and the gradient of every parameter."""
    drafter.zero_grad()
    hidden = drafter(x, place, drafter.context(features, position), masks)
    weight = torch.linspace(-1, 1, hidden.numel(), device=hidden.device, dtype=hidden.dtype).view_as(hidden)
    (hidden * weight).sum().backward()
    return [hidden.detach(), *(p.grad for p in drafter.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("tokens", "anchors", "block", "sinks"), [(300, 31, 7, False), (1024, 256, 8, True)]
)  # flex_attention compiles for each of them, which is what these tests take their time for
def test_block_sparse_attention_is_the_written_out_one(tokens: int, anchors: int, block: int, sinks: bool) -> None:
    """Error against FP32 at most 1.1 times that of the written-out mask in BF16, outputs and gradients."""
    torch.manual_seed(0)
    config = DFlashConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=64, vocab_size=64, num_target_layers=8, taps=(1, 4), mask_token_id=1, block_size=block, window=100,
        layer_types=(SLIDING, FULL), sinks=sinks, value_scale=0.6, partial_rotary_factor=0.5,
    )  # fmt: skip
    exact = Drafter(config).cuda()
    init_drafter(exact, torch.randn(128))
    position = torch.cat([torch.arange(tokens // 3), torch.arange(tokens - tokens // 3)]).expand(2, -1).cuda()
    documents = (position == 0).cumsum(-1) - 1
    drawn = [torch.randperm(tokens - 1)[:anchors].sort().values + 1 for _ in range(2)]
    anchor = torch.stack(drawn).cuda()
    anchor[0, 0] = -1
    features = torch.randn(2, tokens, 256, device="cuda")
    x = torch.randn(2, anchors * block, 128, device="cuda")
    place = (position.gather(1, anchor.clamp(min=0))[..., None] + torch.arange(block, device="cuda")).flatten(1)

    def run(drafter: Drafter, dtype: torch.dtype, flex: bool) -> list[Tensor]:
        drafter.ops = FLEX if flex else EAGER
        made = {
            k: sparse(config, k, documents, anchor) if flex else additive(dense(config, k, documents, anchor), dtype)
            for k in (SLIDING, FULL)
        }
        return [t.float() for t in outputs(drafter, x.to(dtype), place, features.to(dtype), position, made)]

    truth = run(exact, torch.float32, flex=False)
    half = Drafter(config).to("cuda", torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    plain, fast = run(half, torch.bfloat16, flex=False), run(half, torch.bfloat16, flex=True)
    for e, p, f in zip(truth, plain, fast, strict=True):
        limit = (p - e).square().mean().sqrt() * (1.1 + 3 / e.numel() ** 0.5) + 1e-6 * e.abs().max()
        assert (f - e).square().mean().sqrt() <= limit


@pytest.mark.parametrize(("tokens", "anchors", "window"), [(300, 31, 0), (1024, 256, 100)])
def test_block_sparse_chains_are_the_written_out_ones(tokens: int, anchors: int, window: int) -> None:
    """Seven chained steps and their gradients, held to the bound of the test above."""
    torch.manual_seed(0)
    config = EagleConfig(
        hidden_size=128, intermediate_size=256, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
        vocab_size=64, num_target_layers=8, taps=(1, 4), drafts=7, window=window,
    )  # fmt: skip
    exact = EagleDrafter(config).cuda()
    init_eagle(exact)
    embedding = nn.Embedding(64, 128).cuda().requires_grad_(False)
    ids = torch.randint(0, 64, (2, tokens), device="cuda")
    position = torch.cat([torch.arange(tokens // 3), torch.arange(tokens - tokens // 3)]).expand(2, -1).cuda()
    able = (position[0] > 0).nonzero()[:, 0]
    anchor = torch.stack([able[torch.randperm(len(able), device="cuda")[:anchors]].sort().values for _ in range(2)])
    features = torch.randn(2, tokens, 256, device="cuda")

    def run(drafter: EagleDrafter, dtype: torch.dtype, flex: bool) -> list[Tensor]:
        drafter.ops = FLEX if flex else EAGER
        drafter.zero_grad()
        target: Any = SimpleNamespace(embedding=lambda at: embedding(at).to(dtype))
        hidden = trained_chains(drafter, target, ids, position, features.to(dtype), anchor)
        weight = torch.linspace(-1, 1, hidden.numel(), device="cuda", dtype=dtype).view_as(hidden)
        (hidden * weight).sum().backward()
        return [hidden.detach().float(), *(p.grad.float() for p in drafter.parameters() if p.grad is not None)]

    truth = run(exact, torch.float32, flex=False)
    half = EagleDrafter(config).to("cuda", torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    plain, fast = run(half, torch.bfloat16, flex=False), run(half, torch.bfloat16, flex=True)
    for e, p, f in zip(truth, plain, fast, strict=True):
        limit = (p - e).square().mean().sqrt() * (1.1 + 3 / e.numel() ** 0.5) + 1e-6 * e.abs().max()
        assert (f - e).square().mean().sqrt() <= limit


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(dpace_alpha=0.5), LossConfig(ce=0.5, kl=1.0)], ids=str)
def test_the_compiled_loss_is_the_plain_one(config: LossConfig) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 5000, (70,), device="cuda")
    labels[13] = -100
    logits, target = (torch.randn(70, 5000, device="cuda").bfloat16() for _ in range(2))
    plain = chunk_loss(logits, labels, target if config.kl else None, 7, config)
    fused = compiled(chunk_loss)(logits, labels, target if config.kl else None, 7, config)
    torch.testing.assert_close(fused[0].float(), plain[0].float(), atol=1e-5, rtol=1e-2)
    torch.testing.assert_close(fused[1], plain[1], atol=1e-3, rtol=1e-4)
    assert torch.equal(fused[2], plain[2])
    values, ids = compiled(best_of)(logits, 4)
    wanted = logits.float().topk(4, dim=-1)
    assert torch.equal(values, wanted.values) and torch.equal(logits.gather(1, ids).float(), values)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_recorded_step_is_the_plain_one(micro_batches: int) -> None:
    """Losses and trained weights bit for bit, over batches that differ in documents, anchors and labels."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).to("cuda", torch.bfloat16).eval()
    model.set_attn_implementation("flex_attention")
    target = Target(model.requires_grad_(False), (0, 1))
    config = DFlashConfig(
        **sizes, num_hidden_layers=2, num_target_layers=3, taps=(0, 1), mask_token_id=1, window=40,
        selector_top_k=4, selector_rank=16,
    )  # fmt: skip

    def trained(graph: bool) -> list[Tensor]:
        torch.manual_seed(1)
        drafter = Drafter(config).to("cuda", torch.bfloat16)
        init_drafter(drafter, torch.randn(128))
        drafter.ops = FLEX
        optim = OptimConfig(name=OptimName.muon, lr=1e-2, muon_lr=1e-2)
        engine = LocalEngine(
            drafter, make_loss(target, LossConfig(dpace_alpha=0.5)), optim, micro_batches=micro_batches,
            device=torch.device("cuda"), graph=graph,
        )  # fmt: skip
        found = []
        for step in range(3):
            for part in range(micro_batches):
                batch = drawn_batch(2 * step + part).to("cuda")
                stats = engine.forward_backward(batch, 1.0 / batch.num_targets, part == micro_batches - 1)
                found += [stats[name] for name in sorted(stats)]
            found.append(engine.step(1.0))
        return [*found, *drafter.state_dict().values()]

    plain, recorded = trained(graph=False), trained(graph=True)
    assert all(torch.equal(p, r) for p, r in zip(plain, recorded, strict=True))


def drawn_batch(seed: int) -> DraftBatch:
    """Two rows of 256 tokens in two documents."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 640, (2, 256), generator=generator)
    cut = int(rng.integers(20, 200))
    position = torch.cat([torch.arange(cut), torch.arange(256 - cut)]).expand(2, -1).clone()
    labels = torch.roll(ids, -1, 1)
    labels[:, -1] = labels[:, cut - 1] = IGNORE
    anchors = np.stack([draw_anchors(labels[r].numpy(), position[r].numpy(), 40, rng) for r in range(2)])
    return DraftBatch(ids, labels, position, torch.from_numpy(anchors), torch.full((2,), 7))


def test_what_reads_the_gpu_on_the_way_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2, device="cuda"))

    def work(batch: Batch, scale: Tensor) -> dict[str, Tensor]:
        (weight.sum() * scale * batch.input_ids_BT.sum().item()).backward()
        return {}

    rows = torch.ones(1, 2, dtype=torch.int64, device="cuda")
    with pytest.raises(UnsupportedError, match=r"graph=true, and this step cannot be recorded.*set graph=false"):
        GraphedWork(work, [weight])(Batch(rows, rows, rows), 1.0)


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "eagle"])
def test_a_recorded_round_is_the_launched_one(kind: str) -> None:
    """Drafts and the target's choices out of the graphs that acceptance times; replays repeat them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=4, initializer_range=0.3, **sizes))
    model = model.to("cuda", torch.bfloat16).eval()
    known = {"head_dim": 16, "vocab_size": 96, "num_target_layers": 4, "taps": (1, 3), **sizes}
    if kind == "eagle":
        small = EagleDrafter(EagleConfig(**known)).to("cuda", torch.bfloat16).eval()
        init_eagle(small, std=0.3)
        opened = eagle("e", small, model)
    else:
        chosen = {"selector_top_k": 8, "selector_rank": 16} if kind == "dflash2" else {}
        config = DFlashConfig(**known, num_hidden_layers=2, mask_token_id=2, window=16, **chosen)
        drafter = Drafter(config)
        init_drafter(drafter, torch.randn(64), std=0.3)
        opened = dflash("d", drafter.to("cuda", torch.bfloat16).eval(), model)
    prompts = [Prompt("p", torch.randint(3, 96, (60,)).tolist())]
    fixed = fixed_round(model, opened, prompts, 40)
    draft, verify = fixed.draft(), fixed.verify()
    (drafting, drafted), (verifying, chosen) = record(fixed.draft), record(fixed.verify)
    for _ in range(3):
        drafted.zero_(), chosen.zero_()
        drafting.replay(), verifying.replay()
        assert torch.equal(drafted, draft) and torch.equal(chosen, verify)
    timed = graphed(model, opened, prompts, 40)
    assert timed.context == 40 and timed.draft_ms > 0 < timed.verify_ms
