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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from burnish.errors import ResumeError
from burnish.model.project import previous_token
from burnish.types import Block, LossOutput, Metric, collate

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.second import Second

Tensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Update:
    """What became of one optimizer step."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    skipped: bool = False
    """Nothing moved: the loss or the gradient was not finite."""
    reason: str = ""
    """Why, where it was skipped."""


class Policy:
    """A model in training on this rank.

    Args:
        micro_batch_size: rows in one forward pass; changes memory and speed, never the gradient.
        max_grad_norm: longest gradient that is stepped with, None: any.
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
        second: Second | None = None,
    ) -> None:
        self.second = second
        self.model, self.optimizer, self.mesh = model, optimizer, mesh
        self.micro_batch_size, self.max_grad_norm = micro_batch_size, max_grad_norm
        self._mean_loss = 0.0

    def forward_backward(self, blocks: list[Block], loss: Loss) -> dict[str, Metric]:
        """Adds the gradient of `loss` over this rank's whole share of a step; returns metrics over all ranks.

        The divisor is the loss's count over every micro-batch of every rank, known before the first backward pass, so
        rows may be cut into micro-batches and spread over ranks in any way.
        """
        blocks = self.annotated(blocks, loss)
        self.model.train()
        batches = [collate(rows) for rows in in_chunks(blocks, self.micro_batch_size)]
        counts = [loss.count(batch) for batch in batches]
        counted = torch.stack([count.double().reshape(-1) for count in counts]).sum(0)
        divisors = torch.tensor(
            [count or 1.0 for count in self.mesh.sum_scalars(counted.tolist())], dtype=torch.float64
        )
        if self.mesh.world_size == 1:  # with more ranks every one must take part in every collective
            held = [i for i, batch in enumerate(batches) if batch.num_documents] or [0]
            batches, counts = [batches[i] for i in held], [counts[i] for i in held]
        totals = Totals()
        for batch, count in zip(batches, counts, strict=True):
            output = self._forward(batch, loss)
            (output.total.reshape(-1) / divisors.to(output.total)).sum().backward()
            totals.add(output, count)
        metrics, mean = totals.over_ranks(self.mesh)
        self._mean_loss += mean
        return metrics

    def optim_step(self, learning_rate: float) -> Update:
        """Moves the parameters by the gradient that was added up, and clears it.

        A loss or gradient that is not finite moves nothing and leaves the optimizer's state as it was.
        """
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grad_norm = gradient_norm(gradients, self.mesh)
        mean_loss, self._mean_loss = self._mean_loss, 0.0
        if not math.isfinite(mean_loss) or not math.isfinite(grad_norm):
            self.optimizer.zero_grad(set_to_none=True)
            what = "gradient" if math.isfinite(mean_loss) else "loss"
            return Update(grad_norm, skipped=True, reason=f"the {what} is not finite")
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
        return totals.over_ranks(self.mesh)[0]

    def logprobs(self, blocks: list[Block]) -> list[Tensor]:
        """float32 [T] for each block, where that block is: log p of every token that something predicts, else 0."""
        return logprobs(self.model, self.mesh, blocks, self.micro_batch_size)

    @torch.no_grad()
    def embeddings(self, blocks: list[Block], *, training: bool = False) -> list[Tensor]:
        """float32 [D, E] for each block, on this rank's device: one vector a document, 0 for unused entries.

        Args:
            training: with dropout, drawn as a `forward_backward` over the same blocks right afterwards draws it: the
                generators are left where they were. None of the blocks is empty then, since it passes over those.
        """
        self.model.train(training)
        result: list[Tensor] = []
        with torch.random.fork_rng([self.mesh.device] if self.mesh.device.type == "cuda" else []):
            for rows in in_chunks(blocks, self.micro_batch_size):
                batch = collate(rows).to(self.mesh.device)
                outputs = self.model(batch, needs=frozenset({"embeddings"}), reads=torch.zeros_like(batch.loss_mask))
                result += outputs.embeddings.split([row.documents.shape[0] for row in rows])
        return result

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """(tensors by part and name, JSON) of everything that a later `load` needs to go on bit for bit.

        Tensors are live, not copies. `model` holds the trained parameters under their Hugging Face names, `optimizer`
        its state as `exp_avg.<parameter name>`, `rng` the generators' states as uint8.
        """
        names = self._names()
        optimizer = {
            f"{kind}.{names[parameter]}": local(value)
            for parameter in names
            for kind, value in self.optimizer.state.get(parameter, {}).items()
        }
        rng = {"torch": torch.get_rng_state()}
        if self.mesh.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.mesh.device)
        model = {name: local(parameter.detach()) for parameter, name in names.items()}
        return {"model": model, "optimizer": optimizer, "rng": rng}, {"optimizer": type(self.optimizer).__name__}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], json: Mapping[str, Any]) -> None:
        """Becomes the policy whose `state` this is.

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
        torch.set_rng_state(tensors["rng"]["torch"])
        if self.mesh.device.type == "cuda" and "cuda" in tensors["rng"]:  # absent where a CPU began the run
            torch.cuda.set_rng_state(tensors["rng"]["cuda"], self.mesh.device)

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The whole model under Hugging Face names, adapters merged: what an engine loads."""
        return self.model.hf_tensors(merge=True)

    def annotated(self, blocks: list[Block], loss: Loss) -> list[Block]:
        """`blocks`, a step's or an evaluation's chunk, with the columns that `loss.asks` of a second model.

        Every rank must call it with as many blocks, empty ones included. No dropout is drawn.
        """
        if not loss.asks:
            return blocks
        assert self.second is not None, f"{loss.type} asks {sorted(loss.asks)} of a second model, and there is none"
        return self.second.annotate(blocks, loss)

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
        parts = outputs.logprobs.split([row.num_tokens for row in rows])
        result += [part.to(row.token_ids.device) for part, row in zip(parts, rows, strict=True)]
    return result


