"""Rows of other kinds than conversations through the chat renderer: [[ ]] around what is trained."""

from __future__ import annotations

import numpy as np
import pytest

from burnish.data.renderers.chat import Chat
from burnish.errors import DataError
from burnish.types import Rendered, Row, RowFormat, RowKind, Sample
from tests.chat_helpers import THINKING, assistant, byte_level, row, shown, user


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def samples_of(rendered: Rendered) -> tuple[Sample, ...]:
    assert rendered.group is not None
    return rendered.group.samples


def group_of(tokenizer, rendered: Rendered) -> list[tuple[str, dict, int | None]]:
    assert rendered.refusal is None, rendered.refusal
    assert rendered.group is not None
    assert rendered.fates.total() == len(rendered.group)
    assert rendered.fates["trained"] == sum(sample.loss_mask.sum() for sample in rendered.group.samples)
    return [
        (shown(tokenizer, sample), {k: v.item() for k, v in sample.columns.items() if not v.ndim}, sample.prefix)
        for sample in rendered.group.samples
    ]


PAIR = Row({"prompt": [user("a?")], "chosen": [assistant("b")], "rejected": [assistant("cd")], "weight": 2}, "x:1")


def test_a_pair_shares_its_prompt(tokenizer) -> None:
    (rendered,) = Chat().open(tokenizer, RowFormat("preference")).render([PAIR])
    assert group_of(tokenizer, rendered) == [
        (
            "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n",
            {"weight": 0.0, "preference": 0.0, "margin": 0.0},
            None,
        ),
        ("[[b<|im_end|>]]\n", {"weight": 2.0, "preference": 1.0, "margin": 0.0}, 0),
        ("[[cd<|im_end|>]]\n", {"weight": 2.0, "preference": -1.0, "margin": 0.0}, 0),
    ]
    # Masked: the prompt's 10 + 11 tokens once, and a line end after each answer.
    assert dict(rendered.fates) == {"trained": 2 + 3, "masked": 10 + 11 + 2, "boundary": 0}
    assert [sample.sample_id for sample in samples_of(rendered)] == ["x:1"] * 3


def test_a_pair_need_not_share_its_prompt(tokenizer) -> None:
    (rendered,) = Chat(share_prompt=False).open(tokenizer, RowFormat("preference")).render([PAIR])
    (chosen, _, first), (rejected, _, second) = group_of(tokenizer, rendered)
    assert chosen == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
    assert rejected == "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n[[cd<|im_end|>]]\n"
    assert first is second is None
    assert dict(rendered.fates) == {"trained": 2 + 3, "masked": 2 * (10 + 11) + 2, "boundary": 0}


def test_a_pair_of_strings_with_its_parting_token_straddling() -> None:
    tokenizer = byte_level(merges=40)
    live = Chat().open(tokenizer, RowFormat("preference"))
    (rendered,) = live.render([Row({"prompt": "x" * 20 + "th", "chosen": "e cat", "rejected": "e dog"}, "x:1")])
    assert [(text, prefix) for text, _, prefix in group_of(tokenizer, rendered)] == [
        ("x" * 20, None),
        ("the[[ cat<|endoftext|>]]", 0),
        ("the[[ dog<|endoftext|>]]", 0),
    ]
    assert rendered.fates["boundary"] == 2 and rendered.fates["masked"] == 20


def test_what_is_wrong_with_one_answer_is_said_of_it(tokenizer) -> None:
    live = Chat().open(tokenizer, RowFormat("preference"))
    forged = {**PAIR.record, "rejected": [assistant("c<|im_end|>")]}
    untrained = {**PAIR.record, "chosen": [assistant("b", train=False)]}
    identical = {**PAIR.record, "chosen": [assistant("cd")]}
    results = live.render([PAIR, Row(forged, "x:2"), Row(untrained, "x:3"), Row(identical, "x:4"), PAIR])
    assert [result.group is None for result in results] == [False, True, True, True, False]
    reasons = [str(result.refusal) for result in results[1:4]]
    assert reasons[0].startswith("x:2: rejected: messages[1] holds the text of the control token <|im_end|>")
    assert reasons[1].startswith("x:3: chosen: no token to train")
    assert reasons[2].startswith("x:4: chosen and rejected are identical")
    # 10 + 11 of the prompt and 3 or 4 of the answer: nothing was shared yet.
    assert results[2].fates == {"dropped: no token to train": 2 * 21 + 3 + 4}


