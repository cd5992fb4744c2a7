"""What is done to a loaded model before training, in the one order that works: adapter, recomputation, compilation,
sharding. Recomputation and compilation replace a layer's `forward`, so no module is wrapped and no parameter renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from burnish.errors import ModelError
from burnish.model.context_parallel import share_rows
from burnish.model.heads.attach import attach
from burnish.model.materialise import fill, take
from burnish.model.precision import keep_masters
from burnish.model.tensor_parallel import apply_tensor_parallel
from burnish.model.vocabulary import train_rows

if TYPE_CHECKING:
    from torch import nn

    from burnish.mesh import Mesh
    from burnish.model.config import Compile, ModelConfig
    from burnish.model.policy_model import PolicyModel
    from burnish.types import NewTokens


def prepare(
    model: PolicyModel, config: ModelConfig, mesh: Mesh, *, seed: int, new_tokens: NewTokens | None = None
) -> None:
    """Applies a recipe's `model:` block to `model`, in place. Weights that are deferred (see `deferred.py`) are made at
    the end, each rank its own part; whatever cuts or replaces a parameter before then does it with torch's functions.

    Raises:
        ModelError: adapter targets that do not exist, a dtype that cannot be trained, a model or an adapter that cannot
            be cut over the mesh.
    """
    if config.adapter is not None:
        config.adapter.apply(model, seed=seed)
    if new_tokens is not None:
        train_rows(model, new_tokens)
    attach(model, config.head, seed=seed)
    dtype = getattr(torch, config.dtype)
    keep_masters(model)
    if mesh.sizes.tp > 1 and config.compile is not None:
        raise ModelError(
            "torch.compile cannot take the exchanges of tensor parallel into a layer's graph",
            where="model.compile",
            cure="leave `compile` out, or `mesh.tp: 1`",
        )
    apply_tensor_parallel(model, mesh)
    waiting = take(model)
    if config.activation_checkpointing != "none":
        recompute_layers(model, selective=config.activation_checkpointing == "selective")
    if config.compile is not None:
        compile_layers(model, config.compile)
    shard(model, mesh, dtype)
    if waiting:
        fill(model, waiting, mesh.device)


def recompute_layers(model: PolicyModel, *, selective: bool) -> None:
    """Keeps only each layer's input, and computes the layer again in the backward pass.

    `selective` also keeps what matrix products and attention returned: those are nearly all of a layer's time, the
    element-wise rest is most of its memory. Source: `torch.utils.checkpoint`'s selective contexts.
    """
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if selective else {}
    for layer in model.layers:
        layer.forward = _recomputed(layer.forward, contexts)


def _recomputed(forward: Callable[..., Any], contexts: dict[str, Any]) -> Callable[..., Any]:
    # A function of this module, not `partial(checkpoint, forward)`: torch.compile traces into it and finds `checkpoint`
    # there, but skips a forward that is torch's own function.
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return recomputed


# Without `_grouped_mm`: gpt-oss adds its experts' bias to the product in place, and what is kept must not change.
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def is_product(operator: Any) -> bool:
    """Whether `selective` keeps what this operator returned."""
    return operator in _PRODUCTS or operator is torch.ops.burnish.document_attention.default


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_product(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(model: PolicyModel, compile: Compile) -> None:
    """Compiles each layer's forward. Layers of one kind share one graph, and so do packed layouts: a layout is a tensor
    of fixed shape that only the attention operator reads."""
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, mode=compile.mode)


def shard(model: PolicyModel, mesh: Mesh, dtype: torch.dtype) -> None:
    """Shards layers and root over the ranks (FSDP2): each rank keeps 1/n of every parameter, gradient and moment.

    One rank (of all axes but `tp`) with float32 keeps plain modules, since there is nothing to shard or to cast. On a
    CPU core FSDP's copies of the weights cost 8 % of a LoRA step of a 135M-parameter model (4.51 s, not 4.16 s, for 512
    tokens), 24 % of a full step of 12 layers (3.05 s, not 2.45 s), and a second copy in memory. One rank with a lower
    `dtype` shards the trained parameters only, for their casts: frozen ones are in that dtype already, and a frozen
    model stays plain.

    Gradients are summed, never averaged, because the loss was divided by a global count. That has to be said to every
    FSDP module: said to the root alone, the layers' gradients are divided by the number of ranks.

    The root gives its gathered parameters back after each forward pass. FSDP's default keeps them until a backward
    pass: behind a probe or an evaluation the model's parameters are then low-precision copies, and an optimizer opened
    over them, or a checkpoint taken of them, misses the masters of embedding, last norm and head. Nor does the root
    cast its inputs: a loss's coefficients stay float32.
    """
    model.mesh = mesh
    share_rows(model, mesh)
    alone = mesh.sizes.data * mesh.sizes.cp == 1  # ranks of `tp` have their parts already
    if alone and (dtype == torch.float32 or not model.trainable_parameters()):
        return
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    packed = {parameter for parameter in frozen if not parameter.is_floating_point()}  # four bits: whole on each rank
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": mesh.fsdp_mesh(),
        "ignored_params": frozen if alone else packed,
    }
    for layer in model.layers:
        fully_shard(layer, mp_policy=precision, **options)
    precision = replace(precision, cast_forward_inputs=False)
    for module in map(model.get_submodule, model.heads):
        fully_shard(module, mp_policy=replace(precision, param_dtype=torch.float32), **options)
    fully_shard(model, mp_policy=precision, reshard_after_forward=True, **options)
    register_fsdp_forward_method(model, "logits")
    register_fsdp_forward_method(model, "next_logits")
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The sharded modules of a model; none on one rank in float32."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
