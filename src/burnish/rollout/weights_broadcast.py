"""Weights by gloo, from the trainer to whichever engines ask: a process group for each round, and none besides.

    trainer      offers version 7: its listing and digest, in a TCPStore of its own
    engines      each takes a ticket for version 7: 0, 1, 2
    trainer      0.05 s after the last ticket: a round of four ranks, one broadcast a tensor, in chunks
    engine 1     was killed in the middle: the exchange fails for all of them
    engines      0 and 2 take tickets 3 and 4; the next round is theirs

An engine that starts later takes a ticket then. Every collective runs on a daemon thread, and whoever waits for it
waits with a deadline: gloo and nccl have hung forever on a peer that is there and silent. A round gives up after a
third of the deadline, so that those who shared it with a hung engine can have another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from burnish.errors import SyncFailed, UserError
from burnish.rollout.fleet import idle
from burnish.rollout.weights import Listing
from burnish.rollout.weights_file import KEPT, Newest, copy_base, link_base, signed, write_version
from burnish.rollout.weights_place import claim_memory

if TYPE_CHECKING:
    from burnish.rollout.engine import Weights

log = logging.getLogger(__name__)
dist: Any = torch.distributed  # its stores and groups are bound from C++, and typed only in part

POLL_SECONDS = 0.02
GATHER_SECONDS = 0.05
"""After the last ticket: engines ask within a few milliseconds of each other, and a round serves them all at once."""
CHUNK_BYTES = 32 * 2**20
IN_FLIGHT = 4
"""Chunks under way: small tensors would each wait for the one before."""
ROUNDS = 3
"""That fit into the deadline."""


@dataclass(slots=True)
class _Offer:
    """A version in the trainer's memory."""

    version: int
    key: str
    tensors: list[Tensor]
    served: int = 0
    """Tickets that were given a round."""