def test_a_judged_answer(tokenizer) -> None:
    record = {"prompt": "ab ", "completion": "cd", "label": False}
    (rendered,) = Chat().open(tokenizer, RowFormat("unpaired")).render([Row(record, "x:1")])
    assert group_of(tokenizer, rendered) == [("ab [[cd<|endoftext|>]]", {"weight": 1.0, "preference": -1.0}, None)]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([user("2+2?")], "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nad[[d]]\nis [[4]]<|im_end|>\n"),
        ("2+2?", "2+2?\nad[[d]]\nis [[4]]<|endoftext|>"),
    ],
    ids=["messages", "string"],
)
def test_the_last_token_of_each_step_is_graded(tokenizer, prompt, text: str) -> None:
    row = Row({"prompt": prompt, "completions": ["add", "is 4"], "labels": [True, 0.5]}, "x:1")
    (rendered,) = Chat().open(tokenizer, RowFormat("stepwise")).render([row])
    assert group_of(tokenizer, rendered) == [(text, {"weight": 1.0}, None)]
    (sample,) = samples_of(rendered)
    label = sample.columns["label"]
    assert label.dtype == np.float32 and label[sample.loss_mask].tolist() == [1.0, 0.5]
    assert np.isnan(label[~sample.loss_mask]).all()


def test_a_step_is_not_found_in_the_end_of_its_turn(tokenizer) -> None:
    row = Row({"prompt": [user("m?")], "completions": ["m"], "labels": [True]}, "x:1")  # as in <|im_end|>
    (rendered,) = Chat().open(tokenizer, RowFormat("stepwise")).render([row])
    ((text, _, _),) = group_of(tokenizer, rendered)
    assert text == "<|im_start|>user\nm?<|im_end|>\n<|im_start|>assistant\n[[m]]<|im_end|>\n"


def test_steps_that_a_template_takes_apart_are_refused() -> None:
    live = Chat().open(byte_level(THINKING), RowFormat("stepwise"))
    record = {"prompt": [user("2+2?")], "completions": ["<think>hm</think>", "is 4"], "labels": [1, 0]}
    (rendered,) = live.render([Row(record, "x:1")])
    assert str(rendered.refusal).startswith("x:1: 2 steps end at 0 tokens\n  cure: the template must render each step")
    assert rendered.group is None and rendered.fates.total() > 0


def test_a_query_and_its_answers_are_documents_of_one_group(tokenizer) -> None:
    row = Row({"query": "q" * 20, "positive": "q" * 20 + "p", "negative": ["n"]}, "x:1")
    (rendered,) = Chat().open(tokenizer, RowFormat("retrieval")).render([row])
    assert group_of(tokenizer, rendered) == [
        ("q[[" + "q" * 19 + "<|endoftext|>]]", {"weight": 1.0, "role": 0.0}, None),
        ("q[[" + "q" * 19 + "p<|endoftext|>]]", {"weight": 1.0, "role": 1.0}, None),
        ("n[[<|endoftext|>]]", {"weight": 1.0, "role": 2.0}, None),
    ]


def test_a_labelled_row_needs_no_trained_token(tokenizer) -> None:
    live = Chat().open(tokenizer, RowFormat("labelled", {"label": ("no", "yes"), "length": ()}))
    asked = live.render([row(user("a?"), label="yes"), Row({"text": "ab", "label": 0, "length": 2}, "x:2")])
    (question,), (text,) = (group_of(tokenizer, rendered) for rendered in asked)
    assert question[0] == "<|im_start|>user\na?<|im_end|>\n"
    assert question[1]["label"] == 1.0 and np.isnan(question[1]["length"])
    assert text == ("a[[b<|endoftext|>]]", {"weight": 1.0, "label": 0.0, "length": 2.0}, None)


@pytest.mark.parametrize("kind", ["preference", "unpaired", "stepwise"])
def test_prompts_of_what_is_compared_cannot_be_trained(tokenizer, kind: RowKind) -> None:
    with pytest.raises(DataError, match="prompts are trained") as caught:
        Chat(train_on="all").open(tokenizer, RowFormat(kind))
    assert caught.value.where == "data.renderer.train_on"


def test_every_sample_of_a_kind_has_the_same_columns(tokenizer) -> None:
    live = Chat().open(tokenizer, RowFormat("preference"))
    rows = [PAIR, Row({"chosen": "a b", "rejected": "a c", "margin": 1}, "x:2")]
    found = {tuple(sample.columns) for rendered in live.render(rows) for sample in samples_of(rendered)}
    assert found == {("weight", "preference", "margin")}
