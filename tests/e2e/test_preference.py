"""Preference and distillation runs as a person sees them, with a reference or a teacher beside the policy."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from burnish.policy.checkpoint import load_latest
from tests import tiny_run
from tests.e2e_helpers import Lab, column, events
from tests.zygote import Zygote

LORA = {"type": "lora", "r": 4, "lora_alpha": 8}
DPO = {"type": "preference", "loss": {"type": "dpo", "beta": 0.5}}


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The right answer turns the words around, the wrong one says other words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(tiny_run.WORDS, k=rng.randint(1, 6))
        wrong = rng.choices(["cold", "dark", "lost", "never"], k=rng.randint(1, 6))
        rows.append(
            {
                "prompt": [{"role": "user", "content": "turn around: " + " ".join(words)}],
                "chosen": [{"role": "assistant", "content": " ".join(reversed(words))}],
                "rejected": [{"role": "assistant", "content": " ".join(wrong)}],
            }
        )
    return rows


def unpaired(count: int) -> list[dict[str, Any]]:
    """The same, one answer a row."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(count)
        for side in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Lab:
    folder = tmp_path_factory.mktemp("preference")
    tiny_run.write_jsonl(folder / "eval.jsonl", pairs(12, seed=1))
    tiny_run.write_jsonl(folder / "unpaired.jsonl", unpaired(40))
    tiny_run.write_model(folder / "teacher", seed=1)
    return Lab(zygote, folder, tiny_model, tiny_run.write_jsonl(folder / "pairs.jsonl", pairs(60)))


def source(path: Path) -> list[dict[str, Any]]:
    return [{"type": "jsonl", "path": str(path)}]


@pytest.fixture(scope="module")
def full(lab: Lab) -> Path:
    """Twelve steps of DPO on all weights, beside a frozen copy."""
    return lab.train("full", workflow=DPO, data={"eval": source(lab.folder / "eval.jsonl")})


@pytest.fixture(scope="module")
def adapted(lab: Lab) -> Path:
    """The same with an adapter, whose reference has it off."""
    return lab.train("adapted", workflow=DPO, model={"adapter": LORA}, optimizer={"learning_rate": 0.02})


