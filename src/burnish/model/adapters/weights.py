"""The weights of an adapter: their initial values, the weight they amount to, and their names in PEFT's files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.model.deferred import assign, is_deferred, values
from burnish.model.seeded import generator
from burnish.model.shards import Whole, reader, whole_shape

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel

ADAPTER = "default"
"""PEFT's name for the one adapter of a model; it is part of parameter names (`q_proj.lora_A.default.weight`)."""


@torch.no_grad()
def initialise(model: PolicyModel, seed: int) -> None:
    """Gives every adapter weight its first value, in float32: one factor of the update is drawn, the other is zero, and
    DoRA's magnitudes are the norms that the frozen weight has.

    The laws are PEFT's: A of a linear layer uniform in +-1/sqrt(fan_in), B of an embedding normal; but each is drawn on
    the CPU from a generator of its own.
    """
    if model.head.weight.is_meta and not is_deferred(model.head.weight):
        return
    for name, parameter in list(model.causal_lm.named_parameters()):
        if ".lora_" not in name:
            continue
        parameter.data = parameter.data.float()
        owner_name, _, leaf = name.rpartition(".")
        if ".lora_magnitude_vector" in name:
            layer = model.causal_lm.get_submodule(name.partition(".lora_")[0])
            make = partial(_norms, layer.lora_magnitude_vector[ADAPTER], frozen_weight(layer))
        elif ".lora_A" in name:
            make = partial(_uniform, parameter.shape, seed, name)
        elif ".lora_embedding_B" in name:
            make = partial(_normal, parameter.shape, seed, name)
        else:
            make = partial(torch.zeros, parameter.shape)
        assign(model.causal_lm.get_submodule(owner_name), leaf, make)


def _norms(dora: Any, weight: Tensor) -> Tensor:
    """By PEFT's own function: the forward pass divides by what it returns, and must find exactly one."""
    return dora.get_weight_norm(values(weight).float(), 0.0, 1.0)


def _uniform(shape: torch.Size, seed: int, name: str) -> Tensor:
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, name))


def _normal(shape: torch.Size, seed: int, name: str) -> Tensor:
    return torch.empty(shape).normal_(generator=generator(seed, name))


def frozen_weight(layer: Any) -> Tensor:
    """The weight an adapted layer has beside its adapter, or that of a plain layer; four bits are expanded."""
    layer = getattr(layer, "base_layer", layer)
    if getattr(layer.weight, "quant_state", None) is None:
        return layer.weight
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)


