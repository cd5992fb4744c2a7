"""`workflow: {type: rl}` as a person runs it: rewards rise, a kill changes nothing, and what was said can be read."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import rl_helpers, tiny_run
from tests.e2e_helpers import Lab, column, events
from tests.zygote import wait_until


def changes(lab: Lab, **workflow):
    return rl_helpers.changes(lab.folder / "prompts.jsonl", **workflow)


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> Path:
    """Six synchronous steps of GRPO."""
    return lab.train("undisturbed", **changes(lab))


def test_every_prompt_of_the_run_is_trained_once_in_order(undisturbed):
    assert [group["index"] for group in rl_helpers.groups(undisturbed)] == list(range(24))
    assert column(undisturbed, "lag_max") == [0.0] * 6
    assert json.loads((undisturbed / "ledger.json").read_text()) == {"prompts": {"trained": 24}}


def test_engine_and_policy_say_the_same_of_every_token(undisturbed):
    assert max(column(undisturbed, "mismatch_abs")) < 1e-5
    assert max(column(undisturbed, "mismatch/max_difference")) < 1e-5
    assert max(column(undisturbed, "probe/max_difference")) < 1e-5
    assert column(undisturbed, "ratio") == [1.0] * 6


def test_a_stopped_run_goes_on_as_if_nothing_had_been(lab: Lab, undisturbed):
    run_dir = lab.train("stopped", "stop_after=3", expect=75, **changes(lab))
    lab.resume("stopped")
    assert tiny_run.losses(run_dir) == tiny_run.losses(undisturbed)
    assert rl_helpers.texts(run_dir) == rl_helpers.texts(undisturbed)
    weights = [(each / "model" / "model.safetensors").read_bytes() for each in (run_dir, undisturbed)]
    assert weights[0] == weights[1]


def test_a_killed_run_goes_on_as_if_nothing_had_been(lab: Lab, undisturbed):
    path = lab.recipe("killed", **changes(lab))
    run_dir = lab.folder / "killed"
    trial = lab.zygote.start(["train", str(path)], lab.folder / "killed.log")
    wait_until(lambda: (run_dir / "rollouts" / "step-000004.jsonl").exists(), 60.0)
    trial.kill()
    trial.wait()
    lab.resume("killed")
    assert events(run_dir, "resumed")
    assert tiny_run.losses(run_dir) == tiny_run.losses(undisturbed)
    assert rl_helpers.trained(run_dir) == rl_helpers.trained(undisturbed)


def test_the_reward_rises(lab: Lab):
    run_dir = lab.train(
        "rises",
        **changes(lab, rollout={"group_size": 8})
        | {"num_steps": 25, "optimizer": {"type": "adamw", "learning_rate": 1e-2}, "schedule": {"type": "constant"}},
    )
    rewards = column(run_dir, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15, rewards


def test_nothing_drifts_where_nothing_is_learned(lab: Lab):
    run_dir = lab.train(
        "still",
        **changes(lab, preset="aligned", rollout={"group_size": 2, "sampling": {"max_new_tokens": 4}})
        | {
            "num_steps": 50,
            "global_batch_size": 1,
            "optimizer": {"type": "adamw", "learning_rate": 1e-30, "weight_decay": 0.0},
            "schedule": {"type": "constant"},
        },
    )
    differences = column(run_dir, "probe/max_difference")
    assert len(differences) == 50 and max(differences) < 1e-5
    assert max(column(run_dir, "mismatch/max_difference")) < 1e-5


def test_groups_that_teach_nothing_are_replaced(lab: Lab):
    rewards = [{"type": "regex", "pattern": "[aeiou]"}]  # 1 or 0: of two answers many are alike
    run_dir = lab.train("uniform", **changes(lab, rewards=rewards, rollout={"group_size": 2, "drop_uniform": True}))
    counts = json.loads((run_dir / "ledger.json").read_text())["prompts"]
    assert counts["trained"] == 24 and counts["uniform"] > 0
    assert all(len({r["reward"] for r in group["rollouts"]}) == 2 for group in rl_helpers.groups(run_dir))
    assert column(run_dir, "uniform_groups") == [0.0] * 6


def test_an_epoch_of_prompts_ends_with_its_schedule_and_an_evaluation(lab: Lab):
    recipe = changes(lab) | {"num_steps": None, "num_epochs": 1, "global_batch_size": 20}
    recipe["data"] = recipe["data"] | {"eval": recipe["data"]["train"]}
    recipe["schedule"] = {"type": "linear"}
    run_dir = lab.train("whole-epoch", **recipe)
    assert len(column(run_dir, "eval_reward")) == 2  # before the first step and after the second, which is the last
    assert column(run_dir, "learning_rate") == [pytest.approx(3e-3), pytest.approx(1.5e-3)]


def test_the_last_step_of_an_epoch_has_what_is_left(lab: Lab):
    run_dir = lab.train("epoch", **changes(lab) | {"num_steps": None, "num_epochs": 1, "global_batch_size": 16})
    assert rl_helpers.trained(run_dir) == dict.fromkeys(range(40), 1)
    assert [len(column(run_dir, "reward")), column(run_dir, "learning_rate")[-1] > 0] == [3, True]


def test_a_signal_does_not_wait_for_an_evaluation(lab: Lab):
    recipe = changes(lab, eval_group_size=16, eval_sampling={"max_new_tokens": 32})
    recipe["data"] = recipe["data"] | {"eval": recipe["data"]["train"] * 4}
    path, run_dir = lab.recipe("asked", **recipe), lab.folder / "asked"
    trial = lab.zygote.start(["train", str(path)], lab.folder / "asked.log")
    wait_until(lambda: (run_dir / "events.jsonl").exists() and bool(events(run_dir, "begun")), 60.0)
    trial.kill(signal.SIGTERM)
    assert trial.wait() == 75, trial.output()
    assert not (run_dir / "metrics.jsonl").read_text()


def test_a_bad_prompt_is_refused_when_it_is_reached_and_what_was_learned_is_kept(lab: Lab):
    rows = [{"prompt": rl_helpers.PROMPTS[i % 4]} for i in range(40)]
    rows[21] = {"prompt": "turn around: " + "stone " * 80}
    bad = tiny_run.write_jsonl(lab.folder / "bad.jsonl", rows)
    recipe = changes(lab) | {"checkpoint": {"save_every": 100}, "num_steps": 8}
    recipe["data"] = recipe["data"] | {"train": [{"type": "jsonl", "path": str(bad)}], "shuffle": False}
    code, output = lab.burnish("train", lab.recipe("bad", **recipe))
    assert code == 2 and "bad.jsonl:22" in output and "data.max_length" in output
    assert (lab.folder / "bad" / "checkpoint-5").is_dir()  # prompts 0 to 19
    rows[21] = {"prompt": rl_helpers.PROMPTS[1]}
    tiny_run.write_jsonl(bad, rows)
    lab.resume("bad")
    assert rl_helpers.trained(lab.folder / "bad") == dict.fromkeys(range(32), 1)


@pytest.mark.parametrize(
    "preset",
    ["gspo", "reinforce_pp", *(pytest.param(p, marks=pytest.mark.long) for p in ("dr_grpo", "dapo", "cispo", "rloo"))],
)
def test_every_preset_trains(lab: Lab, preset):
    run_dir = lab.train(preset, **changes(lab, preset=preset) | {"num_steps": 2})
    written = json.loads((run_dir / "recipe.json").read_text())["workflow"]
    assert written["preset"] == preset and "type" in written["loss"] and "type" in written["advantage"]
    assert len(column(run_dir, "loss")) == 2
    assert max(column(run_dir, "mismatch_abs")) < 1e-5


def test_ppo_trains_its_value_head(lab: Lab):
    head = {"type": "multi", "heads": {"lm": {"type": "lm"}, "value": {"type": "scalar"}}}
    run_dir = lab.train("ppo", **changes(lab, preset="ppo") | {"model": {"head": head}, "num_steps": 8})
    errors = column(run_dir, "value_loss")
    assert len(errors) == 8 and sum(errors[-2:]) < sum(errors[:2])


def test_a_held_out_set_is_asked_before_and_after(lab: Lab):
    recipe = changes(lab, eval_sampling={"temperature": 0.0, "max_new_tokens": 8})
    recipe["data"] |= {"eval": recipe["data"]["train"]}
    run_dir = lab.train("eval", **recipe | {"num_steps": 2})
    assert len(column(run_dir, "eval_reward")) == 2
    assert len(column(run_dir, "eval_reward/vowels")) == 2


def test_the_best_of_several_answers_become_rows(lab: Lab):
    recipe = changes(lab, type="best_of_n", preset=None, rollout={"group_size": 4, "sampling": {"max_new_tokens": 24}})
    run_dir = lab.train("best", "stop_after=1", expect=75, **recipe | {"num_steps": None, "num_epochs": 1})
    lab.resume("best")
    rows = [
        json.loads(line)
        for file in sorted((run_dir / "selected").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert rows and all(row["completion"][0]["role"] == "assistant" and row["prompt"] for row in rows)
    assert rl_helpers.trained(run_dir) == dict.fromkeys(range(40), 1)
    assert not (run_dir / "model").exists()
    sft = lab.train("on-the-best", data={"train": [{"type": "jsonl", "path": str(run_dir / "selected/*.jsonl")}]})
    assert column(sft, "loss")


def test_a_student_comes_nearer_to_its_teacher_on_its_own_answers(lab: Lab, tmp_path):
    teacher = tiny_run.write_model(tmp_path / "teacher", seed=1)
    workflow = {"type": "on_policy_distill", "preset": None, "rewards": None, "teacher": {"path": str(teacher)}}
    run_dir = lab.train("taught", **changes(lab, **workflow) | {"num_steps": 8})
    losses = column(run_dir, "divergence")
    assert losses[-1] < 0.8 * losses[0]
