"""Every error that vtc raises on purpose: one sentence that says what is wrong and what to do.

The command lines print the sentence and exit with 1; a traceback from vtc is a bug.
"""

import os


class VtcError(Exception):
    """Base of all errors below."""

    #: of a command or script that it ends
    exit_code = 1


class ImageError(VtcError):
    """A picture that cannot be read, is too large, or has a form that is not supported."""


class BitstreamError(VtcError):
    """A stream that is damaged, cut, not ours, or newer than this version of vtc."""


class ModelError(VtcError):
    """A model that is unknown, incomplete, or not the one that a stream was made with."""


class ConfigError(VtcError, ValueError):
    """A setting that is out of range or contradicts another."""


class TrainingError(VtcError):
    """A training run that cannot go on."""


class FileError(VtcError, OSError):
    """A file that cannot be read or written."""


def sentence(error: BaseException, name: str) -> str:
    """What went wrong with the file `name`, in one line."""
    if isinstance(error, VtcError):
        text = " ".join(str(error).split())
        return text if name in text else f"{name}: {text}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_memory(str(error))):
        return f"{name}: there is not enough memory for it."
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    where = f" at {os.path.basename(step.tb_frame.f_code.co_filename)}:{step.tb_lineno}" if step else ""
    return f"{name}: unexpected {type(error).__name__}{where}: {first_sentence(error)}."


def _is_memory(text: str) -> bool:
    """Whether a RuntimeError of torch's allocators says so: their types differ between devices and versions."""
    return any(phrase in text.lower() for phrase in ("out of memory", "not enough memory", "can't allocate memory"))


def first_sentence(error: BaseException) -> str:
    """The first line of what an exception says, without its full stop."""
    return " ".join((str(error).strip() or "no details").splitlines()[0].split()).rstrip(".")