class Totals:
    """Sums losses and metrics of micro-batches in float64 where they are, so that the host waits once a step."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.num_terms = 0
        self.sums: Tensor | None = None

    def add(self, output: LossOutput, count: Tensor) -> None:
        """`count` is the loss's, shaped as its total."""
        assert self.names in ((), tuple(output.metrics)), "a loss names the same metrics for every block"
        self.names, self.num_terms = tuple(output.metrics), output.total.numel()
        parts = (output.total, count, *(value for pair in output.metrics.values() for value in pair))
        device = output.total.device
        row = torch.cat([torch.as_tensor(part, device=device).detach().double().reshape(-1) for part in parts])
        self.sums = row if self.sums is None else self.sums + row

    def over_ranks(self, mesh: Mesh) -> tuple[dict[str, Metric], float]:
        """(metrics, what was minimised) over all micro-batches of all ranks.

        A loss whose terms are counted differently cannot say its value as one (sum, count) and leaves out `loss`: here
        it is (total[0] / count[0] + total[1] / count[1] + ..., 1).
        """
        if self.sums is None:
            return {}, 0.0
        sums, terms = mesh.sum_scalars(self.sums.tolist()), self.num_terms
        mean = sum(total / (count or 1.0) for total, count in zip(sums[:terms], sums[terms:], strict=False))
        pairs = sums[2 * terms :]
        metrics = {name: (pairs[2 * i], pairs[2 * i + 1]) for i, name in enumerate(self.names)}
        return {"loss": (mean, 1.0), **metrics}, mean


def gradient_norm(gradients: list[Tensor], mesh: Mesh) -> float:
    """Euclidean norm of all tensors laid end to end, over all ranks: first each tensor's in float32, then of those.

    A sharded tensor's shards add up over the ranks; a replicated one is the same on each and counts once.
    """
    sharded = _norm([gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)])
    whole = _norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    (squares,) = mesh.sum_scalars([sharded**2])
    return math.sqrt(squares + whole**2)


def _norm(tensors: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor (all of it on one rank), the tensor itself otherwise; memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, shard: Tensor) -> Tensor:
    """`shard` as an optimizer holds it for `parameter`; scalars such as the step count are never sharded."""
    if not isinstance(parameter, DTensor) or shard.ndim == 0:
        return shard
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, run_check=False)


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
