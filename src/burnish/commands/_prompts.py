"""`burnish data RECIPE` where training is on what the policy says: the prompts as they will be asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from burnish.commands._rollouts import visible
from burnish.errors import DataError
from burnish.rollouts import Dropped, Prompt

if TYPE_CHECKING:
    from burnish.launch.texts import Texts
    from burnish.recipe import Recipe

LONGEST_COLUMN = 200
"""Characters of a column's value that are shown to people."""


def show(recipe: Recipe, texts: Texts, split: str, num_shown: int, form: str) -> None:
    """Prints the first prompts in training order, or of `data.eval`, and those left out on the way.

    Raises:
        DataError: a row is bad, once those before it were shown.
    """
    from burnish.launch.rollouts import open_prompts

    if split == "eval" and not recipe.data.eval:
        raise DataError("the recipe has no eval data", where="data.eval", cure="`eval: [{type: jsonl, path: ...}]`")
    prompts = open_prompts(recipe, texts)
    found = prompts.evaluation() if split == "eval" else _in_order(prompts.get)
    for prompt in _first(found, num_shown):
        if form == "json":
            sys.stdout.write(json.dumps(_as_dict(prompt, texts)) + "\n")
        else:
            _print(prompt, recipe, texts)


def _in_order(get: Any) -> Iterator[Prompt | Dropped]:
    for index in count():
        found = get(index)
        if found is None:
            return
        yield found


def _first(found: Iterable[Prompt | Dropped], num_shown: int) -> Iterator[Prompt | Dropped]:
    """Up to the last of so many prompts; what is dropped does not count."""
    left = num_shown
    for prompt in found:
        yield prompt
        left -= isinstance(prompt, Prompt)
        if not left:
            return


def _as_dict(prompt: Prompt | Dropped, texts: Texts) -> dict[str, Any]:
    facts: dict[str, Any] = {"index": prompt.index, "where": prompt.where}
    if isinstance(prompt, Dropped):
        return facts | {"dropped": prompt.reason}
    tokens = texts.tokenizer.convert_ids_to_tokens(prompt.token_ids)
    said = {"asked": prompt.asked, "columns": prompt.columns}
    return facts | {"tokens": tokens, "token_ids": prompt.token_ids, **said}


def _print(prompt: Prompt | Dropped, recipe: Recipe, texts: Texts) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    title = f"{prompt.where} | prompt {prompt.index}"
    if isinstance(prompt, Dropped):
        console.print(Text(visible(f"{title} | left out: {prompt.reason}"), style="bold"), end="\n\n")
        return
    room = recipe.data.max_length - len(prompt.token_ids)
    console.print(Text(visible(f"{title} | {len(prompt.token_ids)} tokens, room for {room}"), style="bold"))
    console.print(Text(visible(str(texts.tokenizer.decode(prompt.token_ids))), style="dim"))
    for name, value in prompt.columns.items():
        said = visible(value if isinstance(value, str) else json.dumps(value))
        console.print(Text(f"  {name}: {said[:LONGEST_COLUMN]}{'...' * (len(said) > LONGEST_COLUMN)}"))
    console.print()
