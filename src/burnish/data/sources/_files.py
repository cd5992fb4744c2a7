"""The files behind a source, on this machine or anywhere fsspec reaches, with one way to read ranges of bytes.

Owns what a `path` means (one file, a folder, a glob, a URL) and the order of the files. Knows no file format.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from burnish.errors import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file. Nothing stays open between calls, so a set of 5,000 files needs no 5,000 descriptors."""

    path: str
    """As a person would write it; shown in errors."""
    remote: AbstractFileSystem | None = None
    """The file system of a URL; None: this machine's."""

    def open(self) -> IO[bytes]:
        """The bytes from the start, buffered and seekable."""
        return open(self.path, "rb") if self.remote is None else cast("IO[bytes]", self.remote.open(self.path, "rb"))

    def read_ranges(self, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """The bytes of each [start, end). Remote ranges are asked for together: an object store answers in parallel."""
        if self.remote is not None:
            return cast("list[bytes]", self.remote.cat_ranges([self.path] * len(starts), list(starts), list(ends)))
        pieces = []
        with open(self.path, "rb") as handle:
            for start, end in zip(starts, ends, strict=True):
                handle.seek(start)
                pieces.append(handle.read(end - start))
        return pieces


def find_files(path: str, suffix: str) -> list[DataFile]:
    """Files that `path` names, ordered by name: a file, a folder's `*suffix` files, a glob, or a URL of any of them.

    Raises:
        DataError: there is none, or the place cannot be reached.
    """
    if "://" in path:
        return _find_remote(path, suffix)
    local = os.path.expanduser(path)
    if os.path.isfile(local):
        return [DataFile(local)]
    if os.path.isdir(local):
        names = glob.glob(os.path.join(glob.escape(local), f"*{suffix}"))
        if not names:
            raise DataError(f"the folder holds no *{suffix} file", where=path, cure="name the files: `path: folder/*`")
    elif glob.has_magic(local):
        names = [name for name in glob.glob(local, recursive=True) if os.path.isfile(name)]
        if not names:
            raise DataError(
                "no file matches", where=path, cure=f"paths are relative to the current folder, {os.getcwd()}"
            )
    else:
        raise _missing(local)
    return [DataFile(name) for name in sorted(names)]


def _find_remote(path: str, suffix: str) -> list[DataFile]:
    try:
        from fsspec.core import url_to_fs

        remote, root = url_to_fs(path)
        if glob.has_magic(root):
            names: Any = remote.glob(root)
        elif remote.isdir(root):
            names = remote.glob(f"{root.rstrip('/')}/*{suffix}")
        else:
            names = [root] if remote.exists(root) else []
    except Exception as error:  # every file system brings its own exceptions: missing backend, credentials, network
        cure = "install the file system's package (s3fs, gcsfs...) and check name and credentials"
        raise DataError(f"cannot be reached: {error}", where=path, cure=cure) from error
    if not names:
        raise DataError("no such file", where=path, cure=f"check the name; a folder is searched for *{suffix}")
    return [DataFile(remote.unstrip_protocol(name), remote) for name in sorted(names)]


def _missing(path: str) -> DataError:
    folder, name = os.path.split(path)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    near = difflib.get_close_matches(name, os.listdir(folder or "."), n=3)
    absent = os.path.join(folder, name)
    reason = "no such file" if absent == path else f"no such file, and no folder '{absent}'"
    if near:
        return DataError(reason, path, f"did you mean {' or '.join(os.path.join(folder, n) for n in near)}?")
    return DataError(reason, path, f"paths are relative to the current folder, {os.getcwd()}")