class BroadcastSender:
    """The trainer's end.

    Raises:
        UserError: `host` is no address of this machine.
    """

    def __init__(self, host: str, seconds: float) -> None:
        try:
            listening = socket.create_server((host, 0))
        except OSError as error:
            cure = "name one that this machine has"
            raise UserError(f"{host}: {error.strerror or error}", "rollout.sync.host", cure) from error
        self._address, self._seconds = (host, listening.getsockname()[1]), seconds
        self._store = dist.TCPStore(
            *self._address,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listening.detach(),  # its own socket would listen on all interfaces
        )
        self._started, self._offers, self._sent = time.time_ns(), deque[_Offer](), 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="weights")
        self._thread.start()

    def send(
        self, version: int, tensors: Iterator[tuple[str, Tensor]], *, adapter_only: bool, folder: Path | None
    ) -> dict[str, Any]:
        """See `Sender`. The tensors are copied."""
        self._sent += 1
        listing, held = Listing(), list[Tensor]()
        for name, tensor in tensors:
            held.append(tensor.detach().to("cpu", copy=True).contiguous())
            listing.add(name, held[-1])
        key = f"{version}-{self._sent}"
        self._store.set(f"{key}/listing", json.dumps(listing.to_json()))
        with self._lock:
            self._offers.append(_Offer(version, key, held))
        self._drop(lambda: len(self._offers) > KEPT)
        facts = {"digest": listing.digest, "num_bytes": listing.num_bytes, "adapter_only": adapter_only}
        place = {"address": list(self._address), "key": key, "base": None if folder is None else str(folder)}
        return {"version": version, "sender": self._started, **facts, **place}

    def forget(self, version: int) -> None:
        """See `Sender`."""
        self._drop(lambda: bool(self._offers) and self._offers[0].version < version)

    def close(self) -> None:
        """Ends what waits for tickets; a round under way ends with its engines."""
        self._closed.set()
        self._thread.join(self._seconds)
        self._drop(lambda: bool(self._offers))

    def _drop(self, more: Callable[[], bool]) -> None:
        with self._lock:
            while more():
                key = self._offers.popleft().key
                self._store.set(f"{key}/gone", "")
                # Emptied: whoever is about to read a key that was deleted would wait for it until the deadline.
                self._store.set(f"{key}/listing", "")

    def _serve(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with self._lock:
                offers = list(self._offers)
            for offer in offers:
                if self._asked(offer) > offer.served:
                    self._start_round(offer)

    def _asked(self, offer: _Offer) -> int:
        return self._store.add(f"{offer.key}/asked", 0)

    def _start_round(self, offer: _Offer) -> None:
        asked = self._asked(offer)
        while not self._closed.wait(GATHER_SECONDS) and (now := self._asked(offer)) > asked:
            asked = now
        first, size = offer.served, asked - offer.served
        offer.served = asked
        name = f"{offer.key}/round-{first}"
        threading.Thread(target=self._round, args=(offer, name, size + 1), daemon=True, name=name).start()
        for place in range(size):
            self._store.set(f"{offer.key}/ticket-{first + place}", json.dumps([name, place + 1, size + 1]))

    def _round(self, offer: _Offer, name: str, size: int) -> None:
        try:
            group = _join(self._address, name, 0, size, self._seconds / ROUNDS)
            for _ in _exchange(group, offer.tensors, self._seconds / ROUNDS):
                pass
        except RuntimeError as error:  # gloo's own; the engines that are well ask again, and have another round
            log.warning("weights of version %d: a round for %d engines failed: %s", offer.version, size - 1, error)


class BroadcastReceiver:
    """An engine's end."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._newest = seconds, Newest()
        self._root: tuple[Path, Callable[[], None]] | None = None

    def receive(self, parcel: dict[str, Any], alive: Callable[[], None] = idle) -> Weights:
        """See `Receiver`. All tensors are in memory on return, and checked."""
        self._newest.require(parcel)
        until, came = time.monotonic() + self._seconds, list[str]()
        host, port = parcel["address"]
        where = f"weights of version {parcel['version']} from {host}:{port}"
        answer: Future[dict[str, Tensor]] = Future()

        def fetch() -> None:
            try:
                answer.set_result(_fetch(parcel, where, came, until, self._seconds))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=fetch, daemon=True, name="weights").start()
        seen = 0
        while not wait([answer], POLL_SECONDS).done:
            if time.monotonic() > until:
                raise SyncFailed(f"{where}: not whole after {self._seconds:g} s; {len(came)} tensors came")
            if len(came) != seen:
                seen = len(came)
                alive()
        return _Received(parcel, answer.result(), self._folder, alive)

    def close(self) -> None:
        """Leaves nothing."""
        if self._root is not None:
            (root, release), self._root = self._root, None
            shutil.rmtree(root, ignore_errors=True)
            release()

    def _folder(self) -> Path:
        """An empty folder; the one before is gone."""
        if self._root is None:
            self._root = claim_memory()
        shutil.rmtree(self._root[0] / "version", ignore_errors=True)
        (self._root[0] / "version").mkdir()
        return self._root[0] / "version"


class _Received:
    """A version in memory."""

    def __init__(
        self, parcel: dict[str, Any], tensors: dict[str, Tensor], folder: Callable[[], Path], alive: Callable[[], None]
    ) -> None:
        self.version: int = parcel["version"]
        self.digest: str = parcel["digest"]
        self.adapter_only: bool = parcel["adapter_only"]
        self._base, self._tensors, self._make_folder, self._alive = parcel["base"], tensors, folder, alive

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Weights`."""
        return iter(self._tensors.items())

    def folder(self) -> Path:
        """See `Weights`: written on this machine."""
        folder = self._make_folder()
        try:
            write_version(folder, signed(self.tensors(), self._alive), adapter_only=self.adapter_only)
            if self._base is not None and Path(self._base).is_dir():  # on a file system that this machine sees
                copy_base(Path(self._base), folder.with_name("base"))
                link_base(folder.with_name("base"), folder)
        except OSError as error:
            raise SyncFailed(f"weights of version {self.version} cannot be written: {error}") from error
        return folder


def _fetch(parcel: dict[str, Any], where: str, came: list[str], until: float, seconds: float) -> dict[str, Tensor]:
    """The tensors by name; the names of those that have come are in `came` at any time."""
    key, address = parcel["key"], tuple(parcel["address"])
    try:
        store = _connect(address, seconds)
        store.add(f"{key}/asked", 0)
    except RuntimeError as error:
        raise SyncFailed(f"{where}: nobody answers there: {_first_line(error)}") from error
    failure = "no round was offered"
    while time.monotonic() < until:
        try:
            said = store.get(f"{key}/listing")
            if not said:
                raise SyncFailed(f"{where}: they are not offered any more")
            listing = Listing.from_json(json.loads(said))
            if listing.digest != parcel["digest"]:
                raise SyncFailed(f"{where}: digest {listing.digest} is offered, {parcel['digest']} was announced")
            ticket = f"{key}/ticket-{store.add(f'{key}/asked', 1) - 1}"
            while not store.check([ticket]):
                if time.monotonic() > until or store.check([f"{key}/gone"]):
                    break
                time.sleep(POLL_SECONDS)
            else:
                name, rank, size = json.loads(store.get(ticket))
                return _take(address, name, rank, size, listing, where, came, seconds / ROUNDS)
        except SyncFailed:
            raise
        except RuntimeError as error:  # gloo's own: somebody in the round died or hangs; the next is without it
            failure = _first_line(error)
            del came[:]
    raise SyncFailed(f"{where}: not whole after {seconds:g} s: {failure}")


def _take(
    address: Any, name: str, rank: int, size: int, listing: Listing, where: str, came: list[str], seconds: float
) -> dict[str, Tensor]:
    group = _join(address, name, rank, size, seconds)
    buffers = (torch.empty(entry.shape, dtype=entry.dtype) for entry in listing.entries.values())
    found: dict[str, Tensor] = {}
    for each, tensor in zip(listing.entries, _exchange(group, buffers, seconds), strict=True):
        found[each] = listing.require(each, tensor, where)
        came.append(each)
    return found


def _connect(address: Any, seconds: float) -> Any:
    """A connection of one's own: a store's blocking calls stop all others of the same one."""
    return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)


