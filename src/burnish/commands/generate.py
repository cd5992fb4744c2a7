"""`burnish generate MODEL|RUN "prompt"`: talk to a model; with `--rows`, let it answer a whole file of questions."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from burnish.commands._arguments import count
from burnish.errors import UserError

REPORT_SECONDS = 10.0
"""Between two lines about how far it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish generate`."""
    parser.add_argument("model", metavar="MODEL|RUN", help="a run folder, a model folder or a hub id")
    parser.add_argument("prompt", nargs="?", help="what the user says")
    parser.add_argument("--rows", metavar="JSONL", help="answer every row of these files instead (a glob is one)")
    parser.add_argument(
        "--to", metavar="JSONL", help="with --rows: where the answers go; rows that have theirs are skipped"
    )
    parser.add_argument("--num-answers", type=count, default=1, help="with --rows: answers to each row")
    parser.add_argument("--batch-size", type=count, default=16, help="with --rows: rows answered at once")
    parser.add_argument("--max-new-tokens", type=count, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """One answer, printed as it is generated; or a file of them."""
    if (args.prompt is None) == (args.rows is None):
        raise UserError(
            "nobody asks, or two do", cure='give a prompt, `burnish generate MODEL "hello"`, or --rows FILE'
        )
    return _talk(args) if args.rows is None else _answer_rows(args)


def _talk(args: argparse.Namespace) -> int:
    from burnish.rollout.generate import stream_answer

    try:
        for piece in stream_answer(
            args.model,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        # The generating thread is inside torch, and the interpreter's own end would abort under it. Nothing is open.
        sys.stdout.write("\n")
        sys.stdout.flush()
        os._exit(130)
    sys.stdout.write("\n")
    return 0


def _answer_rows(args: argparse.Namespace) -> int:
    from burnish.data.formats.asked import asked
    from burnish.data.sources.jsonl import JsonLines, JsonlTable
    from burnish.rollout.answers import Question, Sampling, answer_all

    if args.to is None:
        raise UserError("the answers have nowhere to go", where="--rows", cure="add --to answers.jsonl")
    if args.num_answers > 1 and args.temperature <= 0:
        reason = f"{args.num_answers} answers at temperature 0 are the same one"
        raise UserError(reason, where="--num-answers", cure="add --temperature 1.0")
    if not Path(args.to).absolute().parent.is_dir():
        raise UserError(
            "no such folder", where=str(Path(args.to).parent), cure="create it, or give `--to` another file"
        )
    table = JsonLines(path=args.rows).open()
    assert isinstance(table, JsonlTable), "only streamed sources have no length"
    questions = []
    for row in table.rows(range(len(table))):  # all are looked at before the model is loaded
        said = asked(row)
        questions.append(Question(row.where, said.messages, said.tools, said.chat_template_kwargs))
    sampling = Sampling(args.max_new_tokens, args.temperature, args.seed)
    tally, reported = None, time.monotonic()
    for tally in answer_all(
        args.model,
        questions,
        Path(args.to),
        num_answers=args.num_answers,
        sampling=sampling,
        batch_size=args.batch_size,
    ):
        if time.monotonic() - reported > REPORT_SECONDS:
            print(f"{tally.asked} answers asked for, {tally.written} written", flush=True)
            reported = time.monotonic()
    if tally is None:
        print(f"{args.to}: every row has its answer already")
        return 0
    print(f"{args.to}: {tally.written} answers to {len(questions)} rows written")
    if tally.unfinished:
        print(
            f"{tally.unfinished} were cut off at {args.max_new_tokens} tokens or empty, and are left out; the same "
            f"command with a larger --max-new-tokens asks for them again"
        )
    return 0
