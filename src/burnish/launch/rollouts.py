"""Opens what an on-policy workflow is handed in place of packed rows: prompts, engines, rewards and their collector.

Rank 0 alone has engines and rewards; the other ranks hear of their rollouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from burnish.errors import UserError
from burnish.workflows.on_policy import OnPolicy

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from burnish.data.prompts import Prompts
    from burnish.launch.texts import Texts
    from burnish.policy.agreement import Student
    from burnish.policy.policy import Policy
    from burnish.recipe import Recipe
    from burnish.rewards.pool import RewardPool
    from burnish.rollout.collector import Collector
    from burnish.rollout.engine import EngineSetup
    from burnish.rollouts import Dialogue, Prompt
    from burnish.workflows.rollout_stream import RolloutStream


def on_policy(recipe: Recipe) -> OnPolicy | None:
    """The recipe's workflow, where it trains on what the policy says."""
    return recipe.workflow if isinstance(recipe.workflow, OnPolicy) else None


def open_prompts(recipe: Recipe, texts: Texts) -> Prompts:
    """The run's prompts. Raises UserError: a file is missing, or prompts cannot be made of it."""
    from burnish.data import prompts

    return prompts.open_prompts(
        recipe.data,
        dialogue_of(recipe, texts),
        seed=recipe.seed,
        num_epochs=recipe.num_epochs,
        max_prompt_length=recipe.data.max_length - 1,
    )


def dialogue_of(recipe: Recipe, texts: Texts) -> Dialogue:
    """How the recipe's rows are asked about. Raises DataError: that cannot be."""
    workflow = on_policy(recipe)
    assert workflow is not None
    return texts.renderer.dialogue(multi_turn=workflow.rollout.environment.is_interactive)


def engine_setup(recipe: Recipe, texts: Texts, student: Student) -> EngineSetup:
    """What an engine must know to sample for this run."""
    from burnish.rollout.engine import EngineSetup

    workflow = on_policy(recipe)
    assert workflow is not None
    tokenizer_path = str(Path(recipe.run_dir).absolute() / "tokenizer")
    return EngineSetup(
        model=recipe.model,
        seed=recipe.seed,
        new_tokens=student.new_tokens,
        max_length=recipe.data.max_length,
        stop_token_ids=tuple(dialogue_of(recipe, texts).stop_token_ids),
        tokenizer_path=tokenizer_path,
        temperature=workflow.rollout.sampling.policy_temperature,
    )


def open_judges(recipe: Recipe, stack: ExitStack, event: Callable[..., None]) -> RewardPool:
    """Processes of the recipe's rewards and environment, ended with `stack`. Needs no model: what cannot be opened is
    refused before minutes are spent on loading one.

    Raises:
        UserError: a reward cannot be opened.
    """
    from burnish.rewards.pool import RewardPool

    workflow = on_policy(recipe)
    assert workflow is not None
    rollout = workflow.rollout
    judges = RewardPool(workflow.rewards, rollout.environment, num_workers=rollout.reward_workers, event=event)
    stack.callback(judges.close)
    return judges


def open_rollouts(
    recipe: Recipe,
    policy: Policy,
    prompts: Prompts,
    texts: Texts,
    student: Student,
    judges: RewardPool | None,
    stack: ExitStack,
    event: Callable[..., None],
    stop_requested: Callable[[], str | None],
) -> RolloutStream:
    """The stream of the run's rollouts; engines are ended with `stack`.

    Args:
        judges: on rank 0; None elsewhere.

    Raises:
        UserError: an engine cannot be opened.
    """
    from burnish.launch.second import shares_rows
    from burnish.model.wire import adapter_alone
    from burnish.workflows.rollout_probe import Probe
    from burnish.workflows.rollout_rows import Layout
    from burnish.workflows.rollout_stream import RolloutStream

    workflow = on_policy(recipe)
    assert workflow is not None
    rollout = workflow.rollout
    if policy.mesh.world_size > 1 and not rollout.workers.beside:
        raise UserError(
            "the policy is cut over several ranks, and none of them alone can sample from it",
            where="workflow.rollout.workers",
            cure="`{type: processes, num_workers: 1}` or `{type: ray, num_workers: 1}`",
        )
    policy.set_temperature(rollout.sampling.policy_temperature)
    policy.drop_nothing()
    collector = None
    if judges is not None:
        collector = _collector(recipe, policy, prompts, texts, student, judges, stack, event)
    folder = Path(recipe.run_dir) / "tokenizer"
    stream = RolloutStream(
        policy,
        collector,
        layout=Layout(
            row_length=recipe.data.packing.tokens_per_row(recipe.data.max_length),
            share_prompts=shares_rows(recipe) and rollout.group_size > 1,
            one_a_row=not shares_rows(recipe),
        ),
        probe=Probe(
            rollout.alignment,
            rollout.alignment.limit(
                [recipe.model.dtype, rollout.engine.computes_in(recipe.model.dtype)],
                same_code=rollout.engine.is_policy_code,
            ),
            rollout.sampling,
            event,
        ),
        require=prompts.require,
        extent=prompts.extent,
        num_prompts=prompts.num_prompts,
        beside=rollout.max_policy_lag > 0,
        adapter_only=rollout.workers.beside
        and adapter_alone(policy.model)
        and rollout.engine.takes_adapter(engine_setup(recipe, texts, student)),
        folder=folder,
        stop_requested=stop_requested,
    )
    stack.callback(stream.close)
    return stream


def _collector(
    recipe: Recipe,
    policy: Policy,
    prompts: Prompts,
    texts: Texts,
    student: Student,
    judges: RewardPool,
    stack: ExitStack,
    event: Callable[..., None],
) -> Collector:
    from burnish.model.wire import describe
    from burnish.rollout.collector import Collector
    from burnish.rollout.fleet import Parts

    workflow = on_policy(recipe)
    assert workflow is not None
    rollout, environment = workflow.rollout, workflow.rollout.environment
    folder = Path(recipe.run_dir) / "tokenizer"
    texts.tokenizer.save_pretrained(folder)
    describe(policy.model, folder, base_path=recipe.model.path or "", base_revision=recipe.model.revision)
    setup, run_dir = engine_setup(recipe, texts, student), Path(recipe.run_dir).absolute()
    fleet = rollout.workers.open(Parts(rollout.engine, setup, rollout.sync, policy.model, run_dir, event))
    stack.callback(fleet.close)
    return Collector(
        config=rollout,
        fleet=fleet,
        judges=judges,
        dialogue=dialogue_of(recipe, texts),
        prompt_at=prompt_at(prompts),
        held_out=prompts.evaluation,
        per_step=recipe.global_batch_size,
        max_length=recipe.data.max_length,
        seed=recipe.seed,
        interactive=environment.is_interactive,
        max_turns=environment.max_turns,
    )


def prompt_at(prompts: Prompts) -> Callable[[int], Prompt | str | None]:
    """The run's prompts as a collector asks for them: by index, a left-out one as the reason why."""
    from burnish.rollouts import Dropped

    def at(index: int) -> Prompt | str | None:
        found = prompts.get(index)
        return found.reason if isinstance(found, Dropped) else found

    return at
