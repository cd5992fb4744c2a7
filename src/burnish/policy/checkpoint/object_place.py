"""Checkpoints in an object store, where nothing can be renamed: parts first, the manifest next, one `COMMIT` last.

    s3://bucket/runs/7b/
      checkpoint-20.3fa91b2c/model-00001-of-00002.safetensors/00000     parts of a file (parts.py)
      checkpoint-20.3fa91b2c/manifest.json/00000
      checkpoint-20.3fa91b2c/along/metrics.jsonl/00000                  what an empty machine needs besides
      checkpoint-20.COMMIT          {"token": "3fa91b2c", "along": {"metrics.jsonl": {"size": 913, "crc32": 7}}}
      owner/00000002                who writes here (store_owner.py)

Until `checkpoint-20.COMMIT` exists there is no checkpoint 20. It is created on the condition that it does not exist, so
of two writers one wins, and each has written below a token of its own. Must not know what is in a file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import zlib
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

from burnish.errors import Unreachable, UserError
from burnish.policy.checkpoint.manifest import MANIFEST, decode_manifest
from burnish.policy.checkpoint.objects import Objects
from burnish.policy.checkpoint.parts import PART_BYTES, StoredFiles, send
from burnish.policy.checkpoint.place import name_of, step_of
from burnish.policy.checkpoint.store_owner import Owner, Rhythm, require_conditions

COMMIT = ".COMMIT"
ALONG = "along/"


class ObjectPlace:
    """The checkpoints of one run below `s3://bucket/prefix`, `gs://...`, `az://...` or `file://...`.

    Anyone may read; who writes has rank 0 `claim` it first.

    >>> place = ObjectPlace("s3://bucket/runs/7b", along=[run_dir / "metrics.jsonl"])
    >>> place.claim(run_id="5d1c0f3a", who="runs/7b")
    >>> place.steps()
    [10, 20]
    >>> place.release()
    """

    def __init__(
        self,
        url: str,
        *,
        along: Sequence[Path] = (),
        objects: Objects | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """Sends nothing yet.

        Args:
            along: files of rank 0 that are stored with each checkpoint, as they are when it is committed.
            objects: another store, or one that fails on purpose in a test.

        Raises:
            UserError: no store can be made of the url and the environment.
        """
        self.objects = objects or Objects(url)
        self.along, self.part_bytes = tuple(along), part_bytes
        self.owner: Owner | None = None
        self._live: set[str] = set()
        self._tokens: dict[int, str] = {}
        self._files: tuple[int, StoredFiles] | None = None

    def __str__(self) -> str:
        return self.objects.url

    # ownership

    def claim(self, run_id: str, who: str, rhythm: Rhythm | None = None) -> None:
        """Makes this process the one that writes here; see `Owner`.

        Raises:
            ResumeError: another run writes here, or the store cannot keep two of them apart.
            UserError: the store refuses.
            Unreachable: it does not answer.
        """
        owner = Owner(self.objects, run_id, who, rhythm)
        try:
            require_conditions(self.objects)
            owner.claim()
        except ConnectionError as error:
            raise Unreachable(f"the store does not answer: {error}; the same command tries again") from None
        except OSError as error:
            cure = "see that the bucket exists and that the credentials in the environment are valid and may write"
            raise UserError(f"the store refuses: {error.strerror}", where=self.objects.url, cure=cure) from None
        self.owner = owner

    def release(self) -> None:
        """Lets the next run have the place at once; never raises. A process that dies without it is waited for."""
        if self.owner is not None:
            self.owner.release()

    # reading

    def steps(self) -> list[int]:
        self._files = None
        if self.owner is None:  # the owner, and nobody else, may have replaced some since
            self._tokens.clear()
        return sorted(_steps(self.objects.children().objects))

    def read(self, step: int, file: str, offset: int = 0, size: int | None = None) -> bytearray:
        return self._open(step).read(file, offset, size)

    def size(self, step: int, file: str) -> int:
        return self._open(step).size(file)

    def carried(self, step: int) -> dict[str, bytes]:
        """The files that were stored along with a checkpoint, by name. Raises OSError, also where a bit differs."""
        found = {}
        for name, facts in self._commit_of(step)["along"].items():
            data = bytes(self.read(step, ALONG + name))
            if facts != _facts(data):
                raise OSError(errno.EIO, "checksum differs", f"{self.describe(step)}/{ALONG}{name}")
            found[name] = data
        return found

    def free_bytes(self) -> int | None:
        return None

    def describe(self, step: int) -> str:
        return f"{self.objects.url}/{name_of(step)}"

    # changing

    def begin(self, step: int, token: str) -> ObjectDraft:
        self._live.add(token)
        return ObjectDraft(self, step, token)

    def end(self, step: int, token: str, *, committed: bool) -> None:
        """Notes that a draft is finished, one way or the other."""
        self._live.discard(token)
        if committed:
            self._tokens[step], self._files = token, None

    def remove(self, steps: Set[int]) -> None:
        self.objects.remove([f"{name_of(step)}{COMMIT}" for step in sorted(steps)])
        self._files = None
        for step in steps:
            self._tokens.pop(step, None)
        for folder in self.objects.children().folders if steps else []:
            step, token = _parse(folder)
            if step in steps and token not in self._live:
                self.remove_folder(folder)

    def clean(self) -> None:
        folders, objects = self.objects.children()
        committed = set(_steps(objects))
        for folder in folders:
            step, token = _parse(folder)
            if step is None or token in self._live:
                continue
            # What resists stays: nobody sees it, and the next save tries again.
            with contextlib.suppress(OSError):
                if step not in committed or token != self.token(step):
                    self.remove_folder(folder)

    def remove_folder(self, folder: str) -> None:
        """Everything below it."""
        self.objects.remove([f"{folder}/{name}" for name in self.objects.tree(f"{folder}/")])

    def token(self, step: int) -> str:
        """Which folder is the checkpoint of a step. Raises OSError, FileNotFoundError where there is none."""
        if step not in self._tokens:
            self._tokens[step] = self._commit_of(step)["token"]
        return self._tokens[step]

    def _open(self, step: int) -> StoredFiles:
        if self._files is None or self._files[0] != step:
            self._files = step, StoredFiles(self.objects, f"{name_of(step)}.{self.token(step)}")
        return self._files[1]

    def _commit_of(self, step: int) -> dict[str, Any]:
        name = f"{name_of(step)}{COMMIT}"
        try:
            found = json.loads(bytes(self.objects.read(name)))
            return {"token": str(found["token"]), "along": dict(found["along"])}
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(errno.EIO, "not what was written", f"{self.objects.url}/{name}") from error


class ObjectDraft:
    """A folder `checkpoint-20.3fa91b2c` without a COMMIT."""

    def __init__(self, place: ObjectPlace, step: int, token: str) -> None:
        self._place, self._step, self._token = place, step, token
        self._folder, self._commit = f"{name_of(step)}.{token}", f"{name_of(step)}{COMMIT}"
        self._begun = self._uncertain = False
        self._replaces: bytes | None = None

    def write(self, file: str, chunks: Iterable[bytes | memoryview]) -> None:
        if not self._begun:
            self._begun, self._replaces = True, self._committed()
        send(self._place.objects, f"{self._folder}/{file}", chunks, self._place.part_bytes)

    def commit(self, manifest: bytes) -> None:
        """Raises FileExistsError where another writer has committed this step since this one began."""
        self._require_files(manifest)
        self.write(MANIFEST, [manifest])
        along = {}
        for path in filter(Path.exists, self._place.along):
            data = path.read_bytes()
            self.write(ALONG + path.name, [data])
            along[path.name] = _facts(data)
        if self._place.owner is not None:
            self._place.owner.check()
        if self._replaces is not None and self._committed() == self._replaces:
            self._place.objects.remove([self._commit])
        self._uncertain = True
        try:
            self._place.objects.create(self._commit, json.dumps({"token": self._token, "along": along}).encode())
        except FileExistsError:
            self._uncertain = False
            raise
        self._place.end(self._step, self._token, committed=True)

    def abandon(self) -> None:
        # A failing store may refuse this too: the next `clean` tries again. It also does where the COMMIT was sent and
        # no answer came: should it still arrive, it stands for files that are all there.
        if not self._uncertain:
            with contextlib.suppress(OSError):
                self._place.remove_folder(self._folder)
        self._place.end(self._step, self._token, committed=False)

    def _committed(self) -> bytes | None:
        """The COMMIT that the step has."""
        try:
            return bytes(self._place.objects.read(self._commit))
        except FileNotFoundError:
            return None

    def _require_files(self, manifest: bytes) -> None:
        """A rank with another store behind the same url would have written elsewhere."""
        sizes = StoredFiles(self._place.objects, self._folder).sizes()
        for file, facts in decode_manifest(manifest)["files"].items():
            if sizes.get(file) != facts["size"]:
                reason = f"{sizes.get(file, 'no')} bytes are there, {facts['size']} were written"
                raise OSError(errno.EIO, reason, f"{self._place.objects.url}/{self._folder}/{file}")


def _steps(names: Iterable[str]) -> list[int]:
    """Of `checkpoint-20.COMMIT` and its like."""
    found = (step_of(name.removesuffix(COMMIT)) for name in names if name.endswith(COMMIT))
    return [step for step in found if step is not None]


def _parse(folder: str) -> tuple[int | None, str]:
    """(20, "3fa91b2c") of `checkpoint-20.3fa91b2c`; None for all else, which is not ours."""
    found = re.fullmatch(r"(checkpoint-[0-9]+)\.([0-9a-f]+)", folder)
    return (step_of(found[1]), found[2]) if found else (None, "")


def _facts(data: bytes) -> dict[str, int]:
    return {"size": len(data), "crc32": zlib.crc32(data)}
