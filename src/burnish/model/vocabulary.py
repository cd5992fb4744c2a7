"""Rows of embedding and head for tokens that a model did not have: where they begin, and training them alone.

The new rows are a parameter of their own, `new_rows` [N, H], on the embedding and, where that is not tied, on the head;
the matrix they extend stays frozen, has no moments, and never enters a checkpoint. It must not know tokenizers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.model.deferred import is_deferred, later, values
from burnish.model.shards import Whole, reader

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel
    from burnish.types import NewTokens


@torch.no_grad()
def grow(causal_lm: Any, new: NewTokens) -> None:
    """Makes room for new tokens in a transformers model and sets their rows, in the weights' dtype.

    Rows that a checkpoint holds beyond its tokenizer (Qwen pads 151,665 tokens to 151,936 rows) are used before any is
    added. `config.vocab_size` follows.
    """
    end = new.first + len(new.sources)
    if causal_lm.get_input_embeddings().weight.shape[0] < end:
        _resize(causal_lm, end)
    for matrix in {id(matrix): matrix for _, matrix in _matrices(causal_lm)}.values():
        if is_deferred(matrix):
            rows = later(
                partial(_first_rows, matrix.detach(), new), (len(new.sources), *matrix.shape[1:]), matrix.dtype
            )
            matrix.data = torch.cat([matrix.detach()[: new.first], rows, matrix.detach()[end:]])
        else:
            matrix[new.first : end] = _first_rows(matrix, new)


def _first_rows(matrix: Tensor, new: NewTokens) -> Tensor:
    """What the new rows of `matrix` begin as, in its dtype."""
    matrix = values(matrix)
    mean = matrix[: new.first].mean(0, dtype=torch.float32)
    rows = [matrix[list(source)].mean(0, dtype=torch.float32) if source else mean for source in new.sources]
    return torch.stack(rows).to(matrix.dtype)


def _resize(causal_lm: Any, rows: int) -> None:
    """Resizes embedding and head; transformers copies the old rows, but not what deferred ones are to hold."""
    before = {place: (id(matrix), matrix.detach(), matrix.requires_grad) for place, matrix in _matrices(causal_lm)}
    causal_lm.resize_token_embeddings(rows, mean_resizing=False)
    grown: dict[int, nn.Parameter] = {}
    for place, _ in _matrices(causal_lm):
        key, old, trains = before[place]
        if is_deferred(old):
            zeros = old.new_zeros(rows - old.shape[0], *old.shape[1:])
            grown.setdefault(key, nn.Parameter(torch.cat([old, zeros]), trains))
            side, name = place
            setattr(getattr(causal_lm, side)(), name, grown[key])


def _matrices(causal_lm: Any) -> list[tuple[tuple[str, str], nn.Parameter]]:
    """((getter, name), parameter) of all that has a row for each token."""
    places = [
        ("get_input_embeddings", "weight"),
        ("get_output_embeddings", "weight"),
        ("get_output_embeddings", "bias"),
    ]
    found = [(place, getattr(getattr(causal_lm, place[0])(), place[1], None)) for place in places]
    return [(place, matrix) for place, matrix in found if matrix is not None]


def train_rows(model: PolicyModel, new: NewTokens) -> None:
    """Lets the rows of new tokens train, in a model whose adapter, if it has one, is applied already.

    Raises:
        ModelError: the adapter changes the embedding or the head itself.
    """
    embedding: Any = model.causal_lm.get_input_embeddings()
    owners: list[Any] = [embedding] if model.is_tied else [embedding, model.head]
    if new.train_all:
        for owner in owners:
            owner.weight.requires_grad_(True)
        return
    if not (isinstance(embedding, nn.Embedding) and isinstance(model.head, nn.Linear)):
        raise ModelError(
            "the adapter changes embedding or head, whose new rows are to train alone",
            where="data.tokenizer.add_tokens.train",
            cure="take them out of `model.adapter`, or set `train: all_rows`",
        )
    rows = slice(new.first, new.first + len(new.sources))
    for owner in owners:
        owner.weight.requires_grad_(False)
        owner.new_rows = nn.Parameter(owner.weight.detach()[rows].float().clone())
        owner.first_new_row = new.first
    embedding.forward = _reading_new_rows(embedding, embedding.forward)


def _reading_new_rows(embedding: Any, inner: Any) -> Any:
    def forward(token_ids: Tensor) -> Tensor:
        return over_new_rows(embedding, token_ids, inner(token_ids))

    return forward


def over_new_rows(embedding: Any, token_ids: Tensor, embedded: Tensor) -> Tensor:
    """`embedded` [..., H], what the matrix has for `token_ids`, with the new rows in the places of new tokens."""
    # The class's own forward over the new rows alone, since it may do more than look up: Gemma multiplies by sqrt(H).
    alone = copy.copy(embedding)
    alone.padding_idx = None  # an id of the whole matrix; a row among `new_rows` must not go without gradient for it
    alone._parameters = {"weight": embedding.new_rows.to(embedding.weight.dtype)}
    local = token_ids - embedding.first_new_row
    inside = (local >= 0) & (local < embedding.new_rows.shape[0])
    new = alone.__class__.forward(alone, local.clamp(0, embedding.new_rows.shape[0] - 1))
    return torch.where(inside.unsqueeze(-1), new, embedded)


class _WithRows(torch.autograd.Function):
    """The frozen matrix with its new rows written into it: no second V x H matrix forward, and a gradient that only the
    new rows keep. The projection still sums all of dW, V x H float32, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, new_rows: Tensor, first: int) -> Tensor:
        begin, end = (min(max(place, 0), matrix.shape[0]) for place in (first, first + new_rows.shape[0]))
        ctx.rows, ctx.taken, ctx.shape = slice(begin, end), slice(begin - first, end - first), new_rows.shape
        matrix.data[ctx.rows] = new_rows[ctx.taken].to(matrix.dtype)
        return matrix.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_rows = grad.new_zeros(ctx.shape, dtype=torch.float32)
        grad_rows[ctx.taken] = grad[ctx.rows].float()
        return None, grad_rows, None


