"""What `burnish check` looks at where training is on what the policy says: prompts, engines and rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from burnish.commands._finding import MAX_REFUSALS, Finding
from burnish.commands._rows import batches, is_table
from burnish.errors import DataError, UserError
from burnish.rollouts import Dropped, Prompt

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from burnish.data.sources.base import RowShards, RowTable
    from burnish.launch.choose import DeviceFacts
    from burnish.launch.texts import Texts
    from burnish.policy.agreement import Student
    from burnish.recipe import Recipe
    from burnish.rollouts import Dialogue
    from burnish.workflows.on_policy import OnPolicy

DUMMY_TOKENS = 4
"""Of the completion that rewards are tried on."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(slots=True)
class Asked:
    """What the rows of one source became."""

    num_rows: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each prompt that would be asked."""
    dropped: Counter[str] = field(default_factory=Counter)
    refusals: list[DataError] = field(default_factory=list)
    lacking: Counter[str] = field(default_factory=Counter)
    """Column that a reward needs -> prompts without it."""
    first_lacking: dict[str, str] = field(default_factory=dict)


class Asking:
    """An on-policy recipe whose tokenizer and renderer are open."""

    def __init__(self, recipe: Recipe, workflow: OnPolicy, texts: Texts, num_rows: int | None) -> None:
        self.recipe, self.workflow, self.rollout = recipe, workflow, workflow.rollout
        self.texts, self.num_rows = texts, num_rows
        self.dialogue: Dialogue | None = None
        self.asked: dict[str, Asked] = {}
        self.example: Prompt | None = None

    def prompts(self, tables: Mapping[str, RowTable | RowShards]) -> Iterator[Finding]:
        """Renders rows of every source as prompts: how long they are, what room is left, what cannot be asked."""
        from burnish.launch.rollouts import dialogue_of, open_prompts

        try:
            self.dialogue = dialogue_of(self.recipe, self.texts)
        except UserError as error:
            yield Finding.refusal("prompts", error)
            return
        try:
            open_prompts(self.recipe, self.texts)
        except UserError as error:
            yield Finding.refusal("prompts", error)
        for name, table in tables.items():
            asked = self.asked[name] = self._ask(table, self.dialogue)
            whole = self.num_rows is None or (is_table(table) and len(table) <= self.num_rows)
            yield from self._told(name, asked, whole=whole)
        yield from self._ends(self.dialogue)

    def _ask(self, table: RowTable | RowShards, dialogue: Dialogue) -> Asked:
        from burnish.data.prompts import fitted

        asked = Asked()
        columns = {column for reward in self.workflow.rewards for column in reward.needed_columns}
        for rows in batches(table, self.num_rows, asked.refusals):
            for found in dialogue.prompts(rows, asked.num_rows):
                asked.num_rows += 1
                if isinstance(found, Prompt):
                    found = fitted(found, self.recipe.data.max_length - 1, self.recipe.data.over_length)
                if isinstance(found, DataError):
                    asked.refusals.append(found)
                elif isinstance(found, Dropped):
                    asked.dropped[found.reason] += 1
                else:
                    self.example = self.example or found
                    asked.lengths.append(len(found.token_ids))
                    for column in columns - found.columns.keys():
                        asked.lacking[column] += 1
                        asked.first_lacking.setdefault(column, found.where)
        return asked

    def _told(self, name: str, asked: Asked, *, whole: bool) -> Iterator[Finding]:
        lengths, longest = asked.lengths, max(asked.lengths, default=0)
        limit, most = self.recipe.data.max_length, self.rollout.sampling.max_new_tokens
        dropped = "".join(f"; {count:,} dropped: {reason}" for reason, count in asked.dropped.most_common())
        text = f"{name}: {'all' if whole else 'the first'} {asked.num_rows:,} rows"
        if lengths:
            mean = sum(lengths) / len(lengths)
            yield Finding(
                "prompts", "ok", f"{text}, {mean:,.1f} tokens each; longest {longest:,} of {limit:,}{dropped}"
            )
        else:
            cure = "`burnish data` shows what becomes of rows"
            yield Finding("prompts", "refused", f"{text}, and nothing to ask{dropped}", cure)
        short = sum(limit - length < most for length in lengths)
        if short:
            text = f"{name}: {short:,} of {len(lengths):,} prompts leave room for fewer than max_new_tokens: {most:,}"
            cure = f"data.max_length: {longest + most}, a lower max_new_tokens, or shorter prompts"
            yield Finding("prompts", "warning", f"{text}; the longest for {limit - longest:,}", cure)
        for column, count in sorted(asked.lacking.items()):
            yield self._lacks(name, column, count, asked)
        for error in asked.refusals[:MAX_REFUSALS]:
            yield Finding.refusal("prompts", error)
        if len(asked.refusals) > MAX_REFUSALS:
            yield Finding("prompts", "refused", f"{name}: and {len(asked.refusals) - MAX_REFUSALS} rows more")

    def _lacks(self, name: str, column: str, count: int, asked: Asked) -> Finding:
        """A reward is computed from a column that rows do not have."""
        from burnish.rewards.base import term_names

        rewards = zip(term_names(self.workflow.rewards), self.workflow.rewards, strict=True)
        whose = ", ".join(term for term, reward in rewards if column in reward.needed_columns)
        every, first = count == len(asked.lengths), asked.first_lacking[column]
        text = f"{name}: {'no row has' if every else f'{count:,} rows lack'} the column `{column}`, which {whose} needs"
        cure = "name another by the reward's fields, or rename one with the source's `columns:`"
        return Finding("prompts", "refused" if every else "warning", f"{text}; first {first}", cure)

    def _ends(self, dialogue: Dialogue) -> Iterator[Finding]:
        """What a turn ends with."""
        sampling = self.rollout.sampling
        tokens = [*dialogue.stop_token_ids, *sampling.stop_token_ids]
        names = [repr(name) for name in self.texts.tokenizer.convert_ids_to_tokens(tokens)]
        ends = [*dict.fromkeys(names), *map(repr, sampling.stop)]
        if ends:
            yield Finding("template", "ok", f"a turn ends with {' or '.join(ends)}")
            return
        always = f"nothing ends a turn, so that each is {sampling.max_new_tokens:,} tokens long"
        if getattr(self.workflow, "train_truncated", True):
            yield Finding("template", "ok", always)
        else:
            text = f"{always}, and `train_truncated: false` trains on none of that length"
            yield Finding("template", "refused", text, "workflow.train_truncated: true")

    def engine(self, student: Student) -> Iterator[Finding]:
        """Whether the engine can sample from this policy, and knows its tokens."""
        from burnish.launch.rollouts import engine_setup

        if self.dialogue is None:
            return
        engine, workers, sampling = self.rollout.engine, self.rollout.workers, self.rollout.sampling
        setup = engine_setup(self.recipe, self.texts, student)
        refused = list(engine.refuse(setup))
        for reason in refused:
            cure = "`engine: {type: embedded}` samples from any policy"
            yield Finding("engine", "refused", reason, cure)
        if (lacking := engine.lacking()) is not None:
            refused.append(lacking.reason)
            if getattr(workers, "address", None) is None:
                yield Finding.refusal("engine", lacking)
            else:
                yield Finding("engine", "warning", f"{lacking.reason}; the cluster's nodes must have it", lacking.cure)
        dropout = getattr(self.recipe.model.adapter, "lora_dropout", 0.0)
        if dropout > 0:
            text = f"nothing is dropped where a policy trains on its own words: lora_dropout: {dropout:g} has no effect"
            yield Finding("engine", "warning", text, "remove model.adapter.lora_dropout")
        ends = {*setup.stop_token_ids, *sampling.stop_token_ids}
        if max(ends, default=0) >= student.vocab_size:
            text = f"token {max(ends)} ends a turn, and the policy has {student.vocab_size:,} embedding rows"
            yield Finding("engine", "refused", text, "remove it from `rollout.sampling.stop_token_ids`")
        elif not refused:
            where = "in the training process" if not workers.beside else f"in {_of(workers)}"
            dtype = engine.computes_in(self.recipe.model.dtype)
            yield Finding("engine", "ok", f"{engine.type} {where}, {dtype}, {engine.capacity:,} rollouts at once")
        missed = sorted(set(_ids(getattr(student.hf_config, "eos_token_id", None))) - ends) if ends else []
        if missed:
            names = " and ".join(map(repr, self.texts.tokenizer.convert_ids_to_tokens(missed)))
            text = f"the model's configuration ends texts with {names} too, after which a rollout would go on"
            cure = f"workflow.rollout.sampling.stop_token_ids: {[*sampling.stop_token_ids, *missed]}"
            yield Finding("engine", "warning", text, cure)

    def batch(self, tables: Mapping[str, RowTable | RowShards]) -> Iterator[Finding]:
        """What a step and an epoch are."""
        recipe, size = self.recipe, self.rollout.group_size
        train = {name: asked for name, asked in self.asked.items() if name.startswith("data.train")}
        if not train or not all(asked.lengths for asked in train.values()):
            return
        longest = max(max(asked.lengths) for asked in train.values()) + self._most_sampled
        updates = getattr(self.workflow, "num_updates", 1)
        text = (
            f"a step: {recipe.global_batch_size:,} prompts x {size:,} = {recipe.global_batch_size * size:,} rollouts "
            f"of at most {min(longest, recipe.data.max_length):,} tokens, {updates} update{'s' * (updates > 1)}"
        )
        yield Finding("batch", "ok", text)
        total = 0.0
        for name, asked in train.items():
            table = tables[name]
            if not is_table(table):
                return
            total += len(table) * len(asked.lengths) / asked.num_rows
        a_step = recipe.global_batch_size
        if recipe.num_epochs is not None:
            run = f"{recipe.num_epochs} epochs are about {recipe.num_epochs * total / a_step:,.0f} steps"
        else:
            run = f"{recipe.num_steps:,} steps are {(recipe.num_steps or 0) * a_step / total:.2g} epochs"
        yield Finding("batch", "ok", f"{run}; an epoch is {total:,.0f} prompts, about {total / a_step:,.0f} steps")

    @property
    def _most_sampled(self) -> int:
        return self.rollout.sampling.max_new_tokens * self.rollout.environment.max_turns

    def memory(self, hf_config: PretrainedConfig, num_parameters: int, device: DeviceFacts) -> tuple[int, str]:
        """What engines take of the device that a rank trains on: (bytes, where they come from)."""
        engine, workers, longest = self.rollout.engine, self.rollout.workers, self.recipe.data.max_length
        if getattr(workers, "gpus", None) or getattr(workers, "address", None):
            return 0, f"of {_of(workers)} elsewhere"
        width = DTYPE_BYTES[engine.computes_in(self.recipe.model.dtype)]
        per_token = key_bytes(hf_config, width)
        rollouts = min(engine.capacity, self.recipe.global_batch_size * self.rollout.group_size)
        each = engine.device_bytes(
            weights=width * num_parameters,
            keys=rollouts * longest * per_token,
            device=0 if device.is_host else device.memory_bytes,
            shares_model=not workers.beside,
        )
        said = f"{engine.type}: {rollouts:,} rollouts x {longest:,} tokens x {per_token:,} bytes of keys and values"
        more = ", no weights of its own" if not workers.beside and engine.is_policy_code else ", and weights"
        count = getattr(workers, "num_workers", 1)
        return count * each, said + more + (f", {count} times" if count > 1 else "")

    def rewards(self) -> Iterator[Finding]:
        """Opens rewards and environment, and asks them once about a made-up completion."""
        from burnish.errors import RunFailed
        from burnish.rewards.pool import Draft, RewardPool

        interactive = self.rollout.environment.is_interactive
        if self.dialogue is None or self.example is None or not (self.workflow.rewards or interactive):
            return
        told: list[dict[str, Any]] = []

        def event(kind: str, **facts: Any) -> None:
            if "reward" in facts:
                told.append({"kind": kind, **facts})

        prompt, dialogue = self.example, self.dialogue
        tokens = [*prompt.token_ids[-DUMMY_TOKENS:], *dialogue.stop_token_ids[:1]]
        try:
            pool = RewardPool(self.workflow.rewards, self.rollout.environment, num_workers=1, event=event)
        except UserError as error:
            yield Finding.refusal("rewards", error)
            return
        try:
            if interactive:
                yield from self._environment(pool, prompt, tokens)
            # Two of one prompt: a reward that says one number for all of them shows.
            pool.score("", prompt, [Draft(dialogue.said(prompt, [tokens]), tokens, "stop")] * 2)
            ((_, (score, _)),) = _answer(pool)
        except RunFailed as error:
            yield Finding("rewards", "refused", str(error), "try the rewards by themselves")
            return
        finally:
            pool.close()
        yield from _misbehaved(told, prompt, score.failed)
        values = ", ".join(f"{name} {value:.4g}" for name, value in score.terms.items() if name not in score.failed)
        if values:
            answer = dialogue.text(tokens)
            yield Finding("rewards", "ok", f"{values} for the answer {answer!r} to {prompt.where}")

    def _environment(self, pool: Any, prompt: Prompt, tokens: list[int]) -> Iterator[Finding]:
        """One step of an episode, and what is said to the policy then."""
        from burnish.rewards.pool import CallFailed

        assert self.dialogue is not None
        pool.reset("", prompt.columns, self.recipe.seed)
        ((_, found),) = _answer(pool)
        if not isinstance(found, CallFailed):
            pool.step("", found, self.dialogue.text(tokens))
            ((_, found),) = _answer(pool)
        kind = self.rollout.environment.type
        if isinstance(found, CallFailed):
            cure = "a run would go on, and count the episode as failed"
            yield Finding("rewards", "warning", f"the environment {kind} failed for {prompt.where}: {found.why}", cure)
            return
        if found.done or not found.messages:
            yield Finding("rewards", "ok", f"the environment {kind} ended the episode after a turn")
            return
        try:
            between = self.dialogue.observe(prompt, [tokens], found.messages)
        except UserError as error:
            yield Finding.refusal("rewards", error)
            return
        yield Finding("rewards", "ok", f"the environment {kind} answered, {len(between):,} tokens to the next turn")


def _misbehaved(told: Sequence[Mapping[str, Any]], prompt: Prompt, failed: Sequence[str]) -> Iterator[Finding]:
    """What a pool told of rewards that were asked about two completions."""
    for facts in told:
        if facts["kind"] == "reward_failed":
            text = f"{facts['reward']} failed for {prompt.where}: {facts['why']}"
            cure = "mend it: a run gives `failed_value` where it fails, and ends where it always does"
            yield Finding("rewards", "warning", text, cure)
        elif facts["kind"] == "reward_asked_again" and facts["reward"] not in failed:
            text = f"{facts['reward']} failed for two completions of {prompt.where}: {facts['why']}"
            cure = "a number for each completion, in a list: a run asks it about each alone, which takes longer"
            yield Finding("rewards", "warning", text, cure)


def key_bytes(hf_config: PretrainedConfig, width: int) -> int:
    """Of the keys and values of a token in all layers, of `width` bytes a number."""
    config: Any = hf_config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * width


def _answer(pool: Any) -> list[tuple[Any, Any]]:
    """What a call brought; the pool gives every call up after its `seconds`."""
    while not (found := pool.poll(1.0)):
        pass
    return found


def _of(workers: Any) -> str:
    """`2 processes`, `4 ray workers`."""
    kind = {"processes": "processes"}.get(workers.type, f"{workers.type} workers")
    count = workers.num_workers
    return f"{count} {kind}" if count != 1 else f"a {'process' if kind == 'processes' else kind[:-1]} of its own"


def _ids(eos: int | list[int] | None) -> list[int]:
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
