"""Rewards and environments in processes that can be killed: a verifier that hangs costs one reward, not the run.

Each reward is asked once for all rollouts of a group. Where that fails, each rollout is asked alone, so that only those
whose fault it was get `failed_value`. Used by one thread at a time, which never waits longer than it says.
"""

from __future__ import annotations

import pickle
import select
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import burnish.errors
from burnish.environments.base import Environment, Observation
from burnish.errors import RunFailed, UserError
from burnish.rewards.base import Reward, free_name, term_names
from burnish.rewards.process import RewardProcess
from burnish.rollouts import Prompt

OPEN_SECONDS = 600.0
"""Longest that a process may take to open all rewards; a reward model of 8B is read in under 100 s."""
_MAX_BAD_STARTS = 3
_LOOK_SECONDS = 0.2
"""Between two looks at processes: one that died while its child holds the socket says nothing there."""
_QUIET_SECONDS = 60.0
"""Between two events about the same reward."""

Event = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Draft:
    """A finished episode that has no reward yet."""

    said: Any
    """The completion in the form of the prompt's `asked`."""
    token_ids: list[int]
    """Sampled tokens of all its turns: `completion_ids` of reward functions."""
    finish_reason: Literal["stop", "length"]
    terms: dict[str, float] = field(default_factory=dict)
    """What the environment gave in all its steps, by name."""
    failed: tuple[str, ...] = ()
    """`("environment",)` where a call of it failed."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a rollout is worth."""

    terms: dict[str, float]
    """Each reward by its name, unweighted, and what the environment gave; that counts with weight 1."""
    reward: float
    """Their weighted sum."""
    failed: tuple[str, ...] = ()
    """Names of those that stand at their `failed_value`; and `environment`, where a call of it failed."""


@dataclass(frozen=True, slots=True)
class CallFailed:
    """Instead of what `reset` or `step` would have said; the episode ends where it is."""

    why: str


Result = list[Score] | Observation | CallFailed | Any
"""Of `score`: a `Score` for each draft. Of `step`: an `Observation` or `CallFailed`. Of `reset`: the state or
`CallFailed`."""


@dataclass(slots=True)
class _Group:
    """The drafts of a prompt while their rewards come in: `values[r][i]` of reward r for draft i."""

    key: Hashable
    prompt: Prompt
    drafts: Sequence[Draft]
    values: list[list[float]]
    failed: list[list[str]]
    left: int
    """Values still missing."""


@dataclass(slots=True)
class _Job:
    """One call: a reward for the rollouts `indices` of `group`, or of the environment where that is None."""

    key: Hashable
    request: tuple[Any, ...]
    seconds: float
    where: str
    group: _Group | None = None
    reward: int = 0
    indices: tuple[int, ...] = ()
    num_deaths: int = 0
    is_forgotten: bool = False


@dataclass(slots=True)
class _Worker:
    """A process and what it is at."""

    process: RewardProcess
    deadline: float
    is_open: bool = False
    job: _Job | None = None
    was_granted: bool = False
    """More time, because its answer was on the way."""
    since: float = 0.0
    words: str = ""
    """Why it could not open the rewards."""