def test_chosen_answers_gain_on_rejected_ones(full: Path, adapted: Path) -> None:
    for run_dir in (full, adapted):
        assert column(run_dir, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
        assert column(run_dir, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)
        assert column(run_dir, "loss")[-1] < 0.55
        assert sum(column(run_dir, "rewards/accuracies")[-3:]) / 3 > 0.9
        assert column(run_dir, "rewards/margins")[-1] > 0.3
    first, last = column(full, "eval_loss")
    assert first == pytest.approx(math.log(2), abs=1e-6) and last < 0.55
    assert column(full, "eval_rewards/accuracies")[-1] > 0.9


@pytest.mark.parametrize("run", ["full", "adapted"])
def test_a_stopped_run_goes_on_bit_for_bit_from_the_same_reference(
    run: str, request: pytest.FixtureRequest, lab: Lab
) -> None:
    """Resumed weights are not the initial ones: a reference taken from them would begin at ln 2 again."""
    undisturbed = request.getfixturevalue(run)
    stopped = f"run_dir={lab.folder / f'{run}-stopped'}"
    lab.resume(run, stopped, "stop_after=5", expect=75)
    lab.resume(run, stopped)
    assert tiny_run.losses(lab.folder / f"{run}-stopped") == tiny_run.losses(undisturbed)


def test_nothing_of_the_reference_is_saved_or_exported(full: Path, adapted: Path, lab: Lab) -> None:
    for run_dir, kind in ((full, "model.embed_tokens.weight"), (adapted, ".lora_")):
        loaded = load_latest(run_dir)
        assert loaded is not None
        names = list(loaded.tensors["model"])
        assert any(kind in name for name in names) and len(names) == len(set(names))
        assert not (run_dir / "reference").exists()
    exported = sorted(path.name for path in (full / "model").iterdir())
    assert [name for name in exported if name.endswith(".safetensors")] == ["model.safetensors"]


def test_a_precomputed_reference_is_asked_once_and_trains_alike(full: Path, lab: Lab) -> None:
    workflow = DPO | {"reference": {"precompute": True}}
    changes = {"workflow": workflow, "data": {"eval": source(lab.folder / "eval.jsonl")}}
    lab.recipe("once", **changes)
    rows = pairs(60) + pairs(12, seed=1)
    asked = (
        f"asked: {len({json.dumps([row['prompt'], row[side]]) for row in rows for side in ('chosen', 'rejected')})} "
    )
    assert asked in lab.resume("once", "stop_after=5", expect=75)
    assert "asked: " not in lab.resume("once")
    run_dir = lab.folder / "once"
    assert column(run_dir, "loss") == pytest.approx(column(full, "loss"), abs=1e-6)
    assert column(run_dir, "eval_loss") == pytest.approx(column(full, "eval_loss"), abs=1e-6)

    file = run_dir / "reference" / "answers-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    (run_dir / "checkpoint-12").rename(lab.folder / "checkpoint-12")
    output = lab.resume("once", expect=2)
    assert f"{file}: is corrupt" in output and "cure: remove " in output and "Traceback" not in output
    shutil.rmtree(run_dir / "reference")
    assert asked in lab.resume("once")
    assert column(run_dir, "loss") == pytest.approx(column(full, "loss"), abs=1e-6)


def test_a_row_that_was_edited_after_it_was_asked_about_is_named(lab: Lab) -> None:
    file = shutil.copy(lab.folder / "pairs.jsonl", lab.folder / "edited.jsonl")
    workflow = DPO | {"reference": {"precompute": True}}
    data = {"train": source(Path(file)), "shuffle": False}
    lab.train("edited", "stop_after=1", expect=75, workflow=workflow, data=data, num_steps=30)
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    rows[50]["chosen"][0]["content"] = "edited"
    tiny_run.write_jsonl(Path(file), rows)
    output = lab.resume("edited", expect=2)
    assert f"{file}:51" in output and "has no answer about this document" in output


def test_answers_marked_good_or_bad(lab: Lab) -> None:
    run_dir = lab.train(
        "kto",
        workflow={"type": "preference", "loss": {"type": "kto", "beta": 0.5}},
        data={"train": source(lab.folder / "unpaired.jsonl")},
    )
    losses, kl = column(run_dir, "loss"), column(run_dir, "kl")
    assert losses[0] == pytest.approx(0.5, abs=1e-6) and losses[-1] < 0.4
    assert kl[0] == pytest.approx(0, abs=1e-6) and max(kl) > 0.05
    assert column(run_dir, "rewards/chosen")[-1] > column(run_dir, "rewards/rejected")[-1] + 0.3


# A teacher and its cache


def distill(lab: Lab, **teacher: Any) -> dict[str, Any]:
    named = {"path": str(lab.folder / "teacher"), "top_k": 8} | teacher
    return {"type": "distill", "loss": {"type": "topk_kd"}, "teacher": named}


@pytest.fixture(scope="module")
def cached(lab: Lab, tiny_train: Path) -> Path:
    """A recipe that trains from a cache, which was written."""
    recipe = lab.recipe(
        "cached",
        workflow=distill(lab, cache=str(lab.folder / "cache")),
        data={"train": source(tiny_train)},
        num_steps=6,
    )
    code, output = lab.burnish("check", recipe)
    assert code == 2 and "manifest.json cannot be read" in output and "burnish cache-teacher" in output
    code, output = lab.burnish("cache-teacher", recipe)
    assert code == 0, output
    documents = {json.dumps(row) for row in tiny_run.conversations(200)}
    assert f"its 8 likeliest tokens: {len(documents)} documents in" in output
    return recipe


def test_training_from_the_cache_is_training_beside_the_teacher(cached: Path, lab: Lab, tiny_train: Path) -> None:
    online = lab.train("online", workflow=distill(lab), data={"train": source(tiny_train)}, num_steps=6)
    output = lab.resume("cached")
    assert f"compared with {lab.folder / 'cache'}: the 8 likeliest tokens of {lab.folder / 'teacher'} for" in output
    losses = column(online, "loss")
    assert losses[-1] < losses[0]
    assert column(lab.folder / "cached", "loss") == pytest.approx(losses, rel=1e-5)


def test_check_refuses_a_cache_of_other_data_and_a_corrupt_one(cached: Path, lab: Lab, tiny_train: Path) -> None:
    code, output = lab.burnish("check", cached, "run_dir=elsewhere")
    assert code == 0, output
    other = tiny_run.write_jsonl(lab.folder / "other.jsonl", tiny_run.conversations(3, seed=9))
    code, output = lab.burnish("check", cached, "run_dir=elsewhere", f"data.train.0.path={other}")
    assert code == 2 and f"{other}:1: " in output and "has no answer about this document" in output
    assert "compared with" in output

    code, output = lab.burnish("check", cached, "run_dir=elsewhere", "workflow.teacher.top_k=4")
    assert code == 2 and "another top_k (8, not 4)" in output

    file = lab.folder / "cache" / "answers-00000.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    for command in ("check", "train"):
        code, output = lab.burnish(command, cached, f"run_dir={lab.folder / 'elsewhere'}")
        assert code == 2 and f"{file}: is corrupt" in output, output
    file.write_bytes(good)


def test_a_row_that_the_cache_lacks_is_refused_when_it_is_reached_and_what_was_learned_is_kept(
    cached: Path, lab: Lab, tiny_train: Path
) -> None:
    rows = tiny_run.conversations(200)
    rows[150] = tiny_run.conversations(1, seed=77)[0]
    file = tiny_run.write_jsonl(lab.folder / "grown.jsonl", rows)
    run_dir, ends = lab.folder / "lacking", ("data.shuffle=false", "num_steps=30", f"data.train.0.path={file}")
    code, output = lab.burnish("train", cached, f"run_dir={run_dir}", *ends)
    assert code == 2 and f"{file}:151: " in output and "has no answer about this document" in output
    assert "burnish cache-teacher" in output and "Traceback" not in output
    steps, (refused,) = column(run_dir, "loss"), events(run_dir, "refused")
    assert 4 < len(steps) < 30 and refused["checkpoint"] == f"checkpoint-{len(steps)}"
    kept = load_latest(run_dir)
    assert kept is not None and kept.name == refused["checkpoint"]


def test_a_teacher_with_another_tokenizer_is_refused_before_its_weights_are_read(lab: Lab, tiny_train: Path) -> None:
    other = shutil.copytree(lab.folder / "teacher", lab.folder / "foreign")
    (other / "model.safetensors").unlink()
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        token: 319 if i == 318 else 318 if i == 319 else i for token, i in vocabulary.items()
    }
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = lab.recipe("foreign-teacher", workflow=distill(lab, path=str(other)), data={"train": source(tiny_train)})
    for command in ("check", "train"):
        code, output = lab.burnish(command, recipe)
        assert code == 2 and f"{other}: it has another tokenizer: 2 of 320 tokens" in output, output
        assert "Traceback" not in output


def test_only_a_distillation_recipe_with_a_cache_has_one_to_write(full: Path, lab: Lab, tiny_train: Path) -> None:
    code, output = lab.burnish("cache-teacher", lab.folder / "full.yaml")
    assert code == 2 and "a workflow of type preference has no teacher" in output
    recipe = lab.recipe("no-cache", workflow=distill(lab), data={"train": source(tiny_train)})
    code, output = lab.burnish("cache-teacher", recipe)
    assert code == 2 and "a cache needs both a teacher and a place" in output
