"""What tensor parallel cuts of a model, read from the plan that the model's own class in transformers brings.

A plan names linear layers by pattern (`model.layers.*.self_attn.q_proj: colwise`). Those of one module make a branch,
which lies between two exchanges: an attention or an MLP, that takes the tokens of all ranks, computes a part of the
heads or features, and leaves a part of the tokens. All that stands outside of branches sees one token at a time, and
runs on a rank's own tokens: norms, and a mixture of experts with its router, which is not cut.

What the plan does not account for is refused. It must not know ranks, nor how tensors are exchanged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from burnish.errors import ModelError

if TYPE_CHECKING:
    from burnish.mesh_config import Sizes
    from burnish.model.policy_model import PolicyModel

WHERE = "mesh.tp"
COLUMNS = frozenset({"colwise", "colwise_gather_output"})
"""Cut by outputs."""
ROWS = frozenset({"rowwise", "rowwise_split_input"})
"""Cut by inputs; what the ranks return is summed."""
BETWEEN_WHOLE = frozenset({"colwise_gather_output", "rowwise_split_input"})
"""Between them all ranks compute the same, on all heads or features."""
SHARED = "replicated_with_grad_allreduce"
"""Whole on each rank, and used for its own heads."""
EXPERTS = "experts"
"""What transformers calls the experts in a mixture, beside their router."""

_Rule = dict[str, int | None]
_CUT: dict[str, _Rule] = {
    "columns": {"weight": 0, "bias": 0, "lora_A": None, "lora_B": 0},
    "rows": {"weight": 1, "bias": None, "lora_A": 1, "lora_B": None},
    "embedding": {"weight": 0, "lora_embedding_A": 1, "lora_embedding_B": None, "new_rows": None},
    "head": {"weight": 0, "bias": 0, "lora_A": None, "lora_B": 0, "new_rows": None},
}
"""Which dim of a layer's weights is cut, an adapter's included. None: whole on each rank, which has a share of its
gradient. For W [outputs, inputs] and an update B A: by outputs, so is B, and A sees what all see, but its gradient
comes through a part of B; by inputs, so is A, and B A x is summed over ranks together with W x."""


@dataclass(slots=True)
class Branch:
    """One module of a layer that is cut, and the names of what the plan says of its parts."""

    name: str
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    """Parameters with one entry a head, such as attention sinks."""
    shared: list[str] = field(default_factory=list)
    """Modules of `SHARED`."""
    between_whole: bool = False


class Layout(NamedTuple):
    """What becomes of each parameter, by each of its names."""

    branches: list[Branch]
    dims: dict[str, int]
    """Which dim is cut."""
    partial: set[str]
    """Whole on each rank, which has a share of its gradient."""


def read_layout(model: PolicyModel) -> Layout:
    """How `model`, its adapter applied, is cut.

    Raises:
        ModelError: its class brings no plan, or one with parts that are not known here; layers that the plan does not
            account for; an adapter that cannot be cut.
    """
    family = type(model.causal_lm).__name__
    plan: dict[str, str] = model.causal_lm.tp_plan
    refuse_plan(plan, family)
    names = {id(module): name for name, module in model.causal_lm.named_modules()}
    layers = [names[id(layer)] for layer in model.layers]
    embedding = names[id(model.causal_lm.get_input_embeddings())]
    mixtures = _mixtures(names.values()) - set(layers)
    branches = _branches(model.causal_lm, plan, layers, {embedding, model.head_name}, mixtures)
    layout = Layout(branches, {}, set())
    for branch in branches:
        _refuse_branch(branch, family)
        for kind, parts in (("columns", branch.columns), ("rows", branch.rows)):
            for name in parts:
                _cut_layer(model.get_submodule(name), name, _CUT[kind], layout)
        layout.dims.update(dict.fromkeys(branch.heads, 0))
        layout.partial.update(f"{name}.{p}" for name in branch.shared for p, _ in _parameters(model, name))
    _cut_layer(model.get_submodule(embedding), embedding, _CUT["embedding"], layout)
    _cut_layer(model.head, model.head_name, _CUT["head"], layout)
    _take_rest(model, mixtures, layout, family)
    return layout


def refuse_plan(plan: Mapping[str, str] | None, family: str) -> None:
    """Raises ModelError for a model whose class has no plan (a head alone is none), or one with unknown parts."""
    without_head = {name: style for name, style in (plan or {}).items() if "layers." in name}
    if not without_head:
        raise ModelError(
            f"{family} brings no tensor-parallel plan in this version of transformers",
            where=WHERE,
            cure="`tp: 1`; the ranks can share the model by `dp_shard`",
        )
    for name, style in without_head.items():
        if style not in COLUMNS | ROWS | {SHARED} and not _in_mixture(name, _mixtures(without_head)):
            raise ModelError(
                f"the tensor-parallel plan of {family} cuts {name} by '{style}', which is not known here",
                where=WHERE,
                cure="`tp: 1`; the ranks can share the model by `dp_shard`",
            )


def require_divisible(hf_config: Any, vocab_rows: int, sizes: Sizes) -> None:
    """What a configuration alone says about whether a model can be cut.

    Args:
        vocab_rows: rows of the head, padding (`model.pad_vocab_to`) included.

    Raises:
        ModelError: no plan, or one with unknown parts; heads, features or rows of the vocabulary that are no multiple
            of `sizes.tp`.
    """
    if sizes.tp == 1:
        return
    config = hf_config.get_text_config()
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    refuse_plan(plan, config.model_type)
    styles = {style for name, style in plan.items() if "attn" in name or "attention" in name}
    heads = ("num_attention_heads", "num_key_value_heads") if "colwise" in styles else ()
    features = () if _mixtures(plan) else ("intermediate_size",)
    numbers = {name: getattr(config, name, None) for name in (*heads, *features)}
    _refuse_indivisible({name: n for name, n in numbers.items() if isinstance(n, int)}, sizes.tp)
    if vocab_rows % sizes.tp:
        raise ModelError(
            f"{sizes.tp} ranks cannot have as many of the head's {vocab_rows:,} rows each",
            where=WHERE,
            cure=f"`model.pad_vocab_to: {math.lcm(64, sizes.tp)}`",
        )
    tokens = getattr(config, "vocab_size", vocab_rows)
    if vocab_rows // sizes.tp * (sizes.tp - 1) >= tokens:
        raise ModelError(
            f"of the head's {vocab_rows:,} rows {tokens:,} stand for tokens, and the last of {sizes.tp} ranks has none",
            where=WHERE,
            cure=f"`model.pad_vocab_to: {sizes.tp}`, or fewer ranks",
        )


def _refuse_indivisible(numbers: Mapping[str, int], tp: int) -> None:
    wrong = {name: n for name, n in numbers.items() if n % tp}
    if not wrong:
        return
    common = math.gcd(*numbers.values())
    valid = [n for n in range(1, common + 1) if common % n == 0]
    near = [max(n for n in valid if n < tp), *[n for n in valid if n > tp][:1]]
    said = " and ".join(f"{name} {n:,}" for name, n in wrong.items())
    raise ModelError(
        f"the model's {said} cannot be shared evenly by {tp} ranks",
        where=WHERE,
        cure=f"`tp: {' or '.join(map(str, near))}`",
    )


def _generic(name: str) -> str:
    """The name with layers' numbers as a plan writes them: `layers.3.mlp` is `layers.*.mlp`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _mixtures(names: Iterable[str]) -> set[str]:
    """Of names in a model or a plan, those of mixtures of experts: with router, and experts that all tokens see."""
    return {name.partition(f".{EXPERTS}")[0] for name in names if EXPERTS in name.split(".")}


