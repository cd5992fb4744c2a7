"""Attention of a part of a row's queries over all of its keys: what each rank of a context-parallel group computes."""

from __future__ import annotations

import pytest
import torch

from burnish.errors import ModelError
from burnish.model.attention import document_attention, visible_pairs
from burnish.model.context_parallel import ContextParallel, imbalance
from burnish.model.kernels import flex, varlen
from tests.attention_helpers import SHARED_PREFIX, layout, reference_attention, side_by_side, visible_mask

DOCUMENTS = layout((0, 3, 0, 0), (3, 19, 0, 0), (20, 23, 0, 0))
"""Of 24 tokens: three ranks cut at 8 and 16, and the second document lies on all of them."""
RANKS = [ContextParallel(rank, 3) for rank in range(3)]
OPTIONS = [{}, {"window": 3}, {"window": 10, "softcap": 1.5}, {"window": 6, "sinks": True}, {"sinks": True}]


def test_a_layout_is_cut_into_own_tokens_and_those_before() -> None:
    cut = [rank.clip(DOCUMENTS, 24).tolist()[:3] for rank in RANKS]
    assert cut[0] == [[0, 3, 0, 0], [3, 8, 3, 3], [0, 0, 0, 0]]
    assert cut[1] == [[0, 0, 0, 0], [8, 16, 3, 8], [0, 0, 0, 0]]
    assert cut[2] == [[0, 0, 0, 0], [16, 19, 3, 16], [20, 23, 20, 20]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_parts_are_the_row(options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 24, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    sinks = torch.linspace(-1, 2, 4, dtype=torch.float64) if "sinks" in options else None
    leaves = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]
    options = {"scale": 1.2, **{name: value for name, value in options.items() if name != "sinks"}}
    parts = []
    for rank in RANKS:
        first, end = rank.span(24)
        clipped = rank.clip(DOCUMENTS, 24)
        parts.append(document_attention(q[:, first:end], k, v, clipped, sinks=sinks, first=first, **options))
    out, expected = torch.cat(parts, 1), reference_attention(q, k, v, DOCUMENTS, sinks=sinks, **options)
    towards = torch.randn(out.shape, dtype=out.dtype, generator=generator)
    ours, theirs = ((x, *torch.autograd.grad(x, leaves, towards)) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("window", [None, 3, 10])
def test_no_pair_is_computed_twice(window: int | None) -> None:
    pairs = [visible_pairs(rank.clip(DOCUMENTS, 24), window) for rank in RANKS]
    assert sum(pairs) == visible_pairs(DOCUMENTS, window)
    assert imbalance(DOCUMENTS, 24, 3, window) == max(pairs) / (sum(pairs) / 3)


def test_the_last_of_four_ranks_computes_nearly_twice_the_mean_of_one_document() -> None:
    """Ranks compute 1, 3, 5 and 7 of 16 parts: the busiest 7/4 of the mean. Short documents make nobody wait."""
    assert imbalance(torch.tensor([[0, 8192, 0, 0]]), 8192, 4) == pytest.approx(7 / 4, abs=1e-3)
    assert imbalance(side_by_side(8, 8, 8), 24, 3) == 1.0
    assert imbalance(layout(), 24, 3) == 1.0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 10, "softcap": 1.5}], ids=str)
def test_flex_counts_queries_from_the_first(options: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 24, 16, dtype=torch.float64, generator=generator) for _ in range(3))
    first, end = RANKS[1].span(24)
    spans = flex.spans_of_tokens(RANKS[1].clip(DOCUMENTS, 24), 24)
    window = options.get("window")
    sees = flex.visible(spans, window, first)(0, 0, torch.arange(8)[:, None], torch.arange(24))
    assert torch.equal(sees, visible_mask(DOCUMENTS, 24, window)[first:end])
    out, _ = flex.attend(q[:, first:end], k, v, spans, 0.4, window, options.get("softcap"), first)
    expected = reference_attention(q, k, v, DOCUMENTS, 0.4, **options)[:, first:end]
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_varlen_gathers_what_stands_before_the_part() -> None:
    """Rank 2 has tokens 16 to 24: three of a document whose 13 others come first, padding, a document, padding."""
    documents = [(16, 19, 3, 16), (20, 23, 20, 20)]
    made = varlen._layout(documents, 8, 24, 16, torch.device("cpu"))
    queries, keys, longest_query, longest_keys = made.lengths
    assert queries.tolist() == [0, 3, 4, 7, 8] and keys.tolist() == [0, 16, 17, 20, 21]
    assert (longest_query, longest_keys) == (3, 16)
    assert made.keys is not None and made.keys.tolist() == list(range(3, 24))
    assert made.gaps == [slice(19, 20), slice(23, 24)]


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ModelError, match=r"22 tokens cannot be shared evenly by 3 ranks(.|\n)*21 or 24 tokens"):
        RANKS[0].span(22)
    with pytest.raises(ModelError, match=r"share a prompt(.|\n)*share_prompt: false"):
        RANKS[0].clip(layout(*SHARED_PREFIX), 24)
