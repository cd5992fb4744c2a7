"""How much of the hardware a step uses: floating-point operations counted exactly, over a peak.

`useful` counts what the objective demands: real tokens, each document's own causal pairs, gradients of what is trained
and of what lies above it, the head on the tokens a loss reads. `executed` counts what ran: padded slots, activations
computed again, scores and logits made again in the backward pass, and what a second model answers on these rows (not
the mismatched pairs of KTO). Their shares of the peak are `mfu` and `hfu`.

The products are not deduced from an architecture: one forward and backward pass of a few tokens is watched, so
adapters, frozen layers, routed experts and recomputation count as they are. Must not know recipes or workflows.
"""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from burnish.model.attention import visible_pairs
from burnish.model.context_parallel import whole_rows
from burnish.model.policy_model import one_document
from burnish.model.project import VECTORS
from burnish.types import previous_token

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.second import Second
    from burnish.types import Block

PROBE_TOKENS = 8
"""Tokens of the watched pass; half of it is run again to see that the count grows with the tokens."""
_ALL_LOGITS = VECTORS | {"weighted_nll", "full_kl"}
"""The `needs` that are made of logits over the whole vocabulary."""


class Throughput:
    """Counts the operations of a training step of `model`, which is run once on a few tokens here.

    FLOPs of a product a @ b are 2 * rows * inner * columns forward, and as many again for each of a and b that needs a
    gradient. So a frozen weight costs no dW, and nothing below the first trained layer costs anything backward.
    """

    obstacle: str | None = None
    """Why this model's operations cannot be counted, if they cannot."""

    def __init__(self, model: PolicyModel, second: Second | None = None) -> None:
        self.second = second
        if second is not None:
            self.obstacle = second.obstacle
        watch, executed = _probe(model, PROBE_TOKENS, backward=True)
        self.obstacle = _obstacle(model, watch, executed) or self.obstacle
        if model.mesh is not None and model.mesh.sizes.tp > 1:
            self.obstacle = "a rank sees only its own part of the layers under tensor parallel"
        self.useful_per_token = (watch.forward + watch.backward) / PROBE_TOKENS
        self.executed_per_slot = executed.products / PROBE_TOKENS
        self.attention = watch.attention
        once = watch.attention_forward(PROBE_TOKENS)
        self.attention_passes = executed.attention_forward / once if once else 1.0
        weight = model.head.weight
        self.vocab_size = model.vocab_size
        self.head_product = 2 * model.vocab_size * weight.shape[1]
        hidden_needs_grad = any(parameter.requires_grad for parameter in model.backbone.parameters())
        self.head_trains = any(parameter.requires_grad for parameter in model.head.parameters())
        self.head_gradients = int(hidden_needs_grad) + self.head_trains

    def flops(self, blocks: list[Block], loss: Loss) -> tuple[float, float] | None:
        """(useful, executed) operations of one forward and backward pass over `blocks`; None with an `obstacle`."""
        if self.obstacle is not None:
            return None
        useful = executed = 0.0
        for block in blocks:
            if not block.num_documents:
                continue
            useful += self.useful_per_token * int((block.document_ids >= 0).sum())
            executed += self.executed_per_slot * block.num_tokens
            for (heads, dim_k, dim_v, window, needs_grad), layers in self.attention.items():
                pairs = 2 * layers * heads * visible_pairs(block.documents, window)
                useful += pairs * (dim_k + dim_v) * (3 if needs_grad else 1)
                executed += pairs * (dim_k + dim_v) * self.attention_passes
                executed += pairs * (3 * dim_k + 2 * dim_v) * needs_grad  # the scores are made again
            read = int((loss.reads(block) & (previous_token(block) >= 0)).sum())
            useful += read * self.head_product * (1 + self.head_gradients) * bool(loss.needs & _ALL_LOGITS)
            executed += read * self.head_product * self._head_products(loss)
            if "candidate_logits" in loss.needs:
                share = len(loss.candidates(block)) / self.vocab_size
                useful += read * share * self.head_product * (1 + self.head_gradients)
                executed += read * share * self.head_product * (1 + self.head_gradients)
        return useful, executed + (self.second.flops(blocks, loss) if self.second is not None else 0.0)

    def _head_products(self, loss: Loss) -> int:
        """Products with the head's weight that the projection really runs: it makes vectors' logits twice, and those of
        a divergence by themselves, twice where the head trains."""
        in_forward = (1 + self.head_gradients) * ("weighted_nll" in loss.needs)
        vectors = (2 + self.head_gradients) * bool(loss.needs & VECTORS)
        divergence = (1 + self.head_trains + self.head_gradients) * ("full_kl" in loss.needs)
        return in_forward + vectors + divergence


