"""`burnish cache-teacher RECIPE`: a teacher's likeliest tokens for the whole data, once, for runs without a teacher."""

from __future__ import annotations

import argparse
import os
from functools import partial

from burnish.errors import EXIT_DONE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish cache-teacher`."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a distillation recipe with both teacher.path and teacher.cache"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the recipe")


def run(args: argparse.Namespace) -> int:
    """Writes `workflow.teacher.cache` anew; what was there before stays until all is written."""
    from burnish.launch.second import student_of, surroundings
    from burnish.launch.texts import open_texts
    from burnish.mesh import open_mesh
    from burnish.model.fresh import for_tokenizer
    from burnish.policy.second import Teacher
    from burnish.recipe import load_recipe

    if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(
            f"a teacher is asked by one process, and this is one of {ranks}",
            where="WORLD_SIZE",
            cure="start it without torchrun; CUDA_VISIBLE_DEVICES chooses its GPU",
        )
    recipe = load_recipe(args.recipe, args.overrides)
    teacher = recipe.workflow.second()
    if not isinstance(teacher, Teacher):
        raise UserError(
            f"a workflow of type {recipe.workflow.type} has no teacher",
            where=args.recipe,
            cure="`workflow: {type: distill, teacher: {path: ..., cache: ...}, loss: {type: topk_kd}}`",
        )
    texts = open_texts(recipe)
    recipe = recipe.model_copy(update={"model": for_tokenizer(recipe.model, texts.tokenizer)})
    with open_mesh() as mesh:
        student = student_of(recipe, texts)
        say = partial(print, flush=True)
        around = surroundings(recipe, student, texts.renderer, mesh, resumed=False, say=say)
        print(f"{teacher.path}, its {teacher.top_k} likeliest tokens: {teacher.write_cache(around)}")
    return EXIT_DONE
