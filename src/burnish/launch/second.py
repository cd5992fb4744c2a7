"""What a run hands to the second model of its objective: what the policy is, and a pass over all rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from burnish.errors import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from burnish.data.renderers.base import LiveRenderer
    from burnish.launch.texts import Texts
    from burnish.mesh import Mesh
    from burnish.policy.agreement import Student
    from burnish.policy.second import Surroundings
    from burnish.recipe import Recipe
    from burnish.types import Block


def student_of(recipe: Recipe, texts: Texts) -> Student:
    """The policy as a second model must know it, from its configuration and tokenizer alone. Raises ModelError."""
    from burnish.model.fresh import for_tokenizer
    from burnish.model.load import load_config
    from burnish.policy.agreement import Student

    config = for_tokenizer(recipe.model, texts.tokenizer)
    return Student(
        config=config,
        hf_config=load_config(config),
        tokenizer=texts.tokenizer,
        chat_template=texts.renderer.chat_template,
        max_length=recipe.data.max_length,
        new_tokens=texts.new_tokens,
    )


def surroundings(
    recipe: Recipe,
    student: Student,
    renderer: LiveRenderer,
    mesh: Mesh,
    *,
    resumed: bool,
    say: Callable[[str], None],
    stop_requested: Callable[[], str | None] = lambda: None,
) -> Surroundings:
    """What `SecondModel.open` needs beside the policy's model.

    Args:
        resumed: the run goes on from a checkpoint.
        stop_requested: name of the signal that asks to stop; the pass over all rows then ends with Stopped.
    """
    from burnish.data.once import all_blocks
    from burnish.policy.second import Surroundings

    def blocks() -> Iterator[Block]:
        for block in all_blocks(recipe.data, renderer):
            if (signal := stop_requested()) is not None:
                raise Stopped(f"stopped before the first step ({signal}); the same command starts again")
            yield block

    return Surroundings(
        student=student,
        mesh=mesh,
        micro_batch_size=recipe.micro_batch_size,
        seed=recipe.seed,
        packed_length=recipe.data.max_length if shares_rows(recipe) else None,
        run_dir=Path(recipe.run_dir),
        resumed=resumed,
        blocks=blocks,
        say=say,
    )


def shares_rows(recipe: Recipe) -> bool:
    """Whether several documents stand in one forward pass, if only the two answers of a pair."""
    together = recipe.row_format().kind in ("preference", "retrieval")
    return together or recipe.data.packing.type != "none" or recipe.micro_batch_size > 1
