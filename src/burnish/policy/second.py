"""The second model of an objective: a reference that preferences are measured against, or a teacher.

It never trains. What a loss asks of it (`Loss.asks`) it writes into columns of the step's blocks, before the step. Here
are the recipe's blocks; `frozen.py` is the model that answers, `answers.py` what one said once, kept on the disk,
`asking.py` the pass in which it said that, and `agreement.py` whether it speaks the policy's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, Self

from annotated_types import Ge, MinLen
from pydantic import model_validator

from burnish.component import Config
from burnish.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from burnish.losses.base import Loss
    from burnish.mesh import Mesh
    from burnish.model.config import ModelConfig
    from burnish.model.divergence import Reference as Distribution
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.agreement import Student
    from burnish.policy.answers import Answers
    from burnish.policy.frozen import Frozen
    from burnish.types import Block, Group

TOP_K = frozenset({"teacher_topk_ids", "teacher_topk_logprobs"})
"""The columns that a teacher's cache holds."""
COLUMNS = TOP_K | {"ref_logprobs", "teacher_hidden"}
"""The columns that a frozen model writes."""


class Second(Protocol):
    """A frozen model, or what it once said."""

    def require(self, group: Group) -> None:
        """Raises DataError where nothing can be said about one of a group's documents; asked of every row of the run
        when it is rendered, so that `annotate` never fails."""
        ...

    def annotate(self, blocks: list[Block], loss: Loss) -> list[Block]:
        """A step's `blocks` with those of the columns that `loss.asks` which this second model writes, on the blocks'
        own device. Every rank calls it with as many blocks, empty ones included."""
        ...

    def reference(self, block: Block, loss: Loss) -> Distribution | None:
        """Its whole distribution over a block, for a loss with a `divergence`; None where it needs none."""
        ...

    def set_temperature(self, temperature: float) -> None:
        """Its log-probabilities are those of its logits divided by this, from now on."""
        ...

    @property
    def obstacle(self) -> str | None:
        """Why its operations cannot be counted, if they cannot."""
        ...

    def flops(self, blocks: list[Block], loss: Loss) -> float:
        """Operations that `annotate` and `reference` run on a step's blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run hands to its second model."""

    student: Student
    """What the policy was made from, and the tokens that it speaks."""
    mesh: Mesh
    micro_batch_size: int
    seed: int
    """Of weights that no file holds."""
    packed_length: int | None
    """Longest document of packed rows; None where a row never holds two documents."""
    run_dir: Path
    resumed: bool
    """Whether the run goes on from a checkpoint."""
    blocks: Callable[[], Iterator[Block]]
    """Every document of the data, once; for what is asked before the first step."""
    say: Callable[[str], None]
    """A line to whoever watches."""


class SecondModel(Config):
    """Which model that is."""

    def provides(self) -> frozenset[str]:
        """What losses may ask of it: names of columns, and `full_kl` for its whole distribution."""
        raise AssertionError(f"{type(self).__name__} does not say what it provides")

    def agree(self, student: Student, losses: Sequence[Loss]) -> str:
        """Proves from configurations, tokenizers and manifests alone that it can serve; a line that says what it is.

        Raises:
            ModelError: it is not there, or does not speak the student's tokens.
            DataError: the cache is another's, or corrupt.
        """
        raise AssertionError(f"{type(self).__name__} cannot be compared")

    def open(self, model: PolicyModel, around: Surroundings) -> Second:
        """The frozen model, beside the policy's own `model`, which has not moved yet.

        Raises:
            ModelError: it cannot be loaded, or does not speak the policy's tokens.
            DataError: what it said once cannot be read, or is of other data.
        """
        raise AssertionError(f"{type(self).__name__} cannot be opened")

    def beside(self, student: Student) -> ModelConfig | None:
        """The model that is in memory beside the policy's during the run; None: none is."""
        return None

    def kept(self) -> Answers | None:
        """What it said about the data before the run; None where it is asked by the run.

        Raises:
            DataError: it cannot be read.
        """
        return None


