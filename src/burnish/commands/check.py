"""`burnish check RECIPE`: everything that can be known before spending, cheapest first."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from burnish.commands._arguments import count, positive

if TYPE_CHECKING:
    from burnish.commands._at_scale import Stated
    from burnish.commands._finding import Finding
    from burnish.launch.choose import DeviceFacts

GPUS_A_NODE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish check`."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file, or a run folder")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", default=[], help="changes to the recipe; values are YAML"
    )
    parser.add_argument(
        "-n", "--rows", type=count, default=64, help="rows of each source that are rendered (default 64)"
    )
    parser.add_argument("--all", action="store_true", help="render every row: nothing is refused in mid-run")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of a recipe, for editors")
    parser.add_argument(
        "--world-size", type=count, metavar="N", help="plan for N ranks (default: as it would run here)"
    )
    parser.add_argument("--device-gb", type=positive, metavar="GB", help="of GPUs that are not here, 8 in a node")
    parser.add_argument("--store-gbs", type=positive, metavar="GB/S", help="where checkpoints go (default 5)")
    parser.add_argument(
        "--device-hours", type=positive, metavar="H", help="between two failures of a GPU (default 50,000)"
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Prints the report line by line as it is found. Exit code 2 if the run would be refused."""
    if args.schema:
        from burnish.recipe import Recipe

        print(json.dumps(Recipe.model_json_schema(), indent=2))
        return 0
    if args.recipe is None:
        args.usage_error("a RECIPE, or --schema")
    findings = []
    for finding in _findings(args):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    refused = sum(finding.verdict == "refused" for finding in findings)
    if args.json:
        print(json.dumps({"ok": not refused, "findings": [finding.as_dict() for finding in findings]}, indent=2))
    elif refused:
        print(f"\n{refused} thing{'s' * (refused > 1)} to fix before this recipe can run", file=sys.stderr)
    else:
        print(f"\nready: burnish train {shlex.join(map(str, [args.recipe, *args.overrides]))}")
    return 2 if refused else 0


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    from burnish.commands._finding import Finding
    from burnish.commands._preflight import Preflight
    from burnish.errors import RecipeError
    from burnish.launch.layout import world_size
    from burnish.recipe import load_recipe

    try:
        recipe = load_recipe(args.recipe, args.overrides, ranks=args.world_size or "all")
    except RecipeError as error:
        for problem in error.problems:
            yield Finding.refusal("schema", problem)
        return
    yield Finding("schema", "ok", "every key is known, and the parts fit together")
    ranks = args.world_size or world_size(recipe)
    yield from Preflight(recipe, None if args.all else args.rows, ranks, _device(args), _stated(args)).findings()


def _device(args: argparse.Namespace) -> DeviceFacts | None:
    from burnish.launch.choose import DeviceFacts

    if args.device_gb is None:
        return None
    return DeviceFacts(f"a GPU of {args.device_gb:g} GB", int(args.device_gb * 2**30), True, GPUS_A_NODE)


def _stated(args: argparse.Namespace) -> Stated:
    from burnish.commands._at_scale import STORE_GBS, Stated

    return Stated(args.store_gbs or STORE_GBS, args.device_hours)
