"""What becomes of steps whose loss or gradient is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from burnish.workflows.anomaly import OK, Anomalies, Anomaly, Verdict

NAN, INF = float("nan"), float("inf")


def judged(anomalies: Anomalies, *losses: float) -> list[str]:
    """Actions over steps 1, 2, ... of these losses."""
    return [anomalies.judge(step, loss, 1.0).action for step, loss in enumerate(losses, 1)]


def test_without_a_block_bad_steps_are_skipped_and_the_third_in_a_row_ends_the_run() -> None:
    anomalies = Anomalies(Anomaly())
    assert judged(anomalies, 2.0, NAN, NAN, 900.0, NAN, INF) == ["ok", "skip", "skip", "ok", "skip", "skip"]
    assert anomalies.judge(7, 2.0, NAN) == Verdict("stop", "the gradient is not finite, the third step in a row")


def test_a_leap_is_measured_in_standard_deviations_of_the_last_good_steps() -> None:
    """1, 2, 3, 2 have the mean 2 and the deviation sqrt(2 / 3) = 0.8165: three of them above it are 4.4495."""
    anomalies = Anomalies(Anomaly(sigmas=3, window=4))
    assert judged(anomalies, 50.0, 1.0, 2.0, 3.0, 2.0) == ["ok"] * 5
    found = anomalies.judge(6, 4.45, 1.0)
    assert found.action == "skip"
    assert found.reason == "the loss of 4.45 is 3 standard deviations above the 2 of the last 4 good steps"
    assert anomalies.judge(7, 4.449, 1.0) == OK  # the leap before it is not among the good steps
    # Now they are 2, 3, 2, 4.449: mean 2.862, deviation 1.155.
    assert anomalies.judge(8, 2.862 + 3 * 1.16, 1.0).action == "skip"
    assert anomalies.judge(9, 2.862 + 3 * 1.15, 1.0) == OK


def test_before_the_window_is_full_nothing_leaps_and_a_flat_loss_has_some_room() -> None:
    anomalies = Anomalies(Anomaly(sigmas=6, window=3))
    assert judged(anomalies, 1.0, 100.0, 1.0) == ["ok"] * 3
    flat = Anomalies(Anomaly(sigmas=6, window=3))
    assert judged(flat, 2.0, 2.0, 2.0, 2.11, 2.0, 2.0, 2.0, 2.13) == ["ok"] * 7 + ["skip"]  # 6 % of 2.0 are 0.12


def test_stop_ends_the_run_at_once() -> None:
    assert Anomalies(Anomaly(action="stop")).judge(1, NAN, 1.0) == Verdict("stop", "the loss is not finite")
    assert Anomalies(Anomaly(max_bad_steps=1)).judge(1, NAN, 1.0) == Verdict("stop", "the loss is not finite")


def test_a_state_goes_through_json_and_judges_on() -> None:
    losses = [3.0, 2.5, 2.75, NAN, 2.0, 9.0, NAN]
    one = Anomalies(Anomaly(sigmas=4, window=3))
    actions = judged(one, *losses)
    for cut in range(len(losses)):
        first, second = (Anomalies(Anomaly(sigmas=4, window=3)) for _ in range(2))
        found = judged(first, *losses[:cut])
        second.load(json.loads(json.dumps(first.state())))
        found += [second.judge(step, losses[step - 1], 1.0).action for step in range(cut + 1, len(losses) + 1)]
        assert found == actions and second.state() == one.state()
    assert actions == ["ok", "ok", "ok", "skip", "ok", "skip", "skip"]


class Killed(Exception):
    pass


class Machine:
    """A run of 12 steps that saves every 3: its weights are the numbers of the steps it was trained on. Batch 6 poisons
    the weights, the checkpoint after it too, and the loss shows it one step later. What survives a kill is `disk`."""

    def __init__(self, config: Anomaly, disk: dict[str, Any], tick: Callable[[], None]) -> None:
        self.config, self.disk, self.tick = config, disk, tick
        self.begun = disk.setdefault("begun", [])
        """After which step each process began."""

    def life(self) -> str:
        """One process, to its end or to a rollback."""
        anomalies, step, weights = Anomalies(self.config), 0, []
        anomalies.expect(self.disk["list"])
        for saved in sorted(self.disk["checkpoints"], reverse=True):
            weights_then, state = json.loads(self.disk["checkpoints"][saved])
            if anomalies.is_sound(saved, state):
                step, weights = saved, weights_then
                anomalies.load(state)
                break
        self.begun.append(step)
        while step < 12:
            self.tick()
            if anomalies.pass_over(step + 1) is None:
                verdict = anomalies.judge(step + 1, NAN if 6 in weights else 1.0, 1.0)
                if verdict.action == "rollback":
                    self.disk["list"] = json.loads(json.dumps(anomalies.listed()))
                    self.tick()
                    return "rolled back"
                if verdict.action == "stop":
                    return verdict.reason
                if verdict == OK:
                    weights.append(step + 1)
            step += 1
            if step % 3 == 0:
                self.disk["checkpoints"][step] = json.dumps((weights, anomalies.state()))
        return f"trained on {weights}"


def outcome(config: Anomaly, kill_at: int | None = None) -> tuple[str, list[int]]:
    """How the run ends that is killed once, at the n-th tick, and started again; and where its processes began."""
    disk: dict[str, Any] = {"checkpoints": {}, "list": {}}
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == kill_at:
            raise Killed

    found = "rolled back"
    while found == "rolled back":
        try:
            found = Machine(config, disk, tick).life()
        except Killed:
            continue
    return found, disk["begun"]


def test_a_rollback_passes_over_what_broke_the_weights() -> None:
    """Back behind the checkpoint of step 6, whose weights hold batch 6, to that of step 3."""
    found, begun = outcome(Anomaly(action="rollback"))
    assert (found, begun) == ("trained on [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]", [0, 3])


@pytest.mark.parametrize("kill_at", range(1, 18))
def test_a_run_that_is_killed_anywhere_rolls_back_alike_and_loses_no_checkpoint(kill_at: int) -> None:
    """Ticks 1 to 7 are steps, 8 stands between list and rollback, 9 to 17 are steps 4 to 12."""
    found, begun = outcome(Anomaly(action="rollback"), kill_at)
    assert found == "trained on [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]"
    resumed_after = {**dict.fromkeys((1, 2, 3), 0), **dict.fromkeys((4, 5, 6), 3), 7: 6}
    resumed_after |= {**dict.fromkeys((8, 9, 10, 11), 3), **dict.fromkeys((12, 13, 14), 6)}
    resumed_after |= dict.fromkeys((15, 16, 17), 9)
    assert resumed_after[kill_at] in begun[1:]


def test_rollbacks_that_do_not_help_end_the_run() -> None:
    assert outcome(Anomaly())[0] == "the loss is not finite, the third step in a row"
    one_step_late = Anomaly(action="rollback", steps_before=0)
    assert outcome(one_step_late)[0] == "the loss is not finite, the third step in a row"
    few = Anomaly(action="rollback", steps_before=0, max_rollbacks=1)
    assert outcome(few)[0] == "the loss is not finite, after 1 rollback"


def test_a_rollback_passes_over_steps_before_the_bad_one_and_wants_a_checkpoint_before_those() -> None:
    anomalies = Anomalies(Anomaly(action="rollback", steps_before=2))
    assert anomalies.judge(9, NAN, 1.0) == Verdict("rollback", "the loss is not finite")
    assert [anomalies.pass_over(step) for step in (6, 7, 9, 10)] == [
        None,
        "before step 9, where the loss is not finite",
        "the loss is not finite",
        None,
    ]
    ignorant, knowing = Anomalies(Anomaly()).state(), anomalies.state()
    assert [anomalies.is_sound(steps, ignorant) for steps in (6, 7, 9)] == [True, False, False]
    assert anomalies.is_sound(9, knowing)
