"""How a command that may run as one of several processes ends."""

import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process; everything it wrote is closed, what it printed is flushed.

    One of several processes ends without the interpreter's clean-up. ZeRO-3's parameters keep their process group past
    `destroy_process_group`, and a group that is taken apart so late, its threads still running, now and then aborts the
    process: a finished run would end with an error code, and the launcher would stop the other ranks.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
