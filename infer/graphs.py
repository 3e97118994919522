"""Steps in which every request generates, replayed as CUDA graphs: the host says what is new and launches once.

A graph is recorded for a number of rows and a length of context (both rounded up to powers of two) when a step first
needs it. Rows that fill up a graph read and write a page that nobody owns, and each row verifies K places whether it
has as many drafts or fewer: what a row computes does not depend on the rows beside it, nor on tokens after its own
(kernels' batch invariance), so the tokens are those of the step computed one launch at a time.

All inputs of a step lie in one block of pinned memory and go over in one copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infer.cache import GroupStep, Step
from infer.drafting import Tables
from infer.scheduler import Work
from kernels.paged_attention import Batch
from kernels.sampling import Params

if TYPE_CHECKING:
    from infer.round import Inputs, Outcome

SHORTEST = 512  # context of the shortest graph
ALIGNMENT = 16
Field = tuple[tuple[int, ...], torch.dtype]


class Staging:
    """Named tensors of fixed shape in one block on the host (pinned) and its copy on the device."""

    def __init__(self, fields: dict[str, Field], device: torch.device) -> None:
        places, total = {}, 0
        for name, (shape, dtype) in fields.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            places[name] = (total, size)
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self.on_host = torch.zeros(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.on_device = torch.zeros(total, dtype=torch.uint8, device=device)
        self.host, self.device = (
            {n: block[at : at + size].view(fields[n][1]).view(fields[n][0]) for n, (at, size) in places.items()}
            for block in (self.on_host, self.on_device)
        )

    def send(self) -> None:
        self.on_device.copy_(self.on_host, non_blocking=True)


@dataclass
class Recorded:
    """inputs: kept because the graph reads their memory."""

    staging: Staging
    inputs: "Inputs"
    graph: torch.cuda.CUDAGraph
    outcome: "Outcome"


class Graphs:
    """Graphs of `compute`, by size.

    Args:
        compute: from `Inputs` to `Outcome`, without waiting for the device (infer.round).
        drafts: K. spare, page: the cache's unowned page of each group, and the page size.
        drafting: whether `compute` takes the drafter's tables.
    """

    def __init__(
        self, compute: Callable[["Inputs"], "Outcome"], *, device: torch.device, drafts: int, spare: Sequence[int],
        page: int, drafting: bool,
    ) -> None:  # fmt: skip
        self.compute, self.device, self.drafts, self.spare = compute, device, drafts, tuple(spare)
        self.page, self.drafting = page, drafting
        self.recorded: dict[tuple[int, int, bool], Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def fits(self, work: Sequence[Work]) -> bool:
        """Whether every request of the step generates, and has read all of its own tokens but one."""
        return bool(work) and all(w.emits and w.count == 1 for w in work)

    def run(self, work: Sequence[Work], cut: bool) -> "Outcome":
        """What `compute` gives for `work`; rows behind it are filling. Valid until the next call."""
        rows = power(len(work))
        longest = max(SHORTEST, power(max(len(w.sequence.ids) for w in work) + 2 * self.drafts + 1))
        key = (rows, longest, cut)
        known = self.recorded.get(key)
        staging = known.staging if known else Staging(self.fields(rows, longest), self.device)
        self.fill(staging.host, work, rows)
        staging.send()
        if known is None:
            known = self.recorded[key] = self.record(staging, rows, longest, cut)
        known.graph.replay()
        return known.outcome

    def fields(self, rows: int, longest: int) -> dict[str, Field]:
        tokens, pages, int64, int32 = rows * (self.drafts + 1), longest // self.page, torch.int64, torch.int32
        found: dict[str, Field] = {
            "ids": ((tokens,), int64), "position": ((tokens,), int64), "anchor": ((rows,), int64),
            "draft": ((rows, self.drafts), int64), "drafted": ((rows,), int32), "seed": ((rows,), int64),
            "temperature": ((rows,), torch.float32), "top_p": ((rows,), torch.float32), "top_k": ((rows,), int32),
            "length": ((rows,), int32),
        }  # fmt: skip
        for group in range(len(self.spare)):
            found |= {f"pages{group}": ((rows, pages), int32), f"slot{group}": ((tokens,), int64)}
        return found

    def fill(self, host: dict[str, Tensor], work: Sequence[Work], rows: int) -> None:
        """Everything that a step says; rows behind `work` read and write the spare page and draw greedily."""
        block = self.drafts + 1
        steps = torch.arange(block)
        first = torch.zeros(rows, dtype=torch.int64)
        first[: len(work)] = torch.tensor([len(w.sequence.ids) - 1 for w in work])
        place = first[:, None] + steps
        host["anchor"].copy_(first)
        host["position"].copy_(place.flatten())
        host["length"].copy_(first + block)
        ids, draft = host["ids"].view(rows, block).zero_(), host["draft"].zero_()
        for row, w in enumerate(work):
            ids[row, 0] = w.sequence.ids[-1]
            if w.drafted:
                draft[row, : w.drafted] = torch.tensor(w.sequence.draft.tokens[: w.drafted])
        ids[:, 1:] = draft
        given = [w.sequence.request.params for w in work]
        plain = [0] * (rows - len(work))
        for name, values in (
            ("drafted", [w.drafted for w in work]), ("seed", [w.sequence.seed for w in work]),
            ("temperature", [p.temperature for p in given]), ("top_k", [p.top_k for p in given]),
            ("top_p", [p.top_p for p in given]),
        ):  # fmt: skip
            host[name].copy_(torch.tensor([*values, *plain], dtype=host[name].dtype))
        host["top_p"][len(work) :] = 1.0
        for group, spare in enumerate(self.spare):
            pages = host[f"pages{group}"].fill_(spare)
            for row, w in enumerate(work):
                assert w.sequence.table is not None
                held = w.sequence.table.pages[group]
                pages[row, : len(held)] = torch.tensor(held, dtype=torch.int32).clamp_(min=0)
            page = pages.gather(1, place // self.page).to(torch.int64)
            host[f"slot{group}"].copy_((page * self.page + place % self.page).flatten())

    def inputs(self, given: dict[str, Tensor], rows: int, longest: int, cut: bool) -> "Inputs":
        from infer.round import Inputs

        block = self.drafts + 1
        start = torch.arange(0, (rows + 1) * block, block, dtype=torch.int32, device=self.device)
        groups = tuple(
            GroupStep(Batch(given[f"pages{g}"], given["length"], start, block, longest), given[f"slot{g}"])
            for g in range(len(self.spare))
        )
        every = torch.arange(rows * block, device=self.device)
        params = Params(given["temperature"], given["top_p"], given["top_k"], given["seed"], cut=cut)
        tables = Tables(tuple(g.batch.page_table for g in groups), longest) if self.drafting else None
        step = Step(given["ids"], given["position"], groups, every)
        return Inputs(step, params, given["anchor"], given["draft"], given["drafted"], tables)

    def record(self, staging: Staging, rows: int, longest: int, cut: bool) -> Recorded:
        """Run the step once as it is (which compiles its kernels), then record it. Both write what a replay writes."""
        given = self.inputs(staging.device, rows, longest, cut)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self.compute(given)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outcome = self.compute(given)
        return Recorded(staging, given, graph, outcome)


def power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
