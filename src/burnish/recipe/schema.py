"""The recipe's fields. Imports nothing heavy: a recipe is read and refused without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, MinLen
from pydantic import ConfigDict, field_validator

from burnish.component import Config, Free, OneOf, differences, fixed_view
from burnish.data.config import DataConfig
from burnish.launch.base import Launch
from burnish.mesh_config import MeshConfig
from burnish.model.config import ModelConfig
from burnish.policy.optimizers.base import Optimizer
from burnish.schedules.base import Schedule
from burnish.track.base import Tracker
from burnish.types import RowFormat, RowKind
from burnish.workflows.anomaly import Anomaly
from burnish.workflows.base import Workflow

WORKFLOWS = OneOf("burnish.workflows", default="sft")
OPTIMIZERS = OneOf("burnish.policy.optimizers", default="adamw")
SCHEDULES = OneOf("burnish.schedules", default="constant")
TRACKERS = OneOf("burnish.track")
LAUNCHES = OneOf("burnish.launch", default="local")

AUTO_FIXED = (("model", "dtype"), ("model", "activation_checkpointing"))
"""Fixed keys that can be `auto`; `mesh` and `checkpoint.save_every` can be too, and are free."""

STORES = ("s3", "gs", "az", "file")
"""What `checkpoint.store` may begin with."""


class Checkpoint(Config):
    """What is kept on disk to resume from."""

    save_every: Annotated[int, Ge(1)] | Literal["auto"] = 100
    """Steps between checkpoints; there is always one at the end, and when a run is stopped. `auto`: the interval that
    loses least, from the measured time of a save and of a step and from `mean_hours_between_failures`."""
    mean_hours_between_failures: Annotated[float, Gt(0)] | None = None
    """Of the whole run, all its devices together, for `save_every: auto`: 50,000 divided by the number of GPUs, say."""
    keep: Annotated[int, Ge(1)] = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    store: str | None = None
    """Where checkpoints go instead of the run folder, one prefix a run: `s3://bucket/runs/7b`, `gs://...`, `az://...`.
    Credentials come from the environment."""

    @field_validator("store")
    @classmethod
    def _store_without_secrets(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "s3://bucket/prefix")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("the url of a store holds no user, password or key: those belong in the environment")
        if parts.scheme not in STORES:
            raise ValueError(f"a store is one of {', '.join(f'{scheme}://' for scheme in STORES)}")
        if not parts.path.strip("/") or (not parts.netloc) != (parts.scheme == "file"):
            raise ValueError("a store is a bucket and a prefix of this run's own: s3://bucket/runs/7b")
        return url


class Chosen(Config):
    """What `auto` stood for when the run began."""

    world_size: Annotated[int, Ge(1)]
    """Ranks that `mesh` was chosen for."""
    reasons: dict[str, str]
    """Why each key that was `auto` has the value that this file gives it."""


def _mark_fixed(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.setdefault("resume", "fixed")


class Recipe(Config):
    """Everything a run depends on.

    In the JSON Schema, `resume` says whether a run that is resumed may have another value; what stands inside a block
    is as the block, unless it is marked `free` itself.
    """

    model_config = ConfigDict(json_schema_extra=_mark_fixed)

    workflow: Annotated[Workflow, WORKFLOWS] = WORKFLOWS.field(Workflow)
    """What is done with model and data."""
    model: ModelConfig
    """Which model, and what is done to it before training."""
    data: DataConfig
    """From files to packed rows."""
    optimizer: Annotated[Optimizer, OPTIMIZERS] = OPTIMIZERS.field(Optimizer)
    """How gradients become updates."""
    schedule: Annotated[Schedule, SCHEDULES] = SCHEDULES.field(Schedule)
    """Factor on the learning rate over the run."""
    max_grad_norm: Annotated[float, Gt(0)] | None = 1.0
    """The gradient is scaled down to this norm if it is longer; null: never."""
    global_batch_size: Annotated[int, Ge(1)] = 8
    """Packed rows a step, over all ranks; of workflows that train on their own rollouts, prompts a step."""
    micro_batch_size: Annotated[int, Ge(1)] = 1
    """Packed rows a rank computes at once; the gradient does not depend on it, memory does."""
    num_steps: Annotated[int, Ge(1)] | None = None
    """Length of the run in steps. This or `num_epochs`."""
    num_epochs: Annotated[int, Ge(1)] | None = None
    """Length of the run in passes over the training data. This or `num_steps`."""
    eval_every: Annotated[int | None, Ge(1), Free()] = None
    """Steps between evaluations on `data.eval`; absent: only before the first step and after the last."""
    stop_after: Annotated[int | None, Ge(1), Free()] = None
    """Pause after this step with a checkpoint and exit code 75; the same command without it goes on."""
    anomaly: Annotated[Anomaly, Free()] = Anomaly()
    """What becomes of a step whose loss or gradient is wrong."""
    checkpoint: Annotated[Checkpoint, Free()] = Checkpoint()
    """What is kept on disk to resume from."""
    track: Annotated[list[Annotated[Tracker, TRACKERS]], Free()] = []
    """Where metrics go besides the run folder's `metrics.jsonl`."""
    launch: Annotated[Launch, LAUNCHES, Free()] = LAUNCHES.field(Launch)
    """Where the run takes place."""
    mesh: Annotated[MeshConfig | Literal["auto"], Free()] = MeshConfig()
    """How the ranks share model, rows and tokens. `auto`: as few ranks to a row as the memory of a device and the rows
    of a step allow, chosen anew when a run goes on with another number of ranks."""
    determinism: Literal["fixed", "elastic"] = "fixed"
    """`fixed`: the same bits on the same number of ranks, and the same to rounding on another. `elastic`: the same bits
    on any power of two, by a fixed order of every sum; on a CPU with one thread a rank."""
    seed: int = 0
    """Of the data order, dropout and new weights."""
    run_dir: Annotated[str, MinLen(1), Free()]
    """Folder of the run: recipe, metrics, checkpoints, export. The same folder resumes the run."""
    chosen: Annotated[Chosen | None, Free()] = None
    """Written by Burnish into the run's `recipe.json`, where the recipe said `auto`; not for a recipe."""

    def row_format(self) -> RowFormat:
        """What every row of the data must be, for the losses of the workflow and the heads of the model."""
        losses, heads = self.workflow.losses(), self.model.head.parts()
        kinds: list[RowKind] = [loss.rows for loss in losses if loss.rows != "conversation"]
        columns = {column: head for loss in losses for column, head in loss.labels().items()}
        names = {column: heads[head].classes() for column, head in columns.items() if head in heads}
        return RowFormat(kinds[0] if kinds else "conversation", names)

    def resolved(self) -> dict[str, Any]:
        """Plain JSON data of every field, defaults included; `Recipe.model_validate` of it equals this recipe."""
        return self.model_dump(mode="json")

    def changed_fixed_fields(self, saved: Mapping[str, Any]) -> list[str]:
        """Lines like `data.max_length: 512 -> 1024` for what a resume of the run with recipe `saved` may not change.

        `auto` is whatever was chosen for it when the run began.
        """
        now = self.resolved()
        for block, key in AUTO_FIXED:
            if "auto" in (now[block][key], saved.get(block, {}).get(key)):
                now[block][key] = saved.get(block, {}).get(key, "auto")
        return differences(fixed_view(self, saved), fixed_view(self, now))
