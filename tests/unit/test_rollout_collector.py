"""From prompts to groups, with a fleet and judges that do as they are told: which requests are made, what becomes of
answers in any order, and who is waited for."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from burnish.environments.base import Observation
from burnish.errors import DataError, RunFailed
from burnish.rewards.pool import CallFailed, Draft, Score
from burnish.rollouts import Prompt, Request, SamplingParams
from tests.collector_helpers import (
    STOP,
    ScriptedFleet,
    ScriptedJudges,
    collected,
    collector,
    indices,
    number,
    prompt_at,
    sampled,
)


def test_one_turn_is_asked_sampled_and_rewarded():
    fleet, judges = ScriptedFleet(number), ScriptedJudges()
    groups = collected(collector(fleet, judges))
    assert indices(groups) == [0, 1]
    assert fleet.all == ["0.0.0", "0.1.0", "1.0.0", "1.1.0"]
    first, second = groups[1].rollouts
    assert second.token_ids == [1, 101, 11, STOP] and second.loss_mask == [False, False, True, True]
    assert second.logprobs == [0.0, 0.0, -11.0, -2.0] and second.versions == [-1, -1, 0, 0]
    assert (first.reward, second.reward, second.terms) == (10.0, 11.0, {"sum": 11.0})
    assert (second.said, second.num_prompt, second.num_turns, second.finish_reason) == ("11", 2, 1, "stop")


def test_requests_are_a_function_of_the_run_s_seed_and_their_place():
    fleets = [ScriptedFleet(), ScriptedFleet()]
    for fleet in fleets:
        fleet.holds = True
        collector(fleet).pump(0.0)
    assert fleets[0].asked == fleets[1].asked
    assert len({request.seed for request in fleets[0].asked}) == 4


def counting(state: dict[str, Any], action: str) -> Any:
    """Says 7 and 8 after the first turn, 9 after the second, nothing more; half a point a turn."""
    if action == "reset":
        return {**state, "turns": 0}
    turns = state["turns"] + 1
    said = [[], [{"content": "7 8"}], [{"content": "9"}], []][turns]
    return Observation(said, {**state, "turns": turns}, done=turns == 3, rewards={"step": 0.5})


def test_turns_are_answered_and_only_what_was_sampled_is_trained():
    fleet = ScriptedFleet(lambda request: [20 + len(request.prompt_ids)])
    made = collector(fleet, ScriptedJudges(counting), interactive=True, max_turns=5, per_step=1, group_size=1)
    fleet.holds = True
    for version in range(3):  # the weights change from turn to turn
        while not fleet.asked:
            made.pump(0.0)
        fleet.version = version
        fleet.answer(f"0.0.{version}")
    (group,) = collected(made)
    (rollout,) = group.rollouts
    assert rollout.token_ids == [1, 100, 22, STOP, 7, 8, 26, STOP, 9, 29, STOP]
    assert rollout.loss_mask == [token not in (1, 100, 7, 8, 9) for token in rollout.token_ids]
    assert rollout.versions == [-1, -1, 0, 0, -1, -1, 1, 1, -1, 2, 2]
    assert rollout.logprobs == [0, 0, -22, -2, 0, 0, -26, -2, 0, -29, -2]
    assert (rollout.num_turns, rollout.oldest_version, rollout.finish_reason) == (3, 0, "stop")
    assert rollout.terms == {"sum": 22 + 26 + 29, "step": 1.5} and rollout.said == "22 | 26 | 29"


def test_an_episode_ends_after_its_last_turn_whatever_the_environment_says():
    fleet = ScriptedFleet()
    made = collector(fleet, ScriptedJudges(counting), interactive=True, max_turns=2, per_step=1, group_size=1)
    (group,) = collected(made)
    (rollout,) = group.rollouts
    assert (rollout.num_turns, rollout.terms["step"]) == (2, 1.0)
    assert rollout.token_ids[-2:] == [10, STOP]  # nobody would read what was said after the last turn


@pytest.mark.parametrize(
    ("max_length", "said"),
    [
        (6, [10, STOP]),  # two tokens of the prompt, two sampled, and two observed leave no room
        (7, [10, STOP, 7, 8, 10]),
        (8, [10, STOP, 7, 8, 10, STOP]),
        (9, [10, STOP, 7, 8, 10, STOP]),
        (10, [10, STOP, 7, 8, 10, STOP, 9, 10]),
    ],
)
def test_an_episode_without_room_for_another_token_was_cut(max_length: int, said: list[int]):
    made = collector(
        ScriptedFleet(), ScriptedJudges(counting), interactive=True, max_turns=5, max_length=max_length,
        per_step=1, group_size=1,
    )  # fmt: skip
    (group,) = collected(made)
    (rollout,) = group.rollouts
    assert rollout.token_ids[2:] == said and rollout.finish_reason == "length"
    assert rollout.num_turns == said.count(10)


def failing(state: Any, action: str) -> Any:
    if (action == "reset") == (state["start"] == 0):
        return CallFailed("reset(): no answer in 10 s" if action == "reset" else "step(): no answer in 10 s")
    return state


def test_an_environment_that_fails_ends_its_episode_and_not_the_run():
    judges = ScriptedJudges(failing)
    made = collector(ScriptedFleet(), judges, interactive=True, group_size=1)
    at_reset, at_step = [group.rollouts[0] for group in collected(made)]
    assert (at_reset.num_sampled, at_reset.num_turns, at_reset.failed) == (0, 0, ("environment",))
    assert (at_step.token_ids[2:], at_step.num_turns, at_step.failed) == ([10, STOP], 1, ("environment",))
    assert made.environment_failures == 2


def test_an_environment_that_says_what_cannot_be_said_ends_its_episode_and_not_the_run():
    def speechless(state: Any, action: str) -> Any:
        return state if action == "reset" else Observation([{"content": None if state["start"] == 0 else "7"}], state)

    judges = ScriptedJudges(speechless)
    made = collector(ScriptedFleet(), judges, interactive=True, max_turns=2, group_size=1)
    bad, good = [group.rollouts[0] for group in collected(made)]
    assert (bad.token_ids[2:], bad.num_turns, bad.failed) == ([10, STOP], 1, ("environment",))
    assert (good.token_ids[2:], good.failed) == ([10, STOP, 7, 10, STOP], ())
    assert (made.environment_failures, judges.misheard) == (1, [("rows.jsonl:0", "the tool turn has no content")])


def test_the_order_in_which_completions_arrive_changes_nothing():
    expected = collected(collector(ScriptedFleet(number)))
    for seed in range(20):
        fleet = ScriptedFleet(number)
        made = collector(fleet)
        fleet.holds = True
        made.pump(0.0)
        names = random.Random(seed).sample(fleet.all, k=4)
        for name in names:
            assert made.take() is None
            fleet.answer(name)
            made.pump(0.0)
        assert collected(made) == expected, names


def test_a_completion_counts_once():
    """Of a worker that was taken for dead, and of the one that did its work again."""
    fleet = ScriptedFleet(number)
    made = collector(fleet, per_step=1)
    fleet.holds = True
    made.pump(0.0)
    twice = fleet.said(fleet.asked[0])
    fleet.finished = [twice, twice]
    made.pump(0.0)
    fleet.answer("0.1.0")
    made.pump(0.0)
    fleet.finished = [twice]
    (group,) = collected(made)
    assert [rollout.token_ids[2:] for rollout in group.rollouts] == [[10, STOP], [11, STOP]]


def test_a_group_that_grew_too_old_is_sampled_again_by_the_new_weights():
    fleet = ScriptedFleet()
    made = collector(fleet, per_step=1, max_policy_lag=1, on_stale="drop")
    assert indices(collected(made)) == [0]
    made.pump(0.0)  # prompts 1 and 2 are finished, by version 0
    for version in (1, 2):
        fleet.version = version
        made.published(version)
    (group,) = collected(made)
    assert (group.prompt.index, group.version, group.rollouts[0].versions) == (1, 2, [-1, -1, 2, 2])
    assert made.buffer.counts["sampled again"] >= 2 and fleet.all.count("1.0.0") == 2


def test_a_group_that_is_finished_too_late_is_sampled_again():
    fleet = ScriptedFleet()
    made = collector(fleet, per_step=1, max_policy_lag=0)
    fleet.holds = True
    made.pump(0.0)
    made.published(1)
    fleet.answer("0.0.0", "0.1.0")
    fleet.holds, fleet.version = False, 1
    (group,) = collected(made)
    assert (group.version, group.rollouts[0].oldest_version, made.buffer.counts["sampled again"]) == (1, 1, 1)


@pytest.mark.parametrize("who", ["engines", "rewards"])
def test_silence_ends_the_run_and_says_who_is_silent(who: str):
    fleet, judges = ScriptedFleet(), ScriptedJudges()
    fleet.holds, judges.holds = who == "engines", who == "rewards"
    made = collector(fleet, judges, max_silence_seconds=0.2)
    named = "2 prompts at the engines or in their environments" if who == "engines" else "the rewards of 2"
    since = time.monotonic()
    with pytest.raises(RunFailed, match=rf"nothing came for 0 s; waiting for {named} \(0, 1\)"):
        while time.monotonic() < since + 10:
            made.pump(0.02)
    assert 0.2 <= time.monotonic() - since < 5


def test_what_moves_now_and_then_is_not_silent():
    fleet = ScriptedFleet()
    made = collector(fleet, max_silence_seconds=0.2, group_size=4, per_step=1)
    fleet.holds = True
    made.pump(0.0)
    for name in list(fleet.all):
        time.sleep(0.12)
        made.pump(0.0)
        fleet.answer(name)
        made.pump(0.0)
    assert indices(collected(made)) == [0]


def test_a_verifier_that_hangs_for_one_rollout_after_the_other_is_not_silent():
    judges = ScriptedJudges()
    judges.holds = True
    made = collector(ScriptedFleet(), judges, max_silence_seconds=0.2, per_step=1)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        made.pump(0.02)
        judges.signs_of_life += 1
    with pytest.raises(RunFailed, match=r"waiting for the rewards of 1 \(0\)"):
        while time.monotonic() < until + 10:
            made.pump(0.02)


def test_time_in_which_nobody_looked_is_no_silence():
    fleet = ScriptedFleet()
    made = collector(fleet, max_silence_seconds=0.2, per_step=1)
    fleet.holds = True
    made.pump(0.0)
    time.sleep(0.3)  # the process was suspended
    made.pump(0.0)
    fleet.answer(*list(fleet.all))
    assert indices(collected(made)) == [0]


def every_third(index: int) -> Prompt | str | None:
    return None if index > 7 else prompt_at(index) if index % 3 == 0 else "prompt longer than 5 tokens"


def test_dropped_prompts_are_counted_and_others_asked_in_their_place():
    made = collector(ScriptedFleet(), prompt_at=every_third)
    assert indices(collected(made)) == [0, 3]
    made.published(1)
    assert indices(collected(made)) == [6]  # the last step of the last epoch
    made.published(2)
    assert collected(made) == []
    assert made.buffer.counts == {"trained": 3, "prompt longer than 5 tokens": 5}


def test_groups_that_teach_nothing_end_the_run_at_last():
    made = collector(ScriptedFleet(), drop_uniform=True, max_draws=3)
    with pytest.raises(RunFailed, match=r"9 prompts were asked for a step of 2.*so far: 8 uniform\n  cure: "):
        collected(made)


def test_prompts_that_are_never_asked_are_no_draws():
    """84 rows in a row were too long, and `drop_uniform` was named as the cure."""
    made = collector(ScriptedFleet(), prompt_at=lambda index: prompt_at(index) if index >= 100 else "too long")
    assert indices(collected(made)) == [100, 101]
    assert made.buffer.counts == {"trained": 2, "too long": 100}


def test_what_grew_too_old_before_a_prompt_that_cannot_be_asked_is_sampled_again():
    def eighth_is_bad(index: int) -> Prompt | str | None:
        if index == 7:
            raise DataError("the prompt has 90 tokens", where="rows.jsonl:7")
        return prompt_at(index)

    fleet = ScriptedFleet()
    made = collector(fleet, prompt_at=eighth_is_bad, max_policy_lag=1, on_stale="drop")
    steps = []
    for version in (1, 2, 3):
        made.pump(0.0)  # 0 to 5 by version 0; 6, and 7 which cannot be asked, by version 1
        steps.append(indices(collected(made)))
        fleet.version = version
        made.published(version)
    assert steps == [[0, 1], [2, 3], [4, 5]] and fleet.all.count("4.0.0") == 2
    with pytest.raises(DataError, match="rows.jsonl:7"):
        collected(made)


@pytest.mark.parametrize("first", ["0.0.0", "2.0.0"])
def test_what_a_step_trains_is_not_left_to_which_surplus_group_was_finished_in_time(first: str):
    """Of four prompts the two first are trained; the third teaches nothing to version 0, and something to version 1."""

    def say(request: Request) -> list[int]:
        index, number = (int(part) for part in request.request_id.split(".")[:2])
        return [10 if index == 2 and fleet.version == 0 else 10 + number]

    fleet = ScriptedFleet(say)
    made = collector(fleet, oversample=2.0, drop_uniform=True)
    fleet.holds = True
    made.pump(0.0)
    rest = {"0.0.0": ["0.1.0", "1.0.0", "1.1.0"], "2.0.0": ["2.1.0", "0.0.0", "0.1.0", "1.0.0", "1.1.0"]}[first]
    for name in [first, *rest]:
        fleet.answer(name)
        made.pump(0.0)
    assert indices(made.take() or []) == [0, 1]
    made.interrupt()
    made.published(1)
    fleet.version, fleet.holds = 1, False
    assert indices(collected(made)) == [2, 3] and made.buffer.counts["uniform"] == 0


def test_a_prompt_that_cannot_be_asked_ends_the_run_when_it_is_reached():
    def third_is_bad(index: int) -> Prompt | str | None:
        if index == 3:
            raise DataError("the prompt has 90 tokens", where="rows.jsonl:3")
        return prompt_at(index)

    made = collector(ScriptedFleet(), prompt_at=third_is_bad, max_policy_lag=1)
    assert indices(collected(made)) == [0, 1]
    made.published(1)
    with pytest.raises(DataError, match="rows.jsonl:3: the prompt has 90 tokens"):
        collected(made)
    assert json.loads(json.dumps(made.state()))["frontier"] == 2


def test_what_nobody_waits_for_any_more_is_passed_over():
    fleet = ScriptedFleet(number)
    made = collector(fleet)
    fleet.holds = True
    names = made.begin([Prompt(0, "eval.jsonl:0", [1, 50], "?", {})], SamplingParams(max_new_tokens=4), 2, "eval")
    made.pump(0.0)
    made.forget(names)
    fleet.answer(*list(fleet.all))
    assert indices(collected(made)) == [0, 1] and made.finished(names) is None


def test_evaluation_goes_on_beside_training_and_trains_nothing():
    fleet, judges = ScriptedFleet(number), ScriptedJudges()
    made = collector(fleet, judges)
    fleet.holds = True
    made.pump(0.0)
    waiting = list(fleet.all)
    fleet.holds = False
    held_out = [Prompt(0, "eval.jsonl:0", [1, 50], "?", {})]
    names = made.begin(held_out, SamplingParams(temperature=0.0, max_new_tokens=1, stop=["."]), 2, "eval")
    (group,) = sampled(made, names)
    assert [rollout.token_ids for rollout in group.rollouts] == [[1, 50, 10], [1, 50, 11]]
    assert (group.rollouts[1].reward, group.rollouts[1].finish_reason) == (11.0, "length")
    assert fleet.all == [*waiting, "eval-0.0.0", "eval-0.1.0"] and fleet.hurried == fleet.all[4:]
    assert made.buffer.counts == {} and made.take() is None
    fleet.answer(*waiting)
    assert indices(collected(made)) == [0, 1]


def test_a_probe_is_one_turn_that_nobody_judges():
    fleet, judges = ScriptedFleet(), ScriptedJudges(counting)
    made = collector(fleet, judges, interactive=True, max_turns=5, prompt_at=every_third)
    fleet.holds = True
    probes = made.probe_prompts(2)
    assert [prompt.index for prompt in probes] == [0, 3]
    fleet.holds = False
    groups = sampled(made, made.begin(probes, SamplingParams(max_new_tokens=4), 1, "probe"))
    assert [group.rollouts[0].token_ids[2:] for group in groups] == [[10, STOP]] * 2
    assert not any("probe" in key for key in judges.scored) and groups[0].rollouts[0].terms == {}


def test_what_was_in_flight_is_asked_again_with_the_same_seeds():
    undisturbed = ScriptedFleet(number)
    made = collector(undisturbed)
    steps = [collected(made)]
    made.published(1)
    steps.append(collected(made))

    fleet = ScriptedFleet(number)
    made = collector(fleet)
    assert collected(made) == steps[0]
    made.published(1)
    fleet.holds = True
    made.pump(0.0)
    asked = list(fleet.asked)
    fleet.answer("2.0.0")
    made.pump(0.0)
    state = json.loads(json.dumps(made.state()))
    resumed = ScriptedFleet(number)
    resumed.holds = True
    other = collector(resumed)
    other.load(state)
    other.published(1)
    other.pump(0.0)
    assert resumed.asked == asked
    resumed.answer(*[request.request_id for request in asked])
    assert collected(other) == steps[1]


def test_what_is_interrupted_for_an_update_is_begun_anew():
    fleet = ScriptedFleet(number)
    made = collector(fleet, oversample=2.0)
    fleet.holds = True
    made.pump(0.0)
    late = fleet.said(fleet.asked[-1])
    fleet.answer("0.0.0", "0.1.0", "1.0.0", "1.1.0")
    assert indices(collected(made)) == [0, 1]
    made.interrupt()
    made.published(1)
    fleet.version = 1
    fleet.holds = False
    groups = collected(made)
    assert indices(groups) == [2, 3] and fleet.all.count("3.1.0") == 2
    assert all(rollout.oldest_version == 1 for group in groups for rollout in group.rollouts)
    assert late.versions == [0, 0] and made.buffer.counts["sampled again"] == 2


class Failing(ScriptedJudges):
    """Of two rewards these fail for every rollout."""

    def __init__(self, *failed: str) -> None:
        super().__init__()
        self.failed = failed

    def score(self, key: str, prompt: Prompt, drafts: Sequence[Draft]) -> None:
        self.finished.append((key, [Score({"right": 0.0, "form": 1.0}, 1.0, self.failed) for _ in drafts]))


@pytest.mark.parametrize("failed", [("right", "form"), ("environment",)])
def test_a_run_of_which_nothing_is_ever_rewarded_ends(failed):
    made = collector(ScriptedFleet(), Failing(*failed), max_policy_lag=1)
    with pytest.raises(RunFailed, match=f"`{min(failed)}`.* failed for every rollout of the last 4 prompts, up to row"):
        for _ in range(10):
            made.pump(0.0)
    assert made.buffer.ready() is not None  # what came before is still there


def test_one_of_two_rewards_may_fail_for_ever():
    made = collector(ScriptedFleet(), Failing("right"))
    for version in range(1, 7):
        collected(made)
        made.published(version)
    assert made.buffer.counts["trained"] == 12
