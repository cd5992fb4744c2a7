"""`burnish data RECIPE`: what training will see: rendered, masked, packed rows, and where every token went.

Of a recipe that trains on what the policy says: its prompts (`_prompts.py`), and of its run what was answered
(`_rollouts.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from burnish.commands._arguments import count
from burnish.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from burnish.data.config import DataConfig
    from burnish.data.ledger import Ledger
    from burnish.types import Block, RowFormat, RowKind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish data`."""
    parser.add_argument("recipe", metavar="RECIPE|RUN", help="a YAML file, or a run folder")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="changes to the recipe; values are YAML")
    parser.add_argument(
        "-n",
        type=count,
        default=3,
        metavar="N",
        help="samples (pairs, prompts) to show, in training order (default 3)",
    )
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    parser.add_argument(
        "--format",
        choices=("text", "json"),
        default="text",
        help="text: trained tokens in colour, in a pipe as [[trained]]; json: an object a sample, then the ledger",
    )
    parser.add_argument(
        "--rollouts", action="store_true", help="of a run: the prompts of a step, and what its policy answered"
    )
    parser.add_argument("--step", type=count, metavar="N", help="with --rollouts: which step (default the last kept)")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Shows samples one by one, or pair by pair, then the ledger of their packed rows, even where a row was refused."""
    from burnish.recipe import load_recipe

    if args.rollouts:
        from burnish.commands import _rollouts

        folder = args.recipe if Path(args.recipe).is_dir() else load_recipe(args.recipe, args.overrides).run_dir
        _rollouts.show(Path(folder), args.step, args.n, args.format)
        return 0
    if args.step is not None:
        args.usage_error("--step is one of --rollouts")
    from burnish.commands import _prompts
    from burnish.data.once import eval_blocks
    from burnish.data.stream import open_stream
    from burnish.launch.rollouts import on_policy
    from burnish.launch.texts import open_texts

    recipe = load_recipe(args.recipe, args.overrides)
    texts = tokenizer, renderer, _ = open_texts(recipe)
    if on_policy(recipe) is not None:
        _prompts.show(recipe, texts, args.split, args.n, args.format)
        return 0
    row_format = recipe.row_format()
    display = JsonDisplay(tokenizer) if args.format == "json" else TextDisplay(tokenizer, row_format)
    with ExitStack() as stack:
        if args.split == "eval":
            ledger = _eval_ledger(recipe.data)
            blocks, report = eval_blocks(recipe.data, renderer, ledger), ledger.report
        else:
            opened = open_stream(recipe.data, renderer, seed=recipe.seed, num_epochs=recipe.num_epochs)
            stream = stack.enter_context(closing(opened))
            blocks, report = chain.from_iterable(iter(lambda: stream.take(1), [])), stream.ledger
        try:
            display.show(islice(groups(blocks, row_format.kind), args.n))
        finally:
            display.ledger(report())
    return 0


def _eval_ledger(data: DataConfig) -> Ledger:
    from burnish.data.ledger import Ledger

    if not data.eval:
        raise DataError("the recipe has no eval data", where="data.eval", cure="`eval: [{type: jsonl, path: ...}]`")
    names = [f"data.eval.{source}" for source in range(len(data.eval))]
    return Ledger(names, data.packing.tokens_per_row(data.max_length))


class Document(NamedTuple):
    """One packed sample."""

    token_ids: list[int]
    loss_mask: list[bool]
    source: str
    row: int
    """The packed row that it is in; 0 is the first."""
    group: int
    """Its group in the row: the documents of one group came from one row of the source."""
    part: str
    """What it is in its group, `chosen`; empty where groups are single documents."""
    prefix: int
    """Tokens of the shared prompt that it stands behind."""
    columns: dict[str, Any]
    """A number a document, or a list with one a token; None for what the row does not say."""


def groups(blocks: Iterator[Block], kind: RowKind) -> Iterator[list[Document]]:
    """The groups of packed rows, in order."""
    for row, block in enumerate(blocks):
        for _, group in groupby(list(documents(block, row, kind)), key=lambda document: document.group):
            yield list(group)


def documents(block: Block, row: int, kind: RowKind) -> Iterator[Document]:
    """The samples of a packed row, in order."""
    # A row of 8 tokens has 8 entries for documents too, and no column of tokens worth showing.
    of_tokens = {n for n, column in block.columns.items() if len(column) == block.num_tokens != len(block.documents)}
    for index, source in enumerate(block.sample_ids):
        start, end, prefix_start, prefix_end = block.documents[index].tolist()
        columns = {
            name: [_said(value) for value in column[start:end].tolist()] if name in of_tokens else _said(column[index])
            for name, column in block.columns.items()
        }
        yield Document(
            token_ids=block.token_ids[start:end].tolist(),
            loss_mask=block.loss_mask[start:end].tolist(),
            source=source,
            row=row,
            group=int(block.group_ids[index]),
            part=_part(kind, columns),
            prefix=prefix_end - prefix_start,
            columns=columns,
        )


def _said(value: Any) -> float | None:
    number = float(value)
    return None if number != number else number


_PARTS: dict[str, tuple[str, dict[float, str]]] = {
    "preference": ("preference", {1: "chosen", -1: "rejected", 0: "prompt"}),
    "unpaired": ("preference", {1: "desirable", -1: "undesirable"}),
    "retrieval": ("role", {0: "query", 1: "positive", 2: "negative"}),
}
"""Kind of row -> the column that tells its documents apart, and their names."""


def _part(kind: RowKind, columns: dict[str, Any]) -> str:
    if kind not in _PARTS:
        return ""
    column, names = _PARTS[kind]
    return names[columns[column]]


class JsonDisplay:
    """One object a sample, and last {"ledger": ...}."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def show(self, shown: Iterable[list[Document]]) -> None:
        for document in chain.from_iterable(shown):
            tokens = self._tokenizer.convert_ids_to_tokens(document.token_ids)
            _line({"tokens": tokens, **document._asdict()})

    def ledger(self, report: dict[str, Any]) -> None:
        _line({"ledger": report})


