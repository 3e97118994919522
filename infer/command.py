"""How the commands of infer begin and end: checks, ranks, one line for what a user can act on."""

import sys
from collections.abc import Callable

from core.errors import Fp4FlashError, resource_line

MEMORY = (
    "out of GPU memory: lower --kv-share, --rows or --step-tokens, or spread the model over more GPUs (torchrun "
    "--nproc-per-node N -m ...)"
)


def ending(name: str, work: Callable[[], int]) -> int:
    """`work()`'s status; 2 and one line for our own errors and the machine's, 130 for Ctrl-C."""
    try:
        return work()
    except Fp4FlashError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"
        line = MEMORY if out_of_memory else resource_line(error)
        if line is None:
            raise
        print(f"{name}: {line}", file=sys.stderr)
        return 2
