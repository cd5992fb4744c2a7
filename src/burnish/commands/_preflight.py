"""What `burnish check` looks at, stage by stage. A stage that cannot be entered without another's result is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.commands._advice import short_rows, small_step
from burnish.commands._finding import MAX_REFUSALS, Finding
from burnish.commands._rows import Seen, batches, is_table
from burnish.errors import UserError
from burnish.launch.run_folder import require_tokens, saved_recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from burnish.commands._at_scale import Stated
    from burnish.commands._on_policy import Asking
    from burnish.data.renderers.base import LiveRenderer
    from burnish.data.sources.base import RowShards, RowTable, Source
    from burnish.launch.choose import DeviceFacts
    from burnish.launch.texts import Texts
    from burnish.model.config import ModelConfig
    from burnish.model.plan import Plan, Work
    from burnish.policy.answers import Answers
    from burnish.recipe import Recipe
    from burnish.types import NewTokens


class Preflight:
    """A recipe whose schema is clean, on its way to a verdict."""

    def __init__(
        self,
        recipe: Recipe,
        num_rows: int | None,
        world_size: int = 1,
        device: DeviceFacts | None = None,
        stated: Stated | None = None,
    ) -> None:
        """
        Args:
            num_rows: how many rows of each source are rendered; None: all.
            world_size: ranks that it would run on.
            device: what each of them computes on; None: what this process would.
            stated: what is taken for granted of the checkpoints' store and of failures.
        """
        self.recipe, self.num_rows = recipe, num_rows
        self.world_size, self.stated = world_size, stated
        self._device, self._elsewhere = device, device is not None
        train = {f"data.train.{i}": source for i, source in enumerate(recipe.data.train)}
        self.sources: dict[str, Source] = train | {f"data.eval.{i}": s for i, s in enumerate(recipe.data.eval)}
        self.tables: dict[str, RowTable | RowShards] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.hf_config: PretrainedConfig | None = None
        self.new_tokens: NewTokens | None = None
        self.seen: dict[str, Seen] = {}
        self.resumes = False
        """Whether the run folder holds a run that would go on."""
        self.kept: Answers | None = None
        """What a teacher said about the data, where the recipe names a cache."""
        self.beside: ModelConfig | None = None
        """The second model in memory, if there is one."""
        self.asking: Asking | None = None
        """The part of a recipe that trains on what the policy says."""

    def findings(self) -> Iterator[Finding]:
        """Every line of the report, in the order of what it costs to find out."""
        yield from self.run_folder()
        yield from self.files()
        yield from self.choices()
        yield from self.model()
        yield from self.masks()
        yield from self.batches()
        yield from self.sizes()
        if self.asking is not None:
            yield from self.asking.rewards()

    def run_folder(self) -> Iterator[Finding]:
        """Whether the run folder is free, or holds a run that this recipe may go on with."""
        folder = Path(self.recipe.run_dir)
        try:
            saved = saved_recipe(folder)
        except UserError as error:
            yield Finding.refusal("run", error)
            return
        if saved is None:
            yield Finding("run", "ok", f"{folder}: a new run")
            return
        changed = self.recipe.changed_fixed_fields(saved)
        if changed:
            cure = "undo the change to go on with that run, or give another run_dir"
            yield Finding("run", "refused", f"{folder} holds a run of another recipe: {'; '.join(changed)}", cure)
        else:
            self.resumes = True
            yield Finding("run", "ok", f"{folder}: this run goes on where it was left")

    def files(self) -> Iterator[Finding]:
        """Whether every source opens."""
        for name, source in self.sources.items():
            try:
                table = source.open()
            except UserError as error:
                yield Finding.refusal("files", error, f"{name}: ")
                continue
            self.tables[name] = table
            size = f"{len(table):,} rows" if is_table(table) else f"{table.num_shards} shards, streamed"
            yield Finding("files", "ok", f"{name}: {getattr(source, 'path', source.type)}, {size}")

    @property
    def device(self) -> DeviceFacts:
        """What a rank computes on. Imports torch."""
        from burnish.launch.choose import device_facts

        self._device = self._device or device_facts(self.world_size)
        return self._device

    def choices(self) -> Iterator[Finding]:
        """What `auto` stands for. Where that cannot be told, the rest is looked at with the defaults."""
        from burnish.launch.choose import asks, choose, without_choice

        if not asks(self.recipe):
            return
        try:
            saved = saved_recipe(Path(self.recipe.run_dir))
            self.recipe, lines = choose(self.recipe, self.world_size, self.device, saved)
        except UserError as error:
            self.recipe = without_choice(self.recipe)
            yield Finding.refusal("auto", error)
            return
        for line in lines:
            yield Finding("auto", "ok", line)

    def model(self) -> Iterator[Finding]:
        """Whether model and tokenizer are there and agree."""
        from burnish.model.fresh import for_tokenizer
        from burnish.model.load import load_config

        model = self.recipe.model
        unusable: UserError | None = None
        try:
            tokenizer = self.recipe.data.tokenizer.open(model.path, model.revision)
            self.new_tokens = self.recipe.data.tokenizer.extend(tokenizer)
            self.tokenizer = tokenizer
            model = for_tokenizer(model, tokenizer)
        except UserError as error:
            unusable = error
        try:
            hf_config = self.hf_config = load_config(model)
            yield Finding("model", "ok", f"{model.name}: {hf_config.model_type}, {model.dtype}")
            yield from self._positions("model", model, hf_config)
        except UserError as error:
            yield Finding.refusal("model", error)
        if unusable is not None:
            yield Finding.refusal("tokenizer", unusable)
        if self.hf_config is None or self.tokenizer is None:
            return
        tokenizer = self.tokenizer
        rows = self.hf_config.get_text_config().vocab_size
        template = "a chat template" if tokenizer.chat_template else "no chat template"
        new = "" if self.new_tokens is None else f" ({len(self.new_tokens.sources):,} new)"
        yield Finding("tokenizer", "ok", f"{len(tokenizer):,} ids{new} in {rows:,} embedding rows, {template}")

    def _positions(self, stage: str, model: ModelConfig, hf_config: PretrainedConfig) -> Iterator[Finding]:
        """Whether a model was made for documents as long as these. Raises ModelError where it cannot read them."""
        from burnish.model.positions import require_positions, untrained_positions

        require_positions(model, hf_config, self.recipe.data.max_length)
        warning = untrained_positions(model, hf_config, self.recipe.data.max_length)
        if warning is not None:
            cure = "lower data.max_length, or let the model's rope_parameters scale the positions"
            yield Finding(stage, "warning", warning, cure)

    def masks(self) -> Iterator[Finding]:
        """Renders rows of every source: what is trained, what does not fit, what cannot be used."""
        from burnish.commands._on_policy import Asking
        from burnish.launch.rollouts import on_policy
        from burnish.launch.second import student_of
        from burnish.launch.texts import Texts
        from burnish.model.load import require_embeddings

        if self.tokenizer is None:
            return
        try:
            renderer = self.recipe.data.renderer.open(self.tokenizer, self.recipe.row_format())
        except UserError as error:
            yield Finding.refusal("masks", error)
            return
        texts, student = Texts(self.tokenizer, renderer, self.new_tokens), None
        if self.hf_config is not None:
            try:
                student = student_of(self.recipe, texts)
                require_embeddings(student.vocab_size, self.tokenizer, renderer.chat_template)
                if self.resumes:
                    require_tokens(Path(self.recipe.run_dir), student.facts())
            except UserError as error:
                yield Finding.refusal("tokenizer", error)
            yield from self._second(texts)
        if (workflow := on_policy(self.recipe)) is not None:
            self.asking = Asking(self.recipe, workflow, texts, self.num_rows)
            yield from self.asking.prompts(self.tables)
            if student is not None:
                yield from self.asking.engine(student)
            return
        yield from _template(renderer)
        for name, table in self.tables.items():
            seen = self.seen[name] = self._render(table, renderer)
            whole = self.num_rows is None or (is_table(table) and len(table) <= self.num_rows)
            yield self._shares(name, seen, whole=whole)
            for text, cure in short_rows(self.recipe.data, seen.num_rows, seen.beyond_row):
                yield Finding("masks", "warning", f"{name}: {text}", cure)
            for error in seen.refusals[:MAX_REFUSALS]:
                yield Finding.refusal("masks", error)
            if len(seen.refusals) > MAX_REFUSALS:
                yield Finding("masks", "refused", f"{name}: and {len(seen.refusals) - MAX_REFUSALS} rows more")
        if len(self.tables) == len(self.sources):
            yield from self._one_sided()

    def _second(self, texts: Texts) -> Iterator[Finding]:
        """Whether reference or teacher is there and speaks the same tokens."""
        from burnish.launch.second import student_of
        from burnish.model.load import load_config

        second = self.recipe.workflow.second()
        if second is None:
            return
        try:
            student = student_of(self.recipe, texts)
            text = second.agree(student, self.recipe.workflow.losses())
            self.kept, self.beside = second.kept(), second.beside(student)
        except UserError as error:
            yield Finding.refusal("second", error)
        else:
            yield Finding("second", "ok", f"compared with {text}")
            if self.beside is not None and self.beside.path != self.recipe.model.path:
                yield from self._positions("second", self.beside, load_config(self.beside))

    def _one_sided(self) -> Iterator[Finding]:
        """Whether answers marked good or bad are all of one kind."""
        from burnish.data.one_sided import refuse_one_sided

        try:
            refuse_one_sided(self.recipe.data, self.recipe.row_format())
        except UserError as error:
            yield Finding.refusal("masks", error)

    def _render(self, table: RowTable | RowShards, renderer: LiveRenderer) -> Seen:
        from burnish.data.lane import render_rows

        seen = Seen()
        accept = None if self.kept is None else self.kept.require
        for rows in batches(table, self.num_rows, seen.refusals):
            for rendered in render_rows(rows, renderer, self.recipe.data, accept):
                seen.add(rendered)
        return seen

    def _shares(self, name: str, seen: Seen, *, whole: bool) -> Finding:
        tokens = max(seen.fates.total(), 1)
        shares = ", ".join(f"{count / tokens:.1%} {fate}" for fate, count in seen.fates.most_common())
        rows = f"{'all' if whole else 'the first'} {seen.num_rows:,}"
        longest = f"; longest {seen.longest:,} of {self.recipe.data.max_length:,}" if seen.lengths else ""
        text = f"{name}: {rows} rows, {seen.fates.total():,} tokens{': ' * bool(shares)}{shares}{longest}"
        if self.recipe.row_format().kind == "labelled" and seen.lengths:
            return Finding("masks", "ok", text)  # a head reads them, with or without a trained token
        if not seen.fates["trained"]:
            return Finding("masks", "refused", f"{text}; no token is trained", "`burnish data` shows the rendered rows")
        if seen.num_untrained:
            cure = "`burnish data` shows them; they cost time and teach nothing"
            return Finding("masks", "warning", f"{text}; {seen.num_untrained} rows have no trained token", cure)
        return Finding("masks", "ok", text)

    def batches(self) -> Iterator[Finding]:
        """What a step and an epoch are, from the lengths that were seen."""
        from burnish.commands._sizes import epoch

        if self.asking is not None:
            yield from self.asking.batch(self.tables)
            return
        train = {name: seen for name, seen in self.seen.items() if name.startswith("data.train")}
        if not train or not all(seen.lengths for seen in train.values()):
            return
        recipe = self.recipe
        weighted = [(self.sources[name].weight, seen.lengths) for name, seen in train.items()]
        row_length, fill, documents_a_row = epoch(recipe, weighted)
        documents, tokens = recipe.global_batch_size * documents_a_row, recipe.global_batch_size * row_length
        trained = sum(seen.fates["trained"] for seen in train.values()) / sum(sum(lengths) for _, lengths in weighted)
        yield Finding(
            "batch",
            "ok",
            f"a step: {recipe.global_batch_size} rows x {row_length:,} = {tokens:,} tokens, {fill:.1%} filled, about "
            f"{documents:,.0f} documents and {tokens * fill * trained:,.0f} trained tokens",
        )
        for text, cure in small_step(recipe, documents):
            yield Finding("batch", "warning", text, cure)
        total = 0.0
        for name, seen in train.items():
            table = self.tables[name]
            if not is_table(table):
                return
            total += len(table) * len(seen.lengths) / seen.num_rows
        yield Finding("batch", "ok", _length_of_run(recipe, total, documents))

    def sizes(self) -> Iterator[Finding]:
        """What it takes on disk and in memory."""
        if self.hf_config is None:
            return
        from burnish.commands import _at_scale, _sizes
        from burnish.model.plan import plan

        assert self.recipe.mesh != "auto"
        sizes = self.recipe.mesh.sizes(self.world_size)
        try:
            laid_out = plan(self.recipe.model, self.hf_config, sizes, self._work, self.new_tokens)
        except UserError as error:
            yield Finding.refusal("model", error)
            return
        counts = f"{laid_out.num_parameters:,} parameters, {laid_out.num_trained:,} of them trained"
        yield Finding("model", "ok", counts)
        need = _sizes.disk_bytes(self.recipe, laid_out)
        folder = Path(self.recipe.run_dir).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        stored = self.recipe.checkpoint.store is not None
        what = "the export" if stored else f"{self.recipe.checkpoint.keep + 1} checkpoints and the export"
        text = f"{_sizes.show(need)} for {what}, {_sizes.show(free)} free"
        cure = "free some, give run_dir on another disk, or lower checkpoint.keep"
        short = "warning" if self._elsewhere else "refused"  # a plan for other machines is for their disks too
        yield Finding("disk", short, text, cure) if need > free else Finding("disk", "ok", text)
        if self.world_size > 1:
            yield Finding("mesh", "ok", _at_scale.layout(laid_out))
        yield from self._memory(laid_out)
        if self.world_size > 1:
            for text in _at_scale.traffic(self.recipe, laid_out):
                yield Finding("traffic", "ok", text)
            for stage, text in _at_scale.recovery(self.recipe, laid_out, self.stated or _at_scale.Stated()):
                yield Finding(stage, "ok", text)

    @property
    def _work(self) -> Work:
        from burnish.model.plan import Work

        row_length = self.recipe.data.packing.tokens_per_row(self.recipe.data.max_length)
        return Work(self.recipe.global_batch_size, self.recipe.micro_batch_size, row_length)

    def _memory(self, laid_out: Plan) -> Iterator[Finding]:
        from burnish.commands import _sizes
        from burnish.launch.choose import HOST_BYTES
        from burnish.model.load import load_config
        from burnish.model.plan import plan

        assert self.recipe.model.activation_checkpointing != "auto"
        parts = laid_out.memory(self.recipe.model.activation_checkpointing)
        if self.beside is not None:
            beside = plan(self.beside, load_config(self.beside), laid_out.sizes, self._work, frozen=True)
            said = f"{beside.num_parameters:,} frozen in {self.beside.dtype}, of {self.beside.name}"
            parts["second"] = (beside.memory("none")["weights"][0], said)
        if self.asking is not None and self.hf_config is not None:
            parts["engine"] = self.asking.memory(self.hf_config, laid_out.num_parameters, self.device)
        if self.device.is_host:
            parts["process"] = (HOST_BYTES, "Python, torch and transformers")
        need = sum(size for size, _ in parts.values())
        for name, (size, formula) in parts.items():
            yield Finding("memory", "ok", f"{name:12} {_sizes.show(size):>9}  {formula}")
        available = self.device.memory_bytes
        text = f"about {_sizes.show(need)} on each rank; {self.device.name} has {_sizes.show(available)}"
        cure = (
            "more ranks, a lower micro_batch_size or data.packing.row_length, or `model.activation_checkpointing: auto`"
        )
        yield Finding("memory", "warning", text, cure) if need > available else Finding("memory", "ok", text)


def _template(renderer: LiveRenderer) -> Iterator[Finding]:
    """What the renderer found out about the chat template, where it has one."""
    report = getattr(renderer, "report", None)
    if report is None:
        return
    ends = " or ".join(map(repr, report.end_of_turn))
    text = f"system: {report.system}; reasoning: {report.reasoning}; tool calls: {report.tool_calls}"
    if not ends:
        cure = "use a chat template that ends a turn with a special token: data.renderer.chat_template_path"
        yield Finding("template", "warning", f"nothing ends a turn, so a model would not learn to stop; {text}", cure)
    else:
        yield Finding("template", "ok", f"a turn ends with {ends}, which is trained; {text}")
    if not report.as_served:
        cure = "train the last turn alone, or use a template that does not rewrite earlier turns"
        yield Finding("template", "warning", "a server's prompt for a turn is not a prefix of what is trained", cure)


def _length_of_run(recipe: Recipe, num_documents: float, documents_a_step: float) -> str:
    steps = num_documents / documents_a_step
    if recipe.num_epochs is not None:
        run = f"{recipe.num_epochs} epochs are about {max(1.0, recipe.num_epochs * steps):,.0f} steps"
    else:
        run = f"{recipe.num_steps:,} steps are {(recipe.num_steps or 0) / steps:.2g} epochs"
    return f"{run}; an epoch is {num_documents:,.0f} documents, about {max(1.0, steps):,.0f} steps"
