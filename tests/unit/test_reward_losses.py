"""Losses on scores against numbers worked out by hand and against the formulas of the papers in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from burnish.losses.bradley_terry import BradleyTerry
from burnish.losses.classification import Classification
from burnish.losses.process import Process
from burnish.losses.regression import Regression
from burnish.types import Block, TokenOutputs, collate, last_tokens

NAN = float("nan")


def block(lengths: list[int], row_length: int, *, groups: list[int] | None = None, **columns: list[float]) -> Block:
    """Documents of these lengths in a row, columns given a document; `weight` is 1 where it is not given."""
    documents = torch.zeros(len(lengths) + 1, 4, dtype=torch.int32)
    document_ids = torch.full((row_length,), -1)
    start = 0
    for index, length in enumerate(lengths):
        documents[index, :2] = torch.tensor([start, start + length])
        document_ids[start : start + length] = index
        start += length
    zeros = torch.zeros(row_length, dtype=torch.long)
    columns = {"weight": [1.0] * len(lengths)} | columns
    return Block(
        token_ids=zeros,
        loss_mask=zeros.bool(),
        position_ids=zeros,
        document_ids=document_ids,
        documents=documents,
        group_ids=torch.tensor([*(groups or range(len(lengths))), -1]),
        columns={name: torch.tensor([*values, 0.0]) for name, values in columns.items()},
        sample_ids=tuple(map(str, lengths)),
    )


def scores(values: list[float] | list[list[float]], rows: Block) -> Tensor:
    """[T, L] float64: the documents' scores at their last tokens, 7 wherever no loss may look."""
    of_documents = torch.tensor(values, dtype=torch.float64).reshape(len(values), -1)
    spread = torch.full((rows.num_tokens, of_documents.shape[1]), 7.0, dtype=torch.float64)
    for document, said in zip(rows.documents, of_documents, strict=False):
        spread[int(document[1]) - 1] = said
    return spread.requires_grad_()


def test_last_tokens_pass_over_shared_prompts_and_padding() -> None:
    # a prompt of 3 tokens that two answers of 2 and 1 share, then a document of 2; the last slot is padding
    rows = block([3, 2, 1, 2], 9)
    rows.documents[1:3, 2:] = torch.tensor([0, 3])
    assert torch.nonzero(last_tokens(rows)).squeeze(1).tolist() == [4, 5, 7]
    both = collate([rows, rows])
    assert torch.nonzero(last_tokens(both)).squeeze(1).tolist() == [4, 5, 7, 13, 14, 16]


def test_bradley_terry_of_two_pairs() -> None:
    # A shared prompt with rewards 2 (chosen) and 1 (rejected); then rejected 3 before chosen 0, with margin 1.
    columns = {"preference": [0.0, 1.0, -1.0, -1.0, 1.0], "margin": [0.0, 0.0, 0.0, 1.0, 1.0]}
    rows = block([3, 2, 1, 2, 2], 12, groups=[0, 0, 0, 1, 1], **columns)
    rows.documents[1:3, 2:] = torch.tensor([0, 3])
    said = scores([9.0, 2.0, 1.0, 3.0, 0.0], rows)
    loss = BradleyTerry(centering=0.5)
    output = loss(TokenOutputs(scores={"score": said}), rows)
    # log(1 + e^-1) + 0.5 (2 + 1)^2 = 0.313262 + 4.5;   log(1 + e^(3 + 1)) + 0.5 (0 + 3)^2 = 4.018150 + 4.5
    assert output.total.item() == pytest.approx(0.3132617 + 4.5 + 4.0181499 + 4.5, abs=1e-6)
    assert loss.count(rows) == 2
    found = {name: (float(total), float(count)) for name, (total, count) in output.metrics.items()}
    assert found == {
        "loss": (pytest.approx(13.3314116, abs=1e-6), 2),
        "rewards/chosen": (2.0, 2),
        "rewards/rejected": (4.0, 2),
        "rewards/margins": (-2.0, 2),
        "rewards/accuracies": (1.0, 2),
    }
    output.total.backward()
    assert said.grad is not None
    # d/dr_c of the first: -sigmoid(-1) + 2 * 0.5 * 3 = -0.268941 + 3; the prompt and the tokens in between have none.
    assert said.grad[4].item() == pytest.approx(2.7310586, abs=1e-6)
    assert torch.nonzero(said.grad).unique().tolist() == [0, 4, 5, 7, 9]  # 0: the only column


