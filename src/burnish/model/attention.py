"""Document-masked attention: one operator over a packed row, and its place in transformers' attention interface.

A token sees itself and what stands before it in its own document, and all of its document's shared prefix; padding sees
nothing and is seen by nothing. The layout is a tensor that only the operator reads, so torch.compile has one graph for
every layout. Window, soft cap and sinks are honoured, or the model is refused: dropping them silently moves the outputs
of Gemma and gpt-oss models by tens of per cent.

Must not know recipes, losses or how a model was loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from burnish.errors import ModelError
from burnish.model.kernels import sdpa, varlen
from burnish.model.kernels.flex import flex_document_attention

if TYPE_CHECKING:
    from burnish.model.context_parallel import ContextParallel

Kernel = Literal["auto", "sdpa", "varlen", "flex"]

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor documents, Tensor? sinks, float scale, int? window, float? softcap, "
    "str kernel, int first=0) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor documents, Tensor? sinks, "
    "float scale, int? window, float? softcap, str kernel, int first=0) -> (Tensor, Tensor, Tensor, Tensor)"
)


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: Kernel = "auto",
    first: int = 0,
) -> Tensor:
    """Attention within the documents of one packed row of T tokens.

    Args:
        q: [Hq, t, Dk], with Hq a multiple of Hkv (query heads of a group are neighbours); t is T but under context
            parallel, see `first`.
        k: [Hkv, T, Dk]. v: [Hkv, T, Dv].
        documents: int32 [D, 4], see `types.Block`; entries with end <= start are unused. On the CPU it costs nothing to
            read; on a CUDA device `varlen` and `sdpa` wait for the device once a call.
        scale: of the scores, before the soft cap.
        window: a token sees itself and the `window - 1` tokens before it, a shared prefix counted.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
        sinks: [Hq], a learned logit a head, in the softmax's denominator only (gpt-oss).
        kernel: `auto` is `sdpa` on CPU and, on CUDA, `varlen` where it can and `sdpa` elsewhere.
        first: the token that `q[:, 0]` is the query of: `q` may hold those of tokens first..first + t alone, and the
            documents then lie within them, what stands before a cut document as its prefix.

    Returns:
        [Hq, t, Dv], zero on padding. Strides are those of a dense [t, Hq, Dv].

    Raises:
        ModelError: the named kernel cannot do this (dtype, device, head width, soft cap).
    """
    kernel = _choose(kernel, q, v, softcap)
    if kernel == "flex":
        return flex_document_attention(q, k, v, documents, sinks, scale, window, softcap, first)
    return _attention(q, k, v, documents, sinks, scale, window, softcap, kernel, first)[0]


def visible_pairs(documents: Tensor, window: int | None = None) -> int:
    """How many (query, key) pairs a layout computes: the honest count behind FLOPs. `documents` is int32 [D, 4].

    >>> visible_pairs(torch.tensor([[0, 3, 0, 0], [3, 5, 0, 3]]))     # 1+2+3, and 4+5 with a prefix of 3
    15
    """
    total = 0
    for start, end, prefix_start, prefix_end in _in_use(documents):
        before, length = prefix_end - prefix_start, end - start
        total += length * before + length * (length + 1) // 2
        if window is not None and (surplus := before + length - window) > 0:
            unseen = min(surplus, length)  # the last queries lose surplus, surplus - 1, ... keys
            total -= unseen * (2 * surplus - unseen + 1) // 2
    return total


def _choose(kernel: Kernel, q: Tensor, v: Tensor, softcap: float | None) -> Literal["sdpa", "varlen", "flex"]:
    obstacle = varlen.obstacle(q, v, softcap)
    if kernel == "auto":
        return "varlen" if obstacle is None else "sdpa"
    if kernel == "varlen" and obstacle is not None:
        raise ModelError(
            f"the varlen kernel does not do {obstacle}", where="model.attention", cure="use `attention: auto`"
        )
    if kernel == "flex" and q.device.type == "cpu":
        raise ModelError(
            "FlexAttention has no backward pass on CPU", where="model.attention", cure="use `attention: auto`"
        )
    return kernel


def _in_use(documents: Tensor) -> sdpa.Documents:
    return [(s, e, p, q) if q > p else (s, e, s, s) for s, e, p, q in documents.tolist() if e > s]


_KERNELS = {"sdpa": sdpa, "varlen": varlen}


@torch.library.custom_op("burnish::document_attention", mutates_args=(), schema=_SCHEMA)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """`document_attention` with the log-sum-exp [Hq, t] of the scores and the sink."""
    out, lse = _KERNELS[kernel].forward(q, k, v, _in_use(documents), scale, window, softcap, first)
    if sinks is not None:
        with_sink = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))
        out.mul_((lse - with_sink).exp().unsqueeze(-1))
        lse = with_sink
    return out, lse


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    num_heads, num_tokens, _ = q.shape
    out = q.new_empty(num_tokens, num_heads, v.shape[-1]).transpose(0, 1)
    return out, q.new_empty(num_heads, num_tokens, dtype=sdpa.lse_dtype(q))


@torch.library.custom_op("burnish::document_attention_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks ([0] without sinks).

    A sink is a key whose value is zero, so its score's gradient is p_sink * (0 - grad_out . out), summed over queries.
    """
    layout = _in_use(documents)
    dq, dk, dv = _KERNELS[kernel].backward(grad_out, q, k, v, out, lse, layout, scale, window, softcap, first)
    if sinks is None:
        return dq, dk, dv, lse.new_empty(0)
    p_sink = (sinks.to(lse.dtype).unsqueeze(1) - lse).exp()
    d_sinks = -(p_sink * (grad_out.to(lse.dtype) * out).sum(-1)).sum(1)
    return dq, dk, dv, d_sinks.to(sinks.dtype)


