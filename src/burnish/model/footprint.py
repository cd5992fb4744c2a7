"""What a forward pass keeps for its backward pass, and what ranks of `tp` and `cp` exchange: watched, without memory.

The backbone runs on fake tensors, which have shapes and no values, so it takes no memory; of many layers alike, two run
and stand for the others, so depth costs nothing. The bytes that are kept are those of a real pass to a per cent, on
seven families. It must not know recipes or losses.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

from burnish.model.parallel import is_product
from burnish.model.traffic import CountExchanges, Exchanges

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel

Recompute = Literal["none", "selective", "full"]


class Kept(NamedTuple):
    """Bytes of one layer's tensors."""

    input: int
    products: int
    """What matrix products and attention returned."""
    all: int
    """What the backward pass needs."""


@dataclass(slots=True)
class Footprint:
    """Of one micro-batch on one rank."""

    outside: int = 0
    """Bytes kept by what is no layer, or is given to all of them: embedding, positions, last norm, hidden states."""
    layers: list[Kept] = field(default_factory=list)
    forward: Exchanges = field(default_factory=Counter)
    again: Exchanges = field(default_factory=Counter)
    """The part of `forward` that a layer's recomputation repeats."""
    backward: Exchanges = field(default_factory=Counter)

    def kept(self, recompute: Recompute) -> int:
        """Bytes at the end of the forward pass; and where layers are computed again, of the largest one while it is."""
        if recompute == "none":
            return self.outside + sum(layer.all for layer in self.layers)
        each = (layer.input + (layer.products if recompute == "selective" else 0) for layer in self.layers)
        return self.outside + sum(each) + max(layer.all for layer in self.layers)

    def exchanges(self, recompute: Recompute) -> Exchanges:
        """What a forward and backward pass exchange."""
        return self.forward + self.backward + (Counter() if recompute == "none" else self.again)


def footprint(model: PolicyModel, num_tokens: int, dtype: torch.dtype, axes: Mapping[str, str]) -> Footprint:
    """Of a micro-batch of `num_tokens`, on the rank that `model` is cut for.

    Args:
        model: on the meta device; cut by tensor parallel and with its `context` set, not sharded, no layer recomputed.
        dtype: what parameters are used in.
        axes: see `traffic.axes`; without the groups of `tp` and `cp`, none are looked for.

    Raises:
        RuntimeError: its forward pass asks for values.
    """
    try:
        with _silent():
            return _watch_few(model, num_tokens, dtype, axes)
    except RuntimeError:
        if dtype == torch.bfloat16:
            raise
        # torch lets mixtures of experts multiply in bfloat16 alone where tensors are fake. Twice that is too much by
        # what is float32 there too, statistics and normalised inputs: 12 % of a dense layer.
        half = _watch_few(model, num_tokens, torch.bfloat16, axes)
        return Footprint(
            2 * half.outside,
            [Kept(*(2 * part for part in layer)) for layer in half.layers],
            *(_times(2, part) for part in (half.forward, half.again, half.backward)),
        )


