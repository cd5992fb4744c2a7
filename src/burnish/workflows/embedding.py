"""Embedding models: a query's vector comes near those of the documents that answer it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, MinLen

from burnish.component import OneOf
from burnish.losses.base import Loss
from burnish.types import LossOutput, TokenOutputs, collate
from burnish.workflows.base import Workflow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from burnish.policy.policy import Policy
    from burnish.policy.totals import Totals
    from burnish.types import Block, Metric
    from burnish.workflows.run import Run

LOSSES = OneOf("burnish.losses", default="info_nce")


class Embedding(Workflow):
    """Trains what `model.head: {type: embedding}` makes of queries and documents, every query of a step against every
    document of it.

    A step's loss couples all its documents, so it cannot be cut into micro-batches by itself. Its gradient can, by
    gradient caching (Gao et al., arXiv:2101.06983, section 3): embed all without a graph, take the gradient of the loss
    with respect to the vectors, embed micro-batch by micro-batch again and send each its share of that gradient. One
    more forward pass buys as many negatives as the step has documents, at the memory of one micro-batch.
    """

    type: Literal["embedding"] = "embedding"
    loss: Annotated[Loss, LOSSES] = LOSSES.field(Loss)
    """What is minimised: a loss that reads nothing but vectors."""
    top_k: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)] = [1, 10]
    """Lengths k of the result lists that `recall@k` and `ndcg@k` are measured on."""

    def losses(self) -> list[Loss]:
        return [self.loss]

    def run(self, run: Run) -> None:
        """Gradient descent on the loss of whole steps."""
        policy = run.policy
        measure = partial(self.measure, policy, run.blocks_per_step)
        run.evaluate_at_start(measure)
        for learning_rate, blocks in run.batches():
            # With more ranks all make as many forward passes, so the rows that fill up the last step stay.
            rows = blocks if policy.mesh.world_size > 1 else [block for block in blocks if block.num_documents]
            embeddings = policy.embeddings(rows, training=True)
            metrics, gradients = self.cached(policy, embeddings, rows)
            with_gradients = [_with_column(row, gradient) for row, gradient in zip(rows, gradients, strict=True)]
            policy.forward_backward(with_gradients, CachedGradient(of=self.loss))
            update = policy.optim_step(learning_rate, run.judge)
            run.record(metrics, update, blocks, self.loss)
            run.evaluate_if_due(measure)

    def cached(
        self, policy: Policy, embeddings: list[Tensor], blocks: list[Block]
    ) -> tuple[dict[str, Metric], list[Tensor]]:
        """Metrics of the loss over all ranks' `blocks` at once; and for each of this rank's [D, n, E], the gradients of
        the loss's n terms at its vectors, before the division by their counts."""
        import torch

        from burnish.policy.totals import Totals
        from burnish.workflows.gathered import of_all_ranks

        everyone, embeddings, own = of_all_ranks(blocks, embeddings, policy.mesh)
        totals, vectors = Totals(), torch.cat(embeddings).requires_grad_()
        terms = self._over(vectors, everyone, totals).reshape(-1)
        gradients = torch.stack([torch.autograd.grad(term, vectors, retain_graph=True)[0] for term in terms], 1)
        parts = gradients.split([block.documents.shape[0] for block in everyone])
        return totals.over_ranks(policy.mesh)[0], [parts[place] for place in own]

    def measure(self, policy: Policy, blocks_per_step: int, blocks: Iterable[Block]) -> dict[str, Metric]:
        """Of held-out rows: the loss's metrics, over as many rows at a time as a step has, and those of every query's
        ranking of all their documents."""
        import torch

        from burnish.policy.policy import in_chunks
        from burnish.policy.totals import Totals
        from burnish.workflows.gathered import of_all_ranks
        from burnish.workflows.retrieval import Corpus

        totals, corpus = Totals(), Corpus()
        for mine in in_chunks(blocks, blocks_per_step):
            rows, embeddings, _ = of_all_ranks(mine, policy.embeddings(mine), policy.mesh)
            self._over(torch.cat(embeddings), rows, totals)
            for vectors, row in zip(embeddings, rows, strict=True):
                corpus.add(vectors, row)
        return totals.over_ranks(policy.mesh)[0] | corpus.metrics(self.top_k)

    def _over(self, vectors: Tensor, blocks: list[Block], totals: Totals) -> Tensor:
        """The loss's total over all `blocks` at once, its metrics added to `totals`."""
        batch = collate(blocks).to(vectors.device)
        output = self.loss(TokenOutputs(embeddings=vectors), batch)
        totals.add(output, self.loss.count(batch))
        return output.total


class CachedGradient(Loss):
    """The inner product of each document's vector with the gradient of a whole step's loss there: its own gradient is
    that of the loss `of`, whatever else is in the micro-batch."""

    type: str = "cached_gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    of: Loss

    def reads(self, block: Block) -> Tensor:
        return self.of.reads(block)

    def count(self, block: Block) -> Tensor:
        return self.of.count(block)

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.embeddings is not None
        products_DnE = outputs.embeddings.unsqueeze(1) * block.columns["embedding_gradient"]
        return LossOutput(products_DnE.sum((0, 2)), {})


def _with_column(block: Block, gradient: Tensor) -> Block:
    return replace(block, columns=block.columns | {"embedding_gradient": gradient})