@_attention_backward.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sinks = lse.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, sinks, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, documents, sinks)


def _differentiate(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing a second read is an error
    dq, dk, dv, d_sinks = _attention_backward(grad_out, *saved, *ctx.options)
    return dq, dk, dv, None, d_sinks if saved[-1] is not None else None, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.burnish.document_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, sinks: Any, scale: float, window: int | None, *_, **__):
    """Two products (scores, mix) over the visible pairs; padding and masked pairs are not counted."""
    return 2 * q.shape[0] * visible_pairs(documents, window) * (q.shape[-1] + v.shape[-1])


@register_flop_formula(torch.ops.burnish.document_attention_backward, get_raw=True)
def _backward_flops(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    sinks: Any,
    scale: float,
    window: int | None,
    *_,
    **__,
):
    """Five products: the scores again, and the gradients of q, k, v and of the probabilities."""
    return 2 * q.shape[0] * visible_pairs(documents, window) * (3 * q.shape[-1] + 2 * v.shape[-1])


class Decoding(Protocol):
    """Sequences whose keys and values are kept from one forward pass to the next: what rollouts are sampled with."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        kernel: Kernel,
    ) -> Tensor:
        """One layer's attention of the row's tokens, [Hq, T, Dv]: each sees itself and what is kept of its sequence.

        Called once a layer, in their order; shapes and options are those of `document_attention`.
        """
        ...


def register() -> None:
    """Makes the operator known to transformers, as `attn_implementation="burnish"` (kernel `auto`) and
    `"burnish_sdpa"`, `"burnish_varlen"`, `"burnish_flex"`. The layout is then a keyword of the model's forward:
    `model(input_ids [1, T], position_ids=[1, T], documents=[D, 4])`, and no mask is built. With a `context_parallel`
    the tokens are this rank's, and the documents those that it clipped. With `decoding=` in the layout's place the row
    goes on with sequences that were begun before.

    Source: transformers' `AttentionInterface` and `AttentionMaskInterface`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for name, kernel in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, _for_transformers(kernel))
        AttentionMaskInterface.register(name, _no_mask)


IMPLEMENTATIONS: dict[str, Kernel] = {
    "burnish": "auto",
    "burnish_sdpa": "sdpa",
    "burnish_varlen": "varlen",
    "burnish_flex": "flex",
}


def _for_transformers(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        dropout: float = 0.0,
        documents: Tensor | None = None,
        context_parallel: ContextParallel | None = None,
        decoding: Decoding | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """[1, H, T, D] in, [1, T, H, D] out, as transformers' attention modules expect it."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        for wrong, reason in (
            (
                documents is None and decoding is None,
                "no document layout reached this layer: pass `documents=` to the model's forward",
            ),
            (not causal, "it attends in both directions, packed rows are causal"),
            (dropout > 0, "attention dropout is not supported: set `attention_dropout` to 0 in the model's config"),
            (attention_mask is not None, "it brings a mask of its own"),
            (position_bias is not None, "it adds a position bias to its scores"),
            (query.shape[0] != 1 or key.shape[2] != query.shape[2], "a packed row is a batch of one, without a cache"),
            # Not in a graph, where reading `layer_idx` would give each layer a graph of its own: the forward pass that
            # every load makes has asked already.
            (
                not torch.compiler.is_compiling() and _masked_otherwise(module, sliding_window),
                "its mask is neither causal nor a window that it states",
            ),
        ):
            if wrong:
                raise _refusal(type(module).__name__, reason)
        if decoding is not None:
            options = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
            out = decoding.attend(query[0], key[0], value[0], kernel=kernel, **options)
            return out.transpose(0, 1).unsqueeze(0), None
        assert documents is not None
        k, v, first = key[0], value[0], 0
        if context_parallel is not None:
            k, v = context_parallel.gather(k, v)
            first = context_parallel.rank * query.shape[2]
        out = document_attention(
            query[0],
            k,
            v,
            documents,
            scale=scaling,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
            kernel=kernel,
            first=first,
        )
        return out.transpose(0, 1).unsqueeze(0), None

    return attend


def _masked_otherwise(module: torch.nn.Module, sliding_window: int | None) -> bool:
    """True if transformers would mask this layer in a way that its attention call does not tell: chunks (Llama 4), or
    a sliding mask whose window is not handed over (PhiMoE)."""
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return sliding_window is None and getattr(config, "sliding_window", None) is not None
    kind = layer_types[module.layer_idx]
    return kind == "chunked_attention" or (kind == "sliding_attention" and sliding_window is None)


def _no_mask(*, attention_mask: Tensor | None = None, use_vmap: bool = False, **options: Any) -> None:
    """No mask, unless the model asks for one that the layout cannot say. `use_vmap` marks a custom mask function."""
    if attention_mask is not None:
        raise _refusal("the model", "a padding mask was given: the document layout says what is padding")
    if use_vmap or "allow_is_bidirectional_skip" in options:
        raise _refusal("the model", "its mask is not causal")


def _refusal(where: str, reason: str) -> ModelError:
    return ModelError(f"document-masked attention cannot stand in: {reason}", where=where)
