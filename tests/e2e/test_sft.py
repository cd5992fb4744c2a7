"""Supervised fine-tuning as a person sees it: losses that fall, epochs that add up, exports that answer."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.policy.checkpoint import load_latest
from tests import tiny_run
from tests.e2e_helpers import Lab, column, events, ledger
from tests.zygote import Zygote

LORA = {"type": "lora", "r": 4, "lora_alpha": 8}

USERS_LOSSES = '''
from pathlib import Path
from typing import ClassVar

import torch

from burnish.losses.base import Loss
from burnish.losses.nll import NLL
from burnish.types import LossOutput


class Recorder(NLL):
    """Appends the samples of every training block to a file."""

    type: str
    to: str

    def __call__(self, outputs, block):
        if torch.is_grad_enabled():
            with open(self.to, "a") as file:
                file.writelines(sample + "\\n" for sample in block.sample_ids)
        return super().__call__(outputs, block)


class Poisoned(NLL):
    """Not a number for the samples that a file lists by their line; `*`: for all."""

    type: str
    listed: str

    def __call__(self, outputs, block):
        output = super().__call__(outputs, block)
        listed = Path(self.listed).read_text().split()
        if "*" in listed or any(sample.rpartition(":")[2] in listed for sample in block.sample_ids):
            return output._replace(total=output.total * float("nan"))
        return output
'''


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_train: Path) -> Lab:
    lab = Lab(zygote, tmp_path_factory.mktemp("sft"), tiny_model, tiny_train)
    (lab.folder / "users_losses.py").write_text(USERS_LOSSES)
    tiny_run.write_jsonl(lab.folder / "eval.jsonl", tiny_run.conversations(20, seed=1))
    return lab


@pytest.fixture(scope="module")
def full(lab: Lab) -> Path:
    """Twelve steps of full fine-tuning: what other runs are compared with."""
    return lab.train("full", track=[{"type": "tensorboard"}])


@pytest.fixture(scope="module")
def loud(lab: Lab) -> Path:
    """The tiny model with embeddings ten times as long: an adapter cannot change them, and with those of random
    weights (0.02) every logit is too small to say anything."""
    folder = shutil.copytree(lab.model_path, lab.folder / "loud")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 10
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def adapted(loud: Path, lab: Lab) -> Path:
    """Twelve steps of an adapter."""
    return lab.train(
        "adapted",
        model={"path": str(loud), "adapter": LORA},
        optimizer={"type": "adamw", "learning_rate": 0.02},
        schedule={"type": "constant"},
    )


def source(path: Path, **more: Any) -> dict[str, Any]:
    return {"type": "jsonl", "path": str(path), **more}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 60).unsqueeze(0)).logits[0]


def test_the_loss_falls(full: Path, adapted: Path) -> None:
    losses = column(full, "loss")
    assert len(losses) == 12
    assert losses[0] == pytest.approx(5.77, abs=0.1)  # ln 320: the model knows nothing yet
    assert sum(losses[-3:]) / 3 < losses[0] - 0.6
    losses = column(adapted, "loss")
    assert sum(losses[-3:]) / 3 < losses[0] - 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 2},
        {"model": {"activation_checkpointing": "full"}},
        {"model": {"activation_checkpointing": "selective"}},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_what_only_changes_memory_changes_no_loss(changes: dict[str, Any], full: Path, lab: Lab) -> None:
    run_dir = lab.train("lean", **changes)
    assert column(run_dir, "loss") == pytest.approx(column(full, "loss"), rel=1e-6)
    assert column(run_dir, "grad_norm") == pytest.approx(column(full, "grad_norm"), rel=1e-5)
    shutil.rmtree(run_dir)


def test_the_ledger_adds_up(full: Path) -> None:
    report, metrics = ledger(full), tiny_run.read_metrics(full)
    assert report["tokens"]["trained"] == sum(line["tokens"] for line in metrics)
    assert report["blocks"] == 2 * 12
    assert report["slots"] - report["padding"] == sum(report["tokens"].values())
    assert report["fill"] == pytest.approx(sum(line["fill"] for line in metrics) / 12)


def test_epochs_bring_every_sample_once_and_the_schedule_to_its_end(lab: Lab) -> None:
    train = tiny_run.write_jsonl(lab.folder / "epochs.jsonl", tiny_run.conversations(50))
    seen = lab.folder / "seen.txt"
    run_dir = lab.train(
        "epochs",
        workflow={"type": "sft", "loss": {"type": "users_losses:Recorder", "to": str(seen)}},
        data={"train": [source(train)], "eval": [source(lab.folder / "eval.jsonl")]},
        num_steps=None,
        num_epochs=2,
        eval_every=5,
    )
    assert Counter(seen.read_text().split()) == {f"{train}:{line}": 2 for line in range(1, 51)}
    assert (ledger(run_dir)["samples"], ledger(run_dir)["dropped"]) == (100, 0)
    metrics = tiny_run.read_metrics(run_dir)
    last = metrics[-1]["step"]
    assert [line["step"] for line in metrics if "eval_loss" in line] == [*range(0, last, 5), last]
    rates = column(run_dir, "learning_rate")
    assert max(rates) == pytest.approx(3e-3, rel=0.1) and rates[2:] == sorted(rates[2:], reverse=True)
    # Cosine at a share p of the run is (1 + cos(pi * p)) / 2, and the last step begins at about p = 1 - 1 / steps.
    assert rates[-1] < 3e-3 * (3.15 / last) ** 2

    code, output = lab.burnish("data", lab.folder / "epochs.yaml", "-n", "20", "--split", "eval", "--format", "json")
    assert code == 0
    documents = [json.loads(line) for line in output.splitlines()[:-1]]
    assert len(documents) == 20
    assert column(run_dir, "eval_loss")[0] == pytest.approx(loss_of(lab.model_path, documents), rel=1e-5)
    assert column(run_dir, "eval_loss")[-1] == pytest.approx(loss_of(run_dir / "model", documents), rel=1e-5)
    assert column(run_dir, "eval_loss")[-1] < column(run_dir, "eval_loss")[0] - 0.5


def loss_of(folder: Path, documents: list[dict[str, Any]]) -> float:
    """Mean loss of the trained tokens by plain transformers, one document at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for document in documents:
        ids, mask = torch.tensor(document["token_ids"]), torch.tensor(document["loss_mask"])
        with torch.no_grad():
            logprobs = model.eval()(input_ids=ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
        total -= float(logprobs[:-1].gather(1, ids[1:, None])[:, 0][mask[1:]].sum())
        count += int(mask.sum())
    return total / count


def test_sources_are_mixed_by_weight(lab: Lab) -> None:
    files = [tiny_run.write_jsonl(lab.folder / f"{n}.jsonl", tiny_run.conversations(24, seed=n)) for n in (5, 6)]
    train = [source(files[0], weight=3.0), source(files[1])]
    run_dir = lab.train("mixed", data={"train": train}, num_steps=None, num_epochs=1)
    sources = ledger(run_dir)["sources"]
    assert [sources[f"data.train.{n}"]["samples"] for n in (0, 1)] == [36, 12]


def test_without_packing_every_document_has_a_row_of_its_own(lab: Lab) -> None:
    run_dir = lab.train("unpacked", data={"packing": {"type": "none", "row_length": 64}})
    report = ledger(run_dir)
    assert report["blocks"] == report["samples"] == 2 * 12
    assert column(run_dir, "loss")[-1] < column(run_dir, "loss")[0] - 0.6


def test_the_loss_in_the_documentation_works_as_written(full: Path, lab: Lab) -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-loss.md").read_text()
    (code,) = re.findall(r"```python\n(# my_losses\.py.*?)```", page, re.DOTALL)
    (lab.folder / "my_losses.py").write_text(code)
    (written,) = re.findall(r"```yaml\n(workflow: .*?)\n```", page, re.DOTALL)
    override = re.sub("^workflow: ", "workflow=", written)
    lab.recipe("focal")
    lab.resume("focal", override, f"run_dir={lab.folder / 'undisturbed'}")
    lab.resume("focal", override, "stop_after=5", expect=75)
    saved = json.loads((lab.folder / "focal" / "recipe.json").read_text())
    assert saved["workflow"]["loss"] == {"type": "my_losses:Focal", "gamma": 1.5}
    lab.resume("focal", override)
    focal = tiny_run.losses(lab.folder / "focal")
    assert focal == tiny_run.losses(lab.folder / "undisturbed")
    assert focal[0][1] < column(full, "loss")[0]  # (1 - p)^1.5 < 1

    plain = lab.train("plain", workflow={"type": "sft", "loss": {"type": "my_losses:Focal", "gamma": 0.0}})
    assert column(plain, "loss") == pytest.approx(column(full, "loss"), rel=1e-6)


def test_a_step_that_is_not_finite_is_skipped_and_its_samples_are_named(lab: Lab) -> None:
    listed = lab.folder / "listed.txt"
    listed.write_text("17 90")
    run_dir = lab.train(
        "poisoned",
        workflow={"type": "sft", "loss": {"type": "users_losses:Poisoned", "listed": str(listed)}},
        num_steps=24,
        checkpoint={"save_every": 1, "keep": 24},
    )
    skipped = events(run_dir, "step_skipped")
    assert skipped and all(event["reason"] == "the loss is not finite" for event in skipped)
    for event in skipped:
        assert {f"{lab.train_file}:{line}" for line in (17, 90)} & set(event["samples"])
    steps = [event["step"] for event in skipped]
    assert [line["step"] for line in tiny_run.read_metrics(run_dir) if line["grad_norm"] == "NaN"] == steps

    lab.resume("poisoned", f"run_dir={lab.folder / 'unmoved'}", f"stop_after={steps[0]}", expect=75)
    for part in ("model", "optimizer"):
        files = [
            lab.folder / "unmoved" / f"checkpoint-{step}" / f"{part}.safetensors" for step in (steps[0] - 1, steps[0])
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_three_bad_steps_in_a_row_end_the_run_and_lose_nothing(full: Path, lab: Lab) -> None:
    listed = lab.folder / "all.txt"
    listed.write_text("")
    workflow = {"type": "sft", "loss": {"type": "users_losses:Poisoned", "listed": str(listed)}}
    run_dir = lab.train("diverged", "stop_after=6", expect=75, workflow=workflow, checkpoint={"save_every": 1})
    listed.write_text("*")
    output = lab.resume("diverged", expect=1)
    assert "step 9: the loss is not finite, the third step in a row" in output and "cure: " in output
    assert "Traceback" not in output
    assert [event["step"] for event in events(run_dir, "step_skipped")] == [7, 8, 9]
    listed.write_text("")
    lab.resume("diverged")
    assert tiny_run.losses(run_dir) == tiny_run.losses(full)


def test_a_rollback_goes_back_passes_over_the_rows_and_is_the_same_run_when_cut(full: Path, lab: Lab) -> None:
    listed = lab.folder / "sixth.txt"
    workflow = {"type": "sft", "loss": {"type": "users_losses:Poisoned", "listed": str(listed)}}
    changes = {"workflow": workflow, "anomaly": {"action": "rollback", "steps_before": 1}}
    listed.write_text("*")
    lab.train("probe", **changes, expect=1)  # the first step is bad, and there is no checkpoint to go back to
    listed.write_text("")
    probe = lab.train("rows", "stop_after=6", expect=75, **changes | {"checkpoint": {"save_every": 3}})
    listed.write_text("*")
    output = lab.resume("rows", expect=1)  # everything is bad: five times back, or three in a row
    assert "not finite" in output and "Traceback" not in output
    lines = next(event["samples"] for event in events(probe, "step_skipped") if event["step"] == 7)
    listed.write_text(lines[0].rpartition(":")[2])

    run_dir = lab.train("rolled", **changes)
    (back,) = events(run_dir, "rolled_back")
    bad = back["step"]
    assert back["to"] == max(step for step in (4, 8) if step < bad - 1)
    assert [event["step"] for event in events(run_dir, "passed_over")] == [bad - 1, bad]
    written = tiny_run.read_metrics(run_dir)
    assert [line["step"] for line in written if line["step"]] == list(range(1, 13))
    assert [line["step"] for line in written if line["step"] and "loss" not in line] == [bad - 1, bad]
    assert tiny_run.losses(run_dir)[: bad - 2] == tiny_run.losses(full)[: bad - 2]
    lab.train("rolled-cut", f"stop_after={bad - 1}", expect=75, **changes)
    lab.resume("rolled-cut", f"stop_after={bad}", expect=75)
    lab.resume("rolled-cut")
    assert tiny_run.losses(lab.folder / "rolled-cut") == tiny_run.losses(run_dir)


def test_a_run_folder_can_be_moved(full: Path, lab: Lab) -> None:
    before = lab.train("before", "stop_after=5", expect=75)
    before.rename(lab.folder / "elsewhere")
    lab.resume("before", f"run_dir={lab.folder / 'elsewhere'}")
    assert tiny_run.losses(lab.folder / "elsewhere") == tiny_run.losses(full)
    assert not before.exists()


def test_tensorboard_has_every_step(full: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = full.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(file))
    reader.Reload()
    (tag,) = [tag for tag in reader.Tags()["scalars"] if tag.rpartition("/")[2] == "loss"]
    shown = [(event.step, event.value) for event in reader.Scalars(tag)]
    assert shown == [(step, pytest.approx(loss, rel=1e-6)) for step, loss, _ in tiny_run.losses(full)]


def test_the_export_is_the_trained_model(full: Path, adapted: Path, loud: Path, lab: Lab) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trained, exported = [AutoModelForCausalLM.from_pretrained(path) for path in (lab.model_path, full / "model")]
    before = logits(trained)
    loaded = load_latest(full)
    assert loaded is not None
    tensors = {name: tensor[: trained.state_dict()[name].shape[0]] for name, tensor in loaded.tensors["model"].items()}
    assert not trained.load_state_dict(tensors, strict=False).unexpected_keys
    torch.testing.assert_close(logits(exported), logits(trained), rtol=0, atol=1e-5)
    assert (logits(exported) - before).abs().max() > 0.5

    merged, base = [AutoModelForCausalLM.from_pretrained(loud) for _ in range(2)]
    before = logits(base)
    loaded = load_latest(adapted)
    assert loaded is not None
    for name, a in loaded.tensors["model"].items():
        if ".lora_A." in name:
            b = loaded.tensors["model"][name.replace("lora_A", "lora_B")]
            merged.get_parameter(name.partition(".lora_A")[0] + ".weight").data += 8 / 4 * b @ a
    again = PeftModel.from_pretrained(base, adapted / "model")
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=1e-5)
    assert (logits(again) - before).abs().max() > 0.5


@pytest.mark.parametrize("run", ["full", "adapted"])
def test_a_run_can_be_talked_to(run: str, request: pytest.FixtureRequest, lab: Lab) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue(run)
    code, output = lab.burnish("generate", folder, "turn around: one two", "--max-new-tokens", "6")
    assert code == 0, output
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    chat = [{"role": "user", "content": "turn around: one two"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert output.strip() == tokenizer.decode(answer, skip_special_tokens=True).strip()