class RewardPool:
    """Asks rewards and the environment in `num_workers` processes.

    Args:
        event: told of starts and deaths of processes, and of failures, each reward at most once a minute.

    Raises:
        UserError: a reward cannot be opened, or two have one name.
    """

    def __init__(self, rewards: Sequence[Reward], environment: Environment, num_workers: int, event: Event) -> None:
        self.names = term_names(rewards)
        self._rewards, self._environment, self._event = list(rewards), environment, event
        self._parts = pickle.dumps((self._rewards, environment))
        self._queue: deque[_Job] = deque()
        self._finished: list[tuple[Hashable, Result]] = []
        names = "reward_failures", "reward_retries", "reward_restarts", "reward_seconds"
        self._facts: dict[str, float] = dict.fromkeys(names, 0.0)
        self._told: dict[str, float] = {}
        self.signs_of_life = 0
        """What was heard of processes, and given up of them: while it grows, calls come to an end."""
        self._is_open, self._bad_starts = False, 0
        self._workers: list[_Worker] = []
        if rewards or environment.is_interactive:
            try:
                self._workers = [self._start() for _ in range(num_workers)]
                while not all(worker.is_open for worker in self._workers):
                    self._turn(time.monotonic() + _LOOK_SECONDS)
            except BaseException:
                self.close()
                raise
        self._is_open = True

    def score(self, key: Hashable, prompt: Prompt, drafts: Sequence[Draft]) -> None:
        """Queues all rollouts of a prompt. `key` is that of nothing unfinished."""
        sizes = len(self._rewards), len(drafts)
        values = [[0.0] * sizes[1] for _ in self._rewards]
        group = _Group(key, prompt, drafts, values, [list(draft.failed) for draft in drafts], sizes[0] * sizes[1])
        if not group.left:
            self._finish(group)
        else:
            self._queue.extend(self._scoring(group, reward, tuple(range(sizes[1]))) for reward in range(sizes[0]))

    def reset(self, key: Hashable, row: dict[str, Any], seed: int) -> None:
        """Queues the beginning of an episode."""
        self._queue.append(_Job(key, ("reset", row, seed), self._environment.seconds, "reset()"))

    def step(self, key: Hashable, state: Any, action: str) -> None:
        """Queues a step of an episode."""
        self._queue.append(_Job(key, ("step", state, action), self._environment.seconds, "step()"))

    def poll(self, seconds: float) -> list[tuple[Hashable, Result]]:
        """What finished since the last call; returns as soon as there is some, else after about `seconds`.

        Raises:
            RunFailed: processes cannot be started any more.
        """
        until = time.monotonic() + seconds
        while True:
            self._assign()
            if not self._finished:
                self._turn(until)
            if self._finished or time.monotonic() >= until:
                finished, self._finished = self._finished, []
                self._assign()
                return finished

    def abort(self) -> None:
        """Forgets all that is unfinished; none of it is heard of again."""
        self._queue.clear()
        self._finished.clear()
        for worker in self._workers:
            if worker.job is not None:
                worker.job.is_forgotten = True

    def misspoken(self, where: str, why: str) -> None:
        """The environment said what cannot be said to the policy."""
        self._tell("environment_failed", "environment", where, f"step(): {why}")

    @property
    def num_unfinished(self) -> int:
        """Calls queued or under way; 0: a poll would bring nothing."""
        busy = sum(worker.job is not None and not worker.job.is_forgotten for worker in self._workers)
        return len(self._queue) + busy + len(self._finished)

    @property
    def pids(self) -> list[int]:
        """Of its processes."""
        return [worker.process.pid for worker in self._workers]

    def facts(self) -> dict[str, float]:
        """Sums since it was made: `reward_failures` in rollouts, `reward_retries` and `reward_restarts`,
        `reward_seconds` of all processes; and `reward_workers`, how many there are."""
        return self._facts | {"reward_workers": float(len(self._workers))}

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.process.kill()
        self._workers = []

    # The processes

    def _start(self) -> _Worker:
        process = RewardProcess(self._parts)
        self._event("reward_worker_started", pid=process.pid)
        return _Worker(process, time.monotonic() + OPEN_SECONDS)

    def _assign(self) -> None:
        for worker in self._workers:
            if worker.is_open and worker.job is None and self._queue:
                worker.job, worker.since = self._queue.popleft(), time.monotonic()
                worker.deadline, worker.was_granted = worker.since + worker.job.seconds, False
                worker.process.ask(worker.job.request)

    def _turn(self, until: float) -> None:
        """Waits for news, `until` at most, and takes it in."""
        now = time.monotonic()
        busy = [worker for worker in self._workers if worker.job is not None or not worker.is_open]
        wait = min([until, now + _LOOK_SECONDS, *(worker.deadline for worker in busy)]) - now
        news = select.poll()
        for worker in self._workers:
            news.register(worker.process, select.POLLIN | (select.POLLOUT if worker.process.wants_room else 0))
        news.poll(max(0.0, wait) * 1000)
        for worker in list(self._workers):
            # What it answered counts even where it has died since, or where we were away beyond the deadline.
            for answer in worker.process.receive():
                self._hear(worker, answer)
            if death := worker.process.death():
                self._replace(worker, death, is_late=False)
            elif (worker.job is not None or not worker.is_open) and time.monotonic() > worker.deadline:
                self._late(worker)

    def _late(self, worker: _Worker) -> None:
        seconds = OPEN_SECONDS if worker.job is None else worker.job.seconds
        if worker.process.is_answering and not worker.was_granted:
            worker.was_granted, worker.deadline = True, time.monotonic() + seconds
            self.signs_of_life += 1
        else:
            self._replace(worker, f"no answer in {seconds:g} s", is_late=True)

    def _replace(self, worker: _Worker, why: str, is_late: bool) -> None:
        worker.process.kill()
        self.signs_of_life += 1
        self._event("reward_worker_lost", pid=worker.process.pid, why=why)
        self._facts["reward_restarts"] += 1
        if not worker.is_open:
            self._bad_start(worker.words or f"a reward cannot be opened: {why}")
        self._workers[self._workers.index(worker)] = self._start()
        if worker.job is not None:
            self._facts["reward_seconds"] += time.monotonic() - worker.since
            self._lost(worker.job, why, is_late)

    def _bad_start(self, why: str) -> None:
        self._bad_starts += 1
        was_killed = "ended by SIG" in why  # by whoever kills processes, which is no reason to refuse a reward
        if self._bad_starts < _MAX_BAD_STARTS and (self._is_open or was_killed):
            return
        if not self._is_open:
            raise UserError(
                why, where="workflow.rewards", cure="try it with `python -c`, in this folder and environment"
            )
        raise RunFailed(f"reward processes cannot be started any more: {why}")

    # What they say

    def _hear(self, worker: _Worker, answer: dict[str, Any]) -> None:
        self.signs_of_life += 1
        if not worker.is_open:
            if "ready" in answer:
                worker.is_open, self._bad_starts = True, 0
            elif "refused" in answer and not self._is_open:
                kind, *facts = answer["refused"]
                raise getattr(burnish.errors, kind, UserError)(*facts)
            else:  # its process ends now, and is replaced
                worker.words = "a reward cannot be opened: " + (answer.get("broken") or answer["refused"][1])
            return
        assert worker.job is not None, answer
        job, worker.job = worker.job, None
        self._facts["reward_seconds"] += time.monotonic() - worker.since
        if job.is_forgotten:
            return
        if "raised" in answer:
            self._fail(job, answer["raised"])
        elif job.group is not None:
            self._take(job, job.group, answer)
        elif job.request[0] == "reset":
            self._finished.append((job.key, answer["state"]))
        else:
            self._finished.append((job.key, Observation(**answer)))

    def _take(self, job: _Job, group: _Group, answer: dict[str, Any]) -> None:
        bad = []
        for index, value in zip(job.indices, answer["values"], strict=True):
            if value is None:
                bad.append(index)
            else:
                self._settle(group, job.reward, index, value)
        if bad:
            self._retry_or_give_up(group, job, tuple(bad), f"it said {answer['bad']}, not a number")

    def _lost(self, job: _Job, why: str, is_late: bool) -> None:
        """A call whose process is gone."""
        if job.is_forgotten:
            return
        # A process may have died of something else, memory or an operator: who was alone in it is asked once more.
        if not is_late and job.num_deaths == 0 and len(job.indices) <= 1:
            job.num_deaths += 1
            self._facts["reward_retries"] += 1
            self._queue.appendleft(job)
        else:
            self._fail(job, why)

    def _fail(self, job: _Job, why: str) -> None:
        """A call that brought nothing."""
        if job.group is not None:
            self._retry_or_give_up(job.group, job, job.indices, why)
        else:
            self._tell("environment_failed", "environment", job.where, why)
            self._finished.append((job.key, CallFailed(f"{job.where}: {why}")))

    def _retry_or_give_up(self, group: _Group, job: _Job, indices: tuple[int, ...], why: str) -> None:
        """Rollouts without a value: each is asked alone, unless it was."""
        name = self.names[job.reward]
        if len(job.indices) > 1:
            self._facts["reward_retries"] += len(indices)
            self._tell("reward_asked_again", name, job.where, why)
            alone = [self._scoring(group, job.reward, (index,)) for index in indices]
            self._queue.extendleft(reversed(alone))
        else:
            self._facts["reward_failures"] += 1
            self._tell("reward_failed", name, job.where, why)
            group.failed[indices[0]].append(name)
            self._settle(group, job.reward, indices[0], self._rewards[job.reward].failed_value)

    def _tell(self, kind: str, name: str, where: str, why: str) -> None:
        now = time.monotonic()
        if now - self._told.get(kind + name, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            self._told[kind + name] = now
            self._event(kind, reward=name, where=where, why=why, failures=int(self._facts["reward_failures"]))

    # Groups

    def _scoring(self, group: _Group, reward: int, indices: tuple[int, ...]) -> _Job:
        ours = {"prompts", "completions", "completion_ids", "finish_reason"}
        columns = {name: value for name, value in group.prompt.columns.items() if name not in ours}
        drafts = [group.drafts[index] for index in indices]
        each = {
            "completions": [draft.said for draft in drafts],
            "completion_ids": [draft.token_ids for draft in drafts],
            "finish_reason": [draft.finish_reason for draft in drafts],
        }
        request = ("score", reward, group.prompt.asked, columns, each)
        return _Job(group.key, request, self._rewards[reward].seconds, group.prompt.where, group, reward, indices)

    def _settle(self, group: _Group, reward: int, index: int, value: float) -> None:
        group.values[reward][index] = value
        group.left -= 1
        if not group.left:
            self._finish(group)

    def _finish(self, group: _Group) -> None:
        scores = []
        for index, draft in enumerate(group.drafts):
            terms = {name: values[index] for name, values in zip(self.names, group.values, strict=True)}
            reward = sum(each.weight * terms[name] for each, name in zip(self._rewards, self.names, strict=True))
            for name, value in draft.terms.items():
                terms[free_name(name, set(terms))] = value
                reward += value
            scores.append(Score(terms, float(reward), tuple(group.failed[index])))
        self._finished.append((group.key, scores))
