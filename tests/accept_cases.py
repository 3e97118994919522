"""Assertions on kernels.accept that hold for the reference, under the interpreter and on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels.sampling as sampling
from kernels.accept import accept
from kernels.sampling import Params
from tests import sampling_cases as cases


@dataclass(frozen=True)
class Round:
    draft: Tensor
    q: Tensor | None
    logits: Tensor
    params: Params
    position: Tensor
    drafted: Tensor

    def to(self, device: str) -> "Round":
        p = self.params
        params = Params(*(v.to(device) for v in (p.temperature, p.top_p, p.top_k, p.seed)), p.cut)
        q = None if self.q is None else self.q.to(device)
        rest = (self.logits.to(device), params, self.position.to(device), self.drafted.to(device))
        return Round(self.draft.to(device), q, *rest)

    def rows(self, index: Tensor) -> "Round":
        q = None if self.q is None else self.q[index]
        params = cases.rows_of(self.params, index)
        return Round(self.draft[index], q, self.logits[index], params, self.position[index], self.drafted[index])

    def verdict(self, backend: str) -> tuple[Tensor, Tensor]:
        return accept(self.draft, self.q, self.logits, self.params, self.position, self.drafted, backend=backend)


def round_of(size: int, drafts: int, given: bool, seed: int = 0, dtype: torch.dtype = torch.float32) -> Round:
    """A row for each setting; a drafter that is near the target, so that every count of accepted drafts occurs."""
    rows = len(cases.SETTINGS)
    logits = cases.logits_of(rows * (drafts + 1), size, seed).unflatten(0, (rows, drafts + 1))
    generator = torch.Generator().manual_seed(seed + 1)
    near = logits[:, :-1] + torch.randn(rows, drafts, size, generator=generator)
    q = near.softmax(-1)
    best = logits[:, :-1].argmax(-1)
    drawn = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(rows, drafts) if drafts else best
    greedy = torch.rand(rows, drafts, generator=generator) < 0.7
    draft = torch.where(greedy, best, drawn)
    drafted = torch.randint(0, drafts + 1, (rows,), generator=generator).to(torch.int32)
    drafted[::2] = drafts
    params = cases.params_of(cases.SETTINGS, "cpu", seed)
    position = torch.arange(rows) * 5 + seed
    return Round(draft, q if given else None, logits.to(dtype), params, position, drafted)


def assert_equal_reference(one: Round, device: str) -> Tensor:
    """Counts and tokens of both implementations on `device` are the CPU reference's; returns the counts."""
    accepted, token = one.verdict("reference")
    there = one.to(device)
    for backend in ("triton", "reference"):
        found = there.verdict(backend)
        assert torch.equal(found[0].cpu(), accepted) and torch.equal(found[1].cpu(), token), backend
    return accepted


def assert_no_drafts_is_sample(device: str, backend: str) -> None:
    """Rows with drafted = 0 among rows with drafts, and K = 0: the very token of `sample`."""
    for drafts in (0, 3):
        one = round_of(300, drafts, given=drafts > 0).to(device)
        one.drafted.zero_()
        if drafts:
            one.drafted[1] = drafts
        accepted, token = one.verdict(backend)
        expected = sampling.sample(one.logits[:, 0].contiguous(), one.params, one.position, backend=backend)
        none = one.drafted == 0
        assert torch.equal(token[none], expected[none]) and not accepted[none].any()


def assert_greedy_rows_keep_equal_drafts(device: str, backend: str) -> None:
    """Also with q, and for drafts that lie outside the vocabulary."""
    drafts, size = 4, 50
    logits = cases.logits_of(6 * (drafts + 1), size, seed=2).unflatten(0, (6, drafts + 1))
    best = logits.argmax(-1)
    draft = best[:, :-1].clone()
    draft[1, 0] = (draft[1, 0] + 1) % size
    draft[2, 2] = (draft[2, 2] + 1) % size
    draft[3, 3], draft[4, 1] = -1, size
    drafted = torch.tensor([4, 4, 4, 4, 4, 2], dtype=torch.int32)
    params, position = cases.params_of([(0.0, 0.9, 4)] * 6, device), torch.arange(6, device=device)
    expected = [4, 0, 2, 3, 1, 2]
    for q in (None, torch.full((6, drafts, size), 1.0 / size), torch.nn.functional.one_hot(draft % size, size).float()):
        given = None if q is None else q.to(device)
        one = Round(draft.to(device), given, logits.to(device), params, position, drafted.to(device))
        accepted, token = one.verdict(backend)
        assert accepted.tolist() == expected
        assert token.tolist() == [int(best[r, n]) for r, n in enumerate(expected)]


def assert_zero_probability_is_never_accepted(device: str, backend: str, rows: int) -> None:
    """Drafts that the target excludes, or its cuts do, whatever q says of them."""
    size = 8
    logits = torch.zeros(rows, 2, size)
    logits[:, :, 6] = float("-inf")
    logits[:, :, 5] = -3.0
    for token in (5, 6):
        for q in (None, torch.full((rows, 1, size), 1.0 / size), torch.zeros(rows, 1, size)):
            one = Round(
                torch.full((rows, 1), token), q, logits, cases.params_of([(1.0, 1.0, 5)] * rows, "cpu"),
                torch.arange(rows), torch.ones(rows, dtype=torch.int32),
            ).to(device)  # fmt: skip
            accepted, following = one.verdict(backend)
            assert not accepted.any()
            assert not torch.isin(following.cpu(), torch.tensor([5, 6, -1])).any()


def assert_rows_do_not_meet(device: str, backend: str) -> None:
    for given in (False, True):
        one = round_of(400, 3, given).to(device)
        accepted, token = one.verdict(backend)
        for index in ([2], [5, 1, 1, 10]):
            some = torch.tensor(index, device=device)
            found = one.rows(some).verdict(backend)
            assert torch.equal(found[0], accepted[some]) and torch.equal(found[1], token[some])


def assert_unusable_logits_are_marked(device: str, backend: str) -> None:
    """A NaN at a slot that is reached gives -1; one behind the first rejection, or after `drafted`, changes nothing."""
    one = round_of(64, 2, given=False, seed=4)
    row = 1  # temperature 1, nothing cut
    one.draft[row] = one.logits[row, :-1].argmax(-1)
    one.logits[row, 0, one.draft[row, 0]] = 60.0
    one.drafted[row] = 2
    one.logits[row, 1, 7] = float("nan")
    accepted, token = one.to(device).verdict(backend)
    assert (int(accepted[row]), int(token[row])) == (1, -1)
    one.drafted[row] = 0
    accepted, token = one.to(device).verdict(backend)
    assert int(accepted[row]) == 0 and int(token[row]) >= 0
