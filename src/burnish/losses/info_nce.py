"""In-batch contrastive loss: a query finds its document among those of all other queries."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from burnish.losses.base import Loss
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, RowKind, TokenOutputs


class InfoNCE(Loss):
    """-log( exp(s_ii / t) / sum over j of exp(s_ij / t) ), with s_ij the inner product of query i and document j, t the
    temperature, and j over the positives and negatives of every query in the block. Counted by positive.

    van den Oord et al., arXiv:1807.03748, eq. 4; other queries' documents as negatives: Karpukhin et al.,
    arXiv:2004.04906, section 3.2. With n documents that are all alike it is ln n. A document column `weight` multiplies
    its positive's term and leaves the count as it is.

    What a block is decides what a query is compared with: the `embedding` workflow hands over a whole step.
    """

    type: Literal["info_nce"] = "info_nce"
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    rows: ClassVar[RowKind] = "retrieval"
    temperature: Annotated[float, Gt(0)] = 0.05
    """Divides the similarities; smaller looks harder at the nearest negatives. 0.01 to 0.1 with normalised vectors."""
    symmetric: bool = False
    """Mean of this and of the same loss of each positive against all queries (Radford et al., arXiv:2103.00020)."""
    exclude_identical: bool = True
    """Leave out negatives that are no negatives: documents with the same tokens as the query's own positive, and
    positives of a query with the same tokens."""

    def reads(self, block: Block) -> Tensor:
        import torch

        return torch.zeros_like(block.loss_mask)

    def count(self, block: Block) -> Tensor:
        return ((block.columns["role"] == 1) & (block.documents[:, 1] > block.documents[:, 0])).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        import torch

        assert outputs.embeddings is not None
        query_P, positive_P, negative_N = roles(block)
        document_C = torch.cat([positive_P, negative_N])
        identity_D = self._identities(block)
        is_own_PC = identity_D[positive_P, None] == identity_D[document_C]
        is_own_PC[:, : len(query_P)] |= identity_D[query_P, None] == identity_D[query_P]
        is_own_PC.fill_diagonal_(False)  # from here on: own, but not the positive of this row
        similarity_PC = outputs.embeddings[query_P] @ outputs.embeddings[document_C].T
        logits_PC = (similarity_PC / self.temperature).masked_fill(is_own_PC, float("-inf"))
        own_P = logits_PC.diagonal()
        loss_P = logits_PC.logsumexp(1) - own_P
        if self.symmetric:
            loss_P = (loss_P + logits_PC[:, : len(query_P)].logsumexp(0) - own_P) / 2
        total = (loss_P * block.columns["weight"][positive_P]).sum()
        return LossOutput(total, {"loss": (total, self.count(block)), **_metrics(similarity_PC, is_own_PC)})

    def _identities(self, block: Block) -> Tensor:
        """int64 [D]: documents that must not be told apart have the same number."""
        import torch

        device, number = block.documents.device, dict[bytes, int]()
        if not self.exclude_identical:
            return torch.arange(block.documents.shape[0], device=device)
        return torch.tensor([number.setdefault(key, len(number)) for key in document_keys(block)], device=device)


def roles(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """(query of each positive [P], positives [P], negatives [N]): documents by their number in the block, int64."""
    import torch

    used_D, role_D = block.documents[:, 1] > block.documents[:, 0], block.columns["role"]
    query, positive_P, negative_N = (torch.nonzero(used_D & (role_D == role)).squeeze(1) for role in (0, 1, 2))
    query_G = torch.zeros_like(block.group_ids).index_copy(0, block.group_ids[query], query)
    return query_G[block.group_ids[positive_P]], positive_P, negative_N


def document_keys(block: Block) -> list[bytes]:
    """For each of the D entries a digest of its tokens: equal for documents of equal tokens."""
    token_ids = block.token_ids.cpu().numpy()
    spans = block.documents[:, :2].tolist()
    return [hashlib.blake2b(token_ids[start:end].tobytes(), digest_size=16).digest() for start, end in spans]


def _metrics(similarity_PC: Tensor, is_own_PC: Tensor) -> dict[str, tuple[Tensor | float, Tensor | float]]:
    """`accuracy`: how often nothing is as similar to the query as its positive; mean similarities of positives and of
    negatives; `negatives`: how many a query is compared with."""
    num_pairs = similarity_PC.shape[0]
    own_P = similarity_PC.detach().diagonal()
    is_negative_PC = (~is_own_PC).fill_diagonal_(False)
    negative_PC = similarity_PC.detach() * is_negative_PC
    is_nearer_PC = (similarity_PC.detach() >= own_P.unsqueeze(1)) & is_negative_PC
    num_negatives = is_negative_PC.sum()
    return {
        "accuracy": ((~is_nearer_PC.any(1)).sum(), num_pairs),
        "similarities/positive": (own_P.sum(), num_pairs),
        "similarities/negative": (negative_PC.sum(), num_negatives),
        "negatives": (num_negatives, num_pairs),
    }
