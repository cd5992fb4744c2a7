"""`burnish train RECIPE [key.path=value ...]`: run a recipe where its `launch` says."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish train`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a run folder to go on with")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="changes to the recipe; values are YAML"
    )
    parser.add_argument("--json", action="store_true", help="progress as one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Runs the recipe to its end, or until it is stopped; the same command goes on from there."""
    from burnish.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides, ranks="all")
    return recipe.launch.run(recipe, json_lines=args.json)
