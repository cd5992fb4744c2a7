"""Document attention against SDPA with a boolean block mask: forward and backward over one packed row of 2,048 tokens.

    python -m bench.attention

Goal: >= 5x faster on rows of about 16 documents, in one thread, with outputs and gradients within 1e-5. The two are
timed in turns, in CPU seconds of the process (robust to other load), and the best of the rounds counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.report import report
from burnish.model.attention import document_attention, visible_pairs

NUM_TOKENS, HEAD_DIM, ROUNDS = 2048, 64, 5


def measure(label: str, num_documents: int, num_heads: int, num_kv_heads: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randperm(NUM_TOKENS - 1, generator=generator)[: num_documents - 1].add(1).sort().values
    edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([NUM_TOKENS])]).to(torch.int32)
    no_prefix = torch.zeros(num_documents, 2, dtype=torch.int32)
    documents = torch.cat([edges[:-1, None], edges[1:, None], no_prefix], 1)
    ids = torch.repeat_interleave(torch.arange(num_documents), edges.diff())
    mask = (ids.unsqueeze(1) == ids) & torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
    assert int(mask.sum()) == visible_pairs(documents)
    q, k, v = (
        torch.randn(NUM_TOKENS, heads, HEAD_DIM, generator=generator).transpose(0, 1).detach().requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    towards = torch.randn(q.shape, generator=generator)

    def ours() -> Tensor:
        return document_attention(q, k, v, documents, scale=HEAD_DIM**-0.5)

    def masked() -> Tensor:
        gqa = num_heads != num_kv_heads
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=gqa)[0]

    rounds = [[timed(attend, (q, k, v), towards) for attend in (ours, masked)] for _ in range(ROUNDS)]
    seconds = [min(pair[i][0] for pair in rounds) for i in range(2)]
    errors = [(a - b).abs().max().item() for a, b in zip(rounds[0][0][1], rounds[0][1][1], strict=True)]
    return {
        "row": label,
        "documents": num_documents,
        "density": mask.float().mean().item(),
        "ours_ms": seconds[0] * 1e3,
        "boolean_mask_ms": seconds[1] * 1e3,
        "speedup": seconds[1] / seconds[0],
        "error_out": errors[0],
        "error_gradients": max(errors[1:]),
    }


def timed(attend: Callable[[], Tensor], inputs: tuple[Tensor, ...], towards: Tensor) -> tuple[float, list[Tensor]]:
    started = time.process_time()
    out = attend()
    gradients = torch.autograd.grad(out, inputs, towards)
    return time.process_time() - started, [out.detach(), *gradients]


def main() -> None:
    torch.set_num_threads(1)
    report(
        "attention",
        [
            measure("16 documents", 16, 8, 8),
            measure("16 documents, grouped queries 8/2", 16, 8, 2),
            measure("64 documents", 64, 8, 8),
            measure("one document (the worst case)", 1, 8, 8),
        ],
    )


if __name__ == "__main__":
    main()
