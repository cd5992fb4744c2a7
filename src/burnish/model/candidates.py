"""A few logits instead of all: a token against sampled candidates, and a token's place among the whole vocabulary.

This module must not know which loss or measure reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.model.head_chunks import Head, wide_dtype
from burnish.types import Block, Ranking


def candidate_logits(
    hidden_nH: Tensor, weight: Tensor, bias: Tensor | None, ids_n: Tensor, candidates_K: Tensor, head: Head
) -> Tensor:
    """[n, 1 + K]: logits of each row's own id, then of the K candidates that all rows share, and no others.

    A row of the head is read once however often its id occurs: its gradient, [U, H] for U different ids, adds up in
    float32, where 1,000 occurrences of a popular id in bfloat16 would stop counting at 256.
    """
    num_tokens = ids_n.shape[0]
    ids_U, place = torch.cat([ids_n, candidates_K]).unique(return_inverse=True)
    wide = wide_dtype(hidden_nH)
    rows_UH, hidden_nH = head.shard.rows(weight, ids_U).to(wide), hidden_nH.to(wide)
    own_n = (hidden_nH * rows_UH.index_select(0, place[:num_tokens])).sum(1)
    logits = torch.cat([own_n[:, None], hidden_nH @ rows_UH.index_select(0, place[num_tokens:]).t()], 1)
    if bias is not None:
        bias_U = head.shard.rows(bias, ids_U).to(wide)
        shared_nK = bias_U[place[num_tokens:]].expand(num_tokens, -1)
        logits = logits + torch.cat([bias_U[place[:num_tokens], None], shared_nK], 1)
    logits = head.shard.total(logits) * head.logit_scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits / head.temperature


@torch.no_grad()
def ranks(
    hidden_nH: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids_n: Tensor,
    head: Head,
    *,
    ranking: Ranking,
    read_n: Tensor,
    block: Block,
) -> Tensor:
    """[n] float: how many of the ids that compete have a larger logit than the row's own id, and half of those that
    have the same: of a model that says the same of all V ids, each has the rank (V - 1) / 2 that chance would give it.

    Args:
        ranking: which ids compete; the row's own always does.
        read_n: index in the block of the token that each row predicts.
    """
    memory = head.buffer(hidden_nH, 1)[0]
    ranks_n = hidden_nH.new_zeros(ids_n.shape[0], dtype=wide_dtype(hidden_nH))
    absent = None if ranking.among is None else _absent(ranking.among, head)
    for rows in head.slices(ids_n.shape[0]):
        z, _ = head.logits(hidden_nH[rows], weight, bias, memory)
        ids_c1 = ids_n[rows, None]
        (own_c1,) = head.shard.sum(head.shard.pick(z, ids_c1))
        if absent is not None:
            z.masked_fill_(absent, -torch.inf)
        if ranking.exclude_seen:
            head.shard.exclude(z, torch.where(_seen(block, read_n[rows]), block.token_ids, ids_c1))
        head.shard.exclude(z, ids_c1)
        # Not `z > own`: beside a logit that is not a number nothing is larger, and a broken model would be perfect.
        ranks_n[rows] = (~(z <= own_c1)).sum(1) + 0.5 * (z == own_c1).sum(1)
    return head.shard.sum(ranks_n)[0]


def _absent(among: Tensor, head: Head) -> Tensor:
    absent = torch.ones(head.vocab_size, dtype=torch.bool, device=among.device)
    here = among[head.shard.first : head.shard.first + head.vocab_size]
    absent[: len(here)] = ~here
    return absent


def _seen(block: Block, read_c: Tensor) -> Tensor:
    """bool [c, T]: the tokens that stand before token `read_c` in its document, its shared prefix included."""
    start, _, prefix_start, prefix_end = block.documents[block.document_ids[read_c]].long().unsqueeze(2).unbind(1)
    index_T = torch.arange(block.num_tokens, device=read_c.device)
    inside = (index_T >= start) & (index_T < read_c[:, None])
    return inside | ((index_T >= prefix_start) & (index_T < prefix_end))
