"""The data that travels: rows, samples, groups, blocks, and what a model and a loss say about them.

Shape suffixes, everywhere in the project:

    _T tokens of a block    _D documents of a block    _H hidden    _V vocabulary    _K top-k    _G group

One alignment rule: a vector over tokens is indexed by the token it *speaks of*. `logprobs[t]` is
log p(token_ids[t] | what came before t in its document), so `loss_mask`, `advantages`, `logprobs` and `entropy` line up
with `token_ids` and no loss ever shifts anything; `model/project.py` reads the hidden state of t - 1 for it.

Samples are numpy (host, made by background threads); blocks are torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from burnish.errors import DataError


@dataclass(slots=True, frozen=True)
class Row:
    """One record as its source holds it, and the place a person would look for it.

    >>> Row({"messages": [{"role": "user", "content": "hi"}]}, where="data/train.jsonl:17")
    """

    record: dict[str, Any]
    where: str


@dataclass(slots=True, frozen=True)
class Sample:
    """One rendered document: arrays of one length `T`.

    The conversation user "2+2?" / assistant "4" under a toy template `<u>2+2?</u><a>4</a>`:

        token_ids  [  1,  20,  11,  20,   9,   2,   3,  22,   4]     <u> 2 + 2 ? </u> <a> 4 </a>
        loss_mask  [  0,   0,   0,   0,   0,   0,   0,   1,   1]     True: the model is trained to predict this token
        columns    {"weight": array(0.5)}                            shape (): one a document, shape [T]: one a token

    `loss_mask[0]` is always False: nothing stands before the first token of a document that could predict it.
    """

    token_ids: np.ndarray
    """int32 [T]"""
    loss_mask: np.ndarray
    """bool [T]"""
    sample_id: str
    """Where it came from, for people: `data/train.jsonl:17`."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True, frozen=True)
class Group:
    """The unit that packing never splits over rows: one sample, a preference pair, a rollout group."""

    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return sum(len(sample) for sample in self.samples)


@dataclass(slots=True, frozen=True)
class Rendered:
    """What became of a row: a group, or the reason why there is none; and where every token went.

    `fates` counts this row's tokens by fate and must add up to all tokens of the row, for example
    `{"trained": 2, "masked": 7}` or `{"dropped: longer than max_length": 9000}`. Keys are `trained`, `masked`,
    `boundary` (a token that straddles template and content), `truncated`, `dropped: <reason>`.
    """

    row: Row
    group: Group | None
    fates: Counter[str]
    refusal: DataError | None = None
    """Why the run must stop here (a bad row, or a long one under `over_length: refuse`); raised when it is consumed."""


@dataclass(slots=True)
class Block:
    """One packed row of fixed length T, or several laid end to end (a micro-batch): see `collate`.

    Two documents of 3 and 4 tokens in a row of 8, the last slot padding:

        token_ids     [ 5, 6, 7,  8, 9, 4, 3,  0]      int64 [T]
        loss_mask     [ 0, 1, 1,  0, 0, 1, 1,  0]      bool  [T]
        position_ids  [ 0, 1, 2,  0, 1, 2, 3,  0]      int64 [T]
        document_ids  [ 0, 0, 0,  1, 1, 1, 1, -1]      int64 [T], -1: padding
        documents     [[0, 3, 0, 0],                   int32 [D, 4]: start, end, prefix_start, prefix_end
                       [3, 7, 0, 0],
                       [0, 0, 0, 0]]                   unused entries are zero, so D is fixed and compile sees one shape
        group_ids     [0, 1, -1]                       int64 [D]

    Tokens start..end of a document see themselves causally, and all of prefix_start..prefix_end before that: a prompt
    shared by a pair is one document, both completions name it as their prefix. Their positions then go on after it.
    Padding belongs to no document, is seen by none and computed by none.
    """

    token_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    documents: Tensor
    group_ids: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    """[T] a value a token (0 on padding) or [D] a value a document (0 on unused entries)."""
    sample_ids: tuple[str, ...] = ()
    """One for each document in use, in order; host side only."""

    @property
    def num_tokens(self) -> int:
        """Slots, padding included."""
        return self.token_ids.numel()

    @property
    def num_documents(self) -> int:
        """Documents in use."""
        return len(self.sample_ids)

    def to(self, device: Any) -> Block:
        """The same block with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, **moved, columns={k: v.to(device, non_blocking=True) for k, v in self.columns.items()})


_TENSORS = ("token_ids", "loss_mask", "position_ids", "document_ids", "documents", "group_ids")


def collate(blocks: list[Block]) -> Block:
    """Lays blocks end to end: a micro-batch of n rows of length T is one block of n * T tokens.

    Document entries keep their order (the padded entries between rows stay zero), so D is n times the row's D.
    """
    import torch

    if len(blocks) == 1:
        return blocks[0]
    documents, document_ids, group_ids = [], [], []
    tokens = entries = groups = 0
    for block in blocks:
        used = (block.documents[:, 1] > block.documents[:, 0]).unsqueeze(1)
        has_prefix = block.documents[:, 3:4] > block.documents[:, 2:3]
        documents.append(block.documents + tokens * torch.cat([used, used, has_prefix, has_prefix], 1).to(torch.int32))
        document_ids.append(torch.where(block.document_ids >= 0, block.document_ids + entries, -1))
        group_ids.append(torch.where(block.group_ids >= 0, block.group_ids + groups, -1))
        tokens += block.num_tokens
        entries += block.documents.shape[0]
        groups += int(block.group_ids.max().item()) + 1
    return Block(
        token_ids=torch.cat([b.token_ids for b in blocks]),
        loss_mask=torch.cat([b.loss_mask for b in blocks]),
        position_ids=torch.cat([b.position_ids for b in blocks]),
        document_ids=torch.cat(document_ids),
        documents=torch.cat(documents),
        group_ids=torch.cat(group_ids),
        columns={name: torch.cat([b.columns[name] for b in blocks]) for name in blocks[0].columns},
        sample_ids=tuple(i for b in blocks for i in b.sample_ids),
    )


@dataclass(slots=True)
class TokenOutputs:
    """What the projection computed for a loss: exactly what the loss `needs`, the rest is None.

    Vectors are float32 [T], differentiable, indexed by the token they speak of, and 0 where the loss does not read.
    """

    weighted_nll: Tensor | None = None
    """Scalar: sum over t of coefficients[t] * -logprobs[t]; its gradient was computed in the forward pass."""
    logprobs: Tensor | None = None
    """log p(token_ids[t] | before)."""
    entropy: Tensor | None = None
    """Of the distribution that token t was drawn from, in nats."""
    topk_logprobs: Tensor | None = None
    """[T, K] at the ids that `block.columns["topk_ids"]` names."""
    full_kl: Tensor | None = None
    """Divergence to a second model's whole distribution at t, in nats."""
    values: Tensor | None = None
    """A value head's reading of the state that token t was drawn from."""


Metric = tuple[float, float]
"""(sum, count): adds over micro-batches and ranks, and is divided only where a person reads it."""


class LossOutput(NamedTuple):
    """A loss's sum over a block; whoever called divides by a count taken over the whole batch."""

    total: Tensor
    metrics: dict[str, tuple[Tensor | float, Tensor | float]]
    """name -> (sum, count)"""