class Reference(SecondModel):
    """What a preference loss measures the policy against."""

    path: Annotated[str, MinLen(1)] | Literal["initial"] = "initial"
    """`initial`: the model as it is before the first step: the same weights with the adapter off where one is trained,
    else a frozen copy. Or another model: a hub id or a folder."""
    revision: str = "main"
    """Commit hash, branch or tag on the hub, of another model."""
    precompute: bool = False
    """Ask it for the whole data once, before the first step, and keep its answers in the run folder: no second model in
    memory during the run."""

    def provides(self) -> frozenset[str]:
        return frozenset({"ref_logprobs"} if self.precompute else {"ref_logprobs", "kto_kl", "full_kl"})

    def agree(self, student: Student, losses: Sequence[Loss]) -> str:
        from burnish.policy.agreement import agree

        once = ", asked before the first step" if self.precompute else ""
        if self.path != "initial":
            return agree(student, self.path, self.revision) + once
        if student.only_the_adapter_trains:
            return f"the same weights with the adapter off{once}"
        adapter = student.config.adapter
        if adapter is not None and adapter.load_arguments(student.config.dtype):
            raise ModelError(
                "rows of new tokens train beside the adapter, so the reference would be a copy, and not of the rounded "
                "weights that the policy begins with",
                where="workflow.reference",
                cure="train the new tokens first, and prefer with the model that was exported",
            )
        return f"a frozen copy of {student.config.name}{once}"

    def beside(self, student: Student) -> ModelConfig | None:
        return None if self.precompute else self._other(student)

    def open(self, model: PolicyModel, around: Surroundings) -> Second:
        from burnish.policy.answers import Answers
        from burnish.policy.asking import answer_all
        from burnish.policy.frozen import Frozen, load_frozen
        from burnish.policy.mismatch import WithMismatched

        mesh, rows = around.mesh, around.micro_batch_size

        def ask() -> Frozen:
            other = self._other(around.student)
            if other is None:
                return Frozen(model, mesh, rows, adapter=model.adapter)
            return Frozen(load_frozen(other, around), mesh, rows)

        if not self.precompute:
            return WithMismatched(ask(), model, mesh, rows)
        folder, of = around.run_dir / "reference", around.student.facts() | self.model_dump(mode="json")
        # Before its first checkpoint nothing holds a run to its data and model: what it asked then is asked again.
        if not mesh.from_first(around.resumed and Answers.are_of(folder, of)):
            around.say(f"the reference is asked about all rows once, for {folder}")
            around.say(f"asked: {answer_all(ask(), around, {'ref_logprobs'}, folder, of)}")
        return Answers.open(folder, cure=f"remove {folder}: the reference is then asked again at the next start")

    def _other(self, student: Student) -> ModelConfig | None:
        """What is loaded; None: the policy's own model with its adapter off."""
        from burnish.policy.agreement import second_config

        if self.path == "initial" and student.only_the_adapter_trains:
            return None
        return second_config(student, None if self.path == "initial" else self.path, self.revision)


class Teacher(SecondModel):
    """Whose distribution is learned."""

    path: str | None = None
    """A hub id or a folder. Without `cache`, the teacher answers during the run."""
    revision: str = "main"
    """Commit hash, branch or tag on the hub."""
    cache: str | None = None
    """A folder with the teacher's likeliest tokens for the whole data, which `burnish cache-teacher` writes and the run
    reads: no teacher in memory during the run."""
    top_k: Annotated[int, Ge(1)] = 64
    """Tokens of the teacher's distribution that are kept, for losses on its likeliest tokens."""

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if self.path is None and self.cache is None:
            raise ValueError("a teacher is named by `path`, or by the `cache` of what it said")
        return self

    def provides(self) -> frozenset[str]:
        return TOP_K if self.cache is not None else TOP_K | {"teacher_hidden", "full_kl"}

    def agree(self, student: Student, losses: Sequence[Loss]) -> str:
        from burnish.policy.agreement import agree, agree_cache

        if self.cache is not None:
            return agree_cache(student, Path(self.cache), self.top_k, self.path, self.revision)
        assert self.path is not None
        return agree(student, self.path, self.revision, top_k=self.top_k, losses=losses)

    def open(self, model: PolicyModel, around: Surroundings) -> Second:
        return self.kept() or self._ask(around)

    def beside(self, student: Student) -> ModelConfig | None:
        from burnish.policy.agreement import second_config

        return second_config(student, self.path, self.revision) if self.cache is None else None

    def kept(self) -> Answers | None:
        from burnish.policy.answers import Answers

        if self.cache is None:
            return None
        return Answers.open(Path(self.cache), cure="write it again from this data: `burnish cache-teacher RECIPE`")

    def write_cache(self, around: Surroundings) -> str:
        """Asks the teacher for the whole data and writes `cache`; a line about what was written.

        Raises:
            ModelError: no `path` or no `cache`, or the teacher cannot be loaded.
        """
        from burnish.policy.agreement import agree, teacher_facts
        from burnish.policy.asking import answer_all

        if self.path is None or self.cache is None:
            raise ModelError(
                "a cache needs both a teacher and a place",
                where="workflow.teacher",
                cure="give `path`, who is asked, and `cache`, the folder to write",
            )
        agree(around.student, self.path, self.revision, top_k=self.top_k)
        of = teacher_facts(around.student, self.path, self.revision, self.top_k)
        return answer_all(self._ask(around), around, TOP_K, Path(self.cache), of)

    def _ask(self, around: Surroundings) -> Frozen:
        from burnish.policy.agreement import second_config
        from burnish.policy.frozen import Frozen, load_frozen

        assert self.path is not None
        model = load_frozen(second_config(around.student, self.path, self.revision), around)
        return Frozen(model, around.mesh, around.micro_batch_size, top_k=self.top_k)
