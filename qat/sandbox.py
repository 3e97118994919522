"""Running a program that a model wrote, to see whether its tests pass, without trusting it.

Each program gets its own interpreter (`-I -S -B`: no environment, no site packages), an empty folder as working
directory, no environment variables, no standard input, limits on CPU time, memory and wall time, and a seccomp filter
(`qat/sandbox_child.py`) that refuses processes, threads, sockets, signals and every write to a file. What it prints is
dropped. Where the system cannot do that (no Linux seccomp on x86-64 or ARM64) nothing is run at all.

What stays possible: reading files that this user may read (nothing can leave: there is no network and one short line
comes back), and, for a program that searches the interpreter's frames for the nonce, a forged pass.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from core.errors import UnsupportedError
from qat.sandbox_child import UNAVAILABLE

CHILD = Path(__file__).with_name("sandbox_child.py")
ANSWER_BYTES = 256


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0  # wall time; CPU time is this, rounded up
    memory: int = 1 << 30  # bytes of address space


@dataclass(frozen=True)
class Outcome:
    """`reason`: passed, timeout, killed (a limit was hit), or the name of the exception."""

    passed: bool
    reason: str


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run `source` to its end in the sandbox; it passes when no exception leaves it.

    Raises:
        UnsupportedError: the system offers no seccomp filter.
    """
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="fp4flash-") as folder:
        program = Path(folder) / "candidate.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        arguments = [str(program), nonce, str(int(-(-limits.seconds // 1))), str(limits.memory)]
        kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}  # some interpreters need it to start
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD.resolve()), *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=folder, env=kept, start_new_session=True,
        )  # fmt: skip
        answer, late = wait(process, limits.seconds)
    if process.returncode == UNAVAILABLE:
        raise UnsupportedError(
            "this system cannot isolate programs (Linux with seccomp on x86-64 or ARM64 is needed), so code that "
            "a model wrote is not run; leave `code` out of eval.tasks"
        )
    if answer == nonce:
        return Outcome(True, "passed")
    return Outcome(False, "timeout" if late else answer if answer.isidentifier() else "killed")


def wait(process: subprocess.Popen[bytes], seconds: float) -> tuple[str, bool]:
    """What the child answered, and whether it was killed for being late. Ends the whole process group."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        kill_group(process.pid)

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    try:
        answer = process.stdout.read(ANSWER_BYTES)
    finally:
        timer.cancel()
        kill_group(process.pid)
        process.wait()
        process.stdout.close()
    return answer.decode(errors="replace"), late.is_set()


def kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