def _in_mixture(name: str, mixtures: Iterable[str]) -> bool:
    return any(name.startswith(f"{mixture}.") for mixture in mixtures)


def _branches(
    causal_lm: nn.Module, plan: Mapping[str, str], layers: list[str], apart: set[str], mixtures: set[str]
) -> list[Branch]:
    """The branches, in the model's order.

    Args:
        apart: embedding and head, which are cut in a way of their own.
    """
    found: dict[str, Branch] = {}
    modules = [name for name, _ in causal_lm.named_modules()]
    for name in [*modules, *(name for name, _ in causal_lm.named_parameters())]:
        style, owner = plan.get(_generic(name)), name.rpartition(".")[0]
        if style is None or name in apart or _in_mixture(name, mixtures):
            continue
        if owner.rpartition(".")[0] not in layers:
            raise ModelError(f"the tensor-parallel plan cuts {name}, which is no part of a layer's branch", where=WHERE)
        branch = found.setdefault(owner, Branch(owner))
        is_module = isinstance(causal_lm.get_submodule(owner)._modules.get(name.rpartition(".")[2]), nn.Module)
        parts = {SHARED: branch.shared} | dict.fromkeys(ROWS, branch.rows) | dict.fromkeys(COLUMNS, branch.columns)
        (parts[style] if is_module else branch.heads).append(name)
        branch.between_whole |= style in BETWEEN_WHOLE
    return list(found.values())


def _refuse_branch(branch: Branch, family: str) -> None:
    """Raises ModelError unless the branch begins with a cut by outputs and ends with one by inputs."""
    whole_and_parts = branch.between_whole and (branch.heads or branch.shared)
    if not branch.columns or not branch.rows or whole_and_parts:
        raise ModelError(
            f"the tensor-parallel plan of {family} does not cut {branch.name} by outputs and then by inputs",
            where=WHERE,
            cure="`tp: 1`; the ranks can share the model by `dp_shard`",
        )


def _cut_layer(layer: Any, name: str, rule: _Rule, layout: Layout) -> None:
    """Writes down what becomes of the parameters of one linear layer or embedding, with what stands beside it."""
    for leaf, parameter in layer.named_parameters(remove_duplicate=False):
        part = next((p for p in leaf.split(".") if p.startswith("lora_")), leaf.rpartition(".")[2])
        if part not in rule or not parameter.is_floating_point():
            what = "weights of four bits" if part in rule else f"'{part}'"
            raise ModelError(f"{what} in {name} cannot be cut", where=WHERE, cure="`tp: 1`, or `adapter: {type: lora}`")
        dim = rule[part]
        if dim is None:
            layout.partial.add(f"{name}.{leaf}")
        else:
            layout.dims[f"{name}.{leaf}"] = dim


def _take_rest(model: PolicyModel, mixtures: set[str], layout: Layout, family: str) -> None:
    """What is neither cut nor shared: outside of branches a share of its gradient is on each rank, since each runs its
    own tokens; in a branch that computes the same on all ranks, all of it.

    Raises:
        ModelError: a parameter that may mix tokens, or that sees a part of the heads and is not in the plan.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in layout.dims or name in layout.partial or name.partition(".")[0] in model.heads:
            continue
        branch = next((b for b in layout.branches if name.startswith(f"{b.name}.")), None)
        if branch is not None and branch.between_whole:
            continue
        token_by_token = parameter.ndim <= 1 or _in_mixture(name, mixtures)
        if branch is not None or not token_by_token:
            raise ModelError(
                f"the tensor-parallel plan of {family} does not say what becomes of {name}",
                where=WHERE,
                cure="`tp: 1`; the ranks can share the model by `dp_shard`",
            )
        layout.partial.add(name)


def _parameters(model: nn.Module, name: str) -> Iterable[tuple[str, nn.Parameter]]:
    return model.get_submodule(name).named_parameters()
