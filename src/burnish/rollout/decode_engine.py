"""Continuous batching over a policy's model: requests join and leave between two tokens.

Each request has a slot of the cache. Of requests whose prompts are equal the first one reads it, and the others copy
its keys and values; a prompt that begins as another one did, or goes on where a finished turn ended, copies that part.
Keys and values stay as they are when weights change under a request, and are copied by no later one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from burnish.errors import RunFailed, SyncFailed
from burnish.rollout.decode_cache import Feed
from burnish.rollout.decode_draw import draw, uniform
from burnish.rollout.decode_model import Decoder
from burnish.rollout.decode_stop import StopTexts
from burnish.rollout.engine import EngineSetup, Receipt, Weights
from burnish.rollouts import Completion, Request

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel

log = logging.getLogger(__name__)

_WORTH_COPYING = 32
"""Tokens that two different prompts must begin with in common; fewer are read in the pass that reads the rest."""
_LEAST_STRETCH = 128
"""Tokens of prompts in a pass below which it is not memory for them that is missing."""


@dataclass(slots=True)
class _Turn:
    """A request and what was sampled for it."""

    request: Request
    token_ids: list[int]
    """Prompt and sampled."""
    stop_token_ids: frozenset[int]
    most: int
    """Length at which it is cut off."""
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    is_counted: bool = False
    """Among the facts."""

    def completion(self, finish_reason: Literal["stop", "length"]) -> Completion:
        sampled = self.token_ids[len(self.request.prompt_ids) :]
        return Completion(self.request.request_id, sampled, self.logprobs, self.versions, finish_reason)


@dataclass(slots=True)
class _Slot:
    """A place in the cache; without a turn it still holds what its last one left."""

    turn: _Turn | None = None
    token_ids: list[int] = field(default_factory=list)
    """The turn's own list."""
    cached: int = 0
    """How many of them have keys and values."""
    epoch: int = -1
    """Of the weights that computed the first of those."""
    waits: bool = False
    """For another slot, which is reading the same tokens."""


class _Source(NamedTuple):
    """Where the beginning of a sequence is held already."""

    slot: int
    common: int
    """Tokens."""
    is_ready: bool
    """False: they are being read."""


