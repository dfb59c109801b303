"""Reading .tar files that strangers made: their members in order, nothing unpacked, nothing trusted."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import IO

from vtc.errors import FileError, first_sentence
from vtc.files import MAX_FILE_BYTES

BLOCK = tarfile.BLOCKSIZE

#: what tarfile raises for headers that are damaged, or were made to do harm
DAMAGED = (tarfile.TarError, EOFError, ValueError, LookupError, ArithmeticError, RecursionError, MemoryError)
#: kinds of headers that are about the next member, and are read whole; and the most bytes that one may have
ABOUT_THE_NEXT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                  tarfile.GNUTYPE_LONGLINK)
MAX_HEADER_BYTES = 2**20


class Header(tarfile.TarInfo):
    """A member whose size cannot be negative, with which some Pythons' tarfile would loop for ever, and whose name
    cannot fill the memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        header._block(header.size)
        if header.type in ABOUT_THE_NEXT and header.size > MAX_HEADER_BYTES:
            raise tarfile.InvalidHeaderError("a name that is too long")  # type: ignore[attr-defined]  # typeshed lacks it
        return header

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.InvalidHeaderError("a negative size")  # type: ignore[attr-defined]  # typeshed lacks it
        return -(-count // BLOCK) * BLOCK


def members(path: str, file: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """(member, why it has to be left out) of the open .tar in their order, folders aside; the reason is mostly ''.

    Raises FileError where the file is no .tar, is damaged, or ends too early.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=Header)  # noqa: SIM115  # the file is the caller's
        while (member := tar.next()) is not None:
            forget(tar)
            if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                raise FileError(f"{path} is cut: its member {member.name!r} does not end.")
            if not member.isdir():
                yield member, _objection(member)
        file.seek(tar.offset)
        end = file.read(BLOCK)
    except DAMAGED as error:
        raise FileError(f"{path} is not a .tar, or is damaged or cut: {first_sentence(error)}.") from error
    # tarfile takes a damaged header for the end; the true end is a block of zeros.
    if any(end):
        raise FileError(f"{path} is damaged: there is no member of a .tar at byte {tar.offset}.")
    if len(end) < BLOCK:
        raise FileError(f"{path} is cut: its end mark is missing.")


def forget(tar: tarfile.TarFile) -> None:
    """Forget the members so far: tarfile keeps what it knows of every member that it read or wrote."""
    vars(tar)["members"].clear()


def _objection(member: tarfile.TarInfo) -> str:
    parts = member.name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":") or "\0" in member.name:
        return "its path leads out of the shard"
    if not member.isreg() or member.issparse():
        return "it is no ordinary file"
    return ""


def read_member(path: str, file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    """The bytes of a member. Raises FileError."""
    if member.size > MAX_FILE_BYTES:
        raise FileError(f"{path}/{member.name} has {member.size} bytes, and the limit is {MAX_FILE_BYTES}.")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise FileError(f"{path} is cut: its member {member.name!r} does not end.")
    if not data:
        raise FileError(f"{path}/{member.name} is empty.")
    return data
