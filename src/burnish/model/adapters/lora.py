"""Low-rank adapters, through PEFT."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Interval

from burnish.errors import ModelError
from burnish.model.config import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from burnish.model.policy_model import PolicyModel

ADAPTER = "default"
"""PEFT's name for the one adapter of a model; it is part of parameter names (`q_proj.lora_A.default.weight`)."""


class LoRA(Adapter):
    """W x + (lora_alpha / r) B A x with W frozen. Hu et al., arXiv:2106.09685, eq. 3."""

    type: Literal["lora"] = "lora"
    r: Annotated[int, Ge(1)] = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Ge(0)] = 32
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """`all-linear` (every linear layer but the head), or names such as [q_proj, v_proj]."""

    def apply(self, model: PolicyModel, *, seed: int) -> None:
        """Freezes `model` and puts an adapter beside each target. B is zero, so its outputs stay what they were, bit
        for bit; A is drawn from (seed, parameter name), so it is the same whatever else was drawn before.

        Raises:
            ModelError: a name in `target_modules` that no linear layer has; PEFT is not installed.
        """
        try:
            from peft import inject_adapter_in_model
        except ImportError as error:
            raise ModelError("LoRA needs peft", where="model.adapter", cure='pip install "burnish[lora]"') from error
        model.requires_grad_(False)
        # Injected below the backbone, so that `lm_head` is out of reach and PEFT's own names come out.
        inject_adapter_in_model(self.peft_config(model), model.backbone, adapter_name=ADAPTER)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                _initialise(name, parameter, seed)
        model.adapter = self

    def peft_config(self, model: PolicyModel) -> Any:
        """The `LoraConfig` that PEFT and vLLM read beside the adapter's weights."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.lora_dropout,
            target_modules=self._targets(model),
            inference_mode=False,
        )

    def _targets(self, model: PolicyModel) -> list[str]:
        leaves = {name.rsplit(".", 1)[-1] for name in linear_modules(model.backbone)}
        if self.target_modules == "all-linear":
            if not leaves:
                raise ModelError("the model has no linear layer for an adapter", where="model.adapter.target_modules")
            return sorted(leaves)
        for target in self.target_modules:
            if not any(f".{name}".endswith(f".{target}") for name in linear_modules(model.backbone)):
                near = difflib.get_close_matches(target, leaves, n=3) or sorted(leaves)
                raise ModelError(
                    f"no linear layer is called '{target}'",
                    where="model.adapter.target_modules",
                    cure=f"use all-linear, or names such as {', '.join(near)}; fused experts are not linear layers",
                )
        return sorted(self.target_modules)


def linear_modules(backbone: nn.Module) -> list[str]:
    """Full names of the linear layers of a backbone, adapted ones included. Fused mixture-of-experts weights are single
    parameters, not layers, and are left alone."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name.removesuffix(".base_layer") for name in names if ".lora_" not in name]


def _initialise(name: str, parameter: nn.Parameter, seed: int) -> None:
    """B = 0; A uniform in +-1/sqrt(fan_in), as PEFT draws it, but on the CPU from a generator of its own."""
    import torch

    if "lora_A" not in name:
        torch.nn.init.zeros_(parameter)
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    bound = 1 / math.sqrt(parameter.shape[1])
    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        parameter.copy_(drawn)


def weights_without_adapter(model: PolicyModel, *, merge: bool) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor) of every weight, under the names from before `apply`. With `merge`, an adapted
    one is W + (lora_alpha / r) B A, summed in float32 and rounded once to W's dtype."""
    from burnish.model.parallel import whole

    for name, tensor in model.state_dict(keep_vars=True).items():
        if "lora_" in name:
            continue
        tensor = whole(tensor)
        owner_name, _, leaf = name.rpartition(".base_layer.")
        if owner_name and leaf == "weight" and merge:
            tensor = (tensor.float() + _update(model.get_submodule(owner_name))).to(tensor.dtype)
        yield name.replace(".base_layer.", "."), tensor


def _update(layer: Any) -> Tensor:
    """(lora_alpha / r) B A, laid out as the weight it is added to; float32."""
    from burnish.model.parallel import whole

    product = whole(layer.lora_B[ADAPTER].weight).float() @ whole(layer.lora_A[ADAPTER].weight).float()
    return (product.T if layer.fan_in_fan_out else product) * layer.scaling[ADAPTER]


def adapter_tensors(model: PolicyModel) -> dict[str, Tensor]:
    """The adapter under the names of PEFT's `adapter_model.safetensors`."""
    from burnish.model.parallel import whole

    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": whole(parameter).contiguous()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
