"""How a model lies on a mesh that need not exist: what each rank holds and exchanges.

The model is built on the meta device, changed by the code that changes real ones (adapter, new rows, heads, tensor
parallel, FSDP2) and sharded over a process group that only pretends, of any size: what a rank holds is read from its
shards. 70B parameters on 16,384 ranks take seconds and no memory to speak of. `Plan.laid_out` computes the same numbers
for more shares of the data from the shapes alone, which is what choosing among many meshes wants. It must not know
recipes.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from burnish.errors import ModelError
from burnish.mesh import Mesh
from burnish.mesh_config import Sizes
from burnish.model.context_parallel import share_rows
from burnish.model.footprint import Footprint, Recompute, footprint
from burnish.model.parallel import prepare, shard
from burnish.model.policy_model import PolicyModel
from burnish.model.tensor_parallel import apply_tensor_parallel
from burnish.model.tensor_plan import read_layout
from burnish.model.traffic import Exchanges, axes, reduced
from burnish.model.vocabulary import grow

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from burnish.model.config import ModelConfig
    from burnish.types import NewTokens

MASTER_BYTES = 4
"""Trained weights, their gradients, every sum over ranks and AdamW's two moments are float32."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ONE_RANK = Sizes(1, 1, 1, 1)
ROOT = ""


class Work(NamedTuple):
    """What the ranks are given in a step."""

    rows: int
    """Packed rows of all ranks together."""
    micro_batch_size: int
    row_length: int


class Weight(NamedTuple):
    """One parameter, a tied one once."""

    name: str
    unit: str
    """What it is gathered with: a layer's name, a head's, or the root's, `ROOT`."""
    shape: tuple[int, ...]
    """Of the whole."""
    tp_dim: int | None
    """Which dim tensor parallel cuts, where it does."""
    local: int
    """Numbers of it on the rank that has most."""
    trained: bool
    stored: float
    """Bytes of a number while it is kept."""
    used: int
    """Bytes of a number while it is gathered; 0: it never is."""
    padding: int = 0
    """Numbers of it that stand for no token."""

    def cut(self, tp: int) -> int:
        """Numbers that one rank of `tp` computes with."""
        return math.prod(self.shape) // (tp if self.tp_dim is not None else 1)


