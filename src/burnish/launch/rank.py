"""One rank of a run: joins the others, builds what the workflow is handed, runs it to its end and exports.

The one place where the parts of a run are built, in the order that refuses bad input before anything large is
allocated: run folder, tokenizer, renderer, files, then the model. Rank 0 alone owns the run folder and speaks; what one
rank refuses, all refuse. It must not know who started the ranks: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the
environment say all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.component import differences
from burnish.errors import EXIT_DONE, RefusedElsewhere, ResumeError, RunFailed, UserError

if TYPE_CHECKING:
    from burnish.data.stream import Stream
    from burnish.launch.journal import FolderJournal, SilentJournal
    from burnish.launch.run_folder import RunFolder
    from burnish.launch.texts import Texts
    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel
    from burnish.policy.agreement import Student
    from burnish.policy.policy import Policy
    from burnish.policy.second import Surroundings
    from burnish.recipe import Recipe
    from burnish.types import Block, Group
    from burnish.workflows.run import Run


def run_rank(recipe: Recipe, *, json_lines: bool = False, beat: Callable[[str], None] = lambda _: None) -> int:
    """Trains to the end and exports; see `errors.py` for what else can happen.

    Args:
        json_lines: the screen speaks one JSON object a line.
        beat: called with a few words at every sign of progress: `step 12`.
    """
    from burnish.launch.choose import choose_here
    from burnish.launch.signals import StopSignals
    from burnish.mesh import open_mesh

    beat("start")
    recipe, reasons = choose_here(recipe)
    assert recipe.mesh != "auto", "a chosen recipe says how its ranks stand"
    phase = "start"

    def begin(text: str) -> None:
        nonlocal phase
        phase = text
        beat(text)

    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals(silent=os.environ.get("RANK", "0") != "0"))
        mesh = stack.enter_context(open_mesh(config=recipe.mesh, alive=lambda: beat(phase)))
        return _Rank(recipe, mesh, stop.requested, begin, stack).run(json_lines, reasons)


class _Rank:
    """What the phases of `run_rank` share."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        stop_requested: Callable[[], str | None],
        beat: Callable[[str], None],
        stack: ExitStack,
    ) -> None:
        self.recipe, self.mesh, self.stack = recipe, mesh, stack
        self.stop_requested, self.beat = stop_requested, beat
        self.folder: RunFolder | None = None
        self.journal: FolderJournal | SilentJournal

    def run(self, json_lines: bool, reasons: list[str]) -> int:
        with refused_together(self.mesh):
            self.open_folder(json_lines)
        with refused_together(self.mesh):  # by itself: inside are exchanges, which a rank that refused would miss
            self.verify_choice()
        for reason in reasons:
            self.journal.note(reason)
        resumed = self.mesh.from_first(self.folder is not None and self.folder.recipe() is not None)
        with refused_together(self.mesh):
            texts, student = self.open_texts()
        run = self.build(texts, student, resumed)
        before, model = run.step, Path(self.recipe.run_dir) / "model"
        self.recipe.workflow.run(run)
        if run.step == before:
            self.journal.note(f"this run was finished after step {run.step}; its model is in {model}")
        if self.recipe.workflow.exports and self.mesh.from_first(run.step > before or not model.exists()):
            self.beat("export")
            self.journal.note(export_run(self.recipe, run.policy, texts, model))
        return EXIT_DONE

    def open_folder(self, json_lines: bool) -> None:
        """Owns the run folder, on rank 0; a recipe that would change the run's losses is refused."""
        from burnish.launch.console import Console
        from burnish.launch.journal import FolderJournal, SilentJournal
        from burnish.launch.metrics_file import MetricsFile
        from burnish.launch.run_folder import open_run_folder
        from burnish.launch.stored_run import claim_store, find_stored_run, place_of, refuse_moved

        store = self.recipe.checkpoint.store
        self.place = place_of(store, Path(self.recipe.run_dir))
        if self.mesh.rank > 0:
            self.journal = SilentJournal()
            return
        self.folder = self.stack.enter_context(open_run_folder(Path(self.recipe.run_dir)))
        stored = None
        if not isinstance(self.place, Path):
            claim_store(self.place, self.folder.path)
            self.stack.callback(self.place.release)
            stored = find_stored_run(self.place)
            self.folder.look_elsewhere(None if stored is None else stored.recipe())
        refuse_moved(self.folder.path, store, stored)
        refuse_changes(self.folder, self.recipe)
        if stored is not None:
            stored.restore(self.folder.path)
        console = Console(self.recipe.num_steps, json_lines=json_lines)
        self.stack.callback(console.close)
        metrics = MetricsFile(self.folder.path / "metrics.jsonl")
        self.stack.callback(metrics.close)
        self.journal = FolderJournal(self.folder, metrics, console)

    def open_texts(self) -> tuple[Texts, Student]:
        """Tokenizer, renderer, and the policy's facts, proved to fit each other."""
        from burnish.launch.second import student_of
        from burnish.launch.texts import open_texts
        from burnish.model.fresh import for_tokenizer
        from burnish.model.load import require_embeddings
        from burnish.model.positions import require_positions

        texts = open_texts(self.recipe)
        self.recipe = self.recipe.model_copy(update={"model": for_tokenizer(self.recipe.model, texts.tokenizer)})
        student = student_of(self.recipe, texts)
        if self.folder is not None:
            self.folder.hold_tokens(student.facts())
        require_positions(student.config, student.hf_config, student.max_length)
        require_embeddings(student.vocab_size, texts.tokenizer, texts.renderer.chat_template)
        if (second := self.recipe.workflow.second()) is not None:
            self.journal.note(f"compared with {second.agree(student, self.recipe.workflow.losses())}")
        return texts, student

    def build(self, texts: Texts, student: Student, resumed: bool) -> Run:
        """The run as it stands in its folder. Raises UserError: a part of the recipe that turns out impossible."""
        import torch

        from burnish.launch.rollouts import on_policy, open_judges, open_prompts, open_rollouts
        from burnish.launch.second import surroundings
        from burnish.policy.checkpoint import Checkpointer
        from burnish.policy.throughput import Throughput, peak_flops
        from burnish.workflows.anomaly import Anomalies
        from burnish.workflows.run import Cadence, Run
        from burnish.workflows.stragglers import Lookout, device_probe

        recipe, mesh = self.recipe, self.mesh
        elastic, every = recipe.determinism == "elastic", recipe.checkpoint.save_every
        if elastic and mesh.device.type == "cpu":
            torch.set_num_threads(1)  # a matrix product's sums are cut differently for another number of threads

        def accept(group: Group) -> None:
            if policy.second is not None:  # it is opened below, and the stream renders nothing before the first step
                policy.second.require(group)

        workflow = on_policy(recipe)
        if workflow is not None:
            self.journal.keep_rollouts = workflow.rollout.keep == "all"
        with refused_together(mesh):
            prompts = None if workflow is None else open_prompts(recipe, texts)
            stream = self.open_rows(texts, accept) if prompts is None else None
            judges = None if workflow is None or mesh.rank else open_judges(recipe, self.stack, self.journal.event)
            for source in recipe.data.eval:
                source.open()  # a missing file is refused now, not at the first evaluation
        around = surroundings(
            recipe,
            student,
            texts.renderer,
            mesh,
            resumed=resumed,
            say=self.journal.note,
            stop_requested=self.asked_to_stop,
        )
        # Not refused together: others would wait in a collective of the loading, and a rank that ends breaks it.
        policy = open_policy(recipe, mesh, around)
        peak = peak_flops(mesh.device, getattr(torch, recipe.model.dtype))  # before engines start, which take the cores
        if prompts is not None:
            with refused_together(mesh):
                stream = open_rollouts(
                    recipe, policy, prompts, texts, student, judges, self.stack, self.journal.event, self.stop_requested
                )
        assert stream is not None
        checkpointer = Checkpointer(self.place, keep=recipe.checkpoint.keep, mesh=mesh)
        checkpointer.overlap(policy.optimizer)
        self.stack.callback(checkpointer.close)
        run = Run(
            policy=policy,
            stream=stream,
            held_out=self.held_out(texts, accept) if recipe.data.eval else None,
            schedule=recipe.schedule,
            learning_rate=recipe.optimizer.learning_rate,
            blocks_per_step=recipe.global_batch_size // (mesh.sizes.data if workflow is None else 1),
            cadence=Cadence(recipe.num_steps, recipe.eval_every, None if every == "auto" else every, recipe.stop_after),
            checkpointer=checkpointer,
            journal=self.journal,
            throughput=Throughput(policy.model, policy.second),
            peak_flops=peak,
            stop_requested=self.stop_requested,
            beat=self.beat,
            anomalies=Anomalies(recipe.anomaly),
            choose_interval=self.choose_interval,
            lookout=Lookout(mesh, device_probe(mesh.device)),
        )
        if run.throughput.obstacle is not None:
            self.journal.note(f"mfu is not reported: {run.throughput.obstacle}")
        listed = {} if self.folder is None else self.folder.rollbacks()
        run.anomalies.expect(self.mesh.from_first(listed))
        if run.restore():
            self.journal.event("resumed", step=run.step, checkpoint=f"checkpoint-{run.step}", ranks=mesh.world_size)
        else:
            self.journal.event("begun", step=0, ranks=mesh.world_size)
        with refused_together(mesh):
            self.open_trackers(run.step)
        return run

    def open_rows(self, texts: Texts, accept: Callable[[Group], None]) -> Stream:
        """Packed rows of the training data."""
        from burnish.data.one_sided import refuse_one_sided
        from burnish.data.stream import open_stream

        recipe, mesh = self.recipe, self.mesh
        refuse_one_sided(recipe.data, recipe.row_format())
        stream = open_stream(
            recipe.data,
            texts.renderer,
            seed=recipe.seed,
            num_epochs=recipe.num_epochs,
            rank=mesh.data_rank,
            world_size=mesh.sizes.data,
            together=recipe.micro_batch_size if recipe.determinism == "elastic" else 1,
            accept=accept,
        )
        self.stack.callback(stream.close)
        return stream

    def held_out(self, texts: Texts, accept: Callable[[Group], None]) -> Callable[[], Iterable[Block]]:
        """Packed rows of the held-out data; none for a workflow that asks about them by itself."""
        from burnish.data.once import eval_blocks
        from burnish.launch.rollouts import on_policy

        if on_policy(self.recipe) is not None:
            return lambda: ()
        return lambda: eval_blocks(self.recipe.data, texts.renderer, accept=accept)

    def open_trackers(self, step: int) -> None:
        """Metrics go on behind `step`."""
        from burnish.launch.journal import FolderJournal

        if not isinstance(self.journal, FolderJournal) or self.folder is None:
            return
        self.journal.metrics.cut(step)
        self.folder.cut_rollouts(step)
        for tracker in self.recipe.track:
            self.journal.trackers.append(tracker.open(self.folder.path, step, self.recipe.resolved()))
            self.stack.callback(self.journal.trackers[-1].close)

    def verify_choice(self) -> None:
        """Refuses to go on where ranks have chosen differently for `auto`: unlike devices, or unlike run folders."""
        mine = self.recipe.resolved()
        choice = {"model": mine["model"], "mesh": mine["mesh"]}
        others = differences(self.mesh.from_first(choice), choice)
        if others:
            reason = f"rank {self.mesh.rank} chose otherwise than rank 0 for `auto`: {', '.join(others)}"
            raise UserError(reason, where="chosen", cure="write the values of rank 0 into the recipe")

    def choose_interval(self, save_seconds: float, step_seconds: float) -> int:
        """Steps between checkpoints, kept in `recipe.json` from now on."""
        from burnish.launch.choose import with_save_every
        from burnish.policy.checkpoint.interval import save_interval_steps

        hours = self.recipe.checkpoint.mean_hours_between_failures
        assert hours is not None, "`save_every: auto` was accepted without a failure rate"
        steps = save_interval_steps(save_seconds, step_seconds, hours * 3600)
        reason = (
            f"a save takes {save_seconds:.3g} s, a step {step_seconds:.3g} s, a failure comes every {hours:g} hours"
        )
        self.recipe = with_save_every(self.recipe, steps, reason)
        if self.folder is not None:
            with suppress(OSError):  # a full disk: another start times it again
                self.folder.write_recipe(self.recipe.resolved())
        self.journal.note(f"checkpoint.save_every: {steps}, {reason}")
        return steps

    def asked_to_stop(self) -> str | None:
        """Name of the signal that came to any rank; every rank must ask. Called for every row that a second model is
        asked about before the first step."""
        self.beat("start")
        return next((name for name in self.mesh.gather(self.stop_requested()) if name is not None), None)


