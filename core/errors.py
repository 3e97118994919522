"""Errors that a user can act on.

Every message is one line that names the field, its value, the rule it broke and the remedy.
Entry points (`core.config.entry`) print it without a traceback and exit with status 2.
"""


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
