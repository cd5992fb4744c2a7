"""Answers on the disk, found by content; and which second models are refused before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from burnish.data.packing.layout import layout
from burnish.errors import DataError, ModelError, RecipeError, Stopped
from burnish.losses.base import Loss
from burnish.losses.dpo import DPO
from burnish.losses.hidden_kd import HiddenKD
from burnish.losses.sum import Sum
from burnish.losses.topk_kd import TopKKD
from burnish.mesh import Mesh, open_mesh
from burnish.policy.agreement import teacher_facts
from burnish.policy.answer_writer import Writer
from burnish.policy.answers import Answers, keys_of
from burnish.policy.asking import answer_all
from burnish.policy.checkpoint.manifest import encode_manifest
from burnish.policy.checkpoint.storage import Storage
from burnish.policy.second import TOP_K, Reference, Surroundings, Teacher
from burnish.recipe import load_recipe
from burnish.types import Block, Group, NewTokens, Sample
from tests import tiny_run
from tests.second_helpers import student, surroundings
from tests.tiny_models import tiny_config, tiny_model

COLUMNS = frozenset({"ref_logprobs"})
OF = {"who": "a reference", "top_k": 2}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's configuration and tokenizer, and no weights."""
    return described(tmp_path_factory.mktemp("student") / "student")


def described(path: Path, **fields: Any) -> Path:
    tiny_config("llama", **{"vocab_size": 320, **fields}).save_pretrained(path)
    tiny_run.write_tokenizer(path)
    return path


class Counting:
    """A second model that says -0.5 of token 1, -1 of token 2, and so on: a column that a person can check."""

    obstacle = None

    def annotate(self, blocks: list[Block], loss: Loss) -> list[Block]:
        return [replace(block, columns=block.columns | self.columns(block, loss)) for block in blocks]

    def columns(self, block: Block, loss: Loss) -> dict[str, torch.Tensor]:
        half = block.token_ids.float() * -0.5
        made = {
            "ref_logprobs": half,
            "teacher_topk_ids": torch.stack([block.token_ids, block.token_ids + 1], 1),
            "teacher_topk_logprobs": torch.stack([half, half - 1], 1),
        }
        return {name: made[name] for name in loss.asks}

    def require(self, group: Group) -> None:
        return

    def reference(self, block: Block, loss: Loss) -> None:
        return None

    def flops(self, blocks: list[Block], loss: Loss) -> float:
        return 0.0


def sample(ids: list[int], trained: int, name: str, prefix: int | None = None) -> Sample:
    """A document whose last `trained` tokens train."""
    mask = np.arange(len(ids)) >= len(ids) - trained
    return Sample(np.array(ids, np.int32), mask, name, {}, prefix)


PAIR = Group((sample([1, 2, 3], 0, "a"), sample([4, 5], 2, "b", 0), sample([6], 1, "c", 0)))
ALONE = Group((sample([7, 8, 9, 4], 2, "d"),))


def rows() -> list[Block]:
    return [layout([PAIR, ALONE], 12, 8)]


def written(mesh: Mesh, path: Path, blocks: Any = rows, columns: frozenset[str] = COLUMNS, **more: Any) -> None:
    answer_all(Counting(), around_of(mesh, path, blocks), columns, path / "answers", OF, **more)


def around_of(mesh: Mesh, path: Path, blocks: Any) -> Surroundings:
    student: Any = None  # nobody asks who the student is
    return surroundings(student, mesh, path, blocks)


def opened(path: Path) -> Answers:
    return Answers.open(path / "answers", cure="ask again")


# Answers


def test_answers_are_found_in_any_order_row_and_padding(mesh: Mesh, tmp_path: Path) -> None:
    written(mesh, tmp_path)
    blocks = opened(tmp_path).annotate([layout([ALONE], 6, 4), layout([ALONE, PAIR], 16, 8)], DPO())
    assert blocks[0].columns["ref_logprobs"].tolist() == [0, 0, -4.5, -2, 0, 0]
    #                                   d           a        b           c   padding
    assert blocks[1].columns["ref_logprobs"].tolist() == [0, 0, -4.5, -2, 0, 0, 0, -2, -2.5, -3, *[0] * 6]


