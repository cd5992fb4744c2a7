from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from burnish.errors import ModelError
from burnish.model.attention import document_attention, visible_pairs
from burnish.model.kernels import flex, varlen
from tests.attention_helpers import SHARED_PREFIX, layout, reference_attention, side_by_side, visible_mask

OPTIONS = [
    {},
    {"window": 3},
    {"window": 6, "sinks": True},
    {"window": 100},
    {"softcap": 1.5},
    {"softcap": 1.5, "window": 3, "sinks": True},
    {"sinks": True},
]


def tensors(num_heads: int, num_kv_heads: int, width_k: int, width_v: int, num_tokens: int, dtype=torch.float64) -> Any:
    """q, k, v in transformers' memory order (tokens outermost), q large enough for scores well above 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (num_tokens, num_heads, width_k),
        (num_tokens, num_kv_heads, width_k),
        (num_tokens, num_kv_heads, width_v),
    ]
    q, k, v = (torch.randn(shape, dtype=dtype, generator=generator).transpose(0, 1) for shape in shapes)
    return tuple(x.detach().requires_grad_() for x in (3 * q, k, v))


def with_sinks(options: dict, num_heads: int, dtype=torch.float64) -> dict:
    if not options.get("sinks"):
        return {"scale": 0.4, **options}
    sinks = torch.linspace(-1, 2, num_heads, dtype=dtype).requires_grad_()
    return {"scale": 0.4, **options, "sinks": sinks}


def test_uniform_scores_average_what_is_visible():
    """With q = 0 every visible value weighs the same, so the outputs are means that can be read off the layout."""
    documents = layout((0, 3, 0, 0), (3, 5, 0, 3))
    q, k = torch.zeros(1, 6, 8), torch.randn(1, 6, 8)
    v = torch.tensor([1.0, 2.0, 6.0, 3.0, 8.0, 99.0]).view(1, 6, 1).expand(1, 6, 8)

    def outputs(**options) -> list[float]:
        return document_attention(q, k, v, documents, scale=1.0, **options)[0, :, 0].tolist()

    assert outputs() == pytest.approx([1, 1.5, 3, 12 / 4, 20 / 5, 0])
    assert outputs(window=2) == pytest.approx([1, 1.5, 4, 4.5, 5.5, 0])
    assert outputs(sinks=torch.zeros(1)) == pytest.approx([1 / 2, 3 / 3, 9 / 4, 12 / 5, 20 / 6, 0])


@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (4, 2, 8, 8), (4, 2, 8, 6)], ids=["mha", "gqa", "narrow-values"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_attention_written_out(shape, options):
    q, k, v = inputs = tensors(*shape, num_tokens=22)
    documents, options = layout(*SHARED_PREFIX), with_sinks(options, num_heads=4)
    out, expected = (attend(q, k, v, documents, **options) for attend in (document_attention, reference_attention))
    assert_close(out, expected, 1e-12)
    inputs += (options["sinks"],) if "sinks" in options else ()
    towards = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(result, inputs, towards) for result in (out, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"window": 150}, {"softcap": 2.0}], ids=str)
def test_long_documents_in_training_precision(dtype, tolerance, options):
    """Documents longer than the 128 queries of a chunk, shared prefix included, against float64."""
    documents = layout((0, 200, 0, 0), (200, 400, 0, 200), (400, 690, 0, 0))
    exact = tensors(4, 2, 16, 16, num_tokens=700)
    rounded = q, k, v = [x.detach().to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    out = document_attention(q, k, v, documents, **with_sinks(options, 4, dtype))
    expected = reference_attention(exact[0], exact[1], exact[2], documents, **with_sinks(options, 4))
    assert out.dtype == dtype
    assert_close(out, expected, tolerance)
    towards = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(out, rounded, towards)
    theirs = torch.autograd.grad(expected, exact, towards.double())
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, tolerance)


def test_padding_is_zero_and_gets_no_gradient():
    q, k, v = inputs = tensors(2, 2, 8, 8, num_tokens=22)
    out = document_attention(q, k, v, layout(*SHARED_PREFIX), scale=1.0)
    padding = [12, 20, 21]
    assert out[:, padding].eq(0).all() and out[:, [11, 13, 19]].ne(0).all()
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert gradient[:, padding].eq(0).all() and gradient[:, [11, 15, 18]].ne(0).any(-1).all()


def test_an_empty_row_is_zero():
    q, k, v = inputs = tensors(2, 2, 8, 8, num_tokens=4)
    out = document_attention(q, k, v, layout(), scale=1.0)
    assert out.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "sinks": True}], ids=str)
def test_gradcheck(options):
    documents = layout((0, 2, 0, 0), (2, 5, 0, 2))
    inputs = tensors(2, 1, 8, 8, num_tokens=6)
    options = with_sinks(options, 2)
    sinks = options.pop("sinks", None)

    def attend(q, k, v, sinks):
        return document_attention(q, k, v, documents, sinks=sinks, **options)

    assert gradcheck(attend, (*inputs, sinks))


@pytest.mark.parametrize("options", [{}, {"sinks": True, "window": 3}], ids=str)
def test_operator_is_registered_soundly(options):
    """Schema, aliasing, fake kernel (shapes, strides, dtypes) and autograd registration, by torch's own checker."""
    options = with_sinks(options, 4)
    arguments = (options.get("sinks"), options["scale"], options.get("window"), None, "sdpa")
    inputs = tensors(4, 2, 8, 8, num_tokens=22, dtype=torch.float32)
    torch.library.opcheck(torch.ops.burnish.document_attention.default, (*inputs, layout(*SHARED_PREFIX), *arguments))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_another_document_leaves_this_one_bit_identical(options):
    q, k, v = tensors(4, 2, 8, 8, num_tokens=22, dtype=torch.float32)
    options = with_sinks(options, 4, torch.float32)
    documents = side_by_side(7, 9)

    def second_document(q, k, v):
        out = document_attention(q, k, v, documents, **options)[:, 7:16]
        return out, torch.autograd.grad(out.square().sum(), (q, k, v))

    out, gradients = second_document(q, k, v)
    elsewhere = torch.ones(22, 1).index_fill(0, torch.arange(7, 16), 0)
    changed, changed_gradients = second_document(*(x + 5 * elsewhere for x in (q, k, v)))
    assert torch.equal(out, changed)
    for ours, theirs in zip(gradients, changed_gradients, strict=True):
        assert torch.equal(ours, theirs) and ours[:, :7].eq(0).all()


