"""Reading a file or stdin with a limit, and writing one so that a failure leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vtc.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

if sys.platform != "win32":
    import fcntl

#: no picture or stream that vtc accepts is larger; stops an endless pipe
MAX_FILE_BYTES = 2**30


def reason(error: OSError) -> str:
    """'No such file or directory' and the like, in lower case, to end a sentence with."""
    text = error.strerror or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def read_file(path: str | Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file, or of stdin where `path` is '-'.

    Raises FileError where it cannot be read, is a folder, is empty, or holds more than `limit` bytes.
    """
    name = "stdin" if str(path) == "-" else str(path)
    try:
        if str(path) == "-":
            if sys.stdin is None:
                raise FileError("stdin is closed.")
            data = sys.stdin.buffer.read(limit + 1)
        else:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise FileError(f"{name} has {size} bytes, and the limit is {limit}.")
                data = file.read(size + 1)  # takes so many bytes of memory at once
                if len(data) > size:  # of a pipe, or of a file that grows, the size says nothing
                    data += file.read(limit - size)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{name} cannot be read: {reason(error)}.") from error
    if len(data) > limit:
        raise FileError(f"{name} has more than {limit} bytes, which is the limit.")
    if not data:
        raise FileError(f"{name} is empty.")
    return data


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` under a temporary name in the same folder, then rename it to `path`.

    So `path` holds all of `data` or what it held before, whatever goes wrong: a full disk, Ctrl-C, a lost power line.
    The mode bits are what the umask gives. A symbolic link stays one and its target is replaced. A device or a named
    pipe is written to directly. '-' is stdout. Raises FileError; a closed stdout raises BrokenPipeError.
    """
    if str(path) == "-":
        if sys.stdout is None:
            raise FileError("stdout is closed.")
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise FileError(f"stdout cannot be written: {reason(error)}.") from error
        return
    try:
        target = Path(os.path.realpath(path))
        if not target.exists() and os.path.exists(path):  # /dev/stdout, /dev/fd/63: what the link names is no path
            target = Path(path)
        if not target.parent.is_dir():
            raise FileError(f"The output folder {Path(path).parent} does not exist; create it first.")
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            with open(target, "wb") as file:
                file.write(data)
            return
        # The name stays short: the target's own may already have the 255 bytes that a file system allows.
        temporary = target.with_name(f".vtc-{secrets.token_hex(6)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be written: {reason(error)}.") from error


def save_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """A safetensors file without a copy in memory, for models of gigabytes; readable by whom the umask lets read.

    safetensors itself makes files for their owner alone. Raises OSError and SafetensorError.
    """
    from safetensors.torch import save_file

    save_file(tensors, path)
    if os.name == "posix":
        mask = os.umask(0o077)
        os.umask(mask)
        os.chmod(path, 0o666 & ~mask)


def lock(file: IO[bytes], target: str) -> None:
    """Keep an open file to this process until it is closed. FileError where another one has it for `target`."""
    if sys.platform == "win32":  # two processes at one file are not told
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FileError(f"{target} is being written by another process.") from None
    except OSError:  # a file system without locks
        pass
