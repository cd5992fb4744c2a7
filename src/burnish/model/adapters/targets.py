"""Which modules of a model an adapter's names stand for, and refusals of names that stand for none.

Names are those of the plain transformers model, whether an adapter was already applied or not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from burnish.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from burnish.model.adapters.lora import LoRA
    from burnish.model.policy_model import PolicyModel

TARGETS = "model.adapter.target_modules"
SAVED = "model.adapter.modules_to_save"


def plain_modules(model: PolicyModel) -> dict[str, nn.Module]:
    """The modules of the language model under their names from before an adapter was applied."""
    found: dict[str, nn.Module] = {}
    for name, module in model.causal_lm.named_modules():
        if ".lora_" not in name and ".modules_to_save" not in name:
            found[re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)] = module
    return found


def linear_modules(model: PolicyModel) -> list[str]:
    """Names of the backbone's linear layers. Fused mixture-of-experts weights are single parameters, not layers, and
    are left alone."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = plain_modules(model).items()
    return [name for name, m in found if isinstance(m, nn.Linear | Conv1D) and name != model.head_name]


def target_modules(lora: LoRA, model: PolicyModel) -> str | list[str]:
    """`lora.target_modules` for PEFT: names written out, where the recipe says `all-linear`."""
    if lora.target_modules != "all-linear":
        return lora.target_modules
    leaves = {name.rpartition(".")[2] for name in linear_modules(model)}
    if not leaves:
        raise ModelError("the model has no linear layer for an adapter", where=TARGETS)
    return sorted(leaves)


def saved_modules(lora: LoRA, model: PolicyModel) -> list[str]:
    """Full names of the modules to be trained in full. Full, because PEFT looks at how a name ends and no more: for it
    `norm` is also every `input_layernorm`.

    Raises:
        ModelError: a name that no module with weights has.
    """
    names = [name for name, module in plain_modules(model).items() if name and any(True for _ in module.parameters())]
    found = []
    for wanted in lora.modules_to_save:
        matching = [name for name in names if _ends_with(name, wanted)]
        if not matching:
            near = _near(wanted, names)
            raise ModelError(f"no module is called '{wanted}'", where=SAVED, cure=f"names such as {near}")
        found += matching
    embedding = next(name for name, m in model.causal_lm.named_modules() if m is model.causal_lm.get_input_embeddings())
    if model.is_tied and {embedding, model.head_name} & set(found):
        found += [embedding, model.head_name]
    return list(dict.fromkeys(found))


def verify_targets(lora: LoRA, config: Any, model: PolicyModel) -> None:
    """Raises ModelError unless every target that PEFT will find by `config` can be adapted, every name one."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = plain_modules(model)
    depth = len(model.layers)
    if any(layer >= depth for layer in lora.layers_to_transform or []):
        where = "model.adapter.layers_to_transform"
        raise ModelError(f"the model has {depth} layers, counted from 0", where=where, cure=f"0 to {depth - 1}")
    hits = [name for name in modules if name and check_target_module_exists(config, name)]
    adaptable = [name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D | nn.Embedding)]
    for target in [] if isinstance(config.target_modules, str) else sorted(config.target_modules):
        if not any(_ends_with(name, target) for name in adaptable):
            raise ModelError(
                f"no linear layer or embedding is called '{target}'",
                where=TARGETS,
                cure=f"all-linear, or names such as {_near(target, adaptable)}; fused experts are not linear layers",
            )
        if not any(_ends_with(name, target) for name in hits):
            taken = "layers_to_transform and modules_to_save leave no layer"
            raise ModelError(f"{taken} called '{target}' to adapt", where=TARGETS, cure=f"remove '{target}'")
    unfit = [name for name in hits if name not in adaptable]
    if unfit:
        kind = type(modules[unfit[0]]).__name__
        raise ModelError(f"{unfit[0]} is a {kind}, not a linear layer or an embedding", where=TARGETS)
    if not hits:
        raise ModelError(
            f"'{lora.target_modules}' is the whole name of no layer, such as {adaptable[-1]}",
            where=TARGETS,
            cure="give a list of names, or a regular expression such as '.*[.](q_proj|v_proj)'",
        )
    if model.head_name in hits and lora.lora_dropout:
        raise ModelError(
            "the head is projected a chunk at a time from one weight, which leaves no place for dropout",
            where="model.adapter.lora_dropout",
            cure=f"lora_dropout: 0, or leave {model.head_name} out of target_modules",
        )


def _ends_with(name: str, wanted: str) -> bool:
    return f".{name}".endswith(f".{wanted}")


def _near(wanted: str, names: Iterable[str]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()})
    return ", ".join(difflib.get_close_matches(wanted, leaves, n=3) or leaves[:8])
