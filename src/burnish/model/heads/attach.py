"""New heads on a language model: what is refused before its weights are read, and how they become part of it.

The language model's own head neither trains nor has a gradient where no part of `model.head` is `lm`. Where the export
does without it, an untied one is cut down to the 64 rows that the packing probe looks at: at 152k x 3584 in bfloat16,
1.1 GB less. A tied one is the embedding, and trains as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from burnish.errors import ModelError
from burnish.model.heads.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from burnish.model.heads.base import Head
    from burnish.model.policy_model import PolicyModel

PROBED_ROWS = 64
"""Rows that stay of a head that nothing reads."""


def open_heads(head: Head, hf_config: Any, *, seed: int) -> dict[str, nn.Module]:
    """The new modules that `head` asks for, by name, on the CPU.

    Raises:
        ModelError: scores that the model's family has no standard folder for, or a name that the model has already.
    """
    from burnish.model.policy_model import PolicyModel

    opened = {name: part.open(hf_config, name=name, seed=seed) for name, part in head.parts().items()}
    new = {name: module for name, module in opened.items() if module is not None}
    if not new:
        return new
    if classifier(head.parts(), new) is not None and sequence_classifier(hf_config) is None:
        raise ModelError(
            f"transformers has no sequence classification model for {hf_config.model_type}, so the trained head could "
            f"not be exported as one",
            where="model.head",
            cure="keep the language model's head beside it, and its folder gets the scores in a file of their own: "
            "`{type: multi, heads: {lm: {type: lm}, score: {type: scalar}}}`",
        )
    refuse_taken(new, PolicyModel, hf_config.model_type)
    shell = causal_shell(hf_config)
    if shell is not None:
        refuse_taken(new, shell, hf_config.model_type)
    return new


def attach(model: PolicyModel, head: Head, *, seed: int) -> None:
    """Makes the heads children of `model`, which train whatever an adapter has frozen.

    Raises:
        ModelError: see `open_heads`; also an adapter on a head that nothing reads.
    """
    parts, new = head.parts(), open_heads(head, model.hf_config, seed=seed)
    refuse_taken(new, model, model.hf_config.model_type)
    device = model.head.weight.device
    for name, module in new.items():
        # Beside deferred weights a head, small as it is, is drawn at once, and FSDP moves it to the device.
        model.add_module(name, module.to("cpu" if device.type == "meta" else device))
        model.heads[name] = parts[name]
    model.makes_tokens = any(part.makes == "tokens" for part in parts.values())
    if model.makes_tokens or model.is_tied:
        return
    if not isinstance(model.head, nn.Linear):
        raise ModelError(
            f"the adapter changes '{model.head_name}', and no loss reads it",
            where="model.adapter",
            cure="take it out of the adapter, or keep it: `model.head: {type: multi, heads: {lm: {type: lm}, ...}}`",
        )
    if classifier(parts, new) is not None or [part.makes for part in parts.values()] == ["embeddings"]:
        _cut(model.head)
    model.head.requires_grad_(False)


def _cut(head: nn.Linear) -> None:
    """Keeps the rows that are probed; those of new tokens have nobody to learn from."""
    head._parameters.pop("new_rows", None)
    for name, parameter in head.named_parameters():
        setattr(head, name, nn.Parameter(parameter.detach()[:PROBED_ROWS].clone()))


def classifier(heads: Mapping[str, Head], modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the one head, where that is all there is and it has the form of transformers' sequence classifiers, which
    then are the export; else None."""
    if len(heads) == 1 and len(modules) == 1 and all(isinstance(module, Scores) for module in modules.values()):
        return next(iter(modules))
    return None


def sequence_classifier(hf_config: Any) -> Any:
    """transformers' `...ForSequenceClassification` of a family, with its one matrix `score`; None where it has none."""
    from transformers import AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification._model_mapping.get(type(hf_config), None)
    if kind is None:
        return None
    with torch.device("meta"):
        score = getattr(kind._from_config(hf_config), "score", None)
    return kind if isinstance(score, nn.Linear) and score.bias is None else None


def causal_shell(hf_config: Any) -> Any:
    """The causal language model without its weights; None for a class that transformers does not know."""
    from transformers import AutoModelForCausalLM

    if type(hf_config) not in AutoModelForCausalLM._model_mapping:
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def refuse_taken(names: Iterable[str], owner: Any, family: str) -> None:
    """Raises ModelError where `owner` has a part of one of these names."""
    for name in names:
        if hasattr(owner, name):
            raise ModelError(
                f"'{name}' cannot name a head: a {family} model has a part of that name",
                where="model.head",
                cure="give the head another name",
            )
