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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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


RowKind = Literal["conversation", "preference", "unpaired", "stepwise", "labelled", "retrieval", "history", "rollout"]
"""What a row of a source is, by the names of the ecosystem: turns or text to imitate; prompt, chosen and rejected;
prompt, completion and a yes or no; steps with a label each; anything with labels; a query and what answers it; what
a user chose, in order; a prompt that the policy itself answers."""


@dataclass(slots=True, frozen=True)
class RowFormat:
    """What a loss wants each row to be.

    >>> RowFormat("labelled", {"label": ("negative", "positive")})     # class names; () where the label is a number
    """

    kind: RowKind = "conversation"
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label columns that the loss reads -> names of their classes, in the order of the head's outputs."""


CONVERSATIONS = RowFormat()
"""Rows to imitate: the default."""


@dataclass(slots=True, frozen=True)
class NewTokens:
    """Tokens that a model is to learn: ids `first`, `first + 1`, ... up to `len(sources)` of them.

    >>> NewTokens(49152, sources=((314, 51), ()))    # 49152 begins at the mean of rows 314 and 51, 49153 at that of all
    """

    first: int
    sources: tuple[tuple[int, ...], ...]
    """For each the old tokens at the mean of whose rows it begins; () for all."""
    train_all: bool = False
    """Whether the old rows of embedding and head train as well."""


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
    prefix: int | None = None
    """Index in its group of the sample whose tokens stand before this one's: a prompt that a pair shares is one sample,
    and both completions name it. Then `loss_mask[0]` may be True."""

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
    `boundary` (a token that straddles template and content), `truncated` (to max_length), `truncated to a packed row`
    and `dropped: <reason>`.
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


def last_tokens(block: Block) -> Tensor:
    """bool [T]: the last token of each document that is no shared prefix of another."""
    import torch

    start, end, prefix_start, prefix_end = block.documents.long().unbind(1)
    is_prefix = ((start[:, None] == prefix_start) & (end[:, None] == prefix_end)).any(1)
    last = torch.where((end > start) & ~is_prefix, end - 1, block.num_tokens)  # the others mark a slot behind the end
    marks = torch.zeros(block.num_tokens + 1, dtype=torch.bool, device=block.token_ids.device)
    return marks.index_fill(0, last, True)[:-1]


def previous_token(block: Block) -> Tensor:
    """int64 [T]: the token whose hidden state predicts token t, -1 where there is none.

    That is t - 1 inside a document; for a document's first token the last token of its shared prefix; none for the
    first token of a document without a prefix, and for padding. Tensor operations only, the host never waits.
    """
    import torch

    index_T = torch.arange(block.num_tokens, device=block.token_ids.device)
    start_T, _, prefix_start_T, prefix_end_T = block.documents[block.document_ids.clamp(min=0)].long().unbind(1)
    before_first_T = torch.where(prefix_end_T > prefix_start_T, prefix_end_T - 1, -1)
    previous_T = torch.where(index_T > start_T, index_T - 1, before_first_T)
    return torch.where(block.document_ids >= 0, previous_T, -1)


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
    """[T, K] at the ids that `block.columns["teacher_topk_ids"]` names."""
    full_kl: Tensor | None = None
    """Divergence to a second model's whole distribution at t, in nats."""
    candidate_logits: Tensor | None = None
    """[T, 1 + K] unnormalised: of token t itself, then of the block's K candidates."""
    ranks: Tensor | None = None
    """How many ids that compete (see `Ranking`) have a larger logit than token t, and half of those with the same: 0 is
    the best. No gradient."""
    hidden_states: Tensor | None = None
    """[T, H] the last hidden state that token t was drawn from, that of t - 1."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """head name -> [T, L] what the head makes of the hidden state *at* token t, which has read t: a reward at a
    document's last token, a step's grade at the step's last."""
    embeddings: Tensor | None = None
    """[D, E] one vector a document."""


@dataclass(slots=True, frozen=True)
class Divergence:
    """A distance between the policy's distribution p and a second model's q, both softmax(logits / temperature).

    `forward`: KL(q || p), which covers q's modes; `reverse`: KL(p || q), which seeks one; `jsd`: the generalised
    Jensen-Shannon divergence beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p
    (Agarwal et al., arXiv:2306.13649, eq. 1).
    """

    kind: Literal["forward", "reverse", "jsd"]
    beta: float = 0.5
    temperature: float = 1.0


@dataclass(slots=True, frozen=True)
class Ranking:
    """Which ids `ranks` sets a token against."""

    among: Tensor | None = None
    """bool, by id: those that compete, ids behind its end do not; None: all of the vocabulary."""
    exclude_seen: bool = False
    """Leave out the ids that stand before the token in its document, as evaluations of recommenders do."""


Metric = tuple[float, float]
"""(sum, count): adds over micro-batches and ranks, and is divided only where a person reads it."""


class LossOutput(NamedTuple):
    """A loss's sum over a block; whoever called divides by a count taken over the whole batch."""

    total: Tensor
    """Scalar; or [n] where the loss adds up n terms that are counted differently, divided entry by entry."""
    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]]
    """name -> (sum, count). Where the total is [n] there is no `loss` here: the policy adds the divided entries up."""