def _line(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


class TextDisplay:
    """For people: trained tokens in green on a terminal, as [[trained]] in a pipe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row_format: RowFormat) -> None:
        from rich.console import Console

        self._tokenizer, self._row_format = tokenizer, row_format
        self._console: Console = Console(highlight=False, soft_wrap=True)

    def show(self, shown: Iterable[list[Document]]) -> None:
        from rich.text import Text

        for group in shown:
            for document in group:
                self._console.print(Text(self._title(document, alone=len(group) == 1), style="bold"))
                self._console.print(self._rendered(document), end="\n\n")

    def _title(self, document: Document, *, alone: bool) -> str:
        place = f"packed row {document.row}" + ("" if alone else f", group {document.group}")
        part = document.part + (f" behind the prompt's {document.prefix} tokens" if document.prefix else "")
        size = f"{len(document.token_ids)} tokens, {sum(document.loss_mask)} trained"
        marks = _PARTS.get(self._row_format.kind, ("",))[0]
        plain = {"weight": (1.0, 0.0), "margin": (0.0,), marks: (document.columns.get(marks),)}
        said = [
            f"{name} {self._value(name, value)}"
            for name, value in document.columns.items()
            if value not in plain.get(name, ())
        ]
        return " | ".join(text for text in (document.source, place, part, size, *said) if text)

    def _value(self, name: str, value: Any) -> str:
        """A column as people read it: a class by its name, of a value a token those that there are."""
        if isinstance(value, list):
            return ", ".join(f"{number:g}" for number in value if number is not None)
        classes = self._row_format.labels.get(name, ())
        if value is None:
            return "-"
        return classes[int(value)] if classes else f"{value:g}"

    def _rendered(self, document: Document) -> Any:
        from rich.text import Text

        text = Text()
        for trained, span in groupby(
            zip(document.loss_mask, document.token_ids, strict=True), key=lambda pair: pair[0]
        ):
            piece = str(self._tokenizer.decode([token_id for _, token_id in span]))
            marked = trained and not self._console.is_terminal
            text.append(f"[[{piece}]]" if marked else piece, style="bold green" if trained else "dim")
        return text

    def ledger(self, report: dict[str, Any]) -> None:
        """Tokens by fate, a line a source."""
        from rich.table import Table

        fates = list(report["tokens"])
        table = Table("source", "samples", "dropped", *fates, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        totals = {"all": report} if len(report["sources"]) > 1 else {}
        for name, counts in {**report["sources"], **totals}.items():
            numbers = (counts["samples"], counts["dropped"], *(counts["tokens"].get(fate, 0) for fate in fates))
            table.add_row(name, *(f"{number:,}" for number in numbers))
        self._console.print(table)
        slots, padding = report["slots"], report["padding"]
        self._console.print(f"{report['blocks']:,} packed rows, {slots - padding:,} of {slots:,} slots filled", end=" ")
        self._console.print(f"({report['fill']:.1%})")
