"""The policy: a model and its optimizer behind verbs.

    forward_backward(blocks, loss)    a whole step's rows: loss and gradients, divided by one global count
    optim_step(learning_rate)         clip, refuse what is not finite, move the parameters
    evaluate / logprobs / embeddings  the same forward pass without gradients
    state / load, export_weights      everything that must be saved, and what an engine needs

It must not know recipes, files, schedules or which objective it serves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from burnish.errors import ResumeError
from burnish.losses.base import Asking
from burnish.model.seeded import generator
from burnish.model.shards import is_writer, local, region_of
from burnish.model.tensor_parallel import finish_gradients
from burnish.policy.checkpoint.piece import Piece
from burnish.policy.elastic import TreeSum, norm_by_rows
from burnish.policy.totals import Totals
from burnish.region import Region
from burnish.types import Block, LossOutput, Metric, TokenOutputs, collate, previous_token

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.second import Second

Pieces = dict[str, dict[str, Piece]]


@dataclass(frozen=True, slots=True)
class Update:
    """What became of one optimizer step."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    skipped: bool = False
    """Nothing moved: the loss or the gradient was not finite, or was refused."""
    reason: str = ""
    """Why, where it was skipped."""


class Policy:
    """A model in training on this rank.

    Args:
        micro_batch_size: rows in one forward pass; changes memory and speed, never the gradient.
        max_grad_norm: longest gradient that is stepped with, None: any.
        seed: dropout is drawn from it.
        elastic: every sum has one order, whatever the number of ranks; see `elastic.py`.
        second: the reference or teacher that losses compare with, if there is one.
    """

    def __init__(
        self,
        model: PolicyModel,
        optimizer: torch.optim.Optimizer,
        *,
        mesh: Mesh,
        micro_batch_size: int,
        max_grad_norm: float | None,
        seed: int = 0,
        elastic: bool = False,
        second: Second | None = None,
    ) -> None:
        self.second = second
        self.model, self.optimizer, self.mesh = model, optimizer, mesh
        self.micro_batch_size, self.max_grad_norm = micro_batch_size, max_grad_norm
        self.seed, self.elastic = seed, elastic
        self._mean_loss = 0.0
        self._drops_nothing = False
        self._drawn = 0

    def forward_backward(self, blocks: list[Block], loss: Loss) -> dict[str, Metric]:
        """Adds the gradient of `loss` over this rank's whole share of a step; returns metrics over all ranks.

        The divisor is the loss's count over every micro-batch of every rank, known before the first backward pass, so
        rows may be cut into micro-batches and spread over ranks in any way.
        """
        blocks = self.annotated(blocks, loss)
        self.model.train(not self._drops_nothing)
        batches = [collate(rows) for rows in in_chunks(blocks, self.micro_batch_size)]
        counts = [loss.count(batch) for batch in batches]
        counted = self.mesh.sum_rows(torch.stack([count.double().reshape(-1) for count in counts]))
        divisors = torch.tensor([count or 1.0 for count in counted], dtype=torch.float64)
        held = range(len(batches))
        if self.mesh.world_size == 1:  # with more ranks every one must take part in every collective
            held = [i for i, batch in enumerate(batches) if batch.num_documents] or [0]
        totals = Totals()
        tree = TreeSum(parameter for _, parameter in self.model.trainable_parameters()) if self.elastic else None
        for i, batch in enumerate(batches):
            if i in held:
                self._seed_dropout(i)
                output = self._forward(batch, loss)
                (output.total.reshape(-1) / divisors.to(output.total)).sum().backward()
                totals.add(output, counts[i])
                self.mesh.alive()
            if tree is not None:
                tree.take()
        if tree is not None:
            tree.give_back()
        self._drawn += 1
        metrics, mean = totals.over_ranks(self.mesh)
        self._mean_loss += mean
        return metrics

    def optim_step(self, learning_rate: float, refuse: Callable[[float, float], str] | None = None) -> Update:
        """Moves the parameters by the gradient that was added up, and clears it.

        A loss or gradient that is not finite moves nothing and leaves the optimizer's state as it was.

        Args:
            refuse: is told the mean loss and the gradient's norm, the same on every rank, and says why this step must
                not be made; empty: it may.
        """
        finish_gradients(self.model, self.mesh)
        names, groups = self._names(), self.optimizer.param_groups
        named = [(names[p], p.grad) for group in groups for p in group["params"] if p.grad is not None]
        gradients = [gradient for _, gradient in named]
        own = [local(gradient) for name, gradient in named if is_writer(self.model, name, gradient, self.mesh)]
        grad_norm = norm_by_rows(own, self.mesh) if self.elastic else gradient_norm(own, self.mesh)
        mean_loss, self._mean_loss = self._mean_loss, 0.0
        reason = "" if refuse is None else refuse(mean_loss, grad_norm)
        if not reason and not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            reason = f"the {'gradient' if math.isfinite(mean_loss) else 'loss'} is not finite"
        if reason:
            self.optimizer.zero_grad(set_to_none=True)
            return Update(grad_norm, skipped=True, reason=reason)
        if self.max_grad_norm is not None and grad_norm > self.max_grad_norm:
            for gradient in gradients:
                local(gradient).mul_(self.max_grad_norm / grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(grad_norm)

    @torch.no_grad()
    def evaluate(self, blocks: Iterable[Block], loss: Loss, *, at_once: int | None = None) -> dict[str, Metric]:
        """Metrics of `loss` over `blocks`, which may be a generator, and over all ranks; moves nothing.

        Args:
            at_once: rows that stand for a step, where a second model says something of all of one; None: a micro-batch.
        """
        self.model.eval()
        totals = Totals()
        for step in in_chunks(blocks, at_once or self.micro_batch_size):
            for rows in in_chunks(self.annotated(step, loss), self.micro_batch_size):
                batch = collate(rows)
                totals.add(self._forward(batch, loss), loss.count(batch))
                self.mesh.alive()
        return totals.over_ranks(self.mesh)[0]

    def logprobs(self, blocks: list[Block], *, trained_only: bool = False) -> list[Tensor]:
        """float32 [T] for each block, where that block is: log p of every token that something predicts, or of trained
        ones only, else 0."""
        return logprobs(self.model, self.mesh, blocks, self.micro_batch_size, trained_only=trained_only)

    @torch.no_grad()
    def read(self, blocks: list[Block], loss: Loss, read: Callable[[TokenOutputs, Block], Tensor]) -> list[Tensor]:
        """[T] for each block, where that block is: what `read` makes of the outputs that `loss` needs."""
        self.model.eval()
        result: list[Tensor] = []
        for rows in in_chunks(blocks, self.micro_batch_size):
            batch = collate(rows).to(self.mesh.device)
            outputs = self.model(batch, needs=loss.needs, reads=loss.reads(batch))
            parts = read(outputs, batch).split([row.num_tokens for row in rows])
            result += [part.to(row.token_ids.device) for part, row in zip(parts, rows, strict=True)]
            self.mesh.alive()
        return result

    @torch.no_grad()
    def embeddings(self, blocks: list[Block], *, training: bool = False) -> list[Tensor]:
        """float32 [D, E] for each block, on this rank's device: one vector a document, 0 for unused entries.

        Args:
            training: with dropout, drawn as a `forward_backward` over the same blocks right afterwards draws it.
        """
        self.model.train(training)
        result: list[Tensor] = []
        for i, rows in enumerate(in_chunks(blocks, self.micro_batch_size)):
            batch = collate(rows).to(self.mesh.device)
            self._seed_dropout(i)
            outputs = self.model(batch, needs=frozenset({"embeddings"}), reads=torch.zeros_like(batch.loss_mask))
            result += outputs.embeddings.split([row.documents.shape[0] for row in rows])
            self.mesh.alive()
        return result

    def state(self) -> tuple[Pieces, dict[str, Any]]:
        """(what this rank holds by part and name, JSON) of everything that a later `load` needs to go on bit for bit.

        Tensors are live, not copies. `model` holds the trained parameters under their Hugging Face names, `optimizer`
        its state as `exp_avg.<parameter name>`.
        """
        names = self._names()
        optimizer = {
            f"{kind}.{names[parameter]}": self._piece(names[parameter], value)
            for parameter in names
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }
        model = {name: self._piece(name, parameter) for parameter, name in names.items()}
        json = {"optimizer": type(self.optimizer).__name__, "drawn": self._drawn}
        return {"model": model, "optimizer": optimizer}, json

    def wanted(self, part: str, name: str, shape: tuple[int, ...]) -> Region:
        """Which region of a saved tensor of that whole `shape` this rank's `load` takes.

        Raises:
            ResumeError: it is of another model.
        """
        of = name.partition(".")[2] if part == "optimizer" else name
        parameter = dict(self.model.trainable_parameters()).get(of)
        if parameter is None or not shape:  # what `load` refuses, and a count of steps
            return Region.all_of(shape)
        region = self._piece(of, parameter).region
        if region.whole != tuple(shape):
            raise ResumeError(
                f"the parameter {of} has the shape {tuple(shape)} in the checkpoint and {region.whole} in this model",
                cure="resume with the versions of transformers and peft that the run was started with",
            )
        return region

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], json: Mapping[str, Any]) -> None:
        """Becomes the policy whose `state` this is; of every tensor the region that is `wanted` here.

        Raises:
            ResumeError: it was saved by another optimizer, or its parameters are not the trained ones of this model.
        """
        kind = type(self.optimizer).__name__
        if json["optimizer"] != kind:
            raise ResumeError(f"the checkpoint was written by the optimizer {json['optimizer']}, not by {kind}")
        names = self._names()
        named = {name: parameter for parameter, name in names.items()}
        _refuse_other_parameters(
            {name: local(parameter).shape for name, parameter in named.items()},
            {name: tensor.shape for name, tensor in tensors["model"].items()},
        )
        for name, parameter in named.items():
            local(parameter).copy_(tensors["model"][name])
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors["optimizer"].items():
            kind, _, name = key.partition(".")
            state.setdefault(name, {})[kind] = _like(named[name], value.clone())
        # torch numbers parameters over all groups; its own loader puts every value where its kernel wants it.
        ordered = [names[p] for group in self.optimizer.param_groups for p in group["params"]]
        groups = self.optimizer.state_dict()["param_groups"]
        by_index = {index: state[name] for index, name in enumerate(ordered) if name in state}
        self.optimizer.load_state_dict({"state": by_index, "param_groups": groups})
        self._drawn = json["drawn"]

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model under Hugging Face names, adapters merged: what an engine loads."""
        return self.model.hf_tensors(merge=True)

    def annotated(self, blocks: list[Block], loss: Loss) -> list[Block]:
        """`blocks`, a step's or an evaluation's chunk, with the columns that `loss.asks` of a second model; as they are
        where they have them.

        Every rank must call it with as many blocks, empty ones included. No dropout is drawn.
        """
        if not loss.asks or (blocks and loss.asks <= blocks[0].columns.keys()):
            return blocks
        assert self.second is not None, f"{loss.type} asks {sorted(loss.asks)} of a second model, and there is none"
        return self.second.annotate(blocks, loss)

    def asked(self, blocks: list[Block], columns: frozenset[str]) -> list[Block]:
        """`blocks` with columns of the second model, whatever loss reads them."""
        return self.annotated(blocks, Asking(columns=columns))

    def drop_nothing(self) -> None:
        """No dropout from now on, an adapter's neither: no engine drops anything. At a GPT-2's resid_pdrop of 0.2 the
        log-probability of a sampled token was 0.23 from the engine's in the mean, and its ratio no longer 1."""
        self._drops_nothing = True

    def set_temperature(self, temperature: float) -> None:
        """Divides all logits by it from now on, the second model's too: those of rollouts were."""
        self.model.temperature = temperature
        if self.second is not None:
            self.second.set_temperature(temperature)

    def _forward(self, batch: Block, loss: Loss) -> LossOutput:
        batch = batch.to(self.mesh.device)
        outputs = self.model(
            batch,
            needs=loss.needs,
            reads=loss.reads(batch),
            coefficients=loss.coefficients(batch) if "weighted_nll" in loss.needs else None,
            topk_ids=batch.columns.get("teacher_topk_ids"),
            candidates=loss.candidates(batch) if "candidate_logits" in loss.needs else None,
            ranking=loss.ranking(batch) if "ranks" in loss.needs else None,
            reference=self.second.reference(batch, loss) if self.second is not None else None,
        )
        return loss(outputs, batch)

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        region = region_of(self.model, name, tensor, self.mesh)
        return Piece(local(tensor), region, is_writer(self.model, name, tensor, self.mesh))

    def _seed_dropout(self, micro_batch: int) -> None:
        """Dropout depends on the step and on which of its micro-batches this is, not on what was drawn before: so a
        resumed run draws what it would have drawn, and so does another number of ranks."""
        sizes, mesh = self.mesh.sizes, self.mesh
        place = micro_batch * sizes.data + mesh.data_rank
        name = f"dropout:{self._drawn}:{place}:{mesh.axis_rank('cp')}"  # tp ranks drop the same, cp ranks their own
        torch.manual_seed(generator(self.seed, name).initial_seed())

    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in self.model.trainable_parameters()}


