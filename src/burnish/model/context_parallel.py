"""Context parallel: the ranks of one group share the tokens of every row, for documents too long for one of them.

Rank r of n runs the layers on tokens T r / n to T (r + 1) / n. All but attention looks at one token at a time; in
attention a rank's queries meet the keys and values of the whole row, which are gathered once a layer and whose
gradients go back to the ranks they came from. So hidden states, scores and logits of a row are 1/n a rank, its keys and
values of one layer are whole: at 131,072 tokens, 8 heads of 128 and two bytes 512 MiB a layer, kept for the backward
pass unless the layer is recomputed.

A document that straddles a cut is, on the later rank, what it is there and a prefix, its tokens on the ranks before:
the attention operator knows prefixes. Later ranks see more keys. For a row of one document the last of n ranks has
2 - 1/n times the mean of the scores, 1.5 for two and 1.875 for eight, and the others wait for it; rows of documents no
longer than T / n have no such surplus worth a name. `imbalance` counts it for any layout.

Must not know recipes, losses or which kernel attends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.errors import ModelError
from burnish.model.attention import visible_pairs
from burnish.model.collectives import collect_shared, sum_all
from burnish.model.policy_model import one_document
from burnish.types import TokenOutputs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel
    from burnish.types import Block


@dataclass(frozen=True, slots=True)
class ContextParallel:
    """This rank's part of every row.

    The second of two ranks has tokens 4 to 8 of a row of 8, whatever documents lie there:

        ContextParallel(rank=1, size=2).span(8)     # (4, 8)
    """

    rank: int
    size: int
    group: ProcessGroup | None = None
    """The ranks that share the rows; None: nothing is to be exchanged."""

    def span(self, num_tokens: int) -> tuple[int, int]:
        """Which tokens of a block this rank has: from the first number on, up to the second.

        Raises:
            ModelError: the ranks cannot have as many tokens each.
        """
        length, rest = divmod(num_tokens, self.size)
        if rest:
            raise ModelError(
                f"{num_tokens:,} tokens cannot be shared evenly by {self.size} ranks",
                where="mesh.cp",
                cure=f"rows of {num_tokens - rest:,} or {num_tokens - rest + self.size:,} tokens "
                "(data.packing.row_length)",
            )
        return self.rank * length, (self.rank + 1) * length

    def clip(self, documents: Tensor, num_tokens: int) -> Tensor:
        """int32 [D, 4] on the host: the layout of this rank's queries, in places of the whole row's keys.

        Tokens 4 to 8 of [[0, 3, 0, 0], [3, 8, 0, 0]] are [[0, 0, 0, 0], [4, 8, 3, 4]]: of the second document what
        lies here, and its token before as a prefix.

        Raises:
            ModelError: a document has a shared prefix, which would have to be a second one.
        """
        begin, end = self.span(num_tokens)
        if (documents[:, 3] > documents[:, 2]).any():
            raise ModelError(
                "documents that share a prompt cannot be cut over ranks",
                where="mesh.cp",
                cure="give each document its own: `data.renderer: {type: chat, share_prompt: false}`",
            )
        starts, ends = documents[:, 0].clamp(min=begin), documents[:, 1].clamp(max=end)
        clipped = torch.stack([starts, ends, documents[:, 0], starts], 1)
        return torch.where((ends > starts)[:, None], clipped, 0)

    def gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [Hkv, T, Dk] and values [Hkv, T, Dv] of the whole row, from this rank's [Hkv, T/n, ...] of each.

        One exchange a layer and direction: T (n - 1)/n Hkv (Dk + Dv) numbers reach each rank in the forward pass, and
        as many gradients leave it in the backward pass.
        """
        assert self.group is not None
        both = collect_shared(torch.cat([k, v], -1).transpose(0, 1), 0, self.group).transpose(0, 1)
        whole_k, whole_v = both.split([k.shape[-1], v.shape[-1]], -1)
        return whole_k, whole_v

    def sum_outputs(self, outputs: TokenOutputs) -> TokenOutputs:
        """What all ranks read of their own tokens, on each: a loss then sees the whole block, on every rank the same.

        A vector is 0 where the rank has not read, so a sum is the one rank's number, bit for bit. Backward each rank
        takes the gradient of the loss, which all of them have, to what it has read itself.
        """
        assert self.group is not None
        for field in fields(outputs):
            value = getattr(outputs, field.name)
            if isinstance(value, Tensor):
                outputs = replace(outputs, **{field.name: sum_all(value, self.group)})
        return outputs


def share_rows(model: PolicyModel, mesh: Mesh) -> None:
    """Has `model` run this rank's tokens of every row from now on, where the mesh's axis `cp` is wider than one.

    Raises:
        ModelError: it has a head that reads more than a token's own hidden state.
    """
    if mesh.sizes.cp == 1:
        return
    if model.heads:
        raise ModelError(
            f"the head '{next(iter(model.heads))}' reads whole documents, and context parallel cuts them",
            where="mesh.cp",
            cure="`cp: 1`, or the language model's own head alone",
        )
    model.context = ContextParallel(mesh.axis_rank("cp"), mesh.sizes.cp, mesh.cp_group)


@torch.no_grad()
def verify_cut(model: PolicyModel) -> None:
    """Compares log-probabilities of a short document that is cut over the ranks with those of the whole.

    Convolutions, linear attention and state spaces look at several tokens by themselves and would begin anew at every
    cut, and some rotary embeddings (`dynamic`, `longrope`) choose all frequencies by the largest position they see: so
    the second half of the document stands at the model's last positions.

    Raises:
        ModelError: they differ.
    """
    if model.context is None or model.mesh is None:
        return
    mine, device = 4 * model.mesh.sizes.tp, model.mesh.device
    length = mine * model.context.size
    positions = getattr(model.hf_config.get_text_config(), "max_position_embeddings", None) or length
    block = one_document(torch.linspace(1, model.vocab_size - 1, length, device=device).long())
    block.position_ids[length // 2 :] += max(positions - length, 0)
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        cut = _logprobs(model, block)
        with whole_rows(model):
            whole = _logprobs(model, block)
    model.train(was_training)
    # Tokens behind the first cut. The median: in half precision, rounding may send a token to another expert.
    difference = (cut - whole)[mine + 1 :].abs().median().item()
    if not difference <= 1e-2 * whole.abs().max().item():
        raise ModelError(
            f"something in {type(model.causal_lm).__name__} beside attention looks at several tokens: "
            f"log-probabilities of a document that is cut over ranks differ by {difference:.1e}",
            where="mesh.cp",
            cure="`cp: 1`, or a model that is attention and layers of single tokens",
        )


def _logprobs(model: PolicyModel, block: Block) -> Tensor:
    outputs = model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask)
    return outputs.logprobs


@contextmanager
def whole_rows(model: PolicyModel) -> Iterator[None]:
    """Every rank computes whole rows in here, as if there were no other: for probes of a few tokens."""
    context, model.context = model.context, None
    try:
        yield
    finally:
        model.context = context


def imbalance(documents: Tensor, num_tokens: int, size: int, window: int | None = None) -> float:
    """How many times the mean of `size` ranks the busiest computes of a layout's (query, key) pairs; 1.0: none waits.

    >>> imbalance(torch.tensor([[0, 8192, 0, 0]]), 8192, 4)        # one document, 2 - 1/4 but for the diagonal
    1.7499...
    """
    ranks = (ContextParallel(rank, size) for rank in range(size))
    pairs = [visible_pairs(rank.clip(documents, num_tokens), window) for rank in ranks]
    return max(pairs) * size / sum(pairs) if sum(pairs) else 1.0
