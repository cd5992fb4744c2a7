"""How well vectors retrieve: every query of a set against every document of it.

Identical documents are one, and so are identical queries, whose positives are all answers then. Must not know how the
vectors were made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from burnish.losses.info_nce import document_keys, roles

if TYPE_CHECKING:
    from burnish.types import Block, Metric

CHUNK = 256
"""Answers ranked at once: 256 rows of scores, one for each document of the corpus."""


class Corpus:
    """Queries, documents and which answer which, filled block by block."""

    def __init__(self) -> None:
        self._queries, self._documents = _Vectors(), _Vectors()
        self._answers: dict[tuple[int, int], None] = {}
        """(query, document) pairs, in the order of their coming."""

    def add(self, embeddings_DE: Tensor, block: Block) -> None:
        """One block's documents with their vectors."""
        keys = document_keys(block)
        query_P, positive_P, negative_N = (each.tolist() for each in roles(block))
        for query, positive in zip(query_P, positive_P, strict=True):
            pair = (
                self._queries.number(keys[query], embeddings_DE[query]),
                self._documents.number(keys[positive], embeddings_DE[positive]),
            )
            self._answers[pair] = None
        for negative in negative_N:
            self._documents.number(keys[negative], embeddings_DE[negative])

    def metrics(self, top_k: Iterable[int]) -> dict[str, Metric]:
        """Summed and counted by query; {} without any.

        `recall@k`: share of a query's answers among its k nearest documents. `mrr`: 1 / rank of its first answer.
        `ndcg@k`: sum of 1 / log2(1 + rank) over the answers in the first k, divided by its largest possible value
        (Jarvelin and Kekalainen, ACM TOIS 20(4), 2002, with gains of 0 and 1).
        """
        if not self._answers:
            return {}
        query_A, rank_A = self.ranks()
        count = len(self._queries)
        num_answers = torch.bincount(query_A, minlength=count)
        metrics = {}
        for k in top_k:
            hit_A = (rank_A <= k).double()
            found = torch.zeros(count, dtype=torch.float64).index_add(0, query_A, hit_A)
            gain = torch.zeros(count, dtype=torch.float64).index_add(0, query_A, hit_A / (1 + rank_A).double().log2())
            discount = 1 / torch.arange(2, k + 2).double().log2()
            best = discount.cumsum(0)[num_answers.clamp(max=k) - 1]
            metrics[f"recall@{k}"] = (float((found / num_answers).sum()), float(count))
            metrics[f"ndcg@{k}"] = (float((gain / best).sum()), float(count))
        first = torch.full((count,), torch.iinfo(torch.int64).max).scatter_reduce(0, query_A, rank_A, "amin")
        metrics["mrr"] = (float((1 / first.double()).sum()), float(count))
        return metrics

    def ranks(self) -> tuple[Tensor, Tensor]:
        """(query, rank) of each answer, int64 on the CPU; 1 is the nearest document. One that is exactly as near as the
        answer goes before it, so that vectors which are all alike find nothing."""
        pairs = torch.tensor(list(self._answers), dtype=torch.int64).reshape(-1, 2)
        queries, documents = self._queries.stacked(), self._documents.stacked()
        ranks = []
        for query, answer in (chunk.T for chunk in pairs.to(queries.device).split(CHUNK)):
            scores = queries[query] @ documents.T
            ranks.append((scores >= scores.gather(1, answer.unsqueeze(1))).sum(1).cpu())
        return pairs[:, 0], torch.cat(ranks)


class _Vectors:
    """Vectors by the digest of what they stand for."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._vectors: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._vectors)

    def number(self, key: bytes, vector: Tensor) -> int:
        """Place of the vector; of the one that came first under this key."""
        if key not in self._numbers:
            self._numbers[key] = len(self._vectors)
            self._vectors.append(vector)
        return self._numbers[key]

    def stacked(self) -> Tensor:
        """[N, E]"""
        return torch.stack(self._vectors)
