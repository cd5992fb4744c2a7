"""Whole reward runs on a tiny model: what they learn, what they leave on the disk, and who can read it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.errors import ModelError
from burnish.rewards.model import Model
from tests import tiny_run
from tests.e2e_helpers import Lab, column
from tests.zygote import Zygote


def said(rng: random.Random, first: str) -> str:
    return " ".join([first, *rng.choices(tiny_run.WORDS[3:], k=rng.randint(1, 6))])


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The better answer begins with "red", the worse with "blue"."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [{"role": "user", "content": said(rng, "turn around:")}]
        chosen, rejected = ([{"role": "assistant", "content": said(rng, first)}] for first in ("red", "blue"))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def labelled(count: int) -> list[dict[str, Any]]:
    """Texts with the class of their first word, and its number of words as a score where it is odd."""
    rng = random.Random(1)
    rows = []
    for _ in range(count):
        color = rng.choice(["red", "blue"])
        text = said(rng, color)
        words = len(text.split())
        rows.append({"text": text, "color": color, "words": words / 7 if words % 2 else None})
    return rows


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("reward")
    tiny_run.write_model(folder / "model")
    train = tiny_run.write_jsonl(folder / "pairs.jsonl", pairs(96))
    with Zygote() as zygote:
        yield Lab(zygote, folder, folder / "model", train)


SCALAR = {"head": {"type": "scalar"}}


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Path:
    held_out = tiny_run.write_jsonl(lab.folder / "held_out.jsonl", pairs(16, seed=9))
    return lab.train(
        "bt",
        workflow={"type": "reward"},
        model=SCALAR,
        num_steps=16,
        data={"eval": [{"type": "jsonl", "path": str(held_out)}]},
    )


def test_the_reward_learns_which_answer_is_better(trained: Path) -> None:
    losses = column(trained, "loss")
    assert losses[0] == pytest.approx(0.693, abs=0.05)  # two nearly equal rewards: ln 2
    assert losses[-1] < 0.1
    before, after = column(trained, "eval_rewards/accuracies")
    assert before < 0.9 and after == 1.0
    assert column(trained, "eval_rewards/margins")[-1] > 1.0


def test_a_resumed_run_goes_on_bit_for_bit(lab: Lab, trained: Path) -> None:
    changes: dict[str, Any] = {"workflow": {"type": "reward"}, "model": SCALAR, "num_steps": 16}
    half = lab.train("bt_half", "stop_after=7", expect=75, **changes)
    lab.resume("bt_half")
    assert tiny_run.losses(half) == tiny_run.losses(trained)


def test_the_export_is_a_sequence_classifier_that_scores_as_the_policy(trained: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from burnish.policy.checkpoint import load_latest

    config = json.loads((trained / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "regression" and config["pad_token_id"] == 0
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(trained / "model")
    assert classifier.config.num_labels == 1
    loaded = load_latest(trained)
    assert loaded is not None
    torch.testing.assert_close(classifier.score.weight, loaded.tensors["model"]["score.weight"], rtol=0, atol=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(trained / "model")
    texts = ["red sun", "blue moon tree river"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch.attention_mask.tolist()[0][-1] == 0  # padded on the right
    with torch.no_grad():
        together = classifier(**batch).logits[:, 0]
        alone = torch.cat([classifier(**tokenizer(text, return_tensors="pt")).logits[:, 0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_reward_component_sees_what_training_saw(trained: Path) -> None:
    from transformers import AutoTokenizer

    from burnish.data.renderers.chat import Chat
    from burnish.types import Row, RowFormat

    reward = Model(path=str(trained), batch_size=3).open()
    rows = pairs(4, seed=5)
    tokenizer: Any = AutoTokenizer.from_pretrained(trained / "model")
    strings = {"prompt": "red ", "chosen": "sun", "rejected": "stone"}
    renderer = Chat(share_prompt=False).open(tokenizer, RowFormat("preference"))
    rendered = renderer.render([Row(row, "here") for row in (*rows, strings)])
    for row, one in zip((*rows, strings), rendered, strict=True):
        assert one.group is not None
        for sample, side in zip(one.group.samples, ("chosen", "rejected"), strict=True):
            assert reward.token_ids(row["prompt"], row[side], {}) == sample.token_ids.tolist()

    prompts = [row["prompt"] for row in rows] * 2
    completions = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    scores = reward(prompts, completions, trainer_state=object())  # TRL hands over more than columns
    assert min(scores[:4]) > max(scores[4:])
    alone = [reward([prompt], [said])[0] for prompt, said in zip(prompts, completions, strict=True)]
    assert scores == pytest.approx(alone, abs=1e-5)
    thinking = Model(path=str(trained), chat_template_kwargs={"enable_thinking": True}).open()
    assert thinking(prompts[:1], completions[:1], chat_template_kwargs=[{"enable_thinking": False}]) == alone[:1]


def test_an_adapter_run_keeps_adapter_and_head_alone(lab: Lab) -> None:
    from burnish.policy.checkpoint import load_latest

    adapter = {"type": "lora", "r": 4}
    run = lab.train("lora", workflow={"type": "reward"}, model=SCALAR | {"adapter": adapter}, num_steps=8)
    loaded = load_latest(run)
    assert loaded is not None
    names = set(loaded.tensors["model"])
    assert "score.weight" in names
    assert all(".lora_" in name for name in names - {"score.weight"})
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    code, output = lab.burnish("export", run, "--merge", "--to", lab.folder / "merged")
    assert code == 0, output
    rows = pairs(3, seed=7)
    asked = ([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    by_adapter, merged = (Model(path=str(path)).open()(*asked) for path in (run, lab.folder / "merged"))
    assert by_adapter == pytest.approx(merged, abs=1e-4)


def test_classes_and_numbers_of_one_backbone(lab: Lab) -> None:
    """Two heads, each with its loss; labels that a row does not have train nothing."""
    train = tiny_run.write_jsonl(lab.folder / "labelled.jsonl", labelled(96))
    terms = [
        {"loss": {"type": "classification", "label": "color", "head": "color"}},
        {"loss": {"type": "regression", "label": "words", "head": "words", "huber_delta": 1.0}},
        {"weight": 0.1, "loss": {"type": "nll"}},
    ]
    color = {"type": "classification", "labels": ["blue", "red"]}
    run = lab.train(
        "several",
        workflow={"type": "reward", "loss": {"type": "sum", "terms": terms}},
        model={"head": {"type": "multi", "heads": {"lm": {"type": "lm"}, "color": color, "words": {"type": "scalar"}}}},
        data={"train": [{"type": "jsonl", "path": str(train)}]},
        num_steps=24,
    )
    assert column(run, "accuracy")[-1] == 1.0
    errors = column(run, "absolute_error")
    assert errors[-1] < 0.5 * errors[0]
    heads = load_file(run / "model" / "heads.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in heads.items()} == {
        "color.weight": (2, 48),
        "words.weight": (1, 48),
    }
    assert json.loads((run / "model" / "heads.json").read_text())["color"]["classes"] == ["blue", "red"]
    assert json.loads((run / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_classifier_exports_the_names_of_its_classes(lab: Lab) -> None:
    train = tiny_run.write_jsonl(lab.folder / "colors.jsonl", labelled(64))
    run = lab.train(
        "classes",
        workflow={"type": "reward", "loss": {"type": "classification", "label": "color"}},
        model={"head": {"type": "classification", "labels": ["blue", "red"]}},
        data={"train": [{"type": "jsonl", "path": str(train)}]},
        num_steps=4,
    )
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "blue", "1": "red"}
    assert config["problem_type"] == "single_label_classification"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("red cat").input_ids  # as training had it: the score is read at the token that ends a text
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


def test_steps_of_solutions_are_graded(lab: Lab) -> None:
    rng = random.Random(3)
    rows = []
    for _ in range(64):
        firsts = [rng.choice(["red", "blue"]) for _ in range(rng.randint(1, 3))]
        steps = [said(rng, first) for first in firsts]
        prompt = [{"role": "user", "content": "turn around:"}]
        rows.append({"prompt": prompt, "completions": steps, "labels": [first == "red" for first in firsts]})
    train = tiny_run.write_jsonl(lab.folder / "steps.jsonl", rows)
    run = lab.train(
        "steps",
        workflow={"type": "reward", "loss": {"type": "process"}},
        model=SCALAR,
        data={"train": [{"type": "jsonl", "path": str(train)}]},
        num_steps=24,
    )
    assert sum(column(run, "accuracy")[-4:]) / 4 > 0.9
    with pytest.raises(ModelError, match="grades steps"):
        Model(path=str(run)).open()


def test_check_counts_the_head_and_names_a_family_that_cannot_be_exported(lab: Lab) -> None:
    from tests.tiny_models import tiny_config

    changes: dict[str, Any] = {"workflow": {"type": "reward"}, "model": SCALAR}
    code, output = lab.burnish("check", lab.recipe("checked", **changes))
    assert code == 0, output
    assert "57,120 parameters, 57,120 of them trained" in output  # 57,072 of the body and 48 of the head
    folder = lab.folder / "granite"
    tiny_run.write_tokenizer(folder)
    tiny_config("granite", vocab_size=320).save_pretrained(folder)
    changes["model"] = SCALAR | {"path": str(folder)}
    code, output = lab.burnish("check", lab.recipe("refused", **changes))
    assert code == 2
    assert "no sequence classification model for granite" in " ".join(output.split())


def test_a_reward_model_does_not_talk(lab: Lab, trained: Path) -> None:
    code, output = lab.burnish("generate", trained, "hello")
    assert code == 2
    assert "scores answers and writes none" in output


def test_a_language_model_is_no_reward(lab: Lab) -> None:
    with pytest.raises(ValueError, match="a LlamaForCausalLM is not a reward model"):
        Model(path=str(lab.model_path)).open()
