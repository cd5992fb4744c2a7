"""A transformers model without memory, and the moment at which each rank reads its own shard into it.

    open_deferred     the model as transformers loads it, every weight deferred (see `deferred.py`)
    take              once adapter, heads, new rows and masters are on it: what each parameter is to hold
    fill              once it is cut: this rank's part of each, one after the other

Transformers' own loader decides here which tensors of which files a weight is made of (it fuses the experts of a layer,
renames, casts, ties) and which are missing: it is handed deferred tensors instead of the files' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from burnish.model.deferred import is_deferred, values
from burnish.model.shards import sharded_region
from burnish.model.weight_files import WeightFiles

if TYPE_CHECKING:
    from collections.abc import Sequence


def open_deferred(
    hf_config: Any, located: Mapping[str, Any], files: Sequence[str], *, dtype: str, attention: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """(model, loading info) as `from_pretrained` returns them, the weights deferred and the buffers real.

    Args:
        located: what `load.locate` returned.
        files: what `find_weight_files` returned.

    Raises:
        SafetensorError: a file is corrupt.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        remote = {"trust_remote_code": located.get("trust_remote_code", False)}
        kind: Any = type(AutoModelForCausalLM.from_config(hf_config, **remote))
    causal_lm, found = kind.from_pretrained(
        None,
        config=hf_config,
        state_dict=WeightFiles(files).tensors,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    causal_lm.config.name_or_path = located["pretrained_model_name_or_path"]
    _read_generation_config(causal_lm, located)
    _tie(causal_lm)
    for module in causal_lm.modules():
        for name, buffer in module._buffers.items():
            if is_deferred(buffer):
                module._buffers[name] = values(buffer)
    return causal_lm, found


def take(model: nn.Module) -> dict[str, Tensor]:
    """What each deferred parameter is to hold, by name, the parameter itself being left empty on the meta device."""
    found: dict[str, Tensor] = {}
    plain: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_deferred(parameter):
                found.setdefault(f"{prefix}.{name}" if prefix else name, parameter)
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                plain.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
                module._parameters[name] = plain[id(parameter)]
    return found


@torch.no_grad()
def fill(model: nn.Module, waiting: Mapping[str, Tensor], device: torch.device) -> None:
    """Makes this rank's part of every parameter in `waiting`, which FSDP may have sharded since, on `device`.

    Memory beside the parts: one of them, or all of one tensor where it cannot be made piece by piece (see `deferred`).
    """
    made: dict[str, nn.Parameter] = {}
    by_parameter: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert name in waiting or not parameter.is_meta, f"nothing says what {name} is to hold"
        if name not in waiting:
            continue
        if id(parameter) not in by_parameter:
            part: Any = values(waiting[name], sharded_region(parameter)).to(device)
            if isinstance(parameter, DTensor):
                at = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
                part = DTensor.from_local(part, parameter.device_mesh, parameter.placements, **at)
            by_parameter[id(parameter)] = nn.Parameter(part, parameter.requires_grad)
        made[name] = by_parameter[id(parameter)]  # one object under all its names: a tied weight stays tied
    model.load_state_dict(made, strict=False, assign=True)


def _read_generation_config(causal_lm: Any, located: Mapping[str, Any]) -> None:
    """What `from_pretrained` of a path reads too, and of no path does not."""
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):  # none: the model's own was made from its configuration
        name = located["pretrained_model_name_or_path"]
        options = {key: value for key, value in located.items() if key in ("revision", "local_files_only")}
        causal_lm.generation_config = GenerationConfig.from_pretrained(name, **options)


def _tie(causal_lm: Any) -> None:
    """Makes one parameter of two that the configuration ties where the files hold both, and both are the same."""
    for target, source in list(causal_lm.all_tied_weights_keys.items()):
        one, other = causal_lm.get_parameter(source), causal_lm.get_parameter(target)
        if one is other:
            continue
        if torch.equal(one, other):
            owner, _, name = target.rpartition(".")
            setattr(causal_lm.get_submodule(owner), name, one)
        else:
            causal_lm.all_tied_weights_keys.pop(target)