def test_ids_and_logprobs_of_several_tokens(mesh: Mesh, tmp_path: Path) -> None:
    written(mesh, tmp_path, columns=TOP_K)
    (block,) = opened(tmp_path).annotate([layout([ALONE], 5, 4)], TopKKD())
    assert block.columns["teacher_topk_ids"].tolist() == [[0, 0], [0, 0], [9, 10], [4, 5], [0, 0]]
    assert block.columns["teacher_topk_ids"].dtype == torch.int64
    assert block.columns["teacher_topk_logprobs"].tolist() == [[0, 0], [0, 0], [-4.5, -5.5], [-2, -3], [0, 0]]


def test_a_document_is_its_tokens_its_mask_and_what_stands_before_it() -> None:
    same = Group((sample([1, 2, 3], 0, "other"), sample([4, 5], 2, "names", 0)))
    assert keys_of(same) == keys_of(PAIR)[:1]
    assert len(keys_of(PAIR)) == 2  # nobody asks about a prompt
    others = [
        Group((sample([4, 5], 1, "b"),)),
        Group((sample([1, 2], 0, "a"), sample([4, 5], 2, "b", 0))),
        Group((sample([1, 2, 3, 4], 0, "a"), sample([5], 1, "b", 0))),
        Group((sample([1, 2, 3, 4, 5], 2, "one"),)),
        Group((sample([1, 2, 3], 0, "a"), sample([4, 5, 6], 2, "b", 0))),
    ]
    keys = [key for group in (PAIR, *others) for key in keys_of(group)]
    assert len(set(keys)) == len(keys) == 7


def test_a_document_that_comes_twice_is_kept_once_and_files_are_filled_one_by_one(mesh: Mesh, tmp_path: Path) -> None:
    written(mesh, tmp_path, lambda: rows() + rows(), file_bytes=8)  # two trained tokens of 4 bytes fill a file
    kept = opened(tmp_path)
    assert kept.facts["num_documents"] == 3
    assert list(kept.facts["files"]) == ["answers-00000.safetensors", "answers-00001.safetensors"]
    assert sum(int((block.columns["ref_logprobs"] != 0).sum()) for block in kept.annotate(rows(), DPO())) == 5


def test_a_document_that_nobody_was_asked_about_is_refused_by_name(mesh: Mesh, tmp_path: Path) -> None:
    written(mesh, tmp_path, lambda: [layout([PAIR], 12, 8)])
    kept = opened(tmp_path)
    kept.require(PAIR)
    for refused in (lambda: kept.annotate(rows(), DPO()), lambda: kept.require(ALONE)):
        with pytest.raises(DataError, match="has no answer about this document") as caught:
            refused()
        assert (caught.value.where, caught.value.cure) == ("d", "ask again")


def test_every_file_can_be_read_by_safetensors(mesh: Mesh, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written(mesh, tmp_path, columns=TOP_K)
    tensors = load_file(tmp_path / "answers" / "answers-00000.safetensors")
    assert tensors["ends"].tolist() == [2, 3, 5]
    assert tensors["teacher_topk_ids"].tolist() == [[4, 5], [5, 6], [6, 7], [9, 10], [4, 5]]
    assert (tensors["teacher_topk_ids"].dtype, tensors["keys"].shape) == (torch.int32, (3, 16))


@pytest.mark.parametrize("name", ["answers-00000.safetensors", "manifest.json"])
def test_every_flipped_bit_and_every_cut_is_refused_by_file(mesh: Mesh, tmp_path: Path, name: str) -> None:
    written(mesh, tmp_path)
    file = tmp_path / "answers" / name
    good = file.read_bytes()
    broken = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), 7)]
    for data in [*broken, good[:-1], good + b" ", b""]:
        file.write_bytes(data)
        with pytest.raises(DataError) as caught:
            opened(tmp_path)
        assert name in str(caught.value) and caught.value.cure == "ask again"
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path)
    file.write_bytes(good)
    opened(tmp_path)