def head_weight_with_rows(head: Any, owner: Any, first: int = 0) -> Tensor:
    """The head's weight [V, H] with the rows of new tokens that train on `owner`: the head, or a tied embedding.

    Args:
        first: id of the first of the head's rows that are on this rank; of the new ones it takes those that are.
    """
    return _WithRows.apply(head.weight, owner.new_rows, owner.first_new_row - first)  # pyright: ignore[reportReturnType]


def rows_owner(model: PolicyModel) -> Any:
    """The module that holds the head's `new_rows`; None where they do not train alone."""
    owner = model.causal_lm.get_input_embeddings() if model.is_tied else model.head
    return owner if hasattr(owner, "new_rows") else None


def with_new_rows(model: PolicyModel, tensors: Iterator[tuple[str, Whole]]) -> Iterator[tuple[str, Whole]]:
    """The (name, tensor) of a whole model, with trained rows in the matrices that they extend, and not beside them."""
    owners: dict[int, Any] = {id(module.weight): module for module in model.modules() if hasattr(module, "new_rows")}
    read = reader(model)
    for name, tensor in tensors:
        if name.endswith(".new_rows"):
            continue
        module: Any = model.get_submodule(name.rpartition(".")[0]) if name.endswith(".weight") and owners else None
        owner = owners.get(id(getattr(module, "weight", None)))
        yield name, tensor if owner is None else tensor._replace(make=partial(_with_rows, tensor, owner, read))


def _with_rows(matrix: Whole, owner: Any, read: Callable[[Tensor], Tensor]) -> Tensor:
    tensor, new = matrix.make().clone(), read(owner.new_rows)
    tensor[owner.first_new_row : owner.first_new_row + len(new)] = new.to(tensor.dtype)
    return tensor
