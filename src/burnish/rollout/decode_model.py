"""A pass of the policy's model over the next tokens of many sequences, and the proof that it is what training computes.

It must not know requests or how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.errors import ModelError
from burnish.model.policy_model import one_document
from burnish.model.positions import is_rotary
from burnish.rollout.decode_cache import Cache, Feed, Pass

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel

_PROBE = 12
"""Tokens of the probe: longer than any short convolution's kernel (3 or 4 in LFM2, Mamba and Qwen3-Next)."""
_READ = 6
"""Of them read as a prompt; the others are given one by one."""


class Decoder:
    """A model and the cache of its sequences.

    Args:
        compiled: its layers are; they then run as they were, since every pass has another shape.
    """

    def __init__(self, model: PolicyModel, num_slots: int, *, compiled: bool = False) -> None:
        self.model, self.cache = model, Cache(num_slots)
        self._modules = list(model.modules())
        self._compiled = compiled

    def logits(self, feeds: Sequence[Feed], last: Sequence[bool]) -> Tensor:
        """Float32 logits [n, V] of what follows the feeds that `last` marks; those of one token come first."""
        device = next(self.model.parameters()).device
        row = Pass(self.cache, feeds, device)
        ends = torch.tensor([len(feed.token_ids) for feed in feeds]).cumsum(0) - 1
        with torch.no_grad(), self._evaluating(), self._stance():
            return self.model.next_logits(row.token_ids, row.position_ids, ends[list(last)].to(device), row)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        for module in training:  # not `eval()`, which would forget which of them were
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _stance(self) -> AbstractContextManager[None]:
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def verify(self, max_length: int) -> None:
        """Gives it a few tokens one by one and compares their log-probabilities with the model's over the finished row.

        Read in two stretches, then token by token, beside a sequence of another length; under rotary embeddings that
        one stands at the end of `max_length`, since some of them (`dynamic`, `longrope`) choose every token's
        frequencies by the largest position of the row.

        Raises:
            ModelError: they differ: it keeps more of a sequence than keys and values, or mixes tokens of a row.
        """
        model, device = self.model, next(self.model.parameters()).device
        ids = torch.randint(1, model.vocab_size, (_PROBE,), generator=torch.Generator().manual_seed(0)).to(device)
        block = one_document(ids)
        far = max(max_length - _PROBE, 0) if is_rotary(model.hf_config) else 0
        with torch.no_grad(), self._evaluating(), self._stance():
            expected = model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask).logprobs[_READ:]
            logits = self._probed(ids.tolist(), far, device) / model.temperature
        found = logits.log_softmax(1).gather(1, ids[_READ:, None]).squeeze(1)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= (1e-3 if model.head.weight.dtype == torch.float32 else 5e-2):
            raise ModelError(
                f"{type(model.causal_lm).__name__} cannot be sampled token by token: log-probabilities differ by "
                f"{difference:.1g} of the largest from those over the whole row",
                where="rollout.engine",
                cure="take another engine, or a model whose layers attend and keep nothing but keys and values",
            )

    def _probed(self, ids: list[int], far: int, device: torch.device) -> Tensor:
        """Logits behind each token but the first few and the last, with the other sequence `far` away."""
        cache, half, logits = Cache(2), _READ // 2, []
        rows = [[Feed(0, 0, ids[:half]), Feed(1, 0, ids[: _READ + 1])]]
        rows += [[Feed(1, _READ + 1, ids[:1]), Feed(0, half, ids[half:_READ])]]
        rows += [[Feed(0, i, ids[i : i + 1]), Feed(1, i + 2, ids[:1])] for i in range(_READ, _PROBE - 1)]
        for feeds in rows:
            row = Pass(cache, feeds, device)
            slots = torch.tensor([feed.slot for feed in feeds for _ in feed.token_ids], device=device)
            positions = row.position_ids + far * slots
            logits.append(self.model.next_logits(row.token_ids, positions, (slots == 0).nonzero()[-1], row))
        return torch.cat(logits[1:])
