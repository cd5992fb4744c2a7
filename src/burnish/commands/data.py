"""`burnish data RECIPE`: what training will see: rendered, masked, packed rows, and where every token went."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain, groupby, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from burnish.commands._arguments import count
from burnish.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from burnish.data.config import DataConfig
    from burnish.data.ledger import Ledger
    from burnish.types import Block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish data`."""
    parser.add_argument("recipe", metavar="RECIPE|RUN", help="a YAML file, or a run folder")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="changes to the recipe; values are YAML")
    parser.add_argument("-n", type=count, default=3, metavar="N", help="samples to show, in training order (default 3)")
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    parser.add_argument(
        "--format",
        choices=("text", "json"),
        default="text",
        help="text: trained tokens in colour, in a pipe as [[trained]]; json: an object a sample, then the ledger",
    )


def run(args: argparse.Namespace) -> int:
    """Shows samples one by one, then the ledger of the packed rows they came from, even where a row was refused."""
    from burnish.data.stream import eval_blocks, open_stream
    from burnish.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    tokenizer = recipe.data.tokenizer.open(recipe.model.path, recipe.model.revision)
    renderer = recipe.data.renderer.open(tokenizer)
    display = JsonDisplay(tokenizer) if args.format == "json" else TextDisplay(tokenizer)
    with ExitStack() as stack:
        if args.split == "eval":
            ledger = _eval_ledger(recipe.data)
            blocks, report = eval_blocks(recipe.data, renderer, ledger), ledger.report
        else:
            opened = open_stream(recipe.data, renderer, seed=recipe.seed, num_epochs=recipe.num_epochs)
            stream = stack.enter_context(closing(opened))
            blocks, report = chain.from_iterable(iter(lambda: stream.take(1), [])), stream.ledger
        try:
            display.show(islice(documents(blocks), args.n))
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


def documents(blocks: Iterator[Block]) -> Iterator[Document]:
    """The samples of packed rows, in order."""
    for row, block in enumerate(blocks):
        for (start, end, *_), source in zip(block.documents.tolist(), block.sample_ids, strict=False):
            yield Document(block.token_ids[start:end].tolist(), block.loss_mask[start:end].tolist(), source, row)


class JsonDisplay:
    """One object a sample, and last {"ledger": ...}."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def show(self, shown: Iterator[Document]) -> None:
        for document in shown:
            token_ids, loss_mask, source, row = document
            tokens = self._tokenizer.convert_ids_to_tokens(token_ids)
            _line({"token_ids": token_ids, "tokens": tokens, "loss_mask": loss_mask, "source": source, "row": row})

    def ledger(self, report: dict[str, Any]) -> None:
        _line({"ledger": report})


def _line(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


class TextDisplay:
    """For people: trained tokens in green on a terminal, as [[trained]] in a pipe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from rich.console import Console

        self._tokenizer = tokenizer
        self._console: Console = Console(highlight=False, soft_wrap=True)

    def show(self, shown: Iterator[Document]) -> None:
        from rich.text import Text

        for document in shown:
            trained = sum(document.loss_mask)
            title = (
                f"{document.source} | packed row {document.row} | {len(document.token_ids)} tokens, {trained} trained"
            )
            self._console.print(Text(title, style="bold"))
            self._console.print(self._rendered(document), end="\n\n")

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
