"""The child of `qat.sandbox`: give up every right that pure computation does not need, then run the program.

Run by path with `python -I -S -B`, standard library only. A seccomp filter lets through the system calls that a
computing Python makes and answers all others with EPERM: no process, thread, socket, signal, or file opened for
writing. It cannot be undone, is inherited, and needs no privilege. Source: Linux Documentation/userspace-api/
seccomp_filter.rst; numbers from the kernel's syscall tables.
"""

import ctypes
import os
import platform
import resource
import sys

UNAVAILABLE = 77  # exit status: this system cannot isolate

# (audit architecture, number of `open` or -1, number of `openat`, numbers allowed with any argument)
X86_64 = (
    0xC000003E, 2, 257,
    (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 20, 21, 22, 23, 24, 25, 28, 32, 33, 35, 36,
     37, 38, 39, 53, 60, 63, 72, 79, 89, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 131, 158, 186, 202, 204,
     217, 219, 228, 229, 230, 231, 232, 233, 262, 267, 269, 270, 271, 273, 281, 290, 291, 292, 293, 318, 324,
     332, 334, 436, 439),
)  # fmt: skip
AARCH64 = (
    0xC00000B7, -1, 56,
    (17, 19, 20, 21, 22, 23, 24, 25, 29, 48, 57, 59, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 98,
     99, 101, 102, 103, 113, 114, 115, 123, 124, 128, 132, 134, 135, 139, 153, 160, 163, 165, 169, 172, 173, 174,
     175, 176, 177, 178, 179, 199, 214, 215, 216, 222, 226, 233, 278, 283, 291, 293, 436, 439),
)  # fmt: skip
TABLES = {"x86_64": X86_64, "aarch64": AARCH64}

LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF operations
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # DENY: errno 1, EPERM
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes each
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Instruction)))


def instructions() -> list[tuple[int, int, int, int]]:
    """The filter: (operation, jump if true, jump if false, operand)."""
    architecture, open_number, openat_number, allowed = TABLES[platform.machine()]
    found = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for number, flags in ((open_number, 1), (openat_number, 2)):
        if number >= 0:
            found += [(EQUAL, 0, 4, number), (LOAD, 0, 0, ARGUMENTS + 8 * flags), (ANY_BIT, 0, 1, WRITING)]
            found += [(RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    for number in allowed:
        found += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*found, (RETURN, 0, 0, DENY)]


def isolate() -> bool:
    """Install the filter; False where the kernel or the processor has none that we know."""
    if sys.platform != "linux" or platform.machine() not in TABLES:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    rows = instructions()
    program = Program(len(rows), (Instruction * len(rows))(*rows))
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    return (
        libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
        and libc.prctl(set_seccomp, filter_mode, ctypes.byref(program)) == 0
    )


def limit(seconds: int, memory: int) -> None:
    """CPU seconds, address space, and none of the rest."""
    wanted = {
        resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }  # fmt: skip
    for kind, value in wanted.items():
        resource.setrlimit(kind, (value, value))


def main() -> None:
    path, nonce, seconds, memory = sys.argv[1:5]
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        source = file.read()
    result = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    del sys.argv[1:]
    limit(int(seconds), int(memory))
    if not isolate():
        os._exit(UNAVAILABLE)
    try:
        exec(compile(source, "candidate.py", "exec"), {"__name__": "candidate"})
        answer = nonce
    except BaseException as error:  # noqa: BLE001  a candidate may raise anything, SystemExit too
        answer = type(error).__name__
    os.write(result, answer.encode()[:200])
    os._exit(0)


if __name__ == "__main__":
    main()