def _join(address: Any, name: str, rank: int, size: int, seconds: float) -> Any:
    """A process group beside the default one, on the interface that reaches the trainer."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect(address)  # sends nothing
        here = probe.getsockname()[0]
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=here)]
    options._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupGloo(dist.PrefixStore(name, _connect(address, seconds)), rank, size, options)


def _exchange(group: Any, tensors: Iterable[Tensor], seconds: float) -> Iterator[Tensor]:
    """Broadcasts each tensor from rank 0, and yields it when it is there. Raises RuntimeError: a peer is lost, or does
    not take part in time."""
    under_way: deque[tuple[Any, Tensor | None]] = deque()
    for tensor in tensors:
        chunks = tensor.reshape(-1).view(torch.uint8).split(CHUNK_BYTES) if tensor.numel() else ()
        for chunk in chunks:
            while len(under_way) >= IN_FLIGHT:
                yield from _ended(under_way.popleft(), seconds)
            under_way.append((group.broadcast(chunk, 0), None))
        under_way.append((None, tensor))
    while under_way:
        yield from _ended(under_way.popleft(), seconds)


def _ended(work: tuple[Any, Tensor | None], seconds: float) -> Iterator[Tensor]:
    """Waits for a chunk; behind a tensor's last one stands the tensor."""
    handle, whole = work
    if handle is not None:
        handle.wait(timedelta(seconds=seconds))
    if whole is not None:
        yield whole


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