@dataclass(frozen=True)
class Plan:
    """A model on a mesh, at work."""

    sizes: Sizes
    work: Work
    weights: tuple[Weight, ...]
    footprint: Footprint | None
    """None: the model's forward pass asks for values, so it could not be watched."""
    num_layers: int
    vocab_rows: int
    hidden_size: int
    chunk: int
    """Tokens projected at once; 0 where no head reads tokens."""
    trains_head: bool
    dtype: str
    heads: frozenset[str]
    """Units that are used in float32, whatever the dtype."""
    partial: frozenset[str]
    """Parameters whose gradients ranks of `tp` sum."""
    obstacle: str = ""
    """Why tensor parallel cannot cut it; empty: it can."""

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch, before `cp` and `tp` share them."""
        return self.work.micro_batch_size * self.work.row_length

    @property
    def micro_batches(self) -> int:
        """Of a rank in a step."""
        return -(-self.work.rows // (self.sizes.data * self.work.micro_batch_size))

    @cached_property
    def num_parameters(self) -> int:
        return sum(map(self.numel, self.weights))

    @cached_property
    def num_trained(self) -> int:
        return sum(self.numel(weight) for weight in self.weights if weight.trained)

    @staticmethod
    def numel(weight: Weight) -> int:
        """Numbers of the whole parameter, without padding."""
        return math.prod(weight.shape) - weight.padding

    @property
    def checkpoint_bytes(self) -> int:
        """Of all ranks together: trained weights and two moments."""
        return 3 * MASTER_BYTES * self.num_trained

    @cached_property
    def local_trained(self) -> int:
        """Trained numbers on the rank that has most."""
        return sum(weight.local for weight in self.weights if weight.trained)

    def memory(self, recompute: Recompute) -> dict[str, tuple[int, str]]:
        """What a rank holds at the height of a step: name -> (bytes, where they come from)."""
        frozen = sum(weight.local for weight in self.weights if not weight.trained)
        stored = sum(weight.local * weight.stored for weight in self.weights)
        trained = f"{self.local_trained:,} trained x {MASTER_BYTES} bytes"
        rest = f" + {frozen:,} frozen" if frozen else ""
        parts = {
            "weights": (round(stored), f"{trained}{rest}, of {self.num_parameters:,}"),
            "gradients": (MASTER_BYTES * self.local_trained, trained),
            "optimizer": (2 * MASTER_BYTES * self.local_trained, f"two moments x {trained}"),
        }
        if gathered := self._gathered():
            said = "embedding, head and two layers, whole, and a layer's gradients"
            parts["gathered"] = (gathered, said + f", over tp {self.sizes.tp}" * (self.sizes.tp > 1))
        tokens = self.micro_tokens // self.sizes.cp
        rows = self.vocab_rows // self.sizes.tp
        parts["activations"] = (self.activation_bytes(recompute), self._said_of_activations(recompute))
        chunk = min(self.chunk, tokens)
        head = self.hidden_size * self.trains_head
        parts["projection"] = (
            4 * rows * (2 * chunk + head),
            f"{rows:,} vocabulary x 4 x (2 x {chunk} tokens{' + hidden, the gradient' * self.trains_head})",
        )
        return parts

    def activation_bytes(self, recompute: Recompute) -> int:
        """Kept of a micro-batch for its backward pass."""
        if self.footprint is None:
            # Of families that could be watched, 16 to 49 hidden sizes a token and layer: a guess, and called one.
            kept = {"none": 34, "selective": 14, "full": 1}[recompute] * self.num_layers + 34
            per_token = kept * self.hidden_size * DTYPE_BYTES[self.dtype]
            return per_token * self.micro_tokens // (self.sizes.cp * self.sizes.tp)
        return self.footprint.kept(recompute)

    def _said_of_activations(self, recompute: Recompute) -> str:
        tokens = f"{self.micro_tokens // self.sizes.cp:,} tokens x {self.num_layers} layers"
        watched = "watched without memory" if self.footprint is not None else "GUESSED: the model cannot be watched"
        return f"{tokens}, recomputed: {recompute}; {watched}"

    def _gathered(self) -> int:
        """Of FSDP: the root stays gathered for a whole pass, a layer is gathered while the one before it computes."""
        sizes, gradients = defaultdict[str, int](int), defaultdict[str, int](int)
        for weight in self.weights:
            cut = weight.cut(self.sizes.tp) if weight.used else 0
            sizes[weight.unit] += cut * weight.used
            gradients[weight.unit] += cut * (weight.used + MASTER_BYTES) * weight.trained
        root = sizes.pop(ROOT, 0)
        gradients.pop(ROOT, None)
        return root + 2 * max(sizes.values(), default=0) + max(gradients.values(), default=0)

    def traffic(self, recompute: Recompute) -> Exchanges:
        """Bytes that reach a rank in a step, by axis and kind."""
        found, sizes, times = Exchanges(), self.sizes, self.micro_batches
        shards = sizes.dp_shard * sizes.cp
        gathered = sum(weight.local * weight.used for weight in self.weights)
        summed = sum(weight.local for weight in self.weights if weight.trained and weight.used) * MASTER_BYTES
        found["shard", "all-gather"] = 2 * times * (shards - 1) * gathered
        found["shard", "reduce-scatter"] = times * (shards - 1) * summed
        found["dp_replicate", "all-reduce"] = times * reduced(summed, sizes.dp_replicate)
        tokens, used = self.micro_tokens // sizes.cp, DTYPE_BYTES[self.dtype]
        # Of the head: the gradient of what it reads, and of each token's outputs their sum.
        found["tp", "all-reduce"] = times * reduced(tokens * self.hidden_size * used * (self.chunk > 0), sizes.tp)
        partial = sum(weight.local for weight in self.weights if weight.name in self.partial and weight.trained)
        found["tp", "all-reduce"] += reduced(partial * MASTER_BYTES, sizes.tp)
        found["cp", "all-reduce"] = times * reduced(self.micro_tokens * 4, sizes.cp)
        for key, size in (self.footprint.exchanges(recompute) if self.footprint is not None else Counter()).items():
            found[key] += times * size
        return Exchanges({key: size for key, size in found.items() if size})

    def laid_out(self, dp_replicate: int, dp_shard: int) -> Plan:
        """The same model and work with more shares of the data, by arithmetic, from a plan with one."""
        assert self.sizes.data == 1, "shapes of a model that was sharded already"
        sizes = self.sizes._replace(dp_replicate=dp_replicate, dp_shard=dp_shard)
        alone = sizes.data * sizes.cp == 1

        def lay(weight: Weight) -> Weight:
            if weight.stored < 2:  # in four bits: whole on each rank
                return weight
            shape = list(weight.shape)
            if weight.tp_dim is not None:
                shape[weight.tp_dim] //= sizes.tp
            rows = -(-shape[0] // (sizes.dp_shard * sizes.cp)) if shape else 1
            used = MASTER_BYTES if weight.unit in self.heads else DTYPE_BYTES[self.dtype]
            return weight._replace(local=rows * math.prod(shape[1:]), used=weight.used if alone else used)

        return replace(self, sizes=sizes, weights=tuple(map(lay, self.weights)))


def plan(
    config: ModelConfig,
    hf_config: PretrainedConfig,
    sizes: Sizes,
    work: Work,
    new_tokens: NewTokens | None = None,
    *,
    frozen: bool = False,
) -> Plan:
    """How the model of a recipe lies on a mesh of `sizes`, and what its ranks do in a step.

    Args:
        frozen: nothing of it trains: a second model, which keeps no activations.

    Raises:
        ModelError: adapter, new tokens or heads do not fit it, or `tp` or `cp` cannot cut it.
    """
    with pretended_mesh(sizes) as mesh:
        model, packed = _unsharded(config, hf_config, new_tokens, mesh)
        dims, obstacle = _cuts(model, sizes)
        apply_tensor_parallel(model, mesh)
        share_rows(model, mesh)
        dtype = getattr(torch, config.dtype)
        seen = None
        if frozen:
            model.requires_grad_(False)
        else:
            with contextlib.suppress(RuntimeError):  # it asks for values: the plan says that it guesses
                seen = footprint(model, work.micro_batch_size * work.row_length, dtype, axes(mesh))
        shard(model, mesh, dtype)
        return Plan(
            sizes=sizes,
            work=work,
            weights=tuple(_weights(model, config, sizes, dims, packed)),
            footprint=seen,
            num_layers=len(model.layers),
            vocab_rows=model.head.weight.shape[0] * sizes.tp,
            hidden_size=model.hf_config.get_text_config().hidden_size,
            chunk=config.projection_chunk if model.makes_tokens else 0,
            trains_head=model.makes_tokens and any(p.requires_grad for p in model.head.parameters()),
            dtype=config.dtype,
            heads=frozenset(model.heads),
            partial=frozenset(model.tp_partial),
            obstacle=obstacle,
        )


@contextmanager
def pretended_mesh(sizes: Sizes) -> Iterator[Mesh]:
    """Rank 0 of a mesh whose other ranks do not exist: collectives return at once, and what they return is nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch registers the backend "fake" there

    assert not dist.is_initialized(), "a process belongs to one mesh at a time"
    hook = sys.excepthook  # torch puts one in its place that says the rank, at every opening once more
    dist.init_process_group("fake", rank=0, world_size=sizes.world, store=FakeStore())
    try:
        device_mesh = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=Sizes._fields)
        if sizes.cp > 1:
            device_mesh["dp_shard", "cp"]._flatten("shard")
        yield Mesh(torch.device("cpu"), 0, sizes.world, sizes, device_mesh)
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def _unsharded(
    config: ModelConfig, hf_config: PretrainedConfig, new_tokens: NewTokens | None, mesh: Mesh
) -> tuple[PolicyModel, set[str]]:
    """The model as it is before it is cut, on the meta device; and the names of what is held in four bits."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(  # a copy: `grow` notes the new size in it
            deepcopy(hf_config), dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )
        if new_tokens is not None:
            grow(module, new_tokens)
    model = PolicyModel.from_hf(module, projection_chunk=config.projection_chunk, pad_vocab_to=config.pad_vocab_to)
    linear = [m.weight for m in model.backbone.modules() if isinstance(m, nn.Linear)]
    four_bits = config.adapter is not None and config.adapter.frozen_bytes is not None
    packed = {id(weight) for weight in linear} if four_bits else set[int]()
    plain = {"dtype": "float32", "activation_checkpointing": "none", "compile": None}
    alone = replace(mesh, world_size=1, sizes=ONE_RANK)
    prepare(model, config.model_copy(update=plain), alone, seed=0, new_tokens=new_tokens)
    return model, {name for name, parameter in model.named_parameters() if id(parameter) in packed}


def _cuts(model: PolicyModel, sizes: Sizes) -> tuple[dict[str, int], str]:
    """Which dims tensor parallel cuts, or would; or why it cannot."""
    try:
        return read_layout(model).dims, ""
    except ModelError as error:
        if sizes.tp > 1:
            raise
        return {}, error.reason


def _weights(
    model: PolicyModel, config: ModelConfig, sizes: Sizes, dims: dict[str, int], packed: set[str]
) -> Iterator[Weight]:
    names = {id(module): name for name, module in model.named_modules()}
    units = [names[id(layer)] for layer in model.layers] + list(model.heads)
    used = DTYPE_BYTES[config.dtype]
    four_bits = config.adapter.frozen_bytes if config.adapter is not None else None
    for name, parameter in model.named_parameters():
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), ROOT)
        shape, tp_dim = list(parameter.shape), dims.get(name)
        if tp_dim is not None:
            shape[tp_dim] *= sizes.tp
        is_sharded = isinstance(parameter, DTensor)
        weight = Weight(
            name=name,
            unit=unit,
            shape=tuple(shape),
            tp_dim=tp_dim,
            local=parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel(),
            trained=parameter.requires_grad,
            stored=MASTER_BYTES if parameter.requires_grad else parameter.element_size(),
            used=(MASTER_BYTES if unit in model.heads else used) if is_sharded else 0,
        )
        if name.rpartition(".")[0].removesuffix(".base_layer") in model.padded and model.vocab_size < shape[0]:
            weight = weight._replace(padding=(shape[0] - model.vocab_size) * math.prod(shape[1:]))
        if four_bits is not None and name in packed:
            weight = weight._replace(local=parameter.numel(), stored=four_bits, used=0)
        yield weight