def _watch_few(model: PolicyModel, num_tokens: int, dtype: torch.dtype, axes: Mapping[str, str]) -> Footprint:
    """Runs two layers of each kind: what trains may begin behind the first one, which then keeps less."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, layer in enumerate(model.layers):
        alike[_kind(layer)].append(index)
    few = sorted(index for members in alike.values() for index in members[:2])
    found = _watch(model, few, num_tokens, dtype, axes)
    kept = dict(zip(few, found.layers, strict=True))
    for members in alike.values():
        kept |= dict.fromkeys(members[2:], kept[members[:2][-1]])
    exchanges = [found.forward, found.again, found.backward]
    for members in alike.values():
        if len(members) > 2 and found.forward:
            one_more = _watch(model, sorted([*few, members[2]]), num_tokens, dtype, axes)
            grown = (one_more.forward, one_more.again, one_more.backward)
            more = [new - old for new, old in zip(grown, (found.forward, found.again, found.backward), strict=True)]
            exchanges = [a + _times(len(members) - 2, b) for a, b in zip(exchanges, more, strict=True)]
    return Footprint(found.outside, [kept[index] for index in sorted(kept)], *exchanges)


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Layers of one kind keep as much."""
    parameters = ((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
    return (*(type(module).__name__ for module in layer.modules()), *parameters)


@contextmanager
def _only(model: PolicyModel, indices: list[int]) -> Iterator[None]:
    """Inside it, `model` has these of its layers alone."""
    whole, config = model.layers, model.hf_config.get_text_config()
    owner, name = next((m, name) for m in model.modules() for name, child in m.named_children() if child is whole)
    depth = config.num_hidden_layers
    owner._modules[name] = nn.ModuleList(whole[index] for index in indices)
    config.num_hidden_layers = len(indices)
    try:
        yield
    finally:
        owner._modules[name], config.num_hidden_layers = whole, depth


def _times(number: int, exchanges: Exchanges) -> Exchanges:
    return Exchanges({key: number * size for key, size in exchanges.items()})


def _watch(
    model: PolicyModel, layers: list[int], num_tokens: int, dtype: torch.dtype, axes: Mapping[str, str]
) -> Footprint:
    """Of these layers alone."""
    context, mode = model.context, FakeTensorMode()
    options = {} if context is None else {"context_parallel": context}
    tokens = num_tokens if context is None else num_tokens // context.size
    with _only(model, layers), _fake_weights(model, mode, dtype), ExitStack() as stack:
        watch = _Watch(model, axes)
        stack.enter_context(mode)
        for layer in model.layers:
            stack.callback(layer.register_forward_pre_hook(watch.enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(watch.leave).remove)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        documents = torch.zeros(max(8, num_tokens // 8), 4, dtype=torch.int32)
        model.train()
        with torch.autograd.graph.saved_tensors_hooks(watch.save, lambda tensor: tensor), watch:
            hidden = model.backbone(
                input_ids=ids, position_ids=ids, documents=documents, use_cache=False, **options
            ).last_hidden_state
        watch.save(hidden)
        found = watch.found
        found.forward = watch.seen
        if found.forward:
            with CountExchanges(axes) as back:
                hidden.sum().backward()
            found.backward = back.seen
    return found


@contextmanager
def _silent() -> Iterator[None]:
    """torch logs, as an error, each operator that it refuses; what is refused here is answered in another way."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


@contextmanager
def _fake_weights(model: PolicyModel, mode: FakeTensorMode, dtype: torch.dtype) -> Iterator[None]:
    """Inside it, `model`'s parameters are fake tensors that claim to be on the CPU."""
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    made: dict[int, Tensor] = {}
    for tensor in named.values():
        if id(tensor) not in made:
            is_parameter = isinstance(tensor, nn.Parameter)
            meta = tensor.detach().to("meta", dtype if is_parameter and tensor.is_floating_point() else tensor.dtype)
            made[id(tensor)] = FakeTensor(mode, meta, torch.device("cpu")).requires_grad_(tensor.requires_grad)
    fakes: dict[str, Tensor] = {name: made[id(tensor)] for name, tensor in named.items()}
    with stateless._reparametrize_module(model, fakes):
        yield


class _Watch(CountExchanges):
    """Sees what is saved and what is exchanged, and in which layer."""

    def __init__(self, model: PolicyModel, axes: Mapping[str, str]) -> None:
        super().__init__(axes)
        self.kept: dict[int, int] = {}
        """Storage -> its bytes."""
        self.alive: list[Tensor] = []
        """A storage that is let go may be given to the next tensor, and would be taken for it."""
        self.weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.found = Footprint()
        self.inside = False
        self.begun = self.input = self.products = 0
        self.before, self.at_last_kept = Exchanges(), Exchanges()

    def save(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self.weights and storage not in self.kept:
            self.kept[storage] = tensor.untyped_storage().nbytes()
            self.found.outside += 0 if self.inside else self.kept[storage]
        self.alive.append(tensor)
        self.at_last_kept = self.seen.copy()
        return tensor

    def enter(self, _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # What all layers are given, such as the positions' sines, stays whether they are computed again or not.
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor is not hidden:
                self.save(tensor)
        self.begun, self.input, self.products = sum(self.kept.values()), hidden.untyped_storage().nbytes(), 0
        self.inside, self.before, self.at_last_kept = True, self.seen.copy(), self.seen.copy()

    def leave(self, *_: Any) -> None:
        self.inside = False
        self.found.layers.append(Kept(self.input, self.products, sum(self.kept.values()) - self.begun))
        # Computing a layer again ends with the last tensor that was kept of it: what came behind is not repeated.
        self.found.again += self.at_last_kept - self.before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.inside and is_product(func):
            self.products += sum(part.untyped_storage().nbytes() for part in pytree.tree_leaves(out))
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