class DecodeEngine:
    """The embedded engine with its model in memory; see `engine.LiveEngine`.

    Args:
        take: applies a version's weights to the model; None: they are the policy's own, which are new already.
    """

    def __init__(
        self,
        model: PolicyModel,
        setup: EngineSetup,
        max_concurrent: int,
        max_batch_tokens: int,
        *,
        take: Callable[[PolicyModel, Weights], Receipt] | None = None,
    ) -> None:
        self.model, self.setup, self.version = model, setup, -1
        self._take, self._budget = take, max_batch_tokens
        self.on_close: Callable[[], None] = lambda: None
        """Gives back what the model was loaded with."""
        self._device = next(model.parameters()).device
        compiled = take is None and setup.model.compile is not None
        self._decoder = Decoder(model, max_concurrent, compiled=compiled)
        self._decoder.verify(setup.max_length)
        self._slots = [_Slot() for _ in range(max_concurrent)]
        self._queue: deque[_Turn] = deque()
        self._finished: list[Completion] = []
        self._epoch = 0
        """Counts versions that were taken, the same one twice too."""
        self._stops = StopTexts(setup.tokenizer_path)
        self._facts = {"prompt_tokens": 0.0, "prompt_tokens_shared": 0.0, "sampled_tokens": 0.0, "busy_seconds": 0.0}

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues them.

        Raises:
            ModelError: stop texts, and no tokenizer to find them with.
        """
        for request in requests:
            assert request.prompt_ids, f"{request.request_id}: nothing to go on from"
            self._stops.require(request.params.stop)
            most = min(self.setup.max_length, len(request.prompt_ids) + request.params.max_new_tokens)
            stops = frozenset((*self.setup.stop_token_ids, *request.params.stop_token_ids))
            self._queue.append(_Turn(request, list(request.prompt_ids), stops, most))

    @property
    def num_unfinished(self) -> int:
        """Requests queued or in flight."""
        return len(self._queue) + sum(slot.turn is not None for slot in self._slots)

    def step(self) -> list[Completion]:
        """One token for each turn in flight whose prompt is read, and `max_batch_tokens` of the other prompts.

        Raises:
            RunFailed: out of memory with one slot, logits that are not finite, or no version to sample from.
        """
        if not self.num_unfinished:
            return []
        if self.version < 0:
            raise SyncFailed("asked to sample, and the engine holds no version of the policy")
        started = time.perf_counter()
        while (finished := self._tried()) is None:
            continue
        self._facts["busy_seconds"] += time.perf_counter() - started
        return finished

    def abort(self) -> None:
        """Forgets all requests."""
        self._queue.clear()
        self._finished = []
        for slot in self._slots:
            slot.turn, slot.waits = None, False

    def update_weights(self, weights: Weights) -> Receipt:
        """See `engine.LiveEngine`."""
        started = time.perf_counter()
        self.version, self._epoch = -1, self._epoch + 1  # no valid version, should it fail
        receipt = self._take(self.model, weights) if self._take else Receipt(weights.version, weights.digest, 0, 0.0)
        self.version = weights.version
        return Receipt(receipt.version, receipt.digest, receipt.num_bytes, time.perf_counter() - started)

    def sleep(self) -> None:
        """Gives the cache back, and a model of its own to the host's memory."""
        assert not self.num_unfinished, "asked to sleep with requests in flight"
        self._forget(len(self._slots))
        if self._take is not None:
            self.model.to("cpu")
            self._free()

    def wake(self) -> None:
        """Takes the model back; the cache grows anew."""
        if self._take is not None:
            self.model.to(self._device)

    def facts(self) -> dict[str, float]:
        """See `engine.LiveEngine`."""
        return dict(self._facts)

    def close(self) -> None:
        """Gives everything back."""
        self.abort()
        self._forget(len(self._slots))
        self.on_close()

    def _tried(self) -> list[Completion] | None:
        """A step, or None where memory was short and there is now more of it."""
        try:
            return self._step()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
        self._shrink(reason)  # out here: the error's frames hold the tensors that did not fit
        return None

    def _step(self) -> list[Completion]:
        self._join()
        feeds = self._feeds()
        if feeds:
            last = [len(self._slots[feed.slot].token_ids) == feed.start + len(feed.token_ids) for feed in feeds]
            logits = self._decoder.logits(feeds, last)
            for feed in feeds:
                self._slots[feed.slot].cached = feed.start + len(feed.token_ids)
            self._draw(logits, [self._slots[feed.slot] for feed, is_last in zip(feeds, last, strict=True) if is_last])
        finished, self._finished = self._finished, []
        return finished

    def _draw(self, logits: Tensor, slots: list[_Slot]) -> None:
        turns = [slot.turn for slot in slots if slot.turn is not None]
        if not turns:
            return
        tokens, logprobs = draw(
            logits,
            [turn.request.params for turn in turns],
            [uniform(turn.request.seed, len(turn.logprobs)) for turn in turns],
        )
        for slot, turn, token, logprob in zip(slots, turns, tokens, logprobs, strict=True):
            turn.token_ids.append(token)
            turn.logprobs.append(logprob)
            turn.versions.append(self.version)
            reason = self._over(turn)
            if reason is not None:
                slot.turn = None
                self._finished.append(turn.completion(reason))
        self._facts["sampled_tokens"] += len(turns)

    def _over(self, turn: _Turn) -> Literal["stop", "length"] | None:
        if turn.token_ids[-1] in turn.stop_token_ids:
            return "stop"
        stops = turn.request.params.stop
        if stops and self._stops.ended(turn.token_ids[len(turn.request.prompt_ids) :], stops):
            return "stop"
        return "length" if len(turn.token_ids) >= turn.most else None

    def _join(self) -> None:
        """Gives free slots to queued turns, and sends those back that have no room for a token."""
        free = [index for index, slot in enumerate(self._slots) if slot.turn is None]
        while self._queue and free:
            turn = self._queue.popleft()
            if len(turn.token_ids) >= turn.most:
                self._finished.append(turn.completion("length"))
                continue
            source = self._source(turn.token_ids)
            index = source.slot if source is not None and source.slot in free else free[0]
            free.remove(index)
            self._place(index, turn, source)
        for index, slot in enumerate(self._slots):
            if slot.turn is not None and slot.waits:
                self._place(index, slot.turn, self._source(slot.token_ids))

    def _place(self, index: int, turn: _Turn, source: _Source | None) -> None:
        """Puts a turn in a slot with what `source` holds of its tokens, or lets it wait there until that is read."""
        slot = self._slots[index]
        slot.turn, slot.token_ids, slot.cached, slot.epoch = turn, turn.token_ids, 0, self._epoch
        slot.waits = source is not None and not source.is_ready
        if slot.waits:
            return
        common = 0 if source is None else source.common
        if source is not None and source.slot != index:
            self._decoder.cache.copy(source.slot, index, common)
        slot.cached = common
        if not turn.is_counted:
            turn.is_counted = True
            self._facts["prompt_tokens"] += len(turn.request.prompt_ids)
            self._facts["prompt_tokens_shared"] += common

    def _source(self, token_ids: list[int]) -> _Source | None:
        """Where most of the beginning of `token_ids` is held, or will be. All but the last one, at most: that one is
        run, for its logits."""
        need, best = len(token_ids) - 1, None
        for index, slot in enumerate(self._slots):
            if slot.epoch != self._epoch or slot.waits or not need:
                continue
            if slot.token_ids[:need] == token_ids[:need] and (slot.turn is not None or slot.cached >= need):
                return _Source(index, need, slot.cached >= need)
            common = common_beginning(slot.token_ids[: slot.cached], token_ids[:need])
            if common >= _WORTH_COPYING and (best is None or common > best.common):
                best = _Source(index, common, True)
        return best

    def _feeds(self) -> list[Feed]:
        """What the next pass runs: the next token of every turn that is sampled, and of prompts as much as allowed."""
        singles: list[Feed] = []
        stretches: list[Feed] = []
        rest = {
            index: len(slot.token_ids) - slot.cached
            for index, slot in enumerate(self._slots)
            if slot.turn is not None and not slot.waits
        }
        left = max(self._budget - sum(count == 1 for count in rest.values()), 1)
        for index, count in rest.items():
            slot = self._slots[index]
            taken = 1 if count == 1 else min(count, left)
            left -= taken if count > 1 else 0
            if not taken:
                continue
            if not slot.cached:
                slot.epoch = self._epoch
            feed = Feed(index, slot.cached, slot.token_ids[slot.cached : slot.cached + taken])
            (singles if taken == 1 else stretches).append(feed)
        return singles + stretches

    def _shrink(self, reason: str) -> None:
        """Goes on with half the slots that were in flight and shorter stretches; turns that had one are queued again
        with their tokens, and read anew."""
        turns = [slot.turn for slot in self._slots if slot.turn is not None]
        if len(turns) <= 1 and self._budget <= _LEAST_STRETCH:
            raise RunFailed(
                f"out of memory with one request in flight ({reason})\n  cure: lower `data.max_length` or "
                "`rollout.sampling.max_new_tokens`, or give the engine a device with more memory"
            )
        slots, self._budget = max(len(turns) // 2, 1), max(self._budget // 2, _LEAST_STRETCH)
        log.warning("out of memory: from now on %d requests at once (%s)", slots, reason)
        self._forget(slots)
        self._queue.extendleft(reversed(turns))
        self._free()

    def _free(self) -> None:
        """Gives the blocks of tensors that are gone back to the device; the allocator would keep them."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _forget(self, slots: int) -> None:
        """Begins anew with an empty cache of so many slots."""
        self._decoder.cache.clear()
        self._decoder.cache.num_slots = slots
        self._slots = [_Slot() for _ in range(slots)]


def common_beginning(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences begin with in common; 0 where they are fewer than are worth copying.

    By halves, because slices are compared in C: 2 us for 1,000 tokens.
    """
    low, high = 0, min(len(one), len(other))
    if high < _WORTH_COPYING or one[:_WORTH_COPYING] != other[:_WORTH_COPYING]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