@pytest.mark.parametrize(
    ("documents", "window", "pairs"),
    [
        ([(0, 4, 0, 0)], None, 10),
        ([(0, 4, 0, 0)], 2, 1 + 2 + 2 + 2),
        ([(0, 3, 0, 0), (3, 5, 0, 3)], None, 6 + 4 + 5),
        ([(0, 3, 0, 0), (3, 5, 0, 3)], 4, 6 + 4 + 4),
        ([(0, 3, 0, 0), (3, 5, 0, 3)], 1, 5),
    ],
)
def test_visible_pairs(documents, window, pairs):
    assert visible_pairs(layout(*documents), window) == pairs
    assert visible_mask(layout(*documents), 6, window).sum() == pairs


def test_flop_counter_counts_visible_pairs():
    """6 + 15 pairs, 4 heads, 8-wide: forward 2 products, backward 5 (the scores again), 2 FLOPs a multiply-add."""
    q, k, v = tensors(4, 2, 8, 8, num_tokens=10)
    with FlopCounterMode(display=False) as counter:
        out = document_attention(q, k, v, side_by_side(3, 5), scale=1.0)
        assert counter.get_total_flops() == 2 * 2 * 21 * 4 * 8
        out.sum().backward()
    assert counter.get_total_flops() == 7 * 2 * 21 * 4 * 8


