"""A model's weights on their way from a trainer into another process's model of the same recipe.

What travels is what a Hugging Face folder would hold: adapters merged, padding rows cut off, a layer's experts apart, a
tied head once, in the dtype that the model computes in, its buffers as they are. Or the adapter alone, as it is
trained, under the names that `PolicyModel` has for it: the receiver then computes bit for bit what the trainer does,
while a merged weight is rounded once more. Transformers' own conversions are run both ways, over deferred tensors. It
must not know transports.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from burnish.model.adapters.lora import LoRA
from burnish.model.adapters.weights import adapter_parts, without_padding
from burnish.model.deferred import deferred, is_deferred, sources, values
from burnish.model.export_weights import as_loaded, is_first, made, plan_files
from burnish.model.shards import Whole, local

if TYPE_CHECKING:
    from pathlib import Path

    from burnish.model.policy_model import PolicyModel
    from burnish.region import Region


def adapter_alone(model: PolicyModel) -> bool:
    """Whether the adapter's tensors are all of the language model that training changes, and there is a file format for
    them: an adapter of a model with more tokens than its base has would load on nothing."""
    if model.adapter is None or model.new_tokens is not None:
        return False
    parts = adapter_parts(model)
    return all(name in parts or name.partition(".")[0] in model.heads for name, _ in model.trainable_parameters())


def outgoing(model: PolicyModel, *, adapter_only: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) of all that travels. Every rank iterates to the end, one tensor at a time; rank 0
    yields them, the others nothing. A tensor may share the model's memory: it is copied before the next step.

    Args:
        adapter_only: see `adapter_alone`.
    """
    if not adapter_only:
        yield from _files(model, merge=True)
        return
    for name, tensor in adapter_parts(model).items():
        whole = tensor.make()
        if is_first(model):
            yield name, whole.cpu()


def describe(model: PolicyModel, to: Path, *, base_path: str, base_revision: str = "main") -> None:
    """Writes what stands beside the weights in a Hugging Face folder, and in the adapter's PEFT folder where there is
    one, into `to`: for engines that read folders.

    Args:
        base_path: what the adapter is an adapter of: hub id or folder.
    """
    _config(model).save_pretrained(str(to))
    if adapter_alone(model):
        assert isinstance(model.adapter, LoRA)
        model.adapter.saved_config(model, base_path, base_revision).save_pretrained(str(to))


class Incoming:
    """Puts what `outgoing` yields into a model, each tensor as soon as all that it is made with is there.

    Args:
        model: made from the trainer's recipe; with an adapter, it is switched off where merged weights come. Its
            parameters are whole on this rank.

    Raises:
        ValueError: such weights cannot be put into it.
    """

    def __init__(self, model: PolicyModel, *, adapter_only: bool) -> None:
        self._model, self._adapter_only = model, adapter_only
        assert model.mesh is None or model.mesh.world_size == 1, "a receiver has its model for itself"
        self._put: Callable[[str, Tensor], None]
        if adapter_only:
            if any(module._disable_adapters for module in _switches(model)):
                raise ValueError("an adapter's tensors came, and merged weights did before: they hold one already")
            parts = adapter_parts(model)
            self.expected = {name: (part.shape, part.dtype) for name, part in parts.items()}
            self._parameters = dict(model.named_parameters(remove_duplicate=False))
            self._put = self._put_part
        else:
            _untie(model)
            plan = _planned(model, whole_files(model, merge=False))
            self.expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in plan.files.items()}
            self._loaded, self._arrived = plan.loaded(model), plan.arrived
            self._arrived.clear()
            self._places = _places(model)
            self._left = {name: set(sources(tensor)) for name, tensor in self._loaded.items() if is_deferred(tensor)}
            self._put = self._put_file
        self.missing = set(self.expected)
        """Names that have not come yet."""

    @torch.no_grad()
    def put(self, name: str, tensor: Tensor) -> None:
        """Takes one of `missing`, of its expected shape and dtype."""
        self.missing.remove(name)
        self._put(name, tensor)

    def held(self) -> Iterator[tuple[str, Tensor]]:
        """What the model has now, under the same names, in the same form."""
        if self._adapter_only:
            return ((name, part.make().cpu()) for name, part in adapter_parts(self._model).items())
        for module in _switches(self._model):
            module._disable_adapters = True
        return _files(self._model, merge=False)

    def _put_part(self, name: str, tensor: Tensor) -> None:
        without_padding(self._model, name, local(self._parameters[name])).copy_(tensor)

    def _put_file(self, name: str, tensor: Tensor) -> None:
        self._arrived[name] = tensor
        for made_name in [n for n, needed in self._left.items() if name in needed and needed <= self._arrived.keys()]:
            del self._left[made_name]
            self._write(made_name, values(self._loaded[made_name]))
        for done in [n for n in self._arrived if not any(n in needed for needed in self._left.values())]:
            del self._arrived[done]

    def _write(self, name: str, value: Tensor) -> None:
        place = self._places[name]
        target = local(place.tensor)
        (target[: value.shape[0]] if name.rpartition(".")[0] in self._model.padded else target).copy_(value)
        if place.new_rows is not None:
            begin = place.first_new_row
            local(place.new_rows).copy_(value[begin : begin + len(place.new_rows)])


