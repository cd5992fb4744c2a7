"""Bad input to reinforcement learning: refused with key, reason and cure, or counted and survived."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import main
from tests import rl_helpers, tiny_run
from tests.e2e_helpers import Lab, column, ledger

HERE = "tests.rl_bad_helpers:"
SCRIPT = [[100, 101, 2], [102, 103, 104, 105, 106, 2], [107, 2]]


def changes(lab: Lab, top: dict[str, Any] | None = None, **workflow: Any) -> dict[str, Any]:
    """Two steps of four prompts; `top` replaces blocks beside the workflow."""
    blocks = rl_helpers.changes(lab.folder / "prompts.jsonl", **workflow) | {"num_steps": 2}
    data = blocks["data"] | (top or {}).pop("data", {})
    return blocks | {"data": data} | (top or {})


def sampling(**fields: Any) -> dict[str, Any]:
    return {"rollout": {"sampling": {"max_new_tokens": 8} | fields}}


def rollout(**fields: Any) -> dict[str, Any]:
    return {"rollout": fields}


def reward(**fields: Any) -> dict[str, Any]:
    return {"rewards": [fields]}


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "group of one": (
        rollout(group_size=1), "workflow.rollout.group_size", "compares the rollouts of a prompt", "raise it, or use",
    ),
    "lag inline": (
        rollout(max_policy_lag=1), "workflow.rollout.workers", "nothing can lag", "`{type: processes, num_workers: 1}`",
    ),
    "drop without a lag": (rollout(on_stale="drop"), "workflow.rollout.on_stale", "too old", "set it to wait"),
    "uniform groups of one": (
        {"preset": "reinforce_pp"} | rollout(group_size=1, drop_uniform=True),
        "workflow.rollout.drop_uniform", "always equal", "raise group_size",
    ),
    "greedy": (
        sampling(temperature=0.0), "workflow.rollout.sampling.temperature", "nothing to choose between", "set it to",
    ),
    "greedy best of n": (
        {"type": "best_of_n", "preset": None} | sampling(temperature=0.0),
        "workflow.rollout.sampling.temperature", "nothing to choose between", "set it to 1.0",
    ),
    "top p": (sampling(top_p=0.9), "workflow.rollout.sampling.top_p", "know of no cut", "remove it"),
    "top k": (sampling(top_k=5), "workflow.rollout.sampling.top_k", "know of no cut", "remove it"),
    "no room": (
        sampling(max_new_tokens=64), "workflow.rollout.sampling.max_new_tokens", "no room for a prompt", "less than 64",
    ),
    "unknown preset": ({"preset": "alphazero"}, "workflow.preset", "no preset 'alphazero'", "one of: grpo, dr_grpo"),
    "misspelt preset": ({"preset": "grop"}, "workflow.preset", "no preset 'grop'", "did you mean 'grpo'?"),
    "key of a preset": (
        {"loss": {"clip_hihg": 0.3}}, "workflow.loss.clip_hihg", "unknown key", "did you mean `clip_high`?",
    ),
    "loss elsewhere": (
        {"top": {"workflow": {"type": "sft", "loss": {"type": "ppo_clip"}}}},
        "workflow.loss", "no type 'ppo_clip'", "it belongs to `workflow: {type: rl}`",
    ),
    "loss from elsewhere": ({"loss": {"type": "kd"}}, "workflow.loss", "no type 'kd'", "distill"),
    "no rewards": ({"rewards": None}, "workflow.rewards", "what a completion is worth", "add `rewards: [{type: ...}]`"),
    "form of a path": (
        reward(type="function", path="right"), "workflow.rewards.0.path", "'right' (text)", "`my_module:my_reward`",
    ),
    "gspo by token": (
        {"preset": "gspo", "loss": {"aggregation": "token"}}, "workflow.loss.aggregation", "one ratio", "ppo_clip",
    ),
    "cispo by distance": (
        {"preset": "cispo", "loss": {"max_ratio": 0.28}}, "workflow.loss.max_ratio", "would shrink", "1.28 here",
    ),
    "ppo without a head": (
        {"preset": "ppo"}, "model.head", "a head 'value'", "heads: {lm: {type: lm}, value: {type: scalar}}}`",
    ),
    "too many minibatches": ({"num_minibatches": 5}, "workflow.num_minibatches", "4 prompts a step", "at most 4"),
    "several ranks": (
        {"top": {"launch": {"type": "processes", "num_workers": 2}}},
        "workflow.rollout.workers", "cut over several ranks", "`{type: processes, num_workers: 1}`",
    ),
    "patience": (
        rollout(max_silence_seconds=10), "workflow.rewards.0.seconds", "a call may take 10 s", "max_silence_seconds",
    ),
    "rollback": (
        {"top": {"anomaly": {"action": "rollback"}}}, "anomaly.action", "sampled anew", "set it to skip or stop",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_key_reason_and_cure(
    lab: Lab, name: str, capsys: pytest.CaptureFixture[str]
):
    fields, key, reason, cure = REFUSED[name]
    path = lab.recipe("refused", **changes(lab, **fields))
    assert main(["check", str(path), "--json"]) == 2
    (told,) = [each for each in json.loads(capsys.readouterr().out)["findings"] if each["verdict"] == "refused"]
    place, found, words = told["text"].split(": ", 2)
    assert place.startswith(f"{path}:") and found == key
    assert reason in words and cure in told["cure"]


def test_a_preset_that_is_no_name_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(lab.recipe("number", **changes(lab, preset=3)))]) == 2
    assert "workflow.preset: should be text, not 3" in capsys.readouterr().out


def test_one_of_each_prompt_is_enough_without_a_group(lab: Lab):
    run_dir = lab.train("single", **changes(lab, preset="reinforce_pp", **rollout(group_size=1)))
    assert [len(group["rollouts"]) for group in rl_helpers.groups(run_dir)] == [1] * 8
    assert min(column(run_dir, "grad_norm")) > 0


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:right", "nowhere:right: cannot be imported"),
        (f"{HERE}tow", f"{HERE}tow: there is no 'tow'"),
        ("mine.py:right", "mine.py:right: it names a file, not a module"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_before_a_model_is_loaded(lab: Lab, path: str, said: str):
    without_weights = lab.folder / "without-weights"
    shutil.copytree(lab.model_path, without_weights, dirs_exist_ok=True)
    (without_weights / "model.safetensors").unlink()
    model = {"model": {"path": str(without_weights)}}
    lab.train("unready", expect=2, **changes(lab, top=model, **reward(type="function", path=path)))
    output = (lab.folder / "output.log").read_text()
    assert f"workflow.rewards.0: {said}" in output and "\n  cure: " in output


def test_each_fault_of_a_reward_costs_one_reward(lab: Lab, tmp_path: Path):
    faults = ("hang", "raise", "none", "nan", "short")
    rewards: list[dict[str, Any]] = [
        {
            "type": "function",
            "name": fault,
            "path": f"{HERE}faulty",
            "arguments": {"fault": fault, "folder": str(tmp_path)},
            "seconds": 1.0 if fault == "hang" else 30.0,
            "failed_value": -1.0,
        }
        for fault in faults
    ]
    rewards.append({"type": "function", "name": "talkative", "path": f"{HERE}talkative"})
    run_dir = lab.train("faulty", **changes(lab, rewards=rewards))
    terms = [each["terms"] for group in rl_helpers.groups(run_dir) for each in group["rollouts"]]
    for fault in faults:
        assert column(run_dir, f"reward_failures/{fault}") == [1.0]
        assert sorted(each[fault] for each in terms) == [-1.0] + [1.0] * 31
    assert not column(run_dir, "reward_failures/talkative") and len(column(run_dir, "loss")) == 2
    assert "[reward] what a\n[reward] day\n" in (lab.folder / "output.log").read_text()


def test_prompts_that_are_too_long_are_refused_by_their_place_or_left_out(lab: Lab):
    fields = rollout(sampling={"max_new_tokens": 4})
    lab.train("long", expect=2, **changes(lab, top={"data": {"max_length": 17}}, **fields))
    output = (lab.folder / "output.log").read_text()
    assert f"{lab.folder / 'prompts.jsonl'}:" in output and " tokens, and 16 leave room for an answer" in output
    assert "cure: raise `data.max_length`, or leave such prompts out with `data.over_length: drop`" in output
    data = {"max_length": 17, "over_length": "drop"}
    run_dir = lab.train("short", **changes(lab, top={"data": data}, **fields))
    counts = ledger(run_dir)["prompts"]
    dropped = counts.pop("prompt longer than 16 tokens")
    assert counts == {"trained": 8}
    # Every fourth prompt is short enough; dropped are those before the last that was trained, and some asked ahead.
    indices = [group["index"] for group in rl_helpers.groups(run_dir)]
    assert len(set(indices)) == 8 and dropped >= indices[-1] + 1 - 8 > 0


HEAD = {"type": "multi", "heads": {"lm": {"type": "lm"}, "value": {"type": "scalar"}}}


@pytest.mark.parametrize("preset", ["grpo", "reinforce_pp", "ppo"])
def test_empty_completions_and_steps_without_a_token_train_nothing_and_break_nothing(lab: Lab, preset: str):
    fields = rollout(engine={"type": f"{HERE}Mute", "tokens": SCRIPT}, alignment={"action": "warn"})
    top = {"model": {"head": HEAD}} if preset == "ppo" else {}
    run_dir = lab.train(f"mute-{preset}", **changes(lab, top=top, preset=preset, **fields) | {"num_steps": 3})
    assert column(run_dir, "empty_completions") == [8.0, 16.0, 0.0]
    assert column(run_dir, "tokens")[1] == 0 < min(column(run_dir, "tokens")[::2])
    assert column(run_dir, "grad_norm")[1] == 0.0 and all(abs(loss) < 10 for loss in column(run_dir, "loss"))
    assert rl_helpers.trained(run_dir) == dict.fromkeys(range(12), 1)


BESIDE = pytest.param({"type": "processes", "max_restarts": 0}, marks=pytest.mark.long)


@pytest.mark.parametrize("workers", [{"type": "inline"}, BESIDE], ids=str)
@pytest.mark.parametrize(("engine", "said"), [("Unopened", "no card in this"), ("Breaking", "card fell off the bus")])
def test_an_engine_that_dies_ends_the_run(lab: Lab, workers: dict[str, Any], engine: str, said: str):
    lab.train(
        f"dead-{engine}-{workers['type']}",
        expect=1,
        **changes(lab, **rollout(engine={"type": HERE + engine}, workers=workers)),
    )
    output = (lab.folder / "output.log").read_text()
    assert said in output and f"in {'open' if engine == 'Unopened' else 'step'}" in output


def test_prompts_that_teach_nothing_end_the_run(lab: Lab):
    fields = rollout(drop_uniform=True, max_draws=3, sampling={"max_new_tokens": 2})
    lab.train("equal", expect=1, **changes(lab, **fields, **reward(type="function", path=f"{HERE}one")))
    output = (lab.folder / "output.log").read_text()
    assert "prompts were asked for a step of 4, and groups are still missing; so far: " in output
    assert " uniform\n  cure: easier or harder prompts" in output


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [("best_of_n", {"top_p": 0.9}), ("on_policy_distill", {"temperature": 0.0})],
    ids=str,
)
def test_draws_that_nobody_asks_the_probability_of_may_be_cut(lab: Lab, kind: str, drawn: dict[str, float]):
    fields: dict[str, Any] = {"type": kind, "preset": None} | sampling(**drawn)
    if kind == "on_policy_distill":
        fields |= {"rewards": None, "teacher": {"path": str(tiny_run.write_model(lab.folder / "teacher", seed=1))}}
    run_dir = lab.train(f"{kind}-{'-'.join(drawn)}", **changes(lab, **fields))
    assert max(column(run_dir, "probe/max_difference")) < 1e-5
    said = rl_helpers.texts(run_dir)
    assert all((len(set(group)) == 1) == (drawn == {"temperature": 0.0}) for group in said)