@torch.no_grad()
def logprobs(
    model: PolicyModel, mesh: Mesh, blocks: list[Block], micro_batch_size: int, *, trained_only: bool = False
) -> list[Tensor]:
    """float32 [T] for each block, where that block is: log p of every token that something predicts, else 0. Leaves the
    model in evaluation.

    Args:
        trained_only: of trained tokens only, and 0 at the others too.
    """
    model.eval()
    result: list[Tensor] = []
    for rows in in_chunks(blocks, micro_batch_size):
        batch = collate(rows).to(mesh.device)
        reads = batch.loss_mask if trained_only else previous_token(batch) >= 0
        outputs = model(batch, needs=frozenset({"logprobs"}), reads=reads)
        mesh.alive()
        parts = outputs.logprobs.split([row.num_tokens for row in rows])
        result += [part.to(row.token_ids.device) for part, row in zip(parts, rows, strict=True)]
    return result


def gradient_norm(gradients: list[Tensor], mesh: Mesh) -> float:
    """Euclidean norm of tensors laid end to end over all ranks, each part given by one rank alone: first each tensor's
    in float32, then of those."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    if mesh.world_size == 1:
        return norm
    squares = torch.tensor([[norm**2]], dtype=torch.float64)
    return math.sqrt(mesh.sum_rows(squares, every_rank=True)[0])


def _like(parameter: Tensor, shard: Tensor) -> Tensor:
    """`shard` as an optimizer holds it for `parameter`; scalars such as the step count are never sharded."""
    if not isinstance(parameter, DTensor) or shard.ndim == 0:
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def in_chunks(blocks: Iterable[Block], size: int) -> Iterator[list[Block]]:
    """`size` blocks at a time, the last ones fewer."""
    iterator = iter(blocks)
    while rows := list(itertools.islice(iterator, size)):
        yield rows


def _refuse_other_parameters(here: Mapping[str, torch.Size], saved: Mapping[str, torch.Size]) -> None:
    if here == saved:
        return
    different = sorted(name for name in here.keys() | saved.keys() if here.get(name) != saved.get(name))
    name = different[0]
    raise ResumeError(
        f"{len(different)} parameters differ, the first is {name}: "
        f"{_shape(saved.get(name))} in the checkpoint, {_shape(here.get(name))} in this model",
        cure="resume with the versions of transformers and peft that the run was started with",
    )


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
