"""Proposers whose acceptance is known: they check the loop and the estimators, not a drafter.

Random drafts: tau is about 1. Drafts from the text itself: every round commits B tokens, up to the cut last one.
"""

import torch
from torch import Tensor

from core.generate.interface import Draft, Prompt, Reply
from core.generate.sampling import Sampling


class RandomProposer:
    """Uniform drafts; they depend on nothing, so for verification they count as chosen without chance."""

    def __init__(self, vocabulary: int, drafts: int) -> None:
        self.vocabulary, self.drafts, self.taps = vocabulary, drafts, ()

    def start(self, rows: int, slots: int) -> None: ...

    def extend(self, ids_RT: Tensor, features_RTF: Tensor, position_RT: Tensor, used: int) -> None: ...

    def keep(self, rows: Tensor) -> None: ...

    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:  # noqa: ARG002
        shape = (len(anchor_R), self.drafts)
        tokens = torch.randint(self.vocabulary, shape, generator=noise, device=anchor_R.device)
        return Draft(tokens, None, torch.full(shape, 1 / self.vocabulary, device=anchor_R.device))


class OracleProposer:
    """Drafts what the text says next. A row is told by its history, so prompts must differ."""

    def __init__(self, texts: list[tuple[Prompt, Reply]], drafts: int) -> None:
        self.drafts, self.taps = drafts, ()
        self.texts = [[*prompt.ids, *reply.ids] for prompt, reply in texts]

    def start(self, rows: int, slots: int) -> None:
        self.read = torch.zeros(rows, slots, dtype=torch.int64)

    def extend(self, ids_RT: Tensor, features_RTF: Tensor, position_RT: Tensor, used: int) -> None:  # noqa: ARG002
        self.read.scatter_(1, position_RT.cpu(), ids_RT.cpu())

    def keep(self, rows: Tensor) -> None:
        self.read = self.read[rows.cpu()]

    def propose(self, anchor_R: Tensor, position_R: Tensor, sampling: Sampling, noise: torch.Generator) -> Draft:  # noqa: ARG002
        drafts = [
            self.after([*read[:place], anchor])
            for read, place, anchor in zip(self.read.tolist(), position_R.tolist(), anchor_R.tolist(), strict=True)
        ]
        tokens = torch.tensor(drafts, device=anchor_R.device)
        return Draft(tokens, None, torch.ones_like(tokens, dtype=torch.float32))

    def after(self, history: list[int]) -> list[int]:
        """K tokens that follow; zeros behind the end of the text, or where no text begins like this."""
        size = len(history)
        text = next((t for t in self.texts if t[:size] == history), [])
        return (text[size : size + self.drafts] + [0] * self.drafts)[: self.drafts]
