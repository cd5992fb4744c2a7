"""A frozen model that answers during the run: another than the policy's, or the policy's own with its adapter off.

It must not know which loss asks, nor recipes beyond the `model:` block that it is loaded by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from burnish.model.divergence import Reference
from burnish.model.head_chunks import Head
from burnish.model.shards import whole
from burnish.policy.policy import in_chunks
from burnish.policy.second import COLUMNS, TOP_K
from burnish.policy.throughput import ForwardCost
from burnish.types import Block, collate, previous_token

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.mesh import Mesh
    from burnish.model.config import Adapter, ModelConfig
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.second import Surroundings
    from burnish.types import Group


def load_frozen(config: ModelConfig, around: Surroundings) -> PolicyModel:
    """The model of `config` in the policy's precision, sharded as the policy is, with nothing that trains.

    Ids beyond the policy's are outside of its distribution.

    Raises:
        ModelError: see `load_model`; also documents of one packed row that would see each other in it.
    """
    from burnish.model.load import load_model, require_packable

    initial = config.path == around.student.config.path
    new_tokens = around.student.new_tokens if initial else None
    model = load_model(config, around.mesh, seed=around.seed, frozen=True, new_tokens=new_tokens)
    if around.packed_length is not None and not initial:
        require_packable(model, around.packed_length)
    model.vocab_size = min(model.vocab_size, around.student.vocab_size)
    return model


class Frozen:
    """A model that never trains, asked about the blocks of a step. See `second.Second`.

    Args:
        adapter: asked of the policy's own model, with this off: no second model is in memory.
        top_k: length of the teacher's columns.
    """

    def __init__(
        self, model: PolicyModel, mesh: Mesh, micro_batch_size: int, *, adapter: Adapter | None = None, top_k: int = 0
    ) -> None:
        self.model, self.mesh, self.micro_batch_size = model, mesh, micro_batch_size
        self.adapter, self.top_k = adapter, top_k
        with self._asked():
            self._cost = ForwardCost(model)
        self.obstacle = self._cost.obstacle

    def require(self, group: Group) -> None:
        """It can be asked about anything."""

    def set_temperature(self, temperature: float) -> None:
        self.model.temperature = temperature

    def annotate(self, blocks: list[Block], loss: Loss) -> list[Block]:
        """`blocks` with the columns that `loss` asks, at their trained tokens; 0 elsewhere."""
        asks = loss.asks & COLUMNS
        if not asks:
            return blocks
        with self._asked():
            return [row for rows in in_chunks(blocks, self.micro_batch_size) for row in self._answered(rows, asks)]

    def reference(self, block: Block, loss: Loss) -> Reference | None:
        """Its distribution over a block on this rank's device, for a loss with a divergence."""
        if loss.divergence is None:
            return None
        with self._asked():
            # Through the whole forward pass: a sharded model's parameters are gathered there and nowhere else.
            reads_T = previous_token(block) >= 0
            hidden_TH = self.model(block, needs=frozenset({"hidden_states"}), reads=reads_T).hidden_states
            weight_VH, bias = self._head()
        return Reference(hidden_TH, weight_VH, loss.divergence, bias, self.model.softcap, self.model.logit_scale)

    def flops(self, blocks: list[Block], loss: Loss) -> float:
        """Of what both of these run on a step's blocks: the head once for each trained token that columns are asked of,
        and twice, forward and backward, for a divergence."""
        passes = bool(loss.asks & COLUMNS) + (loss.divergence is not None)
        products = ("teacher_topk_ids" in loss.asks) + ("ref_logprobs" in loss.asks) + 2 * (loss.divergence is not None)
        return self._cost.flops(blocks, passes, products)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Without gradients, dropout and adapter; afterwards every module trains or not as it did before."""
        with torch.no_grad(), evaluating(self.model), self.adapter.off(self.model) if self.adapter else nullcontext():
            yield

    def _answered(self, rows: list[Block], asks: frozenset[str]) -> list[Block]:
        self.mesh.alive()
        batch = collate(rows)
        idle = not batch.num_documents and self.mesh.world_size == 1  # with more ranks all take part in every gather
        columns = self._zeros(batch, asks) if idle else self._columns(batch.to(self.mesh.device), asks)
        sizes = [row.num_tokens for row in rows]
        parts = {name: column.to(rows[0].token_ids.device).split(sizes) for name, column in columns.items()}
        return [
            replace(row, columns=row.columns | {name: split[i] for name, split in parts.items()})
            for i, row in enumerate(rows)
        ]

    def _columns(self, batch: Block, asks: frozenset[str]) -> dict[str, Tensor]:
        needs = {"logprobs" if name == "ref_logprobs" else "hidden_states" for name in asks}
        outputs = self.model(batch, needs=frozenset(needs), reads=batch.loss_mask)
        made = {"ref_logprobs": outputs.logprobs, "teacher_hidden": outputs.hidden_states}
        if asks & TOP_K:
            read_n = torch.nonzero(batch.loss_mask).squeeze(1)
            likeliest = self._likeliest(outputs.hidden_states[read_n])
            zeros = self._zeros(batch, TOP_K)
            for name, values_nK in zip(("teacher_topk_ids", "teacher_topk_logprobs"), likeliest, strict=True):
                made[name] = zeros[name].index_copy_(0, read_n, values_nK)
        return {name: made[name] for name in sorted(asks)}

    def _zeros(self, batch: Block, asks: frozenset[str]) -> dict[str, Tensor]:
        """Each column in its shape and dtype."""
        hidden = self.model.head.weight
        shapes = {
            "ref_logprobs": ((), torch.float32),
            "teacher_topk_ids": ((self.top_k,), torch.int64),
            "teacher_topk_logprobs": ((self.top_k,), torch.float32),
            "teacher_hidden": ((hidden.shape[1],), hidden.dtype),
        }
        device, size = batch.token_ids.device, batch.num_tokens
        return {
            name: torch.zeros(size, *shapes[name][0], dtype=shapes[name][1], device=device) for name in sorted(asks)
        }

    def _likeliest(self, hidden_nH: Tensor) -> tuple[Tensor, Tensor]:
        """The `top_k` likeliest tokens at each row, likeliest first, and their log-probabilities: int64 and float32
        [n, K], a chunk of logits at a time."""
        model, (weight, bias) = self.model, self._head()
        shard = model.vocabulary_shard
        here = shard.num_tokens(model.vocab_size, weight)
        head = Head(here, model.softcap, model.logit_scale, model.temperature, model.projection_chunk, shard)
        ids_nK = torch.zeros(len(hidden_nH), self.top_k, dtype=torch.int64, device=hidden_nH.device)
        logprobs_nK = torch.zeros_like(ids_nK, dtype=torch.float32)
        memory = head.buffer(hidden_nH, 1)[0]
        for rows in head.slices(len(hidden_nH)):
            z, _ = head.logits(hidden_nH[rows], weight, bias, memory)
            logits, ids_nK[rows] = shard.topk(z, self.top_k)
            logprobs_nK[rows] = logits - shard.logsumexp(z)
        return ids_nK, logprobs_nK

    def _head(self) -> tuple[Tensor, Tensor | None]:
        bias = self.model.head.bias
        return whole(self.model.head_weight()), None if bias is None else whole(bias)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the length of the block; afterwards every module is in training, or not, as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