@dataclass(slots=True)
class _Plan:
    """What transformers would make of a model's weights in files, and of files' weights in a model. Neither holds the
    model: it is found once for each, in 0.3 s for the 272 tensors of a model of 135M parameters."""

    facts: dict[str, tuple[tuple[int, ...], torch.dtype]]
    """Of the model's tensors."""
    kind: Any
    config: Any
    held: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, Tensor] = field(default_factory=dict)
    """Deferred, made of `held`."""
    arrived: dict[str, Tensor] = field(default_factory=dict)
    _loaded: dict[str, Tensor] = field(default_factory=dict)

    def loaded(self, model: PolicyModel) -> dict[str, Tensor]:
        """The model's tensors by name, deferred, made of `arrived`."""
        if not self._loaded:

            def leaf(name: str, tensor: Tensor) -> Tensor:
                def read(region: Region) -> Tensor:
                    return self.arrived[name][region.slices()]

                return deferred(read, tuple(tensor.shape), tensor.dtype, source=name)

            leaves = {name: leaf(name, tensor) for name, tensor in self.files.items()}
            self._loaded, lost = as_loaded(self.kind, copy.deepcopy(self.config), leaves)
            assert not lost, f"transformers would not load what it saves: {lost[:4]}"
        return self._loaded


_PLANS: WeakKeyDictionary[PolicyModel, _Plan] = WeakKeyDictionary()


def whole_files(model: PolicyModel, *, merge: bool) -> dict[str, Whole]:
    """What a Hugging Face folder is made of, yet to be gathered: without a head that is the embedding."""
    tensors = model.whole_tensors(merge=merge)
    if model.is_tied:
        del tensors[f"{model.head_name}.weight"]
    return tensors


def _files(model: PolicyModel, *, merge: bool) -> Iterator[tuple[str, Tensor]]:
    tensors = whole_files(model, merge=merge)
    plan = _planned(model, tensors)
    plan.held.clear()
    return made(plan.files, tensors, plan.held, first=is_first(model))


def _planned(model: PolicyModel, tensors: Mapping[str, Whole]) -> _Plan:
    facts = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    plan = _PLANS.get(model)
    if plan is None or plan.facts != facts:
        plan = _Plan(facts, type(model.causal_lm), _config(model))
        _, plan.files = plan_files(model, plan.kind, plan.config, tensors, plan.held)
        _PLANS[model] = plan
    return plan


def _config(model: PolicyModel) -> Any:
    """Of the folder that `whole_files` are in."""
    config = copy.deepcopy(model.hf_config)
    if not model.is_tied:  # also where an adapter changed one side of a tied pair
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


@dataclass(slots=True)
class _Place:
    """Where a tensor of the plain model goes."""

    tensor: Tensor
    new_rows: Tensor | None = None
    """Rows of it that train alone, and are read instead of its own."""
    first_new_row: int = 0


def _places(model: PolicyModel) -> dict[str, _Place]:
    """By the names from before an adapter was applied."""
    owners: dict[int, Any] = {id(module.weight): module for module in model.modules() if hasattr(module, "new_rows")}
    found: dict[str, _Place] = {}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        if getattr(tensor, "quant_state", None) is not None:
            raise ValueError(f"{name} has four bits, and merged weights cannot be written into it")
        owner = owners.get(id(tensor))
        extra = (None, 0) if owner is None else (owner.new_rows, owner.first_new_row)
        found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = _Place(tensor, *extra)
    return found


def _switches(model: PolicyModel) -> list[Any]:
    """PEFT's layers; see `LoRA.off`."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]


def _untie(model: PolicyModel) -> None:
    """Gives the head a weight of its own where an adapter changes one side of a pair whose frozen weights are one."""
    embedding: Any = model.causal_lm.get_input_embeddings()
    embedding, head = (getattr(layer, "base_layer", layer) for layer in (embedding, model.head))
    if head.weight is embedding.weight and not model.is_tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