def test_bradley_terry_is_ln_2_where_all_rewards_are_0_and_weights_leave_the_count() -> None:
    columns = {"preference": [1.0, -1.0, 1.0, -1.0], "margin": [0.0] * 4, "weight": [3.0, 3.0, 0.5, 0.5]}
    rows = block([2, 2, 2, 2], 8, groups=[0, 0, 1, 1], **columns)
    output = BradleyTerry()(TokenOutputs(scores={"score": scores([0.0] * 4, rows)}), rows)
    assert output.total.item() == pytest.approx(3.5 * math.log(2), abs=1e-12)
    assert BradleyTerry().count(rows) == 2


def test_process_grades_the_last_tokens_of_steps() -> None:
    rows = block([5, 3], 9, weight=[1.0, 2.0])
    rows.loss_mask = torch.tensor([0, 1, 0, 0, 1, 0, 0, 1, 0]).bool()
    rows.columns["label"] = torch.tensor([NAN, 1.0, NAN, NAN, 0.0, NAN, NAN, 0.25, 0.0])
    said = torch.tensor([7.0, 2.0, 7.0, 7.0, 1.0, 7.0, 7.0, -1.0, 7.0]).double().unsqueeze(1).requires_grad_()
    output = Process()(TokenOutputs(scores={"score": said}), rows)
    # log(1 + e^-2) = 0.126928;  log(1 + e^1) = 1.313262;  2 (0.25 log(1 + e^1) + 0.75 log(1 + e^-1)) = 1.126523
    assert output.total.item() == pytest.approx(0.1269280 + 1.3132617 + 1.1265234, abs=1e-6)
    assert Process().count(rows) == 3
    assert [float(value) for value in output.metrics["accuracy"]] == [2, 3]  # the second step is taken for right
    output.total.backward()
    assert said.grad is not None
    assert torch.nonzero(said.grad[:, 0]).squeeze(1).tolist() == [1, 4, 7]


def test_regression_passes_over_documents_without_a_label() -> None:
    rows = block([2, 1, 3], 8, weight=[1.0, 1.0, 0.5], grade=[1.0, NAN, -2.0])
    said = scores([1.5, 100.0, 1.0], rows)
    loss = Regression(label="grade")
    output = loss(TokenOutputs(scores={"score": said}), rows)
    assert output.total.item() == pytest.approx(0.5**2 + 0.5 * 3.0**2)
    assert [float(value) for value in output.metrics["absolute_error"]] == [3.5, 2]
    assert loss.count(rows) == 2
    output.total.backward()
    assert said.grad is not None
    assert said.grad[:, 0].tolist() == [0, 1.0, 0, 0, 0, 3.0, 0, 0]
    # Huber with delta 1: 0.5^2 / 2 and 1 (3 - 1 / 2)
    output = Regression(label="grade", huber_delta=1.0)(TokenOutputs(scores={"score": said}), rows)
    assert output.total.item() == pytest.approx(0.125 + 0.5 * 2.5)


def test_classification_of_three_documents() -> None:
    rows = block([2, 1, 3], 8, weight=[1.0, 1.0, 2.0], kind=[2.0, NAN, 0.0])
    said = scores([[0.0, 1.0, 3.0], [9.0, 9.0, 9.0], [1.0, 2.0, 0.0]], rows)
    loss = Classification(label="kind", head="kinds")
    output = loss(TokenOutputs(scores={"kinds": said}), rows)
    first = math.log(math.exp(0) + math.exp(1) + math.exp(3)) - 3
    second = math.log(math.exp(1) + math.exp(2) + math.exp(0)) - 1
    assert output.total.item() == pytest.approx(first + 2 * second)
    assert [float(value) for value in output.metrics["accuracy"]] == [1, 2]
    assert loss.count(rows) == 2
    output.total.backward()
    assert said.grad is not None
    assert torch.nonzero(said.grad.abs().sum(1)).squeeze(1).tolist() == [1, 5]


@pytest.mark.parametrize("loss", [BradleyTerry(centering=0.1), Process(), Regression(), Classification()])
def test_a_row_of_padding_adds_nothing(loss: BradleyTerry | Process | Regression | Classification) -> None:
    """Its columns are zeros, which are labels of class 0 and numbers 0 if nobody looks where documents are."""
    rows = block([], 4, preference=[], margin=[], label=[])
    if isinstance(loss, Process):
        rows.columns["label"] = torch.zeros(4)
    said = torch.full((4, 3 if isinstance(loss, Classification) else 1), 5.0).requires_grad_()
    output = loss(TokenOutputs(scores={"score": said}), rows)
    assert output.total.item() == 0 and loss.count(rows) == 0
    assert all(float(total) == 0 and float(count) == 0 for total, count in output.metrics.values())
    output.total.backward()
    assert said.grad is not None and not said.grad.any()
