"""How the commands of infer begin and end: checks, ranks, one line for what a user can act on."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from core.errors import ConfigError, Fp4FlashError, resource_line

MEMORY = (
    "out of GPU memory: lower --kv-share, --rows or --step-tokens, or spread the model over more GPUs (torchrun "
    "--nproc-per-node N -m ...)"
)
HOST_MEMORY = "out of memory: lower --kv-tokens, --rows or --step-tokens, or take a machine with more"


def check_writable(name: str, path: str | None) -> None:
    """ConfigError where a result could not be written to `path`: better now than after the work."""
    if path is None:
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{name} {path}: expected a file in a folder that exists and can be written to")


def ending(name: str, work: Callable[[], int]) -> int:
    """`work()`'s status; 2 and one line for our own errors and the machine's, 130 for Ctrl-C, 1 without a word where
    the reader of the output has left (`| head`)."""
    try:
        return work()
    except Fp4FlashError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails too
        return 1
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            line = MEMORY
        elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's allocator on a CPU
            line = HOST_MEMORY
        else:
            line = resource_line(error)
        if line is None:
            raise
        print(f"{name}: {line}", file=sys.stderr)
        return 2
