"""How every command of this folder ends: our own errors, a full disk and Ctrl-C in one line."""

import argparse
import sys
from collections.abc import Callable

from core.errors import Fp4FlashError, resource_line


def ended(name: str, run: Callable[[argparse.Namespace], None], options: argparse.Namespace, again: str) -> int:
    """Exit status of `run(options)`: 0, 2 for an error that a user can act on, 130 for Ctrl-C (`again`: what then)."""
    try:
        run(options)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {again}", file=sys.stderr)
        return 130
    except (Fp4FlashError, OSError) as error:
        line = str(error) if isinstance(error, Fp4FlashError) else resource_line(error)
        if line is None:
            raise
        print(f"{name}: {line}", file=sys.stderr)
        return 2
    return 0
