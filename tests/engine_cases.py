"""A model of a few hundred values and a one-process engine around it, for tests of what a step and a save do."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.train.batch import Batch
from core.train.config import OptimConfig, ParallelConfig
from core.train.engines import build_engine
from core.train.local import LocalEngine

CPU = torch.device("cpu")
VOCABULARY = 32


class TinyModel(nn.Module):
    """Embedding, fused experts used densely, head: the parameter kinds that matter, in a few hundred values."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.3)

        self.embed = weight(VOCABULARY, 16)
        self.experts = weight(2, 16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = weight(VOCABULARY, 16)
        self.frozen = weight(16, 16).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.embed)
        x = x + torch.tanh(x @ self.experts.sum(0).T) @ self.frozen
        return self.head(x * self.scale)


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch.input_ids_BT).flatten(0, 1).float()
    return F.cross_entropy(logits, batch.labels_BT.flatten(), reduction="sum"), {"rows": torch.tensor(1.0)}


def batch_of(step: int) -> Batch:
    ids = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids.roll(-1, 1), torch.arange(8).expand(4, 8))


def engine_of(optim: OptimConfig | None = None, dtype: torch.dtype = torch.bfloat16, micro: int = 1) -> LocalEngine:
    engine = build_engine(
        TinyModel().to(dtype), loss_fn, optim or OptimConfig(lr=1e-2), ParallelConfig(), micro_batches=micro,
        device=CPU,
    )  # fmt: skip
    assert isinstance(engine, LocalEngine)
    return engine


def train(engine: LocalEngine, first: int, last: int, micro: int = 1) -> list[float]:
    losses = []
    for step in range(first, last):
        batch, total = batch_of(step), 0.0
        rows = 4 // micro
        for index in range(micro):
            part = batch.rows(index * rows, (index + 1) * rows)
            total += float(engine.forward_backward(part, 1 / 32, last=index == micro - 1)["loss"])
        engine.step(1.0)
        losses.append(total)
    return losses


def state_of(engine: LocalEngine) -> dict[str, Tensor]:
    working = {f"working:{n}": p.detach().clone() for n, p in engine.parameters.items()}
    return working | {f"{kind}:{n}": t.clone() for n, kind, t in engine.optimizer.state_tensors()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []
