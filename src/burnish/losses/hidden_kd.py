"""Distillation of a teacher's last hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from burnish.errors import ModelError
from burnish.losses.base import Loss
from burnish.losses.reduce import trained_weight
from burnish.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.types import Block, TokenOutputs


class HiddenKD(Loss):
    """Distance of the states that each trained token is drawn from, student's and teacher's; counted by token.

    `teacher_hidden[t]` and `hidden_states[t]` are both the state that token t is drawn from, that of t - 1. `mse` is
    the mean over the H' entries of the squared difference (Romero et al., arXiv:1412.6550, eq. 3); `cosine` is 1 - cos
    of the angle (Sanh et al., arXiv:1910.01108, section 2).
    """

    type: Literal["hidden_kd"] = "hidden_kd"
    asks: ClassVar[frozenset[str]] = frozenset({"teacher_hidden"})
    kind: Literal["mse", "cosine"] = "mse"
    """`mse` brings entries together, `cosine` directions only."""
    head: str | None = None
    """Where student and teacher are of different widths H and H': the head of the model, `{type: linear, size: H'}`,
    that maps the student's states to the teacher's width. It reads the state *at* a token, so the first token after a
    shared prefix is passed over."""

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"hidden_states"} if self.head is None else {"scores"})

    def heads(self) -> dict[str, Literal["numbers"]]:
        return {} if self.head is None else {self.head: "numbers"}

    def reads(self, block: Block) -> Tensor:
        return block.loss_mask if self.head is None else _before_trained(block)

    def count(self, block: Block) -> Tensor:
        return self.reads(block).sum()

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        from torch.nn.functional import cosine_similarity

        student, teacher, weight_T = outputs.hidden_states, block.columns["teacher_hidden"], trained_weight(block)
        if self.head is not None:
            student, teacher, weight_T = outputs.scores[self.head], teacher.roll(-1, 0), weight_T.roll(-1, 0)
        assert student is not None
        if student.shape[1] != teacher.shape[1]:
            raise ModelError(
                f"the student's states are {student.shape[1]} wide, the teacher's {teacher.shape[1]}",
                where="workflow.loss",
                cure=f"give the model a head `{{type: linear, size: {teacher.shape[1]}}}`, and name it by `head:`",
            )
        student, teacher = student.float(), teacher.float()
        if self.kind == "mse":
            distance_T = (student - teacher).square().mean(1)
        else:
            distance_T = 1 - cosine_similarity(student, teacher, dim=1)
        total, count = (distance_T * weight_T * self.reads(block)).sum(), self.count(block)
        return LossOutput(total, {"loss": (total.detach(), count)})


def _before_trained(block: Block) -> Tensor:
    """bool [T]: tokens whose next token, in the same document, is trained."""
    import torch

    before = torch.zeros_like(block.loss_mask)
    before[:-1] = block.loss_mask[1:] & (block.document_ids[1:] == block.document_ids[:-1])
    return before
