"""Rows of embedding and head for tokens that a model did not have: where they begin, and training them alone.

The new rows are a parameter of their own, `new_rows` [N, H], on the embedding and, where that is not tied, on the head;
the matrix they extend stays frozen, has no moments, and never enters a checkpoint. It must not know tokenizers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from burnish.errors import ModelError

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
        causal_lm.resize_token_embeddings(end, mean_resizing=False)
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    matrices = {id(m): m for m in (embedding.weight, head.weight, head.bias) if m is not None}
    for matrix in matrices.values():
        mean = matrix[: new.first].mean(0, dtype=torch.float32)
        for row, source in enumerate(new.sources, new.first):
            matrix[row] = matrix[list(source)].mean(0, dtype=torch.float32) if source else mean


def train_rows(model: PolicyModel, new: NewTokens) -> None:
    """Lets the rows of new tokens train, in a model whose adapter, if it has one, is applied already.

    Raises:
        ModelError: the adapter changes the embedding or the head itself.
    """
    embedding: Any = model.causal_lm.get_input_embeddings()
    owners = [embedding] if model.is_tied else [embedding, model.head]
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
    # The class's own forward over the new rows alone, since it may do more than look up: Gemma multiplies by sqrt(H).
    alone = copy.copy(embedding)
    alone.padding_idx = None  # an id of the whole matrix; a row among `new_rows` must not go without gradient for it

    def forward(token_ids: Tensor) -> Tensor:
        alone._parameters = {"weight": embedding.new_rows.to(embedding.weight.dtype)}
        local = token_ids - embedding.first_new_row
        inside = (local >= 0) & (local < embedding.new_rows.shape[0])
        new = alone.__class__.forward(alone, local.clamp(0, embedding.new_rows.shape[0] - 1))
        return torch.where(inside.unsqueeze(-1), new, inner(token_ids))

    return forward


class _WithRows(torch.autograd.Function):
    """The frozen matrix with its new rows written into it: no second V x H matrix forward, and a gradient that only the
    new rows keep. The projection still sums all of dW, V x H float32, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, new_rows: Tensor, first: int) -> Tensor:
        ctx.rows = slice(first, first + new_rows.shape[0])
        matrix.data[ctx.rows] = new_rows.to(matrix.dtype)
        return matrix.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, grad[ctx.rows].float(), None


def head_weight_with_rows(head: Any, owner: Any) -> Tensor:
    """The head's weight [V, H] with the rows of new tokens that train on `owner`: the head, or a tied embedding."""
    return _WithRows.apply(head.weight, owner.new_rows, owner.first_new_row)  # pyright: ignore[reportReturnType]


def rows_owner(model: PolicyModel) -> Any:
    """The module that holds the head's `new_rows`; None where they do not train alone."""
    owner = model.causal_lm.get_input_embeddings() if model.is_tied else model.head
    return owner if hasattr(owner, "new_rows") else None


def with_new_rows(model: PolicyModel, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) of a whole model, with trained rows in the matrices that they extend, and not beside them."""
    from burnish.model.parallel import whole

    owners: dict[int, Any] = {id(module.weight): module for module in model.modules() if hasattr(module, "new_rows")}
    for name, tensor in tensors:
        if name.endswith(".new_rows"):
            continue
        module: Any = model.get_submodule(name.rpartition(".")[0]) if name.endswith(".weight") and owners else None
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is not None:
            new = whole(owner.new_rows).to(tensor.dtype)
            tensor = tensor.clone()
            tensor[owner.first_new_row : owner.first_new_row + len(new)] = new
        yield name, tensor
