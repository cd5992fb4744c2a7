"""Groups of rollouts between the engines and the trainer: reserved, committed, taken, consumed, in the prompts' order.

The order is that of the prompts and not that in which groups finish, so a short answer is never trained before a long
one, and what was trained is known by two numbers. Which policy may train on which group is decided when a group is
begun: with P groups a step and a lag of at most L, no more than (L + 1) P groups are reserved and not yet trained, so
the last of them is trained L updates after the weights that it was begun with, at most. Knows neither engines nor
tensors.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from burnish.rollouts import RolloutGroup


class Buffer:
    """Which prompts are reserved, and the groups that were committed and not yet taken.

    Two prompts a step, no lag, groups of equal rewards left out:

        reserve() -> 0, reserve() -> 1, reserve() -> None     two are reserved and not yet trained
        leave_out(0, "uniform")                               room for one more
        reserve() -> 2
        commit(group 2); take(2) -> None                      1 comes first
        commit(group 1); take(2) -> [1, 2]
        reserve() -> None                                     still: they are in training
        published(1); reserve() -> 3

    Args:
        per_step: groups that a step takes.
        ahead: groups that may be reserved and not yet trained.
        in_turns: sampling and training take turns, so what was left out behind a step's last group is asked again by
            the next weights: how many of them had finished is left to chance, and a run must not be.
    """

    def __init__(self, per_step: int, ahead: int, *, in_turns: bool = False) -> None:
        assert ahead >= per_step, (per_step, ahead)
        self.per_step, self.ahead, self.in_turns = per_step, ahead, in_turns
        self.frontier = 0
        """Every prompt before this one was trained, or left out; none behind it was trained."""
        self.in_training = 0
        """Groups that were taken, and whose update is not published yet."""
        self.counts: Counter[str] = Counter()
        """Prompts by what became of them: `trained`, `uniform`, or why they were never asked; and `sampled again`."""
        self.drawn_since_take = 0
        """Prompts that were asked for the first time since groups were taken last."""
        self.ended = False
        """No prompt is left behind those that were reserved."""
        self._next = 0
        self._reserved: set[int] = set()
        self._left_out: set[int] = set()
        self._taught_nothing: dict[int, str] = {}
        """Of these, those that were asked since groups were taken last, and why they were left out."""
        self._committed: dict[int, RolloutGroup] = {}
        self._again: list[int] = []

    @property
    def outstanding(self) -> int:
        """Groups that are reserved, or committed, or in training."""
        return len(self._reserved) + len(self._again) + len(self._committed) + self.in_training

    def reserve(self, *, new: bool = True) -> int | None:
        """The next prompt to begin; None: there are enough.

        Args:
            new: not only what was begun before.
        """
        if self._again:
            index = self._again.pop(0)
        elif not new or self.ended or self.outstanding >= self.ahead:
            return None
        else:
            while self._next in self._left_out or self._next in self._committed:
                self._next += 1  # a resumed run begins again at the frontier, and some behind it are done
            index, self._next = self._next, self._next + 1
            self.drawn_since_take += 1
        self._reserved.add(index)
        return index

    def give_back(self, index: int) -> None:
        """There is no such prompt: the last epoch ended before it."""
        self._reserved.remove(index)
        self.ended = True

    def pass_over(self, index: int, reason: str) -> None:
        """A reserved prompt that is never asked, and so was no draw."""
        self.drawn_since_take -= 1
        self._leave_out(index, reason)

    def leave_out(self, index: int, reason: str) -> None:
        """A reserved prompt whose group is finished and not trained."""
        self._taught_nothing[index] = reason
        self._leave_out(index, reason)

    def commit(self, group: RolloutGroup) -> None:
        """A reserved prompt's group is finished."""
        self._reserved.remove(group.prompt.index)
        self._committed[group.prompt.index] = group

    def again(self, index: int) -> None:
        """A committed group is thrown away and its prompt will be sampled again, before any new one."""
        del self._committed[index]
        self._again.append(index)
        self._again.sort()
        self.counts["sampled again"] += 1

    def interrupt(self) -> None:
        """Whatever is reserved will be sampled again: nothing of it is in flight any more."""
        self._again = sorted([*self._again, *self._reserved])
        self.counts["sampled again"] += len(self._reserved)
        self._reserved.clear()

    def ready(self) -> list[RolloutGroup] | None:
        """The groups of the next step, in order; fewer, or none, at the run's end; None: not yet."""
        found, index = [], self.frontier
        while len(found) < self.per_step:
            if index in self._committed:
                found.append(self._committed[index])
            elif index not in self._left_out:
                is_end = self.ended and not self._reserved and not self._again
                return found if is_end else None
            index += 1
        return found

    def missing(self) -> int:
        """The first prompt that the next step waits for."""
        index = self.frontier
        while index in self._committed or index in self._left_out:
            index += 1
        return index

    def take(self) -> list[RolloutGroup] | None:
        """`ready`, consumed."""
        found = self.ready()
        if found is None:
            return None
        for group in found:
            del self._committed[group.prompt.index]
            self._left_out.add(group.prompt.index)
        if self.in_turns and len(found) == self.per_step:
            self._reconsider(found[-1].prompt.index)
        self._taught_nothing.clear()
        self.counts["trained"] += len(found)
        self.in_training, self.drawn_since_take = len(found), 0
        self._advance()
        return found

    def published(self) -> None:
        """The update that was made of what was taken is with the engines."""
        self.in_training = 0

    def stale(self, version: int, max_lag: int) -> list[int]:
        """Committed groups that are too old for the policy at `version`."""
        return [i for i, group in sorted(self._committed.items()) if version - group.version > max_lag]

    def state(self) -> dict[str, Any]:
        """JSON: the consumed frontier, and what is finished behind it. What is reserved is asked again."""
        return {
            "frontier": self.frontier,
            "left_out": sorted(self._left_out),
            "committed": [group.to_json() for _, group in sorted(self._committed.items())],
            "counts": dict(self.counts),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        groups = [RolloutGroup.from_json(each) for each in state["committed"]]
        self.frontier = self._next = state["frontier"]
        self.counts, self._left_out = Counter(state["counts"]), set(state["left_out"])
        self._committed = {group.prompt.index: group for group in groups}
        self._reserved, self._taught_nothing, self._again, self.ended = set(), {}, [], False
        self.in_training = self.drawn_since_take = 0

    def _leave_out(self, index: int, reason: str) -> None:
        self._reserved.remove(index)
        self._left_out.add(index)
        self.counts[reason] += 1
        self._advance()

    def _reconsider(self, last: int) -> None:
        """What was left out behind prompt `last` will be sampled again."""
        for index, reason in self._taught_nothing.items():
            if index > last:
                self._left_out.remove(index)
                self._again.append(index)
                self.counts[reason] -= 1
                self.counts["sampled again"] += 1
        self._again.sort()

    def _advance(self) -> None:
        while self.frontier in self._left_out:
            self._left_out.remove(self.frontier)
            self.frontier += 1
