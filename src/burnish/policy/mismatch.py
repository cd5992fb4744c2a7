"""KTO's reference point, the column `kto_kl`: how far the policy is from the reference on completions that answer other
prompts.

Ethayarajh et al., arXiv:2402.01306, section 4.1: the KL divergence of the policy from the reference is estimated by the
mean log-ratio of mismatched pairs, prompt i with completion i - 1 of the same step, and clamped at 0; no gradient
flows. It must not know which loss asks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from burnish.policy.policy import logprobs
from burnish.types import Block

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.mesh import Mesh
    from burnish.model.divergence import Reference as Distribution
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.frozen import Frozen
    from burnish.types import Group


class WithMismatched:
    """A reference that also says `kto_kl` [D] of a step's blocks, the same number for all documents, at least 0. See
    `second.Second`; all else `inner` says.

    Args:
        model: the policy's own, as it is at each step.
    """

    def __init__(self, inner: Frozen, model: PolicyModel, mesh: Mesh, micro_batch_size: int) -> None:
        self.inner, self._model, self._mesh, self._micro_batch_size = inner, model, mesh, micro_batch_size
        configs = [either.hf_config.get_text_config() for either in (model, inner.model)]
        positions = [getattr(config, "max_position_embeddings", None) for config in configs]
        self._max_positions = min((most for most in positions if most is not None), default=None)
        self.obstacle = inner.obstacle

    def require(self, group: Group) -> None:
        self.inner.require(group)

    def set_temperature(self, temperature: float) -> None:
        self.inner.set_temperature(temperature)

    def annotate(self, blocks: list[Block], loss: Loss) -> list[Block]:
        blocks = self.inner.annotate(blocks, loss)
        if "kto_kl" not in loss.asks:
            return blocks
        kl = self._kl(blocks, loss)
        used = [block.documents[:, 1] > block.documents[:, 0] for block in blocks]
        return [
            replace(block, columns=block.columns | {"kto_kl": torch.where(used_D, kl, 0.0)})
            for block, used_D in zip(blocks, used, strict=True)
        ]

    def reference(self, block: Block, loss: Loss) -> Distribution | None:
        return self.inner.reference(block, loss)

    def flops(self, blocks: list[Block], loss: Loss) -> float:
        return self.inner.flops(blocks, loss)

    def _kl(self, blocks: list[Block], loss: Loss) -> float:
        """Mean log-ratio of policy and reference over the mismatched pairs of all ranks, at least 0."""
        pairs = mismatched(blocks, self._max_positions)
        counts = [0.0] * self._mesh.world_size
        counts[self._mesh.rank] = float(len(pairs))
        most = int(max(self._mesh.sum_scalars(counts)))
        pairs += [empty_like(blocks[0])] * (most - len(pairs))  # forward passes of a sharded model are in step
        pairs = self.inner.annotate(pairs, loss)
        of_policy = logprobs(self._model, self._mesh, pairs, self._micro_batch_size, trained_only=True)
        total, count = self._mesh.sum_scalars([*map(float, log_ratio(pairs, of_policy))])
        return max(0.0, total / (count or 1.0))


class _Answer(NamedTuple):
    """A document cut before its first trained token."""

    prompt_ids: Tensor
    """With the prefix that it shares."""
    completion_ids: Tensor
    loss_mask: Tensor
    """Of the completion."""


def mismatched(blocks: list[Block], max_positions: int | None = None) -> list[Block]:
    """Prompt i with completion i - 1, the first with the last one, of all documents with trained tokens in order; in
    rows as long as these. A pair that is longer than a row, or than the model has positions, is cut; of a single
    document there is none.

        prompts [a b] [c]  completions [x] [y z]   ->   documents [a b y z] [c x]

    A row holds no more documents than the fullest of `blocks`: where a model's documents must not share a row, those
    hold one.
    """
    answers = [answer for block in blocks for answer in _answers(block)]
    if len(answers) < 2:
        return []
    length, most = blocks[0].num_tokens, max(len(_answers(block)) for block in blocks)
    longest = min(length, max_positions or length)  # two documents of 1024 tokens are up to 2047 in a row of 4096
    rows: list[list[tuple[Tensor, Tensor]]] = [[]]
    for answer, before in zip(answers, [answers[-1], *answers[:-1]], strict=True):
        ids = torch.cat([answer.prompt_ids, before.completion_ids])[:longest]
        mask = torch.cat([torch.zeros_like(answer.prompt_ids, dtype=torch.bool), before.loss_mask])[:longest]
        if len(rows[-1]) == most or sum(len(held) for held, _ in rows[-1]) + len(ids) > length:
            rows.append([])
        rows[-1].append((ids, mask))
    return [_row(row, length, blocks[0].documents.shape[0]) for row in rows]


def log_ratio(pairs: list[Block], logprobs: list[Tensor]) -> tuple[float, int]:
    """(sum over documents of log p - log q, documents), p the policy's `logprobs`, q the column `ref_logprobs`."""
    total = 0.0
    for block, logprobs_T in zip(pairs, logprobs, strict=True):
        ratio_T = logprobs_T.double() - block.columns["ref_logprobs"].double()
        total += float((ratio_T * block.loss_mask).sum())
    return total, sum(block.num_documents for block in pairs)


def empty_like(block: Block) -> Block:
    """A row of padding in the shape of another: what a rank with fewer pairs computes beside the others."""
    return _row([], block.num_tokens, block.documents.shape[0])


def _answers(block: Block) -> list[_Answer]:
    token_ids, loss_mask = block.token_ids.cpu(), block.loss_mask.cpu()
    found = []
    for start, end, prefix_start, prefix_end in block.documents.tolist():
        trained = loss_mask[start:end].nonzero()
        if len(trained):
            first = start + int(trained[0])
            prompt = torch.cat([token_ids[prefix_start:prefix_end], token_ids[start:first]])
            found.append(_Answer(prompt, token_ids[first:end], loss_mask[first:end]))
    return found


def _row(documents: list[tuple[Tensor, Tensor]], length: int, num_documents: int) -> Block:
    row = Block(
        token_ids=torch.zeros(length, dtype=torch.int64),
        loss_mask=torch.zeros(length, dtype=torch.bool),
        position_ids=torch.zeros(length, dtype=torch.int64),
        document_ids=torch.full((length,), -1, dtype=torch.int64),
        documents=torch.zeros(num_documents, 4, dtype=torch.int32),
        group_ids=torch.full((num_documents,), -1, dtype=torch.int64),
        sample_ids=("mismatched",) * len(documents),
    )
    start = 0
    for index, (ids, mask) in enumerate(documents):
        end = start + len(ids)
        row.token_ids[start:end], row.loss_mask[start:end] = ids, mask
        row.position_ids[start:end], row.document_ids[start:end] = torch.arange(len(ids)), index
        row.documents[index, :2], row.group_ids[index] = torch.tensor([start, end]), index
        start = end
    return row
