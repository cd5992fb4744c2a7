"""A model that talks: to a person, where what goes wrong is said at once, and to the rows of a file."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from burnish.cli import main
from burnish.data.formats.asked import asked
from burnish.errors import DataError, ModelError
from burnish.rollout.answers import Question, Sampling, Tally, answer_all
from burnish.rollout.generate import load_chat, stream_answer
from burnish.types import Row
from tests import tiny_run


def test_a_failure_in_the_background_is_raised_here(tmp_path: Path) -> None:
    folder = tiny_run.write_model(tmp_path / "model")
    started = time.monotonic()
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream_answer(str(folder), "one two", max_new_tokens=0, temperature=0.0, seed=0))
    assert time.monotonic() - started < 60  # START_SECONDS is 120


ENDS = list(range(0, 320, 4))
"""A quarter of the vocabulary ends an answer: of 6 random tokens, about one answer in five goes on."""


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of its own and loud, so that the likeliest token is not the last one again."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tiny_run.write_model(tmp_path_factory.mktemp("talker"))
    model = LlamaForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ENDS}))
    return folder


def questions(count: int) -> list[Question]:
    rows = tiny_run.conversations(count)
    return [Question(f"train.jsonl:{i + 1}", row["messages"][:1]) for i, row in enumerate(rows)]


def answer(talker: Path, to: Path, asked: list[Question], *, num_answers: int = 1, batch_size: int = 8) -> list[Tally]:
    sampling = Sampling(max_new_tokens=6, temperature=1.0, seed=0)
    tallies = answer_all(str(talker), asked, to, num_answers=num_answers, sampling=sampling, batch_size=batch_size)
    return list(tallies)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_that_ended_are_written_under_their_questions(talker: Path, tmp_path: Path) -> None:
    asked, to = questions(20), tmp_path / "out.jsonl"
    tally = answer(talker, to, asked)[-1]
    rows = read(to)
    assert tally.asked == 20 and tally.written == len(rows) and tally.written + tally.unfinished == 20
    assert 0 < tally.unfinished < 20  # each is 0.75^6 = 18 % likely to be cut off
    by_place = {question.where: question for question in asked}
    for row in rows:
        *turns, last = row["messages"]
        assert turns == by_place[row["answers"]].messages
        assert last["role"] == "assistant" and last["content"].strip()


def test_the_greedy_answer_of_a_batch_is_the_one_alone(talker: Path, tmp_path: Path) -> None:
    """Padding on the left is seen by none: questions of 1 to 9 words, together and one by one."""
    asked, sampling = questions(12), Sampling(max_new_tokens=12, temperature=0.0, seed=0)
    for size in (12, 1):
        list(
            answer_all(
                str(talker), asked, tmp_path / f"{size}.jsonl", num_answers=1, sampling=sampling, batch_size=size
            )
        )
    together, alone = read(tmp_path / "12.jsonl"), read(tmp_path / "1.jsonl")
    assert together == alone and len(together) > 3


def test_the_same_command_goes_on_where_it_was_torn_off(talker: Path, tmp_path: Path) -> None:
    asked, to = questions(24), tmp_path / "out.jsonl"
    answer(talker, to, asked)
    before = to.read_text().splitlines(keepends=True)
    to.write_text("".join(before[:5]) + before[5][:20])  # killed in the middle of the sixth line
    answer(talker, to, asked)
    assert to.read_text().splitlines(keepends=True)[:5] == before[:5]
    places = [row["answers"] for row in read(to)]
    assert len(set(places)) == len(places)  # nobody is asked again who has an answer


def test_several_answers_are_asked_of_every_question(talker: Path, tmp_path: Path) -> None:
    asked, to = questions(6), tmp_path / "out.jsonl"
    while len(read(to) if to.exists() else []) < 18:  # those cut off are asked for again
        assert answer(talker, to, asked, num_answers=3)
    assert Counter(row["answers"] for row in read(to)) == {question.where: 3 for question in asked}
    assert len({row["messages"][-1]["content"] for row in read(to)}) > 6
    assert answer(talker, to, asked, num_answers=3) == []


def test_a_file_of_something_else_is_not_appended_to(talker: Path, tmp_path: Path) -> None:
    to = tmp_path / "out.jsonl"
    to.write_text(json.dumps({"answers": "train.jsonl:1"}) + "\n" + json.dumps({"text": "a row of the user's"}) + "\n")
    with pytest.raises(DataError, match=r"out\.jsonl:2: the line is no answer"):
        answer(talker, to, questions(2))


def test_a_row_that_the_template_refuses_is_named(talker: Path, tmp_path: Path) -> None:
    bad = Question("train.jsonl:9", [{"role": "user"}])
    with pytest.raises(DataError, match=r"train\.jsonl:9: the chat template refuses it"):
        answer(talker, tmp_path / "out.jsonl", [*questions(2), bad])


def test_a_content_that_the_template_cannot_take_is_refused_too(talker: Path, tmp_path: Path) -> None:
    parts = Question("train.jsonl:9", [{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
    with pytest.raises(DataError, match=r"train\.jsonl:9: the chat template refuses it"):
        answer(talker, tmp_path / "out.jsonl", [parts])


def test_an_embedding_model_is_not_talked_to(talker: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(talker, tmp_path / "search")
    (folder / "modules.json").write_text("[]")
    with pytest.raises(ModelError, match="makes vectors of texts and writes none"):
        load_chat(str(folder))


SAID = {"role": "assistant", "content": "an answer"}
ASKED = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "hi"}, [ASKED]),
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, [ASKED]),
        ({"prompt": [ASKED, SAID, ASKED]}, [ASKED, SAID | {"train": False}, ASKED]),
        ({"messages": [ASKED, SAID]}, [ASKED]),
        ({"messages": [ASKED, SAID, ASKED, SAID]}, [ASKED, SAID | {"train": False}, ASKED]),
        ({"messages": [ASKED]}, [ASKED]),
        ({"instruction": "hi", "output": "an answer"}, [ASKED]),
    ],
)
def test_what_rows_ask(record: dict[str, Any], turns: list[dict[str, Any]]) -> None:
    assert asked(Row(record, "train.jsonl:1")).messages == turns


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": [ASKED, SAID]}, "the last to speak is assistant"),
        ({"messages": [SAID]}, "the last to speak is nobody"),
        ({"text": "once upon a time"}, "a plain text asks nothing"),
        ({"question": "hi"}, "unknown format: the row has question"),
    ],
)
def test_rows_that_ask_nothing_are_refused_by_their_place(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as refusal:
        asked(Row(record, "train.jsonl:3"))
    assert str(refusal.value).startswith("train.jsonl:3: ") and reason in str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["model"], "nobody asks"),
        (["model", "hello", "--rows", "rows.jsonl"], "or two do"),
        (["model", "--rows", "rows.jsonl"], "nowhere to go"),
        (["model", "--rows", "rows.jsonl", "--to", "out.jsonl", "--num-answers", "2"], "are the same one"),
        (["model", "--rows", "rows.jsonl", "--to", "nowhere/out.jsonl"], "nowhere: no such folder"),
    ],
)
def test_commands_that_make_no_sense_are_refused(
    argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *argv]) == 2
    assert reason in capsys.readouterr().err
