"""Every error that vtc raises on purpose: one sentence that says what is wrong and what to do.

The command lines print the sentence and exit with 1; a traceback from vtc is a bug.
"""


class VtcError(Exception):
    """Base of all errors below."""


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
