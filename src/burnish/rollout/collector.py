"""From prompts to groups of rewarded rollouts: one state machine over a fleet of engines and a pool of rewards.

    a prompt is reserved -> its episodes are begun -> turns are sampled and answered -> the group is rewarded
    -> it is committed, or left out -> the trainer takes groups in the prompts' order

`pump` moves everything on that can be moved. Nothing that is in flight is state: what a checkpoint keeps is which
prompts were consumed and which groups are finished, and a prompt that is begun again draws from the same seeds. It must
not know tensors, ranks, where engines run or how rewards are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from burnish.environments.base import Observation
from burnish.errors import DataError, RunFailed
from burnish.rewards.pool import CallFailed, Draft, Score
from burnish.rollout.buffer import Buffer
from burnish.rollout.episode import Episode, seed_of
from burnish.rollout.metrics import prompt_metrics
from burnish.rollouts import Completion, Prompt, Rollout, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from burnish.rollout.config import RolloutConfig
    from burnish.rollout.fleet import Fleet
    from burnish.rollout.judges import Judges
    from burnish.rollouts import Dialogue

Kind = Literal["train", "eval", "probe"]
"""What a group is sampled for. A probe is one turn, and nobody rewards it."""

POLL_SECONDS = 0.005
"""Between two looks at engines and rewards, while both are asked: a step of 0.4 s spent 0.1 s on waits of 0.02 s for
the one that had nothing to say."""

LOOK_SECONDS = 0.1
"""Between two looks at engines that are asked nothing, while rewards are waited for."""


@dataclass(slots=True)
class _Open:
    """A group in flight."""

    prompt: Prompt
    version: int
    episodes: list[Episode]
    kind: Kind
    scored: bool = False

    @property
    def is_over(self) -> bool:
        return all(episode.over for episode in self.episodes)


@dataclass(slots=True)
class Collector:
    """Collects the groups of a run, on the one rank that speaks with the engines.

    Args:
        prompt_at: the run's prompt at an index; the words of why it is left out; None behind the last.
        held_out: the prompts of `data.eval`.
        per_step: groups of a step.
        max_length: tokens of a rollout, at most.
        seed: all draws are a function of it, the prompt's index and the rollout's number.
    """

    config: RolloutConfig
    fleet: Fleet
    judges: Judges
    dialogue: Dialogue
    prompt_at: Callable[[int], Prompt | str | None]
    per_step: int
    max_length: int
    seed: int
    interactive: bool
    max_turns: int = 1
    held_out: Callable[[], Iterable[Prompt]] = tuple
    version: int = -1
    """Of the policy that was published last."""
    buffer: Buffer = field(init=False)
    environment_failures: int = 0
    _unrewarded: int = 0
    """Groups in a row of which no rollout could be rewarded."""
    _open: dict[str, _Open] = field(default_factory=dict)
    _done: dict[str, RolloutGroup] = field(default_factory=dict)
    """Groups that are no training data, by the name of their prompt."""
    _refused: dict[int, DataError] = field(default_factory=dict)
    """Why a prompt cannot be asked, by its index; no new one is begun then."""
    _silent: float = 0.0
    """Seconds since something last moved on, as far as anybody looked."""
    _looked: float = field(default_factory=time.monotonic)
    _signs: int = 0
    """Of life, by the judges, at the last look."""

    def __post_init__(self) -> None:
        lag, per_step = self.config.max_policy_lag, self.per_step
        ahead = (lag + 1 + (self.config.on_stale == "drop")) * per_step
        self.buffer = Buffer(per_step, max(ahead, int(per_step * self.config.oversample)), in_turns=lag == 0)

    def published(self, version: int) -> None:
        """The engines hold `version`: groups that are begun from now on are of it."""
        self.version = version
        self.buffer.published()
        for index in self.buffer.stale(version, self.config.max_policy_lag):
            self.buffer.again(index)
        self._silent = 0.0

    def pump(self, seconds: float) -> bool:
        """Moves on what can be, and waits at most about so long for it; whether anything did.

        Raises:
            RunFailed: nothing was heard of anything for `max_silence_seconds`, or too many prompts were left out.
        """
        moved = self._begin()
        asks_judges = self.judges.num_unfinished > 0
        asks_engines = not asks_judges or any(not group.scored for group in self._open.values())
        longest = POLL_SECONDS if asks_judges else seconds
        for completion in self.fleet.poll(min(seconds, longest) if asks_engines else 0.0):
            self._sampled(completion)
            moved = True
        longest = 0.0 if moved or not asks_judges else POLL_SECONDS if asks_engines else LOOK_SECONDS
        for key, result in self.judges.poll(min(seconds, longest)):
            self._judged(key, result)
            moved = True
        stuck = not (moved or self._open) and self.version >= 0 and self.buffer.ready() is None
        assert not stuck or self.buffer.missing() in self._refused, (
            "nothing is in flight, and nothing may be begun: what was taken last was not published"
        )
        self._listen(moved)
        return moved

    def _listen(self, moved: bool) -> None:
        """Counts the seconds of silence. Of a long time between two looks only a part counts: who was suspended does
        not take all for silent when it looks again.

        Raises:
            RunFailed: there were too many.
        """
        limit, now, signs = self.config.max_silence_seconds, time.monotonic(), self.judges.signs_of_life
        if moved or not self._open or signs != self._signs:  # a verifier that hangs for each of 64 rollouts is at work
            self._silent = 0.0
        else:
            self._silent += min(now - self._looked, limit / 4)
        self._looked, self._signs = now, signs
        if self._silent > limit:
            raise RunFailed(f"nothing came for {self._silent:.0f} s; {self.waits_for()}")

    def probe_prompts(self, count: int) -> list[Prompt]:
        """The run's first prompts, for probes: always the same."""
        found = (self.prompt_at(index) for index in range(4 * count))
        return [prompt for prompt in found if isinstance(prompt, Prompt)][:count]

    def take(self) -> list[RolloutGroup] | None:
        """The groups of a step, consumed; fewer or none at the end of the run; None: they are not finished.

        Raises:
            DataError: the next prompt to be trained cannot be asked.
        """
        found = self.buffer.take()
        if found is None and (refusal := self._refused.get(self.buffer.missing())) is not None:
            raise refusal
        return found

    def waits_for(self) -> str:
        """What the next step waits for, in words."""
        waiting = [name for name, group in self._open.items() if not group.scored]
        judged = [name for name, group in self._open.items() if group.scored]
        parts = []
        if waiting:
            parts.append(f"{len(waiting)} prompts at the engines or in their environments ({_few(waiting)})")
        if judged:
            parts.append(f"the rewards of {len(judged)} ({_few(judged)})")
        return "waiting for " + " and ".join(parts or ["nothing"])

    def begin(self, prompts: Sequence[Prompt], params: SamplingParams, size: int, kind: Kind) -> list[str]:
        """Begins rollouts that are not trained, `size` of each prompt, before all that wait; their names."""
        names = [f"{kind}-{prompt.index}" for prompt in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            self._start(name, prompt, params, size, kind)
        return names

    def finished(self, names: Sequence[str]) -> list[RolloutGroup] | None:
        """The groups of these names, once all are there."""
        if any(name not in self._done for name in names):
            return None
        return [self._done.pop(name) for name in names]

    def forget(self, names: Sequence[str]) -> None:
        """Nobody waits for them any more; what comes of them is passed over."""
        for name in names:
            self._open.pop(name, None)
            self._done.pop(name, None)

    def interrupt(self) -> None:
        """Gives up what is in flight, for later: the engines are about to be put to sleep."""
        if self._open:
            self.fleet.abort()
            self.judges.abort()
            self._open.clear()
            self.buffer.interrupt()

    def facts(self) -> dict[str, float]:
        """Counters of engines, rewards and prompts; see `rollout.metrics.work_metrics`."""
        prompts = prompt_metrics(self.buffer.counts)
        failures = {"environment_failures": float(self.environment_failures)}
        return self.fleet.facts() | self.judges.facts() | prompts | failures

    def state(self) -> dict[str, Any]:
        """JSON of everything that a resume needs."""
        return self.buffer.state()

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`; what was in flight is forgotten, and begun again."""
        self.fleet.abort()
        self.judges.abort()
        self._open.clear()
        self._done.clear()
        self._refused.clear()
        self._unrewarded = 0
        self.buffer.load(state)

    def _begin(self) -> bool:
        """Starts all prompts that there is room for; whether there was one."""
        began = False
        while self.version >= 0 and (index := self.buffer.reserve(new=not self._refused)) is not None:
            began = True
            if self.buffer.drawn_since_take > self.config.max_draws * self.per_step + self.buffer.ahead:
                left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(self.buffer.counts.items()))
                raise RunFailed(
                    f"{self.buffer.drawn_since_take} prompts were asked for a step of {self.per_step}, and groups are "
                    f"still missing; so far: {left_out}\n"
                    f"  cure: easier or harder prompts, a larger group_size, or workflow.rollout.drop_uniform: false"
                )
            try:
                prompt = self.prompt_at(index)
            except DataError as error:  # raised when it is reached: what stands before it is trained first
                self._refused[index] = error
                continue
            if prompt is None:
                self.buffer.give_back(index)
            elif isinstance(prompt, str):
                self.buffer.pass_over(index, prompt)
            else:
                self._start(str(index), prompt, self.config.sampling, self.config.group_size, "train")
        return began

    def _start(self, name: str, prompt: Prompt, params: SamplingParams, size: int, kind: Kind) -> None:
        episodes = [
            Episode(f"{name}.{i}", prompt, params, self.max_length, seed_of(self.seed, name, i)) for i in range(size)
        ]
        self._open[name] = _Open(prompt, self.version, episodes, kind)
        if not self.interactive or kind == "probe":
            self.fleet.submit([episode.request() for episode in episodes], first=kind != "train")
            return
        for episode in episodes:
            self.judges.reset(f"reset/{episode.name}", prompt.columns, episode.seed)

    def _episode(self, name: str) -> tuple[_Open, Episode] | None:
        group, _, number = name.partition(".")
        found = self._open.get(group)
        return None if found is None else (found, found.episodes[int(number.partition(".")[0])])

    def _sampled(self, completion: Completion) -> None:
        found = self._episode(completion.request_id)
        if found is None or completion.request_id != found[1].request_id:
            return  # its group was given up, or a worker taken for dead has said the turn a second time
        group, episode = found
        params, is_cut = episode.params, completion.finish_reason == "length"
        endless = not (self.dialogue.stop_token_ids or params.stop or params.stop_token_ids)
        if is_cut and endless and len(completion.token_ids) == params.max_new_tokens:  # a list of ten items is whole
            completion = replace(completion, finish_reason="stop")
        episode.sampled(completion)
        goes_on = self.interactive and group.kind != "probe" and completion.finish_reason == "stop"
        if goes_on:
            self.judges.step(f"step/{episode.name}", episode.state, self.dialogue.text(episode.last_action))
        else:
            self._end(group, episode)

    def _judged(self, key: str, result: Any) -> None:
        what, _, name = key.partition("/")
        if what == "score":
            self._finish(name, result)
            return
        found = self._episode(name)
        if found is None:
            return
        group, episode = found
        if isinstance(result, CallFailed):
            self._failed(group, episode)
        elif what == "reset":
            episode.state = result
            self.fleet.submit([episode.request()])
        else:
            self._observed(group, episode, result)

    def _observed(self, group: _Open, episode: Episode, observation: Observation) -> None:
        episode.state = observation.state
        episode.rewarded(observation.rewards)
        if observation.done or episode.num_turns >= self.max_turns:
            self._end(group, episode)
            return
        try:
            token_ids = self.dialogue.observe(episode.prompt, episode.turns, observation.messages)
        except DataError as error:  # what the environment says depends on what it was told: others may go on
            self.judges.misspoken(episode.prompt.where, error.reason)
            self._failed(group, episode)
            return
        if len(token_ids) >= episode.room:
            episode.finish_reason = "length"
            self._end(group, episode)
            return
        episode.observed(observation.messages, token_ids)
        self.fleet.submit([episode.request()])

    def _failed(self, group: _Open, episode: Episode) -> None:
        """The environment has; the episode ends where it is."""
        self.environment_failures += 1
        episode.has_failed = True
        self._end(group, episode)

    def _end(self, group: _Open, episode: Episode) -> None:
        episode.over = True
        name = episode.name.partition(".")[0]
        if group.is_over and group.kind == "probe":
            self._finish(name, [Score({}, 0.0)] * len(group.episodes))
        elif group.is_over and not group.scored:
            group.scored = True
            drafts = [
                Draft(
                    said=self.dialogue.said(each.prompt, each.turns),
                    token_ids=each.sampled_ids,
                    finish_reason=each.finish_reason,
                    terms=each.terms,
                    failed=("environment",) if each.has_failed else (),
                )
                for each in group.episodes
            ]
            self.judges.score(f"score/{name}", group.prompt, drafts)

    def _finish(self, name: str, judged: Sequence[Score]) -> None:
        group = self._open.pop(name, None)
        if group is None:
            return
        rollouts = [
            _rollout(self.dialogue, episode, each) for episode, each in zip(group.episodes, judged, strict=True)
        ]
        finished = RolloutGroup(group.prompt, tuple(rollouts), group.version)
        if group.kind != "train":
            self._done[name] = finished
            return
        self._require_rewards(finished)
        if self.version - finished.version > self.config.max_policy_lag:
            self.buffer.commit(finished)
            self.buffer.again(group.prompt.index)
        elif self.config.drop_uniform and len(set(finished.rewards)) == 1:
            self.buffer.leave_out(group.prompt.index, "uniform")
        else:
            self.buffer.commit(finished)

    def _require_rewards(self, group: RolloutGroup) -> None:
        """Raises RunFailed: nothing was rewarded for two steps, from which nothing can be learned. One of several
        rewards may fail that long: a parser does until another reward has taught the form that it reads."""
        is_unrewarded = all(
            "environment" in rollout.failed or (rollout.failed and rollout.terms.keys() <= set(rollout.failed))
            for rollout in group.rollouts
        )
        self._unrewarded = self._unrewarded + 1 if is_unrewarded else 0
        if self._unrewarded >= 2 * self.per_step:
            failed = sorted({name for rollout in group.rollouts for name in rollout.failed})
            names = ", ".join(f"`{name}`" for name in failed)
            raise RunFailed(
                f"{names} failed for every rollout of the last {self._unrewarded} prompts, up to {group.prompt.where}\n"
                f"  cure: mend it; why it failed first is in events.jsonl, under reward_failed or environment_failed"
            )


def _rollout(dialogue: Dialogue, episode: Episode, judged: Score) -> Rollout:
    prompt_ids = episode.prompt.token_ids
    count = len(prompt_ids)
    return Rollout(
        token_ids=prompt_ids + episode.token_ids,
        loss_mask=[False] * count + episode.loss_mask,
        logprobs=[0.0] * count + episode.logprobs,
        versions=[-1] * count + episode.versions,
        num_prompt=count,
        said=dialogue.said(episode.prompt, episode.turns),
        terms=judged.terms,
        reward=judged.reward,
        finish_reason=episode.finish_reason,
        num_turns=episode.num_turns,
        failed=judged.failed,
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