@contextmanager
def refused_together(mesh: Mesh) -> Iterator[None]:
    """What one rank refuses inside the block, all refuse: it with its own error, the others with RefusedElsewhere."""
    refusal = None
    try:
        yield
    except (UserError, RunFailed, OSError) as error:
        refusal = error
    refused = mesh.gather(refusal is not None)
    if any(refused):
        raise refusal or RefusedElsewhere(refused.index(True))


def open_policy(recipe: Recipe, mesh: Mesh, around: Surroundings) -> Policy:
    """The model with its optimizer, and what it is compared with, as the recipe says.

    Raises:
        ModelError: it cannot be loaded, or its documents would see each other in packed rows; also of a second model.
        DataError: what a second model said once cannot be read, or a row it is asked about is refused.
    """
    from burnish.model.load import load_model, require_packable
    from burnish.policy.elastic import sum_in_tree
    from burnish.policy.policy import Policy

    elastic = recipe.determinism == "elastic"
    model = load_model(recipe.model, mesh, seed=recipe.seed, new_tokens=around.student.new_tokens)
    if around.packed_length is not None:
        require_packable(model, around.packed_length)
    if elastic:
        sum_in_tree(model)
    second = recipe.workflow.second()
    opened = None if second is None else second.open(model, around)
    return Policy(
        model,
        # Fused kernels treat the last few numbers of a tensor apart, and where a tensor ends depends on the ranks.
        recipe.optimizer.open(model.trainable_parameters(), fused=not elastic),
        mesh=mesh,
        micro_batch_size=recipe.micro_batch_size,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        elastic=elastic,
        second=opened,
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


def export_run(recipe: Recipe, policy: Policy, texts: Texts, to: Path) -> str:
    """Writes the run's `model/`, the adapter where one was trained, else the whole model; returns a line about it."""
    from burnish.model.export import export

    mark_steps(recipe, policy.model)
    exported = export(
        policy.model,
        texts.tokenizer,
        to,
        merge=False,
        base_path=recipe.model.name,
        base_revision=recipe.model.revision,
        chat_template=texts.renderer.chat_template,
    )
    return f"exported to {to}, {exported}"


def mark_steps(recipe: Recipe, model: PolicyModel) -> None:
    """Has the export's config.json say `grades_steps` where the head was trained at the ends of steps and nowhere else:
    as a reward it would be read at the end of the answer."""
    if recipe.row_format().kind == "stepwise":
        model.hf_config.grades_steps = True