def one_graph(backend: str) -> None:
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(fullgraph=True, backend=backend)
    def step(q, k, v, sinks, documents):
        return document_attention(q.sin(), k, v, documents, scale=0.5, sinks=sinks).square()

    inputs = tensors(4, 2, 8, 8, num_tokens=22, dtype=torch.float32)
    q, k, v = inputs
    sinks = torch.ones(4, requires_grad=True)
    inputs += (sinks,)
    for documents in (side_by_side(22), side_by_side(7, 12), layout(*SHARED_PREFIX), layout()):
        plain = document_attention(q.sin(), k, v, documents, scale=0.5, sinks=sinks).square()
        compiled = step(q, k, v, sinks, documents)
        assert_close(compiled, plain, 1e-6)
        for ours, theirs in zip(
            torch.autograd.grad(compiled.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
        ):
            assert_close(ours, theirs, 1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_every_layout_shares_one_compiled_graph():
    one_graph("aot_eager")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own, on importing inductor
def test_every_layout_shares_one_inductor_graph():
    one_graph("inductor")


def test_kernels_that_cannot_are_refused():
    q, k, v = tensors(2, 2, 8, 8, num_tokens=4, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"varlen kernel does not do attention on cpu"):
        document_attention(q, k, v, side_by_side(4), scale=1.0, kernel="varlen")
    with pytest.raises(ModelError, match=r"no backward pass on CPU"):
        document_attention(q, k, v, side_by_side(4), scale=1.0, kernel="flex")


def test_varlen_layout_without_prefixes():
    """Padding inside and at the end of a row of 10 becomes sequences of its own; keys stay where they are."""
    made = varlen._layout([(5, 8, 5, 5), (0, 4, 0, 0)], 10, 10, 0, torch.device("cpu"))
    cu_seqlens = [0, 4, 5, 8, 10]
    assert [x.tolist() for x in made.lengths[:2]] == [cu_seqlens, cu_seqlens] and made.lengths[2:] == (4, 4)
    assert made.keys is None and made.gaps == [slice(4, 5), slice(8, 10)]


def test_varlen_layout_gathers_shared_prefixes():
    """A prompt of 3, completions of 2 and 1: keys are 0 1 2 | 0 1 2 3 4 | 0 1 2 5 | 6 (padding)."""
    made = varlen._layout([(0, 3, 0, 0), (3, 5, 0, 3), (5, 6, 0, 3)], 7, 7, 0, torch.device("cpu"))
    queries, keys, longest_query, longest_keys = made.lengths
    assert queries.tolist() == [0, 3, 5, 6, 7] and keys.tolist() == [0, 3, 8, 12, 13]
    assert (longest_query, longest_keys) == (3, 5)
    assert made.keys is not None and made.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 6, "softcap": 1.5}], ids=str)
def test_flex_mask_and_score_are_the_layout(options):
    """FlexAttention's slow reference runs forward on CPU: the mask and score functions are those of the CUDA kernel."""
    q, k, v = (x.detach() for x in tensors(4, 2, 16, 16, num_tokens=22))
    documents = layout(*SHARED_PREFIX)
    spans = flex.spans_of_tokens(documents, 22)
    token = torch.arange(22)
    sees = flex.visible(spans, options.get("window"))(0, 0, token[:, None], token)
    assert torch.equal(sees, visible_mask(documents, 22, options.get("window")))
    out, _ = flex.attend(q, k, v, spans, 0.4, options.get("window"), options.get("softcap"))
    assert_close(out, reference_attention(q, k, v, documents, 0.4, **options), 1e-12)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """The largest difference is within `tolerance` of the largest value."""
    error = (ours.to(theirs.dtype) - theirs).abs().max().item()
    assert error <= tolerance * theirs.abs().max().item(), f"off by {error:.2e}"
