"""Errors that a user can act on.

Every message is one line that names the field, its value, the rule it broke and the remedy.
Entry points (`core.config.entry`) print it without a traceback and exit with status 2.
"""

import errno


class Fp4FlashError(Exception):
    """Base of all errors that end a command with one line."""


class ConfigError(Fp4FlashError):
    """A configuration key or value, or a combination of them, cannot be used."""


class CheckpointError(Fp4FlashError):
    """A checkpoint folder is incomplete, damaged, or does not fit the model."""


class FormatError(Fp4FlashError):
    """A tensor cannot be represented: NaN, Inf, or a dimension that does not divide into blocks."""


class DataError(Fp4FlashError):
    """Training or evaluation text is missing, empty or malformed."""


class UnsupportedError(Fp4FlashError):
    """A combination that fp4flash refuses by name instead of doing it wrongly."""


class ResourceError(Fp4FlashError):
    """Memory ran out, or training diverged."""


def resource_line(error: BaseException) -> str | None:
    """One line for a failure of the machine that can happen anywhere (GPU memory, disk); None for any other error."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; this file imports nothing
        detail = str(error).splitlines()[0].split(". Of the allocated")[0]
        return (
            f"out of GPU memory ({detail}); lower train.micro_batch_size or data.seq_len, set "
            "train.activation_checkpointing=true, lower loss.chunk_tokens, or spread over GPUs with parallel=zero3; "
            "where only the final comparison does not fit, set eval.compare=false"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}; free space or choose another run.root, then set run.resume"
    return None
