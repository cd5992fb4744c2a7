"""Running a recipe in this process.

The one place where the parts of a run are built and handed to its workflow, in the order that refuses bad input before
anything large is allocated: run folder, tokenizer, renderer, files, then the model.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from burnish.errors import EXIT_DONE, ResumeError, UserError
from burnish.launch.base import Launch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from burnish.data.renderers.base import LiveRenderer
    from burnish.launch.console import Console
    from burnish.launch.metrics_file import MetricsFile
    from burnish.launch.run_folder import RunFolder
    from burnish.launch.signals import StopSignals
    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.agreement import Student
    from burnish.policy.policy import Policy
    from burnish.policy.second import Surroundings
    from burnish.recipe import Recipe
    from burnish.track.base import LiveTracker
    from burnish.types import Group, NewTokens
    from burnish.workflows.base import Run


class Local(Launch):
    """This process; on the GPU if there is one."""

    type: Literal["local"] = "local"

    def run(self, recipe: Recipe, *, json_lines: bool = False) -> int:
        """Trains to the end and exports; see `errors.py` for what else can happen."""
        from burnish.launch.console import Console
        from burnish.launch.run_folder import open_run_folder
        from burnish.launch.second import student_of
        from burnish.launch.signals import StopSignals
        from burnish.model.fresh import for_tokenizer
        from burnish.model.load import require_embeddings
        from burnish.model.positions import require_positions

        refuse_many_ranks()
        with ExitStack() as stack:
            folder = stack.enter_context(open_run_folder(Path(recipe.run_dir)))
            refuse_changes(folder, recipe)
            stop = stack.enter_context(StopSignals())
            console = Console(recipe.num_steps, json_lines=json_lines)
            stack.callback(console.close)
            texts = open_texts(recipe)
            tokenizer, renderer, _ = texts
            recipe = recipe.model_copy(update={"model": for_tokenizer(recipe.model, tokenizer)})
            student = student_of(recipe, texts)
            folder.hold_tokens(student.facts())
            require_positions(student.config, student.hf_config, student.max_length)
            require_embeddings(student.vocab_size, tokenizer, renderer.chat_template)
            if (second := recipe.workflow.second()) is not None:
                console.note(f"compared with {second.agree(student, recipe.workflow.losses())}")
            run = build(recipe, folder, renderer, student, console, stop, stack)
            before = run.step
            recipe.workflow.run(run)
            if run.step == before:
                console.note(f"this run was finished after step {run.step}; its model is in {folder.path / 'model'}")
            if run.step > before or not (folder.path / "model").exists():
                console.note(export_run(recipe, run.policy, tokenizer, renderer.chat_template, folder.path / "model"))
        return EXIT_DONE


class Texts(NamedTuple):
    """All that is needed to see a recipe's rows as the model will."""

    tokenizer: PreTrainedTokenizerBase
    renderer: LiveRenderer
    new_tokens: NewTokens | None
    """What the recipe adds to the model's vocabulary."""


def open_texts(recipe: Recipe) -> Texts:
    """Tokenizer, with the recipe's own tokens, and renderer. Raises UserError."""
    tokenizer = recipe.data.tokenizer.open(recipe.model.path, recipe.model.revision)
    new_tokens = recipe.data.tokenizer.extend(tokenizer)
    return Texts(tokenizer, recipe.data.renderer.open(tokenizer, recipe.row_format()), new_tokens)


def build(
    recipe: Recipe,
    folder: RunFolder,
    renderer: LiveRenderer,
    student: Student,
    console: Console,
    stop: StopSignals,
    stack: ExitStack,
) -> Run:
    """The run as it stands in its folder; `stack` closes what was opened.

    Raises:
        UserError: any part of the recipe that turns out to be impossible.
    """
    import torch

    from burnish.data.one_sided import refuse_one_sided
    from burnish.data.stream import eval_blocks, open_stream
    from burnish.launch.metrics_file import MetricsFile
    from burnish.launch.second import surroundings
    from burnish.mesh import open_mesh
    from burnish.policy.checkpoint import Checkpointer
    from burnish.policy.throughput import Throughput, peak_flops
    from burnish.workflows.base import Cadence, Run

    refuse_one_sided(recipe.data, recipe.row_format())

    def accept(group: Group) -> None:
        if policy.second is not None:  # it is opened below, and the stream renders nothing before the first step
            policy.second.require(group)

    stream = open_stream(recipe.data, renderer, seed=recipe.seed, num_epochs=recipe.num_epochs, accept=accept)
    stack.callback(stream.close)
    for source in recipe.data.eval:
        source.open()  # a missing file is refused now, not at the first evaluation
    mesh = stack.enter_context(open_mesh())
    resumed = folder.recipe() is not None
    around = surroundings(
        recipe, student, renderer, mesh, resumed=resumed, say=console.note, stop_requested=stop.requested
    )
    policy = open_policy(recipe, mesh, around)
    checkpointer = Checkpointer(folder.path, keep=recipe.checkpoint.keep)
    checkpointer.overlap(policy.optimizer)
    stack.callback(checkpointer.close)
    metrics = MetricsFile(folder.path / "metrics.jsonl")
    stack.callback(metrics.close)
    journal = FolderJournal(folder, metrics, console, [])
    run = Run(
        policy=policy,
        stream=stream,
        held_out=(lambda: eval_blocks(recipe.data, renderer, accept=accept)) if recipe.data.eval else None,
        schedule=recipe.schedule,
        learning_rate=recipe.optimizer.learning_rate,
        blocks_per_step=recipe.global_batch_size // mesh.world_size,
        cadence=Cadence(recipe.num_steps, recipe.eval_every, recipe.checkpoint.save_every, recipe.stop_after),
        checkpointer=checkpointer,
        journal=journal,
        throughput=Throughput(policy.model, policy.second),
        peak_flops=peak_flops(mesh.device, getattr(torch, recipe.model.dtype)),
        stop_requested=stop.requested,
    )
    if run.throughput.obstacle is not None:
        console.note(f"mfu is not reported: {run.throughput.obstacle}")
    restore(run)
    metrics.cut(run.step)
    for tracker in recipe.track:
        journal.trackers.append(tracker.open(folder.path, run.step, recipe.resolved()))
        stack.callback(journal.trackers[-1].close)
    return run