def test_a_pass_that_was_cut_short_leaves_what_was_there(mesh: Mesh, tmp_path: Path) -> None:
    def stopped() -> Iterator[Block]:
        yield layout([PAIR], 12, 8)
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        written(mesh, tmp_path, stopped)
    assert not (tmp_path / "answers").exists()
    written(mesh, tmp_path)
    with pytest.raises(Stopped):
        written(mesh, tmp_path, stopped)
    opened(tmp_path).require(ALONE)
    written(mesh, tmp_path, lambda: [layout([PAIR], 12, 8)])
    with pytest.raises(DataError):
        opened(tmp_path).require(ALONE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["answers"]


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_while_a_cache_is_replaced_leaves_the_old_one_or_the_new(
    renames: int, mesh: Mesh, tmp_path: Path
) -> None:
    class Crashing(Storage):
        left = renames

        def rename(self, old: Path, new: Path) -> None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            super().rename(old, new)

    written(mesh, tmp_path)
    writer = Writer(tmp_path / "answers", storage=Crashing())
    writer.add(keys_of(ALONE)[0], {"ref_logprobs": torch.zeros(2)})
    with pytest.raises(KeyboardInterrupt):
        writer.commit({"format": 1, "of": OF, "num_documents": 1})
    old = tmp_path / ("answers" if renames == 0 else ".answers.old")
    Answers.open(old, cure="").require(PAIR)
    written(mesh, tmp_path)
    opened(tmp_path).require(PAIR)


def test_a_folder_that_holds_something_else_is_not_replaced(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "thesis.txt").write_text("all of it")
    with pytest.raises(DataError, match="holds something else"):
        written(mesh, tmp_path)
    assert (tmp_path / "answers" / "thesis.txt").exists()


def test_a_folder_that_cannot_be_written_is_refused(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written") as caught:
        written(mesh, tmp_path / "file")
    assert "free some space" in caught.value.cure


def test_whose_answers_they_are(mesh: Mesh, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    assert not Answers.are_of(folder, OF)
    written(mesh, tmp_path)
    assert Answers.are_of(folder, OF)
    assert not Answers.are_of(folder, {**OF, "top_k": 3})


# Agreement


def test_a_model_with_the_same_tokens_may_have_more_rows(folder: Path, tmp_path: Path) -> None:
    here = student(folder)
    other = described(tmp_path / "other", vocab_size=384, hidden_size=48)
    assert Teacher(path=str(other)).agree(here, [TopKKD()]) == (
        f"{other}: llama, the same 320 tokens; its 64 ids beyond the student's are left out of its distribution"
    )
    assert Reference(path=str(folder)).agree(here, [DPO()]) == f"{folder}: llama, the same 320 tokens"


def test_who_the_initial_model_is(folder: Path) -> None:
    adapted = student(folder, adapter={"type": "lora"})
    assert Reference().agree(student(folder), [DPO()]) == f"a frozen copy of {folder}"
    assert Reference().agree(adapted, [DPO()]) == "the same weights with the adapter off"
    assert Reference(precompute=True).agree(adapted, [DPO()]).endswith("adapter off, asked before the first step")
    # Rows of new tokens train beside the adapter: with it off they would not be the initial ones.
    grown = replace(adapted, new_tokens=NewTokens(320, ((1,), ())))
    assert Reference().agree(grown, [DPO()]) == f"a frozen copy of {folder}"
    assert grown.vocab_size == 322
    assert Reference().beside(adapted) is None
    copied = Reference().beside(grown)
    assert copied is not None and copied.adapter is None and copied.path == str(folder)


def edited_tokenizer(path: Path, edit: Any) -> Path:
    file = described(path) / "tokenizer.json"
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))
    return path


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(folder: Path, tmp_path: Path) -> None:
    def swap(data: Any) -> None:
        vocabulary = data["model"]["vocab"]
        first, second = list(vocabulary)[10], list(vocabulary)[11]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    with pytest.raises(ModelError) as caught:
        Teacher(path=str(edited_tokenizer(tmp_path / "swapped", swap))).agree(student(folder), [])
    assert "2 of 320 tokens have another id" in caught.value.reason
    assert "workflow: {type: sft}" in caught.value.cure

    def rename(data: Any) -> None:
        data["added_tokens"][1]["content"] = "<|turn|>"
        data["model"]["vocab"] = {
            "<|turn|>" if token == "<|im_start|>" else token: i for token, i in data["model"]["vocab"].items()
        }

    renamed = edited_tokenizer(tmp_path / "renamed", rename)
    config = json.loads((renamed / "tokenizer_config.json").read_text())
    (renamed / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|turn|>"}))
    with pytest.raises(ModelError, match=r"'<\|im_start\|>', 1 here and not there"):
        Reference(path=str(renamed)).agree(student(folder), [])


def test_a_model_with_fewer_ids_or_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    wide = student(described(tmp_path / "wide", vocab_size=384))
    with pytest.raises(ModelError, match="it has 320 ids, the student has 384"):
        Teacher(path=str(folder)).agree(wide, [])
    bare = described(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="its tokenizer cannot be read"):
        Teacher(path=str(bare)).agree(student(folder), [])
    with pytest.raises(ModelError, match="no such model"):
        Teacher(path=str(tmp_path / "none")).agree(student(folder), [])
    with pytest.raises(ModelError, match="top_k of 321 is more than the 320 ids"):
        Teacher(path=str(folder), top_k=321).agree(student(folder), [])


def test_hidden_states_of_another_width_need_a_head(folder: Path, tmp_path: Path) -> None:
    teacher = Teacher(path=str(described(tmp_path / "other", hidden_size=48)))
    with pytest.raises(ModelError, match="its hidden states have 48 entries, the student's 32") as caught:
        teacher.agree(student(folder), [HiddenKD()])
    assert "a head of 48 outputs" in caught.value.cure
    heads = {"lm": {"type": "lm"}, "wide": {"type": "linear", "size": 48}, "narrow": {"type": "linear", "size": 40}}
    with_heads = student(folder, head={"type": "multi", "heads": heads})
    teacher.agree(with_heads, [HiddenKD(head="wide")])
    terms = [{"loss": {"type": "hidden_kd", "head": name}} for name in ("wide", "narrow")]
    for loss in (HiddenKD(head="narrow"), Sum.model_validate({"terms": terms})):
        with pytest.raises(
            ModelError, match="the head `narrow` has 40 outputs, and the hidden states of .* 48"
        ) as caught:
            teacher.agree(with_heads, [loss])
        assert (caught.value.where, caught.value.cure) == ("model.head", "set its size to 48")


def test_a_cache_of_other_tokens_is_refused_with_the_reasons(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    here = student(folder)
    cache = tmp_path / "cache"
    of = {**here.facts(), "top_k": 2, "teacher": {"path": "big", "revision": "main", "weights": None}}
    answer_all(Counting(), around_of(mesh, tmp_path, rows), TOP_K, cache, of)
    teacher = Teacher(cache=str(cache), top_k=2)
    assert teacher.agree(here, []) == f"{cache}: the 2 likeliest tokens of big for 3 documents"
    refused = [
        (Teacher(cache=str(cache), top_k=3), here, r"another top_k \(2, not 3\)"),
        (Teacher(cache=str(cache), top_k=2, path="small"), here, r"another teacher \(big, not small\)"),
        (
            Teacher(cache=str(cache), top_k=2, path="big", revision="v2"),
            here,
            r"another revision of the teacher \(main, not v2\)",
        ),
        (teacher, replace(here, chat_template="another"), "another chat template"),
        (teacher, student(described(tmp_path / "wide", vocab_size=384)), r"another vocabulary size \(320, not 384\)"),
    ]
    grown = student(folder)
    grown.tokenizer.add_tokens(["<new>"])
    refused.append((teacher, grown, "another tokenizer"))
    for asked, by, reason in refused:
        with pytest.raises(DataError, match=reason) as caught:
            asked.agree(by, [])
        assert (caught.value.where, caught.value.cure.endswith("`burnish cache-teacher RECIPE`")) == (str(cache), True)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        Teacher(cache=str(tmp_path / "none")).agree(here, [])
    answer_all(Counting(), around_of(mesh, tmp_path, rows), COLUMNS, tmp_path / "reference", here.facts())
    with pytest.raises(DataError, match="what a reference said"):
        Teacher(cache=str(tmp_path / "reference")).agree(here, [])


def test_a_cache_of_a_teacher_whose_weights_were_replaced_is_refused(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    """The new ones have the same names and shapes: their files are as long, with the same headers."""
    here, cache, path = student(folder), tmp_path / "cache", str(tmp_path / "big")

    def save(seed: int) -> None:
        described(tmp_path / "big")
        tiny_model("llama", seed, vocab_size=320).save_pretrained(path)

    save(0)
    of = teacher_facts(here, path, "main", 2)
    answer_all(Counting(), around_of(mesh, tmp_path, rows), TOP_K, cache, of)
    teacher = Teacher(path=path, cache=str(cache), top_k=2)
    teacher.agree(here, [])
    save(0)  # a copy
    teacher.agree(here, [])
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    save(1)
    assert (tmp_path / "big" / "model.safetensors").stat().st_size == size
    with pytest.raises(DataError, match=f"the cache was written for other weights than {path} holds now"):
        teacher.agree(here, [])
    shutil.rmtree(path)  # the cache is all that a run needs
    teacher.agree(here, [])


def test_a_second_model_with_fewer_positions_than_the_documents_have_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "gpt2"
    tiny_config("gpt2", vocab_size=320, max_position_embeddings=32).save_pretrained(other)
    tiny_run.write_tokenizer(other)
    Reference(path=str(other)).agree(student(folder, max_length=32), [])
    for second in (Reference(path=str(other)), Teacher(path=str(other))):
        with pytest.raises(ModelError, match="33 tokens, and .*gpt2 has a table of 32 learned positions") as caught:
            second.agree(student(folder, max_length=33), [])
        assert (caught.value.where, caught.value.cure[:14]) == ("data.max_length", "lower it to 32")


def test_a_checkpoint_is_neither_read_as_a_cache_nor_replaced_by_one(folder: Path, mesh: Mesh, tmp_path: Path) -> None:
    checkpoint = tmp_path / "answers"
    checkpoint.mkdir()
    manifest = encode_manifest({"format": 1, "step": 20, "files": {}, "tensors": {}})
    (checkpoint / "manifest.json").write_bytes(manifest)
    with pytest.raises(DataError, match="a manifest of something else"):
        Teacher(cache=str(checkpoint)).agree(student(folder), [])
    with pytest.raises(DataError, match="holds something else"):
        written(mesh, tmp_path)
    assert (checkpoint / "manifest.json").read_bytes() == manifest


# Recipes


@pytest.mark.parametrize(
    ("workflow", "reason"),
    [
        ({"type": "sft", "loss": {"type": "dpo"}}, "compares with a reference, and this workflow has none"),
        ({"type": "sft", "loss": {"type": "topk_kd"}}, "the loss topk_kd compares with a teacher"),
        ({"type": "sft", "loss": {"type": "kd"}}, "the loss kd compares with a teacher"),
        ({"type": "preference", "loss": {"type": "topk_kd"}}, "which a reference does not say"),
        ({"type": "preference", "loss": {"type": "kto"}, "reference": {"precompute": True}}, "mismatched answers"),
        ({"type": "preference", "loss": {"type": "kd"}, "reference": {"precompute": True}}, "are not kept: use"),
        ({"type": "preference", "loss": {"type": "simpo"}, "reference": {"precompute": True}}, "has no reference"),
        ({"type": "preference", "loss": {"type": "orpo"}, "reference": {"path": "other"}}, "has no reference"),
        ({"type": "distill", "teacher": {}}, "a teacher is named by `path`, or by the `cache`"),
        ({"type": "distill", "teacher": {"cache": "c"}, "loss": {"type": "kd"}}, "a cache keeps the likeliest"),
    ],
    ids=str,
)  # fmt: skip
def test_a_loss_without_the_second_model_it_asks_is_refused(
    workflow: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    blocks = tiny_run.recipe(tmp_path, tmp_path / "train.jsonl", tmp_path / "run", workflow=workflow)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny_run.write_recipe(tmp_path / "r.yaml", blocks))
    (problem,) = caught.value.problems
    assert reason in problem.reason, problem.reason


def test_a_stream_cannot_be_asked_about_before_the_run(tmp_path: Path) -> None:
    workflow = {"type": "preference", "loss": {"type": "dpo"}, "reference": {"precompute": True}}
    blocks = tiny_run.recipe(tmp_path, tmp_path / "train.jsonl", tmp_path / "run", workflow=workflow)
    blocks["data"]["train"] = [{"type": "huggingface", "path": "some/set", "streaming": True}]
    with pytest.raises(RecipeError, match="a streamed source cannot be gone through once before the run"):
        load_recipe(tiny_run.write_recipe(tmp_path / "r.yaml", blocks))
