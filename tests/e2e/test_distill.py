"""Distillation as a person sees it: a student of another width comes to say what its teacher says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_run
from tests.e2e_helpers import Lab, column
from tests.zygote import Zygote


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_train: Path) -> Lab:
    lab = Lab(zygote, tmp_path_factory.mktemp("distill"), tiny_model, tiny_train)
    tiny_run.write_jsonl(lab.folder / "eval.jsonl", tiny_run.conversations(10, seed=1))
    return lab


@pytest.fixture(scope="module")
def teacher(lab: Lab) -> Path:
    """64 columns where the student has 48, and the same tokenizer; loud enough to have something to teach."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = shutil.copytree(lab.model_path, lab.folder / "teacher")
    config = LlamaConfig.from_pretrained(folder)
    config.hidden_size, config.head_dim = 64, 16
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(12)  # logits of about 2 instead of 0.15
    model.save_pretrained(folder)
    return folder


def workflow(teacher: Path, **loss: Any) -> dict[str, Any]:
    return {"type": "distill", "loss": loss, "teacher": {"path": str(teacher)}}


@pytest.fixture(scope="module")
def trained(lab: Lab, teacher: Path) -> Path:
    data = {"eval": [{"type": "jsonl", "path": str(lab.folder / "eval.jsonl")}]}
    optimizer = {"type": "adamw", "learning_rate": 1e-2}
    return lab.train("kd", workflow=workflow(teacher, type="kd"), data=data, optimizer=optimizer)


def test_the_divergence_falls_on_rows_it_never_saw(trained: Path) -> None:
    seen, held_out = column(trained, "divergence"), column(trained, "eval_divergence")
    assert seen[-1] < 0.8 * seen[0]
    assert len(held_out) == 2 and held_out[1] < 0.8 * held_out[0]


def test_the_export_is_nearer_to_the_teacher_by_transformers_own_logits(lab: Lab, teacher: Path, trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    row = tiny_run.conversations(1, seed=1)[0]["messages"]
    ids: Any = tokenizer.apply_chat_template(row, return_tensors="pt", return_dict=True)["input_ids"]

    def log_softmax(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0, -12:].log_softmax(1)

    q, before, after = log_softmax(teacher), log_softmax(lab.model_path), log_softmax(trained / "model")
    away = [(q.exp() * (q - p)).sum(1).mean().item() for p in (before, after)]
    assert away[1] < 0.8 * away[0]


@pytest.mark.parametrize("kind", ["kd", "topk_kd"])
def test_a_stopped_distillation_goes_on_bit_for_bit(lab: Lab, teacher: Path, kind: str) -> None:
    loss = {"type": "kd", "kind": "jsd"} if kind == "kd" else {"type": "topk_kd"}
    whole = lab.train(f"{kind}-whole", workflow=workflow(teacher, **loss), num_steps=4)
    stopped = lab.train(f"{kind}-stopped", "stop_after=2", expect=75, workflow=workflow(teacher, **loss), num_steps=4)
    lab.resume(f"{kind}-stopped")
    assert tiny_run.losses(stopped) == tiny_run.losses(whole)


def test_hidden_states_of_another_width_are_learned_through_a_head(lab: Lab, teacher: Path) -> None:
    heads = {"lm": {"type": "lm"}, "wide": {"type": "linear", "size": 64}}
    terms = [
        {"loss": {"type": "hidden_kd", "head": "wide"}},
        {"weight": 0.5, "loss": {"type": "kd", "temperature": 2.0}},
    ]
    run = lab.train(
        "hidden",
        workflow=workflow(teacher, type="sum", terms=terms),
        model={"head": {"type": "multi", "heads": heads}},
    )
    hidden, divergence = column(run, "hidden_kd/loss"), column(run, "divergence")
    assert hidden[-1] < 0.95 * hidden[0] and divergence[-1] < divergence[0]


def test_a_cache_cannot_answer_for_whole_distributions(lab: Lab) -> None:
    recipe = lab.recipe("cached", workflow={"type": "distill", "teacher": {"cache": "nowhere"}})
    code, output = lab.burnish("check", recipe)
    assert code == 2
    assert "cached.yaml:" in output and "use `loss: {type: topk_kd}`" in output


def test_answers_of_a_teacher_are_rows_to_imitate(lab: Lab) -> None:
    """Sequence-level distillation: the teacher answers the questions of the data, the student imitates the answers."""
    folder = shutil.copytree(lab.model_path, lab.folder / "talker")
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = list(range(0, 320, 4))  # a quarter of the vocabulary ends an answer
    (folder / "generation_config.json").write_text(json.dumps(config))
    answers = lab.folder / "answers.jsonl"
    asked = ("--rows", lab.train_file, "--to", answers, "--temperature", "1.0", "--max-new-tokens", "20")
    code, output = lab.burnish("generate", folder, *asked)
    assert code == 0, output
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert rows and all(row["messages"][0]["content"].startswith("turn around: ") for row in rows)
    run = lab.train("imitate", data={"train": [{"type": "jsonl", "path": str(answers)}]}, num_steps=2)
    assert len(column(run, "loss")) == 2
