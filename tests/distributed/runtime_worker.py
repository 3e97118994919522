"""One rank of the runtime: greedy and sampled replies of every prompt, with and without a drafter, as JSON."""

import json
import sys
from pathlib import Path

from infer.llm import LLM
from infer.request import SamplingParams
from tests.runtime_cases import prompts

folder, drafter, out, tokens = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
given = [p.ids for p in prompts()]
with LLM(folder, drafter=drafter, device="cpu", dtype="float32", rows=4, step_tokens=24) as llm:
    rank = llm.ranks.shard.rank
    print("ready", rank, flush=True)
    found = [
        [c.ids for c in llm.generate(given, SamplingParams(max_tokens=tokens, ignore_eos=True, **more))]
        for more in ({}, {"temperature": 1.0, "seed": 5})
    ]
(out / f"rank{rank}.json").write_text(json.dumps(found))
