"""The CUDA kernels against attention written out in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from burnish.errors import ModelError
from burnish.model.attention import document_attention
from burnish.model.context_parallel import ContextParallel
from tests.attention_helpers import layout, reference_attention, side_by_side

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention and FlexAttention kernels need CUDA"),
]

DOCUMENTS = {
    "packed": side_by_side(200, 1, 63, 300),
    "padding between": layout((0, 200, 0, 0), (256, 390, 0, 0)),
    "shared prefix": layout((0, 130, 0, 0), (130, 200, 0, 130), (200, 420, 0, 130), (450, 500, 0, 0)),
}
NUM_TOKENS = 600


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "options"),
    [
        ("varlen", torch.bfloat16, {}),
        ("varlen", torch.bfloat16, {"window": 50}),
        ("varlen", torch.bfloat16, {"sinks": True}),
        ("varlen", torch.float16, {"window": 50, "sinks": True}),
        ("flex", torch.bfloat16, {}),
        ("flex", torch.bfloat16, {"window": 50, "sinks": True}),
        ("flex", torch.bfloat16, {"softcap": 2.0}),
        ("sdpa", torch.float32, {"softcap": 2.0, "window": 50, "sinks": True}),
        ("auto", torch.float32, {}),
        ("auto", torch.bfloat16, {"softcap": 2.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_equals_attention_written_out(documents, kernel, dtype, options, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(NUM_TOKENS, heads, 64, generator=generator).to(dtype) for heads in (4, num_kv_heads, num_kv_heads)
    ]
    if options.get("sinks"):
        inputs.append(torch.linspace(-1, 2, 4).to(dtype))
    options = {"scale": 0.25, **{name: value for name, value in options.items() if name != "sinks"}}

    def run(attend, device, dtype, **extra):
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
        q, k, v = (x.transpose(0, 1) for x in leaves[:3])
        sinks = leaves[3] if len(leaves) == 4 else None
        out = attend(q, k, v, documents, sinks=sinks, **options, **extra)
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        return [out, *torch.autograd.grad(out, leaves, towards)]

    ours = run(document_attention, "cuda", dtype, kernel=kernel)
    theirs = run(reference_attention, "cpu", torch.float64)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        assert (a.cpu().double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("kernel", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize("window", [None, 50])
def test_the_parts_of_a_row_are_the_row(kernel, window):
    """Three ranks of 200 tokens; the middle one's queries lie in a document that begins before them and ends after."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(heads, NUM_TOKENS, 64, generator=generator).bfloat16().cuda() for heads in (4, 2, 2)]
    q, k, v = (x.requires_grad_() for x in leaves)
    documents = layout((0, 60, 0, 0), (60, 500, 0, 0), (510, 590, 0, 0))
    parts = []
    for rank in (ContextParallel(rank, 3) for rank in range(3)):
        first, end = rank.span(NUM_TOKENS)
        part = rank.clip(documents, NUM_TOKENS)
        parts.append(
            document_attention(q[:, first:end], k, v, part, scale=0.125, window=window, kernel=kernel, first=first)
        )
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    out, expected = torch.cat(parts, 1), reference_attention(exact[0], exact[1], exact[2], documents, 0.125, window)
    towards = torch.randn(out.shape, generator=generator)
    ours = (out, *torch.autograd.grad(out, leaves, towards.to(out)))
    theirs = (expected, *torch.autograd.grad(expected, exact, towards.double()))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu().double() - b).abs().max() <= 3e-2 * b.abs().max()


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_another_document_leaves_this_one_bit_identical(kernel):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, NUM_TOKENS, 64, generator=generator).to("cuda", torch.bfloat16) for _ in range(3))
    documents = side_by_side(250, 300)
    before = document_attention(q, k, v, documents, scale=0.125, kernel=kernel)
    for x in (q, k, v):
        x[:, :250] += 1
    after = document_attention(q, k, v, documents, scale=0.125, kernel=kernel)
    assert torch.equal(before[:, 250:550], after[:, 250:550]) and not torch.equal(before[:, :250], after[:, :250])


def test_varlen_refuses_a_soft_cap():
    q = torch.randn(2, 16, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="soft caps"):
        document_attention(q, q, q, side_by_side(16), scale=1.0, softcap=2.0, kernel="varlen")
