"""`bf16`: snapped values baked into BF16 under the hub's names. Every engine that knows the model loads it."""

from collections.abc import Iterator
from typing import Any

from convert.formats.config import base_config
from convert.plan import Format, Job, copy_job
from convert.source import Source


class BF16(Format):
    name = "bf16"

    def jobs(self, source: Source) -> Iterator[Job]:
        return map(copy_job, source.items)

    def config(self, source: Source) -> dict[str, Any]:
        return base_config(source)