class ForwardCost:
    """Counts the operations of a model that only reads, which is run once on a few tokens here."""

    def __init__(self, model: PolicyModel) -> None:
        watch, executed = _probe(model, PROBE_TOKENS, backward=False)
        self.obstacle = _obstacle(model, watch, executed)
        self.per_slot = watch.forward / PROBE_TOKENS
        self.attention = watch.attention
        self.head_product = 2 * model.vocab_size * model.head.weight.shape[1]

    def flops(self, blocks: list[Block], passes: int, head_products: int) -> float:
        """Operations of `passes` forward passes over `blocks`, with `head_products` products of the head in all with
        each trained token."""
        total = 0.0
        for block in blocks:
            if not block.num_documents:
                continue
            total += passes * self.per_slot * block.num_tokens
            for (heads, dim_k, dim_v, window, _), layers in self.attention.items():
                total += passes * 2 * layers * heads * visible_pairs(block.documents, window) * (dim_k + dim_v)
            total += head_products * self.head_product * int(block.loss_mask.sum())
        return total


def _obstacle(model: PolicyModel, watch: _Watch, executed: _Executed) -> str | None:
    """Why what was watched is not all that ran, or would not be on more tokens; None: it is."""
    half, half_executed = _probe(model, PROBE_TOKENS // 2, backward=False)
    for seen, counted in ((watch, executed), (half, half_executed)):
        if seen.forward + seen.attention_forward(seen.num_tokens) != counted.forward:
            return "its forward pass multiplies matrices in a way that is not understood"
    if watch.forward != 2 * half.forward:
        return "its cost does not grow linearly with the tokens outside of attention"
    return None


class _Watch(TorchFunctionMode):
    """Sees every matrix product and attention call of a forward pass, with what they need gradients of."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.forward = self.backward = 0
        self.attention: Counter[tuple[int, int, int, int | None, bool]] = Counter()
        """(query heads, key width, value width, window, whether a gradient flows) -> layers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name.startswith("document_attention"):
            q, k, v, window = args[0], args[1], args[2], args[6]
            needs_grad = any(tensor.requires_grad for tensor in (q, k, v))
            self.attention[q.shape[0], q.shape[2], v.shape[2], window, needs_grad] += 1
        elif name in _PRODUCTS:
            operands = (*args, *(kwargs or {}).values())[_PRODUCTS[name] :][:2]
            flops = 2 * out.numel() * operands[0].shape[-1]
            self.forward += flops
            self.backward += flops * sum(operand.requires_grad for operand in operands)
        return out

    def attention_forward(self, num_tokens: int) -> int:
        """Operations of the watched attention calls, over one document."""
        documents = torch.tensor([[0, num_tokens, 0, 0]])
        return sum(
            2 * layers * heads * visible_pairs(documents, window) * (dim_k + dim_v)
            for (heads, dim_k, dim_v, window, _), layers in self.attention.items()
        )


# Functions that multiply matrices -> index of the first operand; the second follows it.
_PRODUCTS = {
    "linear": 0, "matmul": 0, "__matmul__": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1,
    "grouped_mm": 0, "_grouped_mm": 0, "grouped_mm_fallback": 0,
}  # fmt: skip


class _Executed:
    """What FlopCounterMode saw: all of the forward pass; both passes without attention; attention's forward runs."""

    forward = products = attention_forward = 0

    def read(self, counter: FlopCounterMode) -> None:
        counts = counter.get_flop_counts().get("Global", {})
        attention = {op: n for op, n in counts.items() if "document_attention" in str(op)}
        self.products = sum(counts.values()) - sum(attention.values())
        self.attention_forward = sum(n for op, n in attention.items() if "backward" not in str(op))


def _probe(model: PolicyModel, num_tokens: int, *, backward: bool) -> tuple[_Watch, _Executed]:
    """Runs one document of `num_tokens`; leaves neither gradients nor a moved random state behind."""
    device = next(model.parameters()).device
    block = one_document(torch.ones(num_tokens, dtype=torch.int64, device=device))
    watch, executed = _Watch(num_tokens), _Executed()
    with _undisturbed(model, device), FlopCounterMode(display=False) as counter:
        with watch:
            outputs = model(block, needs=frozenset({"logprobs"}), reads=torch.zeros_like(block.loss_mask))
        executed.forward = counter.get_total_flops()
        assert outputs.logprobs is not None
        if backward:
            outputs.logprobs.sum().backward()  # zeros, through every layer: no token is read
        executed.read(counter)
    return watch, executed


@contextmanager
def _undisturbed(model: PolicyModel, device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    # A graph compiled for eight tokens would be thrown away: compiled layers run as plain Python here.
    with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"), whole_rows(model):
        model.train()
        yield
    model.zero_grad(set_to_none=True)


def _grouped_mm_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Rows of `a` are split over the matrices of `b`; in dW the inner axis is split, and both are plain matrices."""
    return 2 * a.numel() * b.shape[-1] if a.ndim == 2 else 2 * a[0].numel() * b.shape[-1]


for _operator in (torch.ops.aten._grouped_mm,):
    if _operator not in flop_registry:
        register_flop_formula(_operator, get_raw=True)(_grouped_mm_flops)


# Dense bfloat16 / float16 FLOP/s with float32 accumulation, from NVIDIA's and AMD's data sheets (without sparsity).
_PEAKS = {
    "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H20": 148e12,
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12,
    "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "MI325X": 1307e12, "MI300X": 1307e12, "MI250X": 383e12,
}  # fmt: skip


def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s that `mfu` is a share of: the data sheet's for a known GPU in half precision, else a measured product."""
    device = torch.device(device)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        known = _listed_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    return _measured_peak(device, dtype, torch.get_num_threads())


def _listed_peak(device_name: str) -> float | None:
    """Peak of a device by the name its driver gives, for example `NVIDIA H100 80GB HBM3`."""
    return next((peak for key, peak in _PEAKS.items() if re.search(rf"\b{key}\b", device_name)), None)


@functools.cache
def _measured_peak(device: torch.device, dtype: torch.dtype, _num_threads: int) -> float:
    """The best of several square products: of 8192 on a GPU, of 1024 on a CPU (2 GFLOP, 20 ms of a core in float32).

    Of 256 where those take longer than 5 ms: a core without instructions for bfloat16 needs 2.3 s for one of 1024.
    """
    if device.type != "cpu":
        return _best_product(8192, device, dtype, seconds=0.4)
    small = _best_product(256, device, dtype, seconds=0.01)
    return small if 2 * 256**3 / small > 0.005 else _best_product(1024, device, dtype, seconds=0.06)


def _best_product(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of the quickest of the products that begin within so many seconds, and of three at least: the first one
    starts threads, and beside a cluster that was starting up it took 200 times as long as the next."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    out, best, deadline = torch.empty_like(a), float("inf"), time.perf_counter() + seconds
    tried = 0
    while (started := time.perf_counter()) < deadline or tried < 3:
        tried += 1
        torch.mm(a, a, out=out)
        out[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
