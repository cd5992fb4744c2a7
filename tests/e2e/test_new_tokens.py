"""An added token from the recipe to the exported folder: trained, saved, resumed, merged, read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from burnish.policy.checkpoint import load_latest
from tests import tiny_run
from tests.e2e_helpers import Lab, column
from tests.zygote import Zygote

ITEMS = {"<item_1>": "red cat", "<item_2>": "green dog", "<item_3>": "blue bird"}


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_train: Path) -> Lab:
    lab = Lab(zygote, tmp_path_factory.mktemp("new_tokens"), tiny_model, tiny_train)
    rows = [
        {"messages": [{"role": "user", "content": f"after {a}?"}, {"role": "assistant", "content": f"{b} {a}"}]}
        for a, b in [("<item_1>", "<item_2>"), ("<item_2>", "<item_3>"), ("<item_3>", "<item_1>")] * 40
    ]
    tiny_run.write_jsonl(lab.folder / "items.jsonl", rows)
    return lab


def blocks(lab: Lab, **add_tokens: object) -> dict[str, object]:
    tokenizer = {"type": "model", "add_tokens": {"tokens": ITEMS} | add_tokens}
    return {"train": [{"type": "jsonl", "path": str(lab.folder / "items.jsonl")}], "tokenizer": tokenizer}


LORA = {"type": "lora", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_run_learns_its_new_tokens_resumes_bit_for_bit_and_exports_them(lab, adapter):
    name = "full" if adapter is None else "lora"
    changes = {"data": blocks(lab), "model": {"adapter": adapter}, "num_steps": 20}
    run = lab.train(name, **changes)
    losses = column(run, "loss")
    assert losses[-1] < losses[0] - 0.3
    saved = load_latest(run)
    assert saved is not None
    model = saved.tensors["model"]
    assert model["model.embed_tokens.new_rows"].shape == (3, 48)
    assert "model.embed_tokens.weight" not in model  # the old rows neither train nor take space
    stopped = lab.train(f"{name}_stopped", "stop_after=6", expect=75, **changes)
    lab.resume(f"{name}_stopped")
    assert tiny_run.losses(stopped) == tiny_run.losses(run)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.convert_tokens_to_ids(list(ITEMS)) == [320, 321, 322]
    assert tokenizer("a<item_2> b").input_ids.count(321) == 1
    reread = AutoModelForCausalLM.from_pretrained(run / "model")
    rows = reread.get_input_embeddings().weight
    assert len(rows) == 323 and torch.equal(rows[320:], model["model.embed_tokens.new_rows"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "after <item_2>?"}], tokenize=False, add_generation_prompt=True
    )
    next_id = reread(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1].argmax()
    assert next_id in (320, 321, 322)


def test_a_reference_is_the_model_with_its_rows_as_they_began(lab):
    pairs = [
        {"prompt": "after <item_1>?", "chosen": " <item_2>", "rejected": " <item_3>"},
        {"prompt": "after <item_2> and red?", "chosen": " <item_3> cat", "rejected": " <item_1>"},
    ] * 20
    tiny_run.write_jsonl(lab.folder / "pairs.jsonl", pairs)
    data = blocks(lab) | {"train": [{"type": "jsonl", "path": str(lab.folder / "pairs.jsonl")}]}
    run = lab.train("dpo", workflow={"type": "preference"}, data=data, model={"adapter": LORA}, num_steps=6)
    losses = column(run, "loss")
    assert abs(losses[0] - 0.693147) < 1e-6
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "add_tokens, said",
    [
        ({"tokens": ["<a>", "<a>"]}, "'<a>' is listed twice"),
        ({"tokens": ["<|im_end|>"]}, "is a token already, with id 2"),
        ({"tokens": [" "]}, "a new token is empty"),
        ({"tokens": None, "file": "nowhere.txt"}, "the file of new tokens cannot be read"),
        ({"tokens": ["<a>"], "file": "both.txt"}, "give the new tokens by `tokens` or by `file`"),
    ],
)
def test_tokens_that_cannot_be_new_are_refused_at_check(lab, add_tokens, said):
    code, output = lab.burnish("check", lab.recipe("refused", data=blocks(lab, **add_tokens)))
    assert code == 2 and said in output, output


def test_a_file_of_tokens_one_a_line_or_json(lab):
    (lab.folder / "tokens.txt").write_text("<item_1>\n<item_2>\n<item_3>\n")
    (lab.folder / "tokens.json").write_text(json.dumps(ITEMS))
    for file in ("tokens.txt", "tokens.json"):
        recipe = lab.recipe("file", data=blocks(lab, tokens=None, file=str(lab.folder / file)))
        code, output = lab.burnish("data", recipe, "-n", "1", "--format", "json")
        assert code == 0 and "<item_" in output, output
        assert any(i in json.loads(output.splitlines()[0])["token_ids"] for i in (320, 321, 322))


def test_a_file_of_tokens_that_was_edited_is_refused_from_then_on(lab):
    file = lab.folder / "edited.txt"
    file.write_text("<item_1>\n<item_2>\n<item_3>\n")
    changes = {"data": blocks(lab, tokens=None, file=str(file)), "num_steps": 4}
    run = lab.train("edited", "stop_after=2", expect=75, **changes)
    file.write_text("<item_2>\n<item_1>\n<item_3>\n")
    assert "tokenizer: not what the run was trained with" in lab.resume("edited", expect=2)
    for command in (["export", run, "--to", lab.folder / "edited_model"], ["check", lab.folder / "edited.yaml"]):
        code, output = lab.burnish(*command)
        assert code == 2 and "tokenizer: not what the run was trained with" in output
    file.write_text("<item_1>\n<item_2>\n<item_3>\n")
    lab.resume("edited")
