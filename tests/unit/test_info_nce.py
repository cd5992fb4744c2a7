"""In-batch InfoNCE by hand and against a float64 reference, one query at a time; ranking metrics by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from burnish.losses.info_nce import InfoNCE
from burnish.types import Block, TokenOutputs, collate
from burnish.workflows.retrieval import Corpus
from tests.embedding_helpers import pack_groups

PAIRS = [[(0, [1, 2]), (1, [3, 4, 5])], [(0, [6]), (1, [7, 8])]]


def loss_of(loss: InfoNCE, vectors: list[list[float]], block: Block) -> tuple[float, dict[str, tuple[float, float]]]:
    padded = torch.zeros(block.documents.shape[0], len(vectors[0]))
    padded[: len(vectors)] = torch.tensor(vectors)
    output = loss(TokenOutputs(embeddings=padded), block)
    return output.total.item(), {name: (float(a), float(b)) for name, (a, b) in output.metrics.items()}


def test_two_queries_that_are_orthogonal() -> None:
    """Query 1 and its positive are e1, query 2 and its positive e2: each sees similarities 1 and 0."""
    block = pack_groups(PAIRS, 12)
    vectors = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    total, metrics = loss_of(InfoNCE(temperature=0.5), vectors, block)
    assert total == pytest.approx(2 * math.log(1 + math.exp(-2)))  # 2 queries, -log(e^2 / (e^2 + e^0)) = 0.1269 each
    assert metrics["loss"] == pytest.approx((total, 2))
    assert InfoNCE().count(block) == 2
    assert metrics["accuracy"] == (2, 2)
    assert metrics["similarities/positive"] == (2, 2)  # 1 + 1
    assert metrics["similarities/negative"] == (0, 2)  # one negative for each query
    assert metrics["negatives"] == (2, 2)
    swapped, metrics = loss_of(InfoNCE(temperature=0.5), [vectors[0], vectors[2], vectors[2], vectors[0]], block)
    assert swapped == pytest.approx(2 * math.log(1 + math.exp(2)))  # 2.1269 each: both prefer the other's
    assert metrics["accuracy"] == (0, 2)


def test_vectors_that_are_all_alike_say_nothing() -> None:
    total, metrics = loss_of(InfoNCE(), [[1.0, 0.0]] * 4, pack_groups(PAIRS, 12))
    assert total == pytest.approx(2 * math.log(2))
    assert metrics["accuracy"] == (0, 2)  # a tie is not a hit


def test_negatives_of_one_query_are_negatives_of_all() -> None:
    groups = [[*PAIRS[0], (2, [9]), (2, [10])], PAIRS[1]]
    block = pack_groups(groups, 16)
    #          query       positive    negative    negative    query       positive
    vectors = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    total, metrics = loss_of(InfoNCE(temperature=1.0), vectors, block)
    # Query 1 sees its positive 1, the other's 0 and negatives 0 and 0; query 2 its positive 1, 0 and negatives 1 and 0.
    expected = math.log((math.e + 3) / math.e) + math.log((2 * math.e + 2) / math.e)
    assert total == pytest.approx(expected)
    assert metrics["negatives"] == (6, 2)
    assert metrics["accuracy"] == (1, 2)


def test_the_other_direction_has_queries_to_choose_from() -> None:
    block = pack_groups([[*PAIRS[0], (2, [9])], PAIRS[1]], 16)
    #          query       positive    negative    query       positive
    vectors = [[1.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.5, 0.0], [0.0, 1.0]]
    total, _ = loss_of(InfoNCE(temperature=1.0, symmetric=True), vectors, block)
    e, log = math.exp, math.log
    # Rows over positives and the negative: query 1 sees 1, 0, 0.5; query 2 sees 0.5, 0, 0.25 and its own is the 0.
    to_documents = log((e(1) + 1 + e(0.5)) / e(1)) + log(e(0.5) + 1 + e(0.25))
    # Columns over queries: positive 1 sees 1 and 0.5; positive 2 sees 0 and 0.
    to_queries = log((e(1) + e(0.5)) / e(1)) + log(2)
    assert total == pytest.approx((to_documents + to_queries) / 2)


@pytest.mark.parametrize("twin", ["document", "query"])
def test_what_answers_a_query_is_no_negative_of_it(twin: str) -> None:
    """Two rows of the data with the same positive, or with the same query: neither may push the other away."""
    other = [(0, [6]), (1, [3, 4, 5])] if twin == "document" else [(0, [1, 2]), (1, [7, 8])]
    groups = [PAIRS[0], other, [(0, [11]), (1, [12])]]
    block = pack_groups(groups, 20)
    vectors = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    total, metrics = loss_of(InfoNCE(temperature=1.0), vectors, block)
    # Queries 1 and 2 see only their own (1) and the third (0), the third all three (0, 0, 1).
    e = math.e
    assert total == pytest.approx(2 * math.log((e + 1) / e) + math.log((e + 2) / e))
    assert metrics["negatives"] == (4, 3)
    kept, metrics = loss_of(InfoNCE(temperature=1.0, exclude_identical=False), vectors, block)
    assert kept == pytest.approx(2 * math.log((2 * e + 1) / e) + math.log((e + 2) / e))
    assert metrics["negatives"] == (6, 3)


def test_a_weight_multiplies_its_query_and_leaves_the_count() -> None:
    block = pack_groups(PAIRS, 12)
    vectors = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]
    block.columns["weight"][2:4] = 3.0
    total, metrics = loss_of(InfoNCE(temperature=1.0), vectors, block)
    assert total == pytest.approx(math.log(1 + math.exp(-1)) + 3 * math.log(1 + math.exp(-0.5)))
    assert metrics["loss"][1] == 2


def test_a_row_without_documents_is_nothing() -> None:
    block = pack_groups([], 8)
    total, metrics = loss_of(InfoNCE(symmetric=True), [[0.0, 0.0]], block)
    assert total == 0.0
    assert set(metrics.values()) == {(0.0, 0.0)}


def reference(loss: InfoNCE, vectors: Tensor, groups: list[list[tuple[int, list[int]]]]) -> Tensor:
    """van den Oord et al., eq. 4, query by query in float64, straight from the groups."""
    places, place = [], 0
    for group in groups:
        places.append([place + i for i in range(len(group))])
        place += len(group)
    documents = [p for g, group in zip(places, groups, strict=True) for p, (r, _) in zip(g, group, strict=True) if r]
    tokens = [tokens for group in groups for _, tokens in group]
    total = torch.zeros((), dtype=torch.float64)
    for own in places:
        query, positive = own[0], own[1]
        false = {p for p in documents if tokens[p] == tokens[positive] and p != positive}
        numerator = torch.exp(vectors[query] @ vectors[positive] / loss.temperature)
        seen = [torch.exp(vectors[query] @ vectors[p] / loss.temperature) for p in documents if p not in false]
        term = -torch.log(numerator / torch.stack(seen).sum())
        if loss.symmetric:
            asking = [g[0] for g in places if tokens[g[1]] != tokens[positive] or g is own]
            back = [torch.exp(vectors[q] @ vectors[positive] / loss.temperature) for q in asking]
            term = (term - torch.log(numerator / torch.stack(back).sum())) / 2
        total = total + term
    return total


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_and_gradient_are_the_papers(symmetric: bool) -> None:
    """Seven queries in three rows, with no, one and two negatives; the positive of one is that of another."""
    rows = [
        [[(0, [1]), (1, [2, 3])], [(0, [4]), (1, [5]), (2, [6])]],
        [[(0, [7]), (1, [8]), (2, [9]), (2, [10, 11])], [(0, [12]), (1, [2, 3])]],
        [[(0, [13]), (1, [14])], [(0, [15]), (1, [16]), (2, [2, 3])], [(0, [17]), (1, [18])]],
    ]
    block = collate([pack_groups(row, 16) for row in rows])
    loss = InfoNCE(temperature=0.3, symmetric=symmetric)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(36, 5, generator=generator, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=1).requires_grad_()
    output = loss(TokenOutputs(embeddings=vectors), block)
    used = torch.nonzero(block.documents[:, 1] > block.documents[:, 0]).squeeze(1)
    expected = reference(loss, vectors[used], [group for row in rows for group in row])
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(total, vectors)[0] for total in (output.total, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert loss.count(block) == 7


def corpus_of(groups: list[list[tuple[int, list[int]]]], vectors: list[list[float]]) -> Corpus:
    corpus, place = Corpus(), 0
    for group in groups:  # a block each: what is identical is found across blocks
        block = pack_groups([group], 8, max_documents=4)
        padded = torch.zeros(4, len(vectors[0]))
        padded[: len(group)] = torch.tensor(vectors[place : place + len(group)])
        corpus.add(padded, block)
        place += len(group)
    return corpus


def mean(metric: tuple[float, float]) -> float:
    return metric[0] / metric[1]


def test_every_query_is_ranked_against_every_document() -> None:
    groups = [
        [(0, [1]), (1, [2]), (2, [3])],
        [(0, [4]), (1, [5])],
        [(0, [6]), (1, [7])],
    ]
    #          query       positive    negative    query       positive    query       positive
    vectors = [[1.0, 0.0], [0.8, 0.1], [0.9, 0.0], [0.0, 1.0], [0.2, 1.0], [1.0, 1.0], [0.5, 0.3]]
    # Similarities with 2, 3, 5, 7: query 1: 0.8, 0.9, 0.2, 0.5 -> own is second. Query 4: 0.1, 0, 1, 0.3 -> first.
    # Query 6: 0.9, 0.9, 1.2, 0.8 -> own is fourth.
    corpus = corpus_of(groups, vectors)
    query, rank = corpus.ranks()
    assert (query.tolist(), rank.tolist()) == ([0, 1, 2], [2, 1, 4])
    metrics = corpus.metrics([1, 3])
    assert all(count == 3 for _, count in metrics.values())
    assert mean(metrics["recall@1"]) == pytest.approx(1 / 3)
    assert mean(metrics["recall@3"]) == pytest.approx(2 / 3)
    assert mean(metrics["mrr"]) == pytest.approx((1 / 2 + 1 + 1 / 4) / 3)
    assert mean(metrics["ndcg@3"]) == pytest.approx((1 / math.log2(3) + 1) / 3)


def test_a_query_that_stands_in_two_rows_has_two_answers_and_a_document_counts_once() -> None:
    groups = [[(0, [1]), (1, [2])], [(0, [1]), (1, [3]), (2, [4])], [(0, [5]), (1, [3])]]
    #          query  2      query  3      4      query  3
    vectors = [[1.0], [0.9], [1.0], [0.2], [0.5], [-1.0], [0.2]]
    # Documents 2, 3, 4 once each. Query 1 sees 0.9, 0.2, 0.5: its answers 2 and 3 have ranks 1 and 3.
    # Query 5 sees -0.9, -0.2, -0.5: its answer 3 has rank 1.
    corpus = corpus_of(groups, vectors)
    query, rank = corpus.ranks()
    assert (query.tolist(), rank.tolist()) == ([0, 0, 1], [1, 3, 1])
    metrics = corpus.metrics([1, 2, 3])
    assert mean(metrics["recall@1"]) == pytest.approx((1 / 2 + 1) / 2)
    assert mean(metrics["recall@2"]) == pytest.approx((1 / 2 + 1) / 2)
    assert mean(metrics["recall@3"]) == 1.0
    assert mean(metrics["mrr"]) == 1.0
    assert mean(metrics["ndcg@1"]) == 1.0  # only one answer can be first
    best, found = 1 + 1 / math.log2(3), 1 + 1 / math.log2(4)
    assert mean(metrics["ndcg@3"]) == pytest.approx((found / best + 1) / 2)


def test_vectors_that_are_all_alike_find_nothing() -> None:
    metrics = corpus_of([[(0, [n]), (1, [n + 50])] for n in range(20)], [[1.0]] * 40).metrics([1, 10, 20])
    assert [mean(metrics[f"recall@{k}"]) for k in (1, 10, 20)] == [0.0, 0.0, 1.0]


def test_nothing_held_out_has_no_metrics() -> None:
    assert Corpus().metrics([1]) == {}