def adapted_weight(layer: Any, read: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
    """The one weight that computes what an adapted layer does, laid out and rounded as its frozen weight; a gradient
    flows to the adapter. For a weight W of [outputs, inputs]

        W' = W + scale B A                                       LoRA; scale = lora_alpha / r, with rsLoRA / sqrt(r)
        W' = m (W + scale B A) / |W + scale B A|                 DoRA; |.| a norm for each output, constant

    summed in float32. A `Conv1D` keeps W transposed, and the embedding of V tokens is a layer of V inputs.

    Args:
        read: applied to each tensor first; `shards.reader` gathers what is cut over ranks.
    """
    is_embedding = bool(layer.lora_embedding_A)
    a = layer.lora_embedding_A[ADAPTER] if is_embedding else layer.lora_A[ADAPTER].weight
    b = layer.lora_embedding_B[ADAPTER] if is_embedding else layer.lora_B[ADAPTER].weight
    weight = read(frozen_weight(layer))
    transposed = is_embedding or layer.fan_in_fan_out
    update = layer.scaling[ADAPTER] * (read(b).float() @ read(a).float())
    adapted = weight.float() + (update.T if transposed else update)
    if ADAPTER in layer.lora_magnitude_vector:
        m = read(layer.lora_magnitude_vector[ADAPTER].weight)
        output = 1 if transposed else 0
        norms = torch.linalg.norm(adapted.detach(), dim=1 - output, keepdim=True).to(m.dtype)
        # Padding rows of a head are zero: without a floor 0 / 0 would reach B and A through their gradients.
        adapted = adapted * (m.unsqueeze(1 - output) / norms.clamp(min=torch.finfo(torch.float32).tiny)).float()
    return adapted.to(weight.dtype)


def weights_without_adapter(model: PolicyModel, *, merge: bool) -> Iterator[tuple[str, Whole]]:
    """(Hugging Face name, tensor) of every weight, under the names from before `apply`.

    With `merge` an adapted weight is W' of `adapted_weight`, rounded once, and a module that was trained in full is the
    trained one; else both are what they were. Four bits come out as the floats that they stand for.
    """
    passed = "original_module." if merge else f"modules_to_save.{ADAPTER}."
    kept = f"modules_to_save.{ADAPTER}." if merge else "original_module."
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    four_bits = {name for name, tensor in state.items() if getattr(tensor, "quant_state", None) is not None}
    read = reader(model)
    for name, tensor in state.items():
        if ".lora_" in name or passed in name or name.partition(".weight.")[0] + ".weight" in four_bits - {name}:
            continue
        layer_name, _, leaf = name.rpartition(".base_layer.")
        make, shape, dtype = partial(read, tensor), whole_shape(model, name, tensor), tensor.dtype
        if name in four_bits:
            make = partial(frozen_weight, model.get_submodule(name.removesuffix(".weight")))
            shape, dtype = tuple(tensor.quant_state.shape), tensor.quant_state.dtype
        if layer_name and leaf == "weight" and merge:
            make = partial(_merged, model.get_submodule(layer_name), read)
        yield name.replace(".base_layer.", ".").replace(f".{kept}", "."), Whole(make, shape, dtype)


def _merged(layer: Any, read: Callable[[Tensor], Tensor]) -> Tensor:
    return adapted_weight(layer, read).detach()


def adapter_tensors(model: PolicyModel) -> dict[str, Whole]:
    """What was trained, under the names of PEFT's `adapter_model.safetensors`, padding rows cut off. A tied weight is
    written under both names."""
    return {peft_name(name): tensor for name, tensor in adapter_parts(model).items()}


def adapter_parts(model: PolicyModel) -> dict[str, Whole]:
    """The same, under the names that `model` has for them."""
    found, read = {}, reader(model)
    for name, parameter in model.causal_lm.named_parameters(remove_duplicate=False):
        if _layer_and_part(name)[1]:
            shape = whole_shape(model, name, parameter)
            # What is cut off is known from the shape alone: from a tensor that has no memory.
            shape = tuple(without_padding(model, name, torch.empty(shape, device="meta")).shape)
            make = partial(_whole_part, model, name, partial(read, parameter))
            found[name] = Whole(make, shape, parameter.dtype)
    return found


def peft_name(name: str) -> str:
    """What PEFT's files call the adapter's parameter `name` of a model.

    They have no `default` in it. PEFT writes DoRA's magnitudes as `lora_magnitude_vector`, which transformers' own
    reader of such files passes over; both read `lora_magnitude_vector.weight`.
    """
    layer, part = _layer_and_part(name)
    part = part.removeprefix(f"modules_to_save.{ADAPTER}.").replace(f".{ADAPTER}", "")
    return f"base_model.model.{layer}.{part}"


def _layer_and_part(name: str) -> tuple[str, str]:
    """`...q_proj.lora_A.default.weight` is the part `lora_A.default.weight` of a layer; of other names it is empty."""
    layer, _, part = re.sub(r"\.(lora_|modules_to_save)", r" \1", name).partition(" ")
    return layer, part


def _whole_part(model: PolicyModel, name: str, make: Callable[[], Tensor]) -> Tensor:
    return without_padding(model, name, make()).contiguous().clone()


def without_padding(model: PolicyModel, name: str, tensor: Tensor) -> Tensor:
    """The part of the adapter's parameter `name`, or of a tensor shaped as it, that belongs to no padding rows of the
    vocabulary; memory is shared."""
    layer, part = _layer_and_part(name)
    if layer not in model.padded:
        return tensor
    if part.startswith("lora_embedding_A"):
        return tensor[:, : model.vocab_size]
    by_token = part.startswith(("lora_B", "modules_to_save")) or layer == model.head_name
    return tensor[: model.vocab_size] if by_token and not part.startswith("lora_A") else tensor
