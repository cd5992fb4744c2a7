"""An object store as checkpoints need it: whole objects, put, created once, listed, read in ranges, deleted.

Owns every request: its timeout, its retries, and what its failure is called: an `OSError` without secrets, a
`ConnectionError` where the store is away, a `PermissionError` where it refuses; those two say nothing about what is
stored. The one file that imports obstore. Must not know what a checkpoint is. A store that fails on purpose in a test
is a subclass; each method under "changing" is one moment at which the machine can die.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from burnish.errors import UserError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

MAX_PAUSE_SECONDS = 15.0


class Patience(NamedTuple):
    """How long a request may take and how often it is tried: a store that hangs is given up after about 5 minutes."""

    request_seconds: float = 60.0
    """One try, from the first byte sent to the last received: a part of 32 MiB needs 0.6 MB/s."""
    tries: int = 5
    pause_seconds: float = 0.5
    """Before the second try; doubled before each further one, and shortened at random by up to a half, so that a
    thousand ranks that were throttled together do not come back together."""


class Listing(NamedTuple):
    """What lies directly below a prefix."""

    folders: list[str]
    """Names, without the prefix, that have objects below them."""
    objects: dict[str, int]
    """Name, without the prefix -> bytes."""


class Objects:
    """The objects below `s3://bucket/prefix`, `gs://...`, `az://...`, or a folder as `file://...`.

    Names are relative to it: `checkpoint-20.COMMIT`. Credentials, region and endpoint are taken from the environment as
    obstore does (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL`...), or from the machine's role.
    """

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        """Sends nothing yet.

        Raises:
            UserError: obstore is missing, or it cannot make a store of this url and environment.
        """
        self.url = url.rstrip("/")
        self.patience = patience or Patience()
        self._store = _open(url, self.patience)

    # reading

    def read(self, name: str, offset: int = 0, size: int | None = None) -> Any:
        """A read-only buffer of `size` bytes from `offset` (absent: of the whole object). Raises OSError."""
        import obstore

        if size == 0:
            return b""
        if size is None:
            return self._patiently(name, lambda: obstore.get(self._store, name).bytes())
        return self._patiently(name, lambda: obstore.get_range(self._store, name, start=offset, length=size))

    def children(self, prefix: str = "") -> Listing:
        """What lies below `prefix` (a folder's name with its slash, or nothing), one level deep. Raises OSError."""
        import obstore

        found = self._patiently(prefix, lambda: obstore.list_with_delimiter(self._store, prefix or None))
        return Listing(
            sorted(path.rstrip("/")[len(prefix) :] for path in found["common_prefixes"]),
            {entry["path"][len(prefix) :]: entry["size"] for entry in found["objects"]},
        )

    def tree(self, prefix: str) -> dict[str, int]:
        """Name, without the prefix -> bytes of all objects below `prefix`, at any depth, sorted. Raises OSError."""
        import obstore

        found = self._patiently(prefix, lambda: obstore.list(self._store, prefix).collect())
        return dict(sorted((entry["path"][len(prefix) :], entry["size"]) for entry in found))

    # changing

    def put(self, name: str, data: bytes | memoryview, *, tries: int | None = None) -> None:
        """The whole object, durable on return, in place of one that has the name. Raises OSError.

        Never in several uploads: what a dead process had uploaded of one would be paid for, and no request of obstore
        lists or aborts it.
        """
        import obstore

        self._patiently(name, lambda: obstore.put(self._store, name, data, use_multipart=False), tries)

    def create(self, name: str, data: bytes) -> None:
        """An object that did not exist; `data` is no other writer's.

        Raises:
            FileExistsError: another writer's object has the name.
            OSError: also where nobody can say whether it was created.
        """
        import obstore

        def request() -> None:
            try:
                obstore.put(self._store, name, data, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                # Ours, where the answer to an earlier try was lost on its way.
                if bytes(obstore.get(self._store, name).bytes()) != data:
                    raise

        self._patiently(name, request)

    def remove(self, names: Sequence[str]) -> None:
        """Deletes; one that does not exist is deleted already. Raises OSError: some of them may be gone."""
        import obstore

        def request() -> None:
            try:
                obstore.delete(self._store, list(names))
            except FileNotFoundError:  # of a folder; the stores themselves do not mind
                _delete_one_by_one(self._store, names)

        if names:
            self._patiently(names[0], request)

    def _patiently(self, name: str, request: Callable[[], T], tries: int | None = None) -> T:
        """The request's result, tried again where another try may help."""
        import obstore

        hopeless = (
            FileNotFoundError,
            obstore.exceptions.AlreadyExistsError,
            obstore.exceptions.InvalidPathError,
            obstore.exceptions.NotSupportedError,
            obstore.exceptions.PermissionDeniedError,
            obstore.exceptions.UnauthenticatedError,
        )
        pause = self.patience.pause_seconds
        for left in reversed(range(tries or self.patience.tries)):
            try:
                return request()
            except (OSError, obstore.exceptions.BaseError) as error:
                if left == 0 or isinstance(error, hopeless):
                    raise _as_oserror(error, f"{self.url}/{name}") from None  # its text may hold a signed url
            time.sleep(min(pause, MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0))
            pause *= 2
        raise AssertionError("no tries")


def _open(url: str, patience: Patience) -> ObjectStore:
    try:
        import obstore.store
    except ImportError as error:
        cure = 'pip install "burnish[store]"'
        raise UserError("an object store needs obstore", where="checkpoint.store", cure=cure) from error
    if url.startswith("file://"):
        return obstore.store.LocalStore(url.removeprefix("file://"), mkdir=True)
    options: Any = _client_environment() | {
        "timeout": timedelta(seconds=patience.request_seconds),
        "connect_timeout": timedelta(seconds=min(10.0, patience.request_seconds)),
    }
    # obstore would repeat some requests itself, but no creation whose answer was lost: all are repeated here.
    once: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=patience.request_seconds)}
    try:
        return obstore.store.from_url(url, client_options=options, retry_config=once)
    except (ValueError, obstore.exceptions.BaseError) as error:
        cure = "give the account, region, endpoint and credentials in the environment (docs/object-store.md)"
        raise UserError(f"no store can be made of it: {said(error)}", where=url, cure=cure) from None


def _client_environment() -> dict[str, str]:
    """`AWS_ALLOW_HTTP=true` as `allow_http`: obstore drops what the environment says where options are given."""
    keys = ("allow_http", "allow_invalid_certificates", "proxy_url", "proxy_excludes", "proxy_ca_certificate")
    names = ((key, f"{store}_{key}".upper()) for store in ("aws", "google", "azure") for key in keys)
    return {key: os.environ[name] for key, name in names if name in os.environ}


def _delete_one_by_one(store: ObjectStore, names: Sequence[str]) -> None:
    import contextlib

    import obstore

    for name in names:
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(store, name)


def _as_oserror(error: Exception, where: str) -> OSError:
    import obstore

    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, said(error), where)
    if isinstance(error, obstore.exceptions.AlreadyExistsError):
        return FileExistsError(errno.EEXIST, "another writer was first", where)
    # An expired token is `400 Bad Request: ExpiredToken`, a condition that is not known `501 Not Implemented`. 408, 429
    # and the other 5xx ask to come again.
    status = re.search(r"status code: (\d+)", str(error))
    refused = status is not None and re.fullmatch(r"501|(?!408|429)4\d\d", status[1])
    denied = (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError)
    if refused or isinstance(error, (*denied, obstore.exceptions.NotSupportedError)):
        return PermissionError(errno.EACCES, said(error), where)
    return ConnectionError(errno.EIO, said(error), where)


def said(error: Exception) -> str:
    """One line of what a store or its client said, without what a url's query or user part may hold."""
    text, _, debug = str(error).partition("\n\nDebug")
    code = re.search(r"<Code>(\w+)</Code>", text)  # SlowDown, NoSuchBucket: the rest of the document is long
    cause = re.search(r'message: "([^"]+)"', debug)
    words = [text.split("<")[0]]
    words += [code[1]] if code else []
    words += ["(timed out)"] if "kind: Timeout" in debug else [f"({cause[1]})"] if cause else []
    line = re.sub(r"\?[^\s)\"']+", "", re.sub(r"//[^/\s@]+@", "//", " ".join(" ".join(words).split())))
    return re.sub(r"Error performing (\w+) (\S+) in [\d.]+\w+ - ", r"\1 \2: ", line)[:400]
