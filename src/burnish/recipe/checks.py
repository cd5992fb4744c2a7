"""Parts that are each right and do not fit together. Only what needs neither files, tokenizer nor model.

A check takes the recipe and yields (key path, reason, cure) for everything it finds; add one to `CHECKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.errors import UserError
from burnish.launch.layout import Misfit
from burnish.recipe.written import Written, dotted
from burnish.workflows.on_policy import OnPolicy

if TYPE_CHECKING:
    from burnish.losses.base import Loss
    from burnish.recipe.schema import Recipe
    from burnish.recipe.written import KeyPath


def misfits(recipe: Recipe, written: Written, found: Sequence[Misfit] = ()) -> list[UserError]:
    """Everything in `recipe` that does not fit together, with what was `found` elsewhere."""
    found = [misfit for check in CHECKS for misfit in check(recipe)] + list(found)
    return [UserError(f"{dotted(m.path)}: {m.reason}", where=written.place(m.path), cure=m.cure) for m in found]


def length_of_run(recipe: Recipe) -> Iterator[Misfit]:
    """A run has one length, and its warm-up is part of it."""
    steps, epochs = recipe.num_steps, recipe.num_epochs
    if steps is None and epochs is None:
        yield Misfit(("num_steps",), "the run has no length", "add `num_steps: 100` or `num_epochs: 1`")
    if steps is not None and epochs is not None:
        reason = f"the run has two lengths, {steps} steps and {epochs} epochs"
        yield Misfit(("num_epochs",), reason, "remove num_steps or num_epochs")
    warmup = recipe.schedule.warmup_steps
    if steps is not None and warmup > steps:
        reason = f"the warm-up of {warmup} steps is longer than the run of {steps}"
        yield Misfit(("schedule", "warmup_steps"), reason, f"at most {steps}")


def batch(recipe: Recipe) -> Iterator[Misfit]:
    """A step is a whole number of micro-batches."""
    whole, micro = recipe.global_batch_size, recipe.micro_batch_size
    if whole % micro and not isinstance(recipe.workflow, OnPolicy):  # there it counts prompts
        below, above = whole - whole % micro, whole - whole % micro + micro
        nearest = f"{below} or {above}" if below else f"{above}"
        divisors = [n for n in range(1, micro) if whole % n == 0]
        reason = f"{whole} packed rows a step are not a whole number of micro-batches of {micro}"
        yield Misfit(("global_batch_size",), reason, f"{nearest}; or micro_batch_size: {divisors[-1]}")


def elastic(recipe: Recipe) -> Iterator[Misfit]:
    """Every sum of an elastic run has one order, whatever the number of ranks."""
    if recipe.determinism != "elastic":
        return
    path, losses = ("determinism",), _single_losses(recipe)
    if any("kto_kl" in loss.asks for loss in losses):
        yield Misfit(path, "kto pairs prompts with answers of the same rank's rows", "set it to fixed")
    if any("embeddings" in loss.needs for loss in losses):
        yield Misfit(path, "its loss couples all documents of a step in one sum", "set it to fixed")


def rollback(recipe: Recipe) -> Iterator[Misfit]:
    """There is a checkpoint from before the rows that a rollback passes over."""
    anomaly, checkpoint = recipe.anomaly, recipe.checkpoint
    if anomaly.action != "rollback" or checkpoint.save_every == "auto":
        return
    if anomaly.steps_before > (checkpoint.keep - 1) * checkpoint.save_every:
        reason = (
            f"{checkpoint.keep} checkpoints every {checkpoint.save_every} steps may all be from behind the "
            f"{anomaly.steps_before} steps before the bad one"
        )
        keep = -(-anomaly.steps_before // checkpoint.save_every) + 1
        yield Misfit(("anomaly", "steps_before"), reason, f"checkpoint.keep: {keep}, or fewer steps_before")


def row_length(recipe: Recipe) -> Iterator[Misfit]:
    """The longest document fits into a row."""
    row, longest = recipe.data.packing.row_length, recipe.data.max_length
    if row != "max_length" and row < longest:
        reason = f"rows of {row} tokens cannot hold a document of max_length {longest}"
        cure = f"row_length: {longest}, or data.max_length: {row}; documents are never split over rows"
        yield Misfit(("data", "packing", "row_length"), reason, cure)


def saving(recipe: Recipe) -> Iterator[Misfit]:
    """An interval is chosen from a failure rate, which nobody can guess."""
    checkpoint = recipe.checkpoint
    if checkpoint.save_every == "auto" and checkpoint.mean_hours_between_failures is None:
        reason = "how often to save depends on how often the run fails, and nothing says that"
        cure = (
            "add `mean_hours_between_failures:`, 50,000 / the number of GPUs where nothing better is known "
            "(Llama 3's 16,384 failed every 3.1 hours), or less on machines that may be taken away"
        )
        yield Misfit(("checkpoint", "save_every"), reason, cure)


def evaluation(recipe: Recipe) -> Iterator[Misfit]:
    """What is evaluated exists."""
    if recipe.eval_every is not None and not recipe.data.eval:
        yield Misfit(("eval_every",), "there is nothing to evaluate on", "add `data.eval`, or remove eval_every")


def streams(recipe: Recipe) -> Iterator[Misfit]:
    """Epochs need sources whose length is known."""
    for index, source in enumerate(recipe.data.train):
        if recipe.num_epochs is not None and getattr(source, "streaming", False):
            reason = "the length of a streamed source is unknown, so an epoch has no end to measure progress by"
            yield Misfit(("data", "train", index, "streaming"), reason, "give num_steps instead of num_epochs")


def remote_code(recipe: Recipe) -> Iterator[Misfit]:
    """Code from a hub is pinned to a commit; code in a local folder is what it is."""
    model = recipe.model
    pinned = re.fullmatch(r"[0-9a-f]{40}", model.revision) is not None
    if model.trust_remote_code and not pinned and not Path(model.name).is_dir():
        reason = f"would run whatever code {model.name} has at '{model.revision}' on the day of the run"
        cure = "set model.revision to a commit hash of 40 hex digits that you have read"
        yield Misfit(("model", "trust_remote_code"), reason, cure)


def compiled_adapter(recipe: Recipe) -> Iterator[Misfit]:
    """torch.compile can trace the adapter."""
    if recipe.model.compile is not None and getattr(recipe.model.adapter, "use_dora", False):
        reason = "PEFT's DoRA looks at the kind of a weight in a way that torch.compile cannot trace"
        yield Misfit(("model", "compile"), reason, "remove model.compile, or use_dora")


def rows(recipe: Recipe) -> Iterator[Misfit]:
    """All losses read the same kind of rows."""
    kinds = sorted({loss.rows for loss in recipe.workflow.losses()} - {"conversation"})
    if len(kinds) > 1:
        reason = f"its losses read rows of different kinds: {' and '.join(kinds)}"
        yield Misfit(("workflow",), reason, "train them one after the other")


def heads(recipe: Recipe) -> Iterator[Misfit]:
    """Every loss finds the heads it reads, of the form it wants, and every head has a loss that trains it."""
    losses, parts = _single_losses(recipe), recipe.model.head.parts()
    makes = {part.makes for part in parts.values()}
    path, read = ("model", "head"), set[str]()
    for loss in losses:
        read |= loss.heads().keys()
        for name, form in loss.heads().items():
            part, example = parts.get(name), _EXAMPLES[form]
            others = "lm: {type: lm}, " if loss.needs & _TOKEN_OUTPUTS else ""
            named = f"`{example}`" if name == "score" else f"`{{type: multi, heads: {{{others}{name}: {example}}}}}`"
            if part is None or part.makes != "scores":
                reason = f"the loss {loss.type} reads the scores of a head '{name}'; the model has {', '.join(parts)}"
                yield Misfit(path, reason, f"{named}, or name another with the loss's `head:`")
            elif form == "number" and part.num_outputs(None) != 1:
                reason = f"the loss {loss.type} reads one number, the head '{name}' says {part.num_outputs(None)}"
                yield Misfit(path, reason, named)
            elif form == "classes" and len(part.classes()) < 2:
                reason = f"the loss {loss.type} reads a score for each class, and the head '{name}' has no classes"
                yield Misfit(path, reason, named)
        tokens = sorted(loss.needs & _TOKEN_OUTPUTS)
        if tokens and "tokens" not in makes:
            reason = f"the loss {loss.type} reads {tokens[0]} of the language model's head, and `model.head` has none"
            yield Misfit(path, reason, "`{type: lm}`, or `{type: multi, heads: {lm: {type: lm}, ...}}`")
        if "embeddings" in loss.needs and "embeddings" not in makes:
            yield Misfit(path, f"the loss {loss.type} reads embeddings, which no head makes", "`{type: embedding}`")
    for name, part in parts.items():
        if losses and part.makes == "scores" and name not in read:
            yield Misfit(path, f"no loss reads the head '{name}', so it would stay random", "remove it, or add a loss")


def labels(recipe: Recipe) -> Iterator[Misfit]:
    """A column of labels says one thing: a class of one list, or a number."""
    parts, read_as = recipe.model.head.parts(), dict[str, tuple[str, ...]]()
    for loss in _single_losses(recipe):
        for column, head in loss.labels().items():
            classes = parts[head].classes() if head in parts else ()
            if column == "weight":
                reason = "the column `weight` multiplies a row's loss, and cannot be its label too"
                cure = "rename it in the source, `columns: {weight: grade}`, and name it by the loss's `label: grade`"
                yield Misfit(("workflow",), reason, cure)
            elif read_as.setdefault(column, classes) != classes:
                reason = f"the column `{column}` would have to be a class for one loss and another thing for the next"
                yield Misfit(("workflow",), reason, "give each loss a column of its own by `label:`")


def fresh_rows(recipe: Recipe) -> Iterator[Misfit]:
    """The rows of a fresh model were never trained."""
    new_tokens = getattr(recipe.data.tokenizer, "add_tokens", None)
    if recipe.model.config is not None and new_tokens is not None and new_tokens.train == "new_rows":
        reason = "the other rows of a fresh model are random, and would stay so"
        yield Misfit(("data", "tokenizer", "add_tokens", "train"), reason, "set it to all_rows")


def whole_steps(recipe: Recipe) -> Iterator[Misfit]:
    """A loss over embeddings compares all documents of a step, which only the embedding workflow has at once."""
    workflow = recipe.workflow
    for loss in workflow.losses():
        if workflow.type == "embedding" and loss.needs != {"embeddings"}:
            reason = f"the embedding workflow has vectors for its loss, and {loss.type} reads {', '.join(loss.needs)}"
            yield Misfit(("workflow", "loss"), reason, "`{type: info_nce}`")
        if workflow.type != "embedding" and "embeddings" in loss.needs:
            reason = f"the loss {loss.type} compares all documents of a step, and {workflow.type} cuts it into parts"
            yield Misfit(("workflow", "type"), reason, "`workflow: {type: embedding, ...}`")
    if workflow.type == "embedding" and recipe.global_batch_size == 1 and recipe.data.packing.type == "none":
        reason = "one unpacked row a step holds one query, and no other query's documents to tell its own from"
        yield Misfit(("global_batch_size",), reason, "raise it, or pack: every query of a step sees all its documents")


def on_policy(recipe: Recipe) -> Iterator[Misfit]:
    """Losses on rollouts are in a workflow that has some; engines and policy can do what is asked of them at once."""
    workflow = recipe.workflow
    if not isinstance(workflow, OnPolicy):
        for loss in _single_losses(recipe):
            if loss.rows == "rollout":
                cure = "`workflow: {type: rl, loss: ...}`"
                yield Misfit(("workflow", "loss"), f"{loss.type} trains on a policy's own rollouts", cure)
        return
    rollout, path, longest = workflow.rollout, ("workflow", "rollout"), recipe.data.max_length
    if rollout.max_policy_lag > 0 and not rollout.workers.beside:
        reason = f"engines that run {rollout.workers.type} sample while nothing trains, so that nothing can lag"
        yield Misfit((*path, "workers"), reason, "`{type: processes, num_workers: 1}`, or max_policy_lag: 0")
    if rollout.engine.needs_own_process and not rollout.workers.beside:
        reason = f"the engine {rollout.engine.type} cannot share a process with training"
        yield Misfit((*path, "workers"), reason, "`{type: processes, num_workers: 1}` or `{type: ray, num_workers: 1}`")
    if rollout.workers.type == "inline" and getattr(recipe.launch, "num_workers", 1) > 1:
        reason = "the policy is cut over several ranks, and none of them alone can sample from it"
        yield Misfit((*path, "workers"), reason, "`{type: processes, num_workers: 1}` or `{type: ray, num_workers: 1}`")
    hosts = [rollout.workers, recipe.launch] if rollout.workers.type == "ray" else []
    if rollout.sync.type == "shared_memory" and any(getattr(each, "address", None) is not None for each in hosts):
        reason = "engines on a cluster may be on other machines, which share no memory with this one"
        yield Misfit((*path, "sync"), reason, "`{type: broadcast}`, or `{type: file, folder: ...}` on a shared disk")
    most = rollout.sampling.max_new_tokens
    if most >= longest:
        reason = f"rollouts of {longest} tokens have no room for a prompt and {most} more"
        yield Misfit((*path, "sampling", "max_new_tokens"), reason, f"less than {longest}, or a larger data.max_length")
    if recipe.anomaly.action == "rollback":
        reason = "a rollback passes over rows, and those of a bad step are sampled anew each time"
        yield Misfit(("anomaly", "action"), reason, "set it to skip or stop")
    if recipe.mesh != "auto" and recipe.mesh.tp * recipe.mesh.cp > 1:
        yield Misfit(("mesh",), "rollouts are trained by data parallel ranks alone so far", "set tp and cp to 1")
    if getattr(workflow, "num_minibatches", 1) > recipe.global_batch_size:
        reason = f"{recipe.global_batch_size} prompts a step cannot be split over more minibatches"
        yield Misfit(("workflow", "num_minibatches"), reason, f"at most {recipe.global_batch_size}")
    if rollout.drop_uniform and rollout.group_size == 1:
        reason = "the rewards of a group of one are always equal, so every prompt would be left out"
        yield Misfit((*path, "drop_uniform"), reason, "set it to false, or raise group_size")
    if rollout.oversample > 1 and not rollout.drop_uniform:
        reason = "no group is ever left out, so more prompts than a step takes are never needed"
        yield Misfit((*path, "oversample"), reason, "remove it, or set drop_uniform to true")
    if recipe.data.over_length == "truncate":
        cure = "`drop` leaves long prompts out, `refuse` stops at the first"
        yield Misfit(("data", "over_length"), "a prompt that is cut asks something else", cure)
    if workflow.eval_sampling is not None and not recipe.data.eval:
        yield Misfit(("workflow", "eval_sampling"), "there is nothing to evaluate on", "add `data.eval`, or remove it")
    if rollout.on_stale == "drop" and rollout.max_policy_lag == 0:
        reason = "with a lag of 0 all that is sampled ahead of an update is too old after it"
        yield Misfit((*path, "on_stale"), reason, "set it to wait, or max_policy_lag to 1")
    yield from _draws(workflow)
    yield from _patience(workflow)


def _patience(workflow: OnPolicy) -> Iterator[Misfit]:
    """A call that may still answer is no silence."""
    environment, silence = workflow.rollout.environment, workflow.rollout.max_silence_seconds
    limits: dict[KeyPath, float] = {("rewards", i): reward.seconds for i, reward in enumerate(workflow.rewards)}
    if environment.is_interactive:
        limits["rollout", "environment"] = environment.seconds
    for path, seconds in limits.items():
        if seconds >= silence:
            reason = f"a call may take {seconds:g} s, and after {silence:g} s of silence the run fails"
            yield Misfit(
                ("workflow", *path, "seconds"), reason, "lower it, or raise workflow.rollout.max_silence_seconds"
            )


def _draws(workflow: OnPolicy) -> Iterator[Misfit]:
    """The policy can say the probability of what was drawn."""
    sampling, path = workflow.rollout.sampling, ("workflow", "rollout", "sampling")
    if sampling.temperature == 0 and workflow.compares_draws:
        reason = "the likeliest token is always the same, and there is nothing to choose between"
        yield Misfit((*path, "temperature"), reason, "set it to 1.0")
    if not workflow.trains_on_draws:
        return
    if sampling.top_p < 1 or sampling.top_k > 0:
        key = "top_p" if sampling.top_p < 1 else "top_k"
        reason = "the policy's own log-probabilities know of no cut, so every ratio to the engine's would be wrong"
        yield Misfit((*path, key), reason, "remove it; cut in `eval_sampling`, or with `workflow: {type: best_of_n}`")


def _single_losses(recipe: Recipe) -> list[Loss]:
    """The losses of the workflow, the terms of a sum one by one: what they say of one head or column may differ."""
    losses = recipe.workflow.losses()
    return [single for loss in losses for single in loss.singles()]


_EXAMPLES = {
    "number": "{type: scalar}",
    "numbers": "{type: linear, size: ...}",
    "classes": "{type: classification, labels: [...]}",
}
_TOKEN_OUTPUTS = {"weighted_nll", "logprobs", "entropy", "topk_logprobs", "full_kl", "candidate_logits", "ranks"}


def minimised(recipe: Recipe) -> Iterator[Misfit]:
    """What is minimised has a gradient."""
    loss = getattr(recipe.workflow, "loss", None)
    if loss is not None and not loss.trains:
        reason = f"{loss.type} measures a model and has no gradient to train it by"
        yield Misfit(("workflow", "loss"), reason, f"train with nll, and measure: `evaluate: {{type: {loss.type}}}`")


def second_models(recipe: Recipe) -> Iterator[Misfit]:
    """Losses that compare with a second model are in a workflow that has one, and it can be asked before the run."""
    second = recipe.workflow.second()
    for loss in recipe.workflow.losses() if second is None else []:
        asked = loss.asks | loss.needs & {"full_kl"}
        reference = asked <= {"ref_logprobs", "kto_kl"}
        whom = "reference" if reference else "teacher"
        reason = f"the loss {loss.type} compares with a {whom}, and this workflow has none"
        other = "{type: preference, loss: ...}" if reference else "{type: distill, teacher: {path: ...}, loss: ...}"
        if asked:
            yield Misfit(("workflow",), reason, f"`workflow: {other}`")
    for index, source in enumerate(recipe.data.train):
        if getattr(second, "precompute", False) and getattr(source, "streaming", False):
            reason = "a streamed source cannot be gone through once before the run, as `precompute` does"
            cure = "read it without streaming, or leave out workflow.reference.precompute"
            yield Misfit(("data", "train", index, "streaming"), reason, cure)


CHECKS: tuple[Callable[[Recipe], Iterator[Misfit]], ...] = (
    length_of_run,
    batch,
    elastic,
    rollback,
    row_length,
    saving,
    evaluation,
    streams,
    remote_code,
    compiled_adapter,
    rows,
    heads,
    labels,
    fresh_rows,
    second_models,
    minimised,
    whole_steps,
    on_policy,
)
