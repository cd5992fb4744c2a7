"""Tensor parallel: the ranks of one group share every layer's heads and features, the tokens between layers, and the
rows of embedding and head.

    embedding     rank r looks up the ids among its V/n rows, the sum over ranks is scattered: [T/n, H]
    norm          on T/n tokens
    branch        gathers T tokens, computes 1/n of the heads or features, and scatters the ranks' sum: [T/n, H]
    last norm     on T/n tokens, then all T are gathered
    projection    logits of V/n rows; see `vocabulary_shard.py`

Parameters stay plain tensors under their names, cut (`PolicyModel.tp_dims`) or whole; FSDP then shards what is there.
A whole one that saw a share of the tokens or heads has a share of its gradient (`PolicyModel.tp_partial`), which
`finish_gradients` sums once a step. The method is that of Shoeybi et al., arXiv:1909.08053, with the norms on a part of
the tokens as in Korthikanti et al., arXiv:2205.05198.

Dropout draws from the generator of the process. All ranks of a group must seed it alike: then what they compute alike,
the tokens that enter an attention, is dropped alike. Where each has other tokens or features they drop the same
places of them.

It must not know recipes, losses or files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.model.collectives import collect, collect_shared, own_part, scatter_sum, sum_gradient
from burnish.model.shards import local
from burnish.model.tensor_plan import WHERE, Branch, Layout, read_layout
from burnish.model.vocabulary import over_new_rows
from burnish.model.vocabulary_shard import VocabularyShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel

TOKENS = -2
"""The dim of tokens in hidden states [1, T, H]."""
FEATURES = -1
BATCHED = 1 << 16
"""Gradients up to this many numbers are summed in one exchange; longer ones where they lie, without a copy."""


def apply_tensor_parallel(model: PolicyModel, mesh: Mesh) -> None:
    """Cuts `model`, its adapter and heads applied, for this rank, and has it compute with the others; where the mesh's
    axis `tp` is wider than one. Before recomputation and sharding, which take a layer's forward pass as it then is.

    Raises:
        ModelError: see `read_layout` and `cut`.
    """
    if mesh.sizes.tp == 1:
        return
    layout = cut(model, mesh.sizes.tp, mesh.axis_rank("tp"))
    connect(model, layout, mesh.tp_group)


@torch.no_grad()
def cut(model: PolicyModel, size: int, rank: int) -> Layout:
    """Keeps rank `rank`'s part of every parameter that is cut over `size` ranks; the rest of it is let go. Parameters
    on the meta device stay there.

    Raises:
        ModelError: see `read_layout`; also a length that is no multiple of `size`.
    """
    layout = read_layout(model)
    cuts: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, whose id nothing may take meanwhile
    for name, dim in layout.dims.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = module._parameters[leaf]
        assert whole is not None
        if id(whole) not in cuts:
            if whole.shape[dim] % size:
                raise ModelError(
                    f"{name} has {whole.shape[dim]:,} {'columns' if dim else 'rows'}, which {size} ranks cannot share "
                    "evenly",
                    where=WHERE,
                    cure="a `tp` that divides them (`model.pad_vocab_to` changes the rows of a head)",
                )
            part = whole.detach().chunk(size, dim)[rank].clone()
            cuts[id(whole)] = whole, nn.Parameter(part, whole.requires_grad)
        module._parameters[leaf] = cuts[id(whole)][1]
        _say_size(module)
    model.tp_dims, model.tp_partial = layout.dims, layout.partial
    return layout


def connect(model: PolicyModel, layout: Layout, group: ProcessGroup) -> None:
    """Puts the exchanges into the forward pass of a model that was cut."""
    for branch in layout.branches:
        _connect_branch(model, branch, group)
    rows = _leaves(model.causal_lm.get_input_embeddings(), nn.Embedding)[0].weight.shape[0]
    _connect_embedding(model.causal_lm.get_input_embeddings(), rows * group.rank(), group)
    _connect_backbone(model.backbone, group)
    head = model.head
    head.forward = _around(head.forward, lambda x: sum_gradient(x, group), lambda y: collect(y, FEATURES, group))
    model.vocabulary_shard = VocabularyShard(head.weight.shape[0] * group.rank(), group)


@torch.no_grad()
def finish_gradients(model: PolicyModel, mesh: Mesh) -> None:
    """Sums over the `tp` axis what each of its ranks has a share of. To be called once a step, after the last backward
    pass, by every rank; the gradients are then those of one rank with all of the model.

    One that is absent on some ranks (an expert that no token went to) counts as zero; absent on all, it stays absent.
    """
    if mesh.sizes.tp == 1:
        return
    parameters = [p for name, p in model.trainable_parameters() if name in model.tp_partial]
    if not parameters:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=mesh.device)
    dist.all_reduce(present, group=mesh.tp_group)
    gradients = []
    for parameter, ranks in zip(parameters, present.tolist(), strict=True):
        if ranks:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(local(parameter.grad))
    short = [gradient for gradient in gradients if gradient.numel() <= BATCHED]
    for dtype in sorted({gradient.dtype for gradient in short}, key=str):
        some = [gradient for gradient in short if gradient.dtype == dtype]
        flat = torch.cat([gradient.reshape(-1) for gradient in some])
        dist.all_reduce(flat, group=mesh.tp_group)
        for gradient, total in zip(some, flat.split([gradient.numel() for gradient in some]), strict=True):
            gradient.copy_(total.view_as(gradient))
    for gradient in gradients:
        if gradient.numel() > BATCHED:
            dist.all_reduce(gradient, group=mesh.tp_group)


def _connect_branch(model: PolicyModel, branch: Branch, group: ProcessGroup) -> None:
    module, whole = model.get_submodule(branch.name), branch.between_whole
    gather = collect if whole else collect_shared
    module.forward = _entering(module.forward, lambda hidden: gather(hidden, TOKENS, group))
    for name in branch.columns if whole else []:
        layer = model.get_submodule(name)
        layer.forward = _around(layer.forward, lambda x: sum_gradient(x, group), lambda y: collect(y, FEATURES, group))
    for name in branch.rows:
        layer = model.get_submodule(name)
        for linear in _leaves(layer, nn.Linear):
            if linear.bias is not None:
                linear.forward = _with_share_of_bias(linear, float(group.rank() == 0))
        split = (lambda x: own_part(x, FEATURES, group)) if whole else (lambda x: x)
        layer.forward = _around(layer.forward, split, lambda y: scatter_sum(y, TOKENS, group))


def _connect_embedding(embedding: Any, first: int, group: ProcessGroup) -> None:
    """Looks up the ids among rows `first`, `first + 1`, ... that are here. One that is not is 0, so that the sum over
    ranks is the one rank's row, bit for bit."""
    tables = _leaves(embedding, nn.Embedding)
    rows, has_new_rows = tables[0].weight.shape[0], hasattr(embedding, "new_rows")
    for table in tables:
        if table.padding_idx is not None:
            here = table.padding_idx - first
            table.padding_idx = here if 0 <= here < rows else None
    lookup = embedding.__class__.forward.__get__(embedding) if has_new_rows else embedding.forward

    def forward(token_ids: Tensor) -> Tensor:
        place = token_ids - first
        absent = (place < 0) | (place >= rows)
        found = lookup(place.clamp(0, rows - 1)).masked_fill(absent.unsqueeze(-1), 0.0)
        hidden = scatter_sum(found, TOKENS, group)
        return over_new_rows(embedding, own_part(token_ids, -1, group), hidden) if has_new_rows else hidden

    embedding.forward = forward