def open_policy(recipe: Recipe, mesh: Mesh, around: Surroundings) -> Policy:
    """The model with its optimizer, and what it is compared with, as the recipe says.

    Raises:
        ModelError: it cannot be loaded, or its documents would see each other in packed rows; also of a second model.
        DataError: what a second model said once cannot be read, or a row it is asked about is refused.
    """
    import torch

    from burnish.model.load import load_model, require_packable
    from burnish.policy.policy import Policy

    model = load_model(recipe.model, mesh, seed=recipe.seed, new_tokens=around.student.new_tokens)
    if around.packed_length is not None:
        require_packable(model, around.packed_length)
    second = recipe.workflow.second()
    opened = None if second is None else second.open(model, around)
    optimizer = recipe.optimizer.open(model.trainable_parameters())
    torch.manual_seed(recipe.seed)  # dropout; everything else draws from generators of its own
    return Policy(
        model,
        optimizer,
        mesh=mesh,
        micro_batch_size=recipe.micro_batch_size,
        max_grad_norm=recipe.max_grad_norm,
        second=opened,
    )


def refuse_many_ranks() -> None:
    """Raises UserError under torchrun with several ranks: each would train the same rows and write the same folder."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UserError(
            f"a run is one process for now, and this is one of {ranks}",
            where="WORLD_SIZE",
            cure="start it without torchrun; CUDA_VISIBLE_DEVICES chooses its GPU",
        )


def refuse_changes(folder: RunFolder, recipe: Recipe) -> None:
    """Compares with the recipe this run was started with, then writes the one it goes on with.

    Raises:
        ResumeError: a field that would change the losses differs.
    """
    saved = folder.recipe()
    changed = recipe.changed_fixed_fields(saved) if saved is not None else []
    if changed:
        raise ResumeError(
            "this run was started with another recipe:" + "".join(f"\n    {line}" for line in changed),
            where=str(folder.path),
            cure="undo the change to go on with this run, or give another run_dir to start a new one",
        )
    folder.write_recipe(recipe.resolved())


def restore(run: Run) -> None:
    """Continues from the newest intact checkpoint, if there is one, and says which were passed over."""
    loaded = run.checkpointer.load_latest()
    if loaded is None:
        return
    for reason in loaded.rejected:
        run.journal.event("checkpoint_rejected", reason=reason)
    run.load(loaded.tensors, loaded.state)
    run.journal.event("resumed", step=run.step, checkpoint=loaded.path.name)


def export_run(recipe: Recipe, policy: Policy, tokenizer: Any, chat_template: str | None, to: Path) -> str:
    """Writes the run's `model/`, the adapter where one was trained, else the whole model; returns a line about it."""
    from burnish.model.export import export

    mark_steps(recipe, policy.model)
    exported = export(
        policy.model,
        tokenizer,
        to,
        merge=False,
        base_path=recipe.model.name,
        base_revision=recipe.model.revision,
        chat_template=chat_template,
    )
    return f"exported to {to}, {exported}"


def mark_steps(recipe: Recipe, model: PolicyModel) -> None:
    """Has the export's config.json say `grades_steps` where the head was trained at the ends of steps and nowhere else:
    as a reward it would be read at the end of the answer."""
    if recipe.row_format().kind == "stepwise":
        model.hf_config.grades_steps = True


class FolderJournal:
    """Everything a run says, to its folder, its trackers and the screen."""

    def __init__(self, folder: RunFolder, metrics: MetricsFile, console: Console, trackers: list[LiveTracker]) -> None:
        self.folder, self.metrics, self.console, self.trackers = folder, metrics, console, trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished step, to every place that shows metrics."""
        self.metrics.write(step, metrics)
        self.console.step(step, metrics)
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def event(self, kind: str, **facts: Any) -> None:
        """Something that is not a metric; a person sees it unless all went as planned."""
        self.folder.event(kind, **facts)
        if kind == "refused":  # the reason and its cure are the last thing that the command says
            still = "the data must keep their number of rows: mend a bad one in place"
            self.console.note(f"refused after step {facts['step']}, {facts['checkpoint']} is saved; {still}")
        elif kind != "checkpoint_saved":
            self.console.note(f"{kind}: " + ", ".join(f"{name}={value}" for name, value in facts.items()))

    def ledger(self, totals: Mapping[str, Any]) -> None:
        """Where every token went so far."""
        self.folder.write_ledger(totals)
