"""Which prompts are begun, in which order groups are trained, and what a resume knows of them."""

from __future__ import annotations

import json
import random

import pytest

from burnish.rollout.buffer import Buffer
from burnish.rollouts import Prompt, Rollout, RolloutGroup


def group(index: int, version: int, rewards: tuple[float, ...] = (0.0, 1.0)) -> RolloutGroup:
    prompt = Prompt(index, f"rows.jsonl:{index}", [1, 2], "2+2?", {"answer": "4"})
    rollouts = tuple(
        Rollout([1, 2, 5], [False, False, True], [0, 0, -0.5], [-1, -1, version], 2, "4", {"r": r}, r, "stop")
        for r in rewards
    )
    return RolloutGroup(prompt, rollouts, version)


def test_groups_are_trained_in_the_prompts_order_whatever_finishes_first():
    buffer = Buffer(per_step=2, ahead=4)
    assert [buffer.reserve() for _ in range(5)] == [0, 1, 2, 3, None]
    for index in (3, 1, 2):
        buffer.commit(group(index, 0))
    assert buffer.take() is None  # 0 is still out
    buffer.commit(group(0, 0))
    assert [g.prompt.index for g in buffer.take() or []] == [0, 1]
    assert buffer.reserve() is None  # two in training and two committed
    buffer.published()
    assert [buffer.reserve() for _ in range(3)] == [4, 5, None]
    assert [g.prompt.index for g in buffer.take() or []] == [2, 3]


def test_what_is_left_out_makes_room_for_the_next_prompt_and_is_counted():
    buffer = Buffer(per_step=2, ahead=2)
    assert [buffer.reserve() for _ in range(3)] == [0, 1, None]
    buffer.leave_out(0, "uniform")
    assert buffer.reserve() == 2
    buffer.commit(group(2, 0))
    assert buffer.take() is None
    buffer.pass_over(1, "too long")
    assert buffer.reserve() == 3 and buffer.drawn_since_take == 3  # it was never asked
    buffer.commit(group(3, 0))
    assert [g.prompt.index for g in buffer.take() or []] == [2, 3]
    assert (buffer.frontier, buffer.counts) == (4, {"uniform": 1, "too long": 1, "trained": 2})


def test_the_last_step_of_the_last_epoch_has_fewer_groups():
    buffer = Buffer(per_step=2, ahead=4)
    for index in (0, 1, 2):
        assert buffer.reserve() == index
        buffer.commit(group(index, 0))
    buffer.give_back(buffer.reserve() or 0)
    assert buffer.reserve() is None
    assert [len(buffer.take() or []) for _ in range(3)] == [2, 1, 0]


def test_a_group_that_grew_too_old_is_sampled_again_before_anything_new():
    buffer = Buffer(per_step=1, ahead=3)
    for index in range(3):
        buffer.reserve()
        buffer.commit(group(index, version=index))
    assert buffer.stale(2, max_lag=1) == [0]
    buffer.again(0)
    assert buffer.take() is None
    assert buffer.reserve() == 0
    buffer.commit(group(0, version=2))
    assert [g.version for g in buffer.take() or []] == [2]
    assert buffer.counts == {"sampled again": 1, "trained": 1}


def test_where_sampling_and_training_take_turns_only_what_stands_before_a_step_s_last_group_is_left_out():
    buffer = Buffer(per_step=2, ahead=6, in_turns=True)
    assert [buffer.reserve() for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    for index in (1, 4, 3):
        buffer.leave_out(index, "uniform")
    buffer.pass_over(5, "too long")
    for index in (0, 2):
        buffer.commit(group(index, 0))
    assert [g.prompt.index for g in buffer.take() or []] == [0, 2]
    assert (buffer.frontier, buffer.counts["uniform"], buffer.state()["left_out"]) == (3, 1, [5])
    buffer.published()
    assert [buffer.reserve() for _ in range(3)] == [3, 4, 6]
    buffer.leave_out(3, "uniform")
    for index in (4, 6):
        buffer.commit(group(index, 1))
    assert [g.prompt.index for g in buffer.take() or []] == [4, 6]
    assert (buffer.frontier, buffer.counts["uniform"]) == (7, 2)


def test_a_resume_keeps_finished_groups_and_begins_the_others_again():
    buffer = Buffer(per_step=2, ahead=6)
    for _ in range(6):
        buffer.reserve()
    for index in (0, 1, 4):
        buffer.commit(group(index, 0))
    buffer.leave_out(3, "uniform")
    assert len(buffer.take() or []) == 2
    resumed = Buffer(per_step=2, ahead=6)
    resumed.load(json.loads(json.dumps(buffer.state())))
    assert (resumed.frontier, resumed.counts) == (2, {"uniform": 1, "trained": 2})
    assert [resumed.reserve() for _ in range(4)] == [2, 5, 6, 7]
    resumed.commit(group(2, 1))
    assert (resumed.take() or [None])[1] == group(4, 0)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_whatever_happens_every_prompt_is_trained_once_in_order_and_none_is_too_old(lag):
    """Groups finish in any order, some teach nothing, and the run is killed and resumed at any moment."""
    for seed in range(60):
        rng = random.Random(seed)
        uniform = {index for index in range(200) if rng.random() < 0.2}
        buffer, saved = Buffer(3, (lag + 1) * 3), None
        version, trained, at_save = 0, [], []
        flying: dict[int, int] = {}
        saved = json.dumps(buffer.state())
        while version < 12:
            while (index := buffer.reserve()) is not None:
                flying[index] = version
            if flying and rng.random() < 0.8:
                index = rng.choice(sorted(flying))
                begun = flying.pop(index)
                if index in uniform:
                    buffer.leave_out(index, "uniform")
                else:
                    buffer.commit(group(index, begun))
            groups = buffer.take()
            if groups is not None:
                assert all(0 <= version - g.version <= lag for g in groups), (seed, version)
                trained += [g.prompt.index for g in groups]
                version += 1
                buffer.published()
                if rng.random() < 0.5:
                    saved, at_save = json.dumps(buffer.state()), [version, list(trained)]
            if at_save and rng.random() < 0.05:  # killed
                buffer = Buffer(3, (lag + 1) * 3)
                buffer.load(json.loads(saved))
                version, trained, flying = at_save[0], list(at_save[1]), {}
        expected = [index for index in range(200) if index not in uniform]
        assert trained == expected[: len(trained)] and len(trained) == 36, seed