def _connect_backbone(backbone: Any, group: ProcessGroup) -> None:
    """Makes tokens a multiple of the ranks, by padding that no document has, and gathers the last hidden states."""
    inner = backbone.forward

    def forward(input_ids: Tensor, *, position_ids: Tensor, **options: Any) -> Any:
        num_tokens = input_ids.shape[-1]
        surplus = -num_tokens % group.size()
        if surplus and options.get("context_parallel") is not None:
            raise ModelError(
                f"{num_tokens:,} tokens on each rank of `cp` cannot be shared evenly by {group.size()} ranks of `tp`",
                where=WHERE,
                cure="a `data.packing.row_length` that is a multiple of cp x tp",
            )
        input_ids, position_ids = (nn.functional.pad(ids, (0, surplus)) for ids in (input_ids, position_ids))
        outputs = inner(input_ids=input_ids, position_ids=position_ids, **options)
        hidden = collect(outputs.last_hidden_state, TOKENS, group)
        outputs.last_hidden_state = hidden[:, :num_tokens]
        return outputs

    backbone.forward = forward


def _entering(inner: Callable[..., Any], exchange: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """`inner` with its hidden states exchanged: transformers names them, or gives them first."""

    def forward(*args: Any, **options: Any) -> Any:
        if "hidden_states" in options:
            return inner(*args, **options | {"hidden_states": exchange(options["hidden_states"])})
        assert args, "a branch that calls its hidden states by another name"
        return inner(exchange(args[0]), *args[1:], **options)

    return forward


def _around(
    inner: Callable[..., Tensor], before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return after(inner(before(x), *args, **options))

    return forward


def _with_share_of_bias(linear: nn.Linear, share: float) -> Callable[[Tensor], Tensor]:
    """What ranks sum must hold the bias once: on one rank it is whole, on the others zero."""

    def forward(x: Tensor) -> Tensor:
        return nn.functional.linear(x, linear.weight, linear.bias * share)

    return forward


def _leaves(module: nn.Module, kind: type[Any]) -> list[Any]:
    """The layers of a kind in a module or in what an adapter put in its place; not those of the adapter itself."""
    return [part for name, part in module.named_modules() if isinstance(part, kind) and "lora_" not in name]


def _say_size(module: Any) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = module.weight.shape[0]
