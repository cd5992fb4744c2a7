"""`burnish chaos RECIPE --faults kill,hang --trials N`: run a recipe under a fault schedule, and get a verdict."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from burnish.errors import EXIT_DONE, EXIT_FAILED, UserError

if TYPE_CHECKING:
    from burnish.launch.chaos import Trial, Verdict
    from burnish.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish chaos`."""
    from burnish.launch.sabotage import FAULTS

    known = "; ".join(f"{name}: {what}" for name, what in FAULTS.items())
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; a short run of it, by overrides, will do")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", default=[], help="changes to the recipe")
    parser.add_argument(
        "--faults", default="kill,hang,term", help=f"what goes wrong, in turn (default %(default)s). {known}"
    )
    parser.add_argument("--trials", type=int, default=10, help="runs, each with two faults (default %(default)s)")
    parser.add_argument(
        "--workers", type=int, help="ranks of each run (default: the recipe's launch.num_workers, or 1)"
    )
    parser.add_argument(
        "--heartbeat-seconds", type=float, default=10.0, help="a silent rank is hung (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fault schedule")
    parser.add_argument("--to", help="a new folder for the runs (default: the recipe's run_dir with -chaos behind it)")
    parser.add_argument("--json", action="store_true", help="one JSON object a trial, and the verdict last")


def run(args: argparse.Namespace) -> int:
    """0: every trial ended by itself, bit-identical to the undisturbed run; else 1."""
    from burnish.launch.attempt import Limits
    from burnish.launch.chaos import Arena, Verdict, open_backend, write_certificate
    from burnish.recipe import load_recipe

    recipe = prepared(load_recipe(args.recipe, args.overrides))
    kinds = chosen_faults(args.faults)
    ranks = args.workers or getattr(recipe.launch, "num_workers", 1)
    folder = Path(args.to or f"{recipe.run_dir.rstrip('/')}-chaos")
    if folder.exists():
        raise UserError("the folder for the trials is there already", where=str(folder), cure="remove it, or give --to")
    limits = Limits(max_restarts=10, heartbeat_seconds=args.heartbeat_seconds, start_seconds=600.0, grace_seconds=60.0)
    verdict = Verdict()
    folder.mkdir(parents=True)
    with open_backend(ranks, folder / "trials.log") as backend:
        if not args.json:
            print(f"an undisturbed run on {ranks} rank{'s' * (ranks > 1)}, in {folder / 'undisturbed'}", flush=True)
        place = Arena(recipe, folder, ranks, limits, backend)
        for number in range(args.trials):
            verdict.trials.append(place.trial(number, kinds, args.seed))
            print(json.dumps(asdict(verdict.trials[-1])) if args.json else line(verdict.trials[-1]), flush=True)
        certificate = write_certificate(place, verdict, args.seed)
    print(json.dumps({"verdict": verdict.summary()}) if args.json else conclusion(verdict, recipe, folder))
    if certificate is not None and not args.json:
        print(f"certificate: {certificate}")
    return EXIT_DONE if all(trial.passed for trial in verdict.trials) else EXIT_FAILED


def prepared(recipe: Recipe) -> Recipe:
    """The recipe without what a trial must not touch: trackers, and a pause. Raises UserError: it has a store."""
    if recipe.checkpoint.store is not None:
        raise UserError(
            "trials would share one store", where="checkpoint.store", cure="checkpoint.store=null, for this command"
        )
    if recipe.checkpoint.save_every == "auto":
        raise UserError("faults are laid out by a fixed interval", where="checkpoint.save_every", cure="give a number")
    return recipe.model_copy(update={"track": [], "stop_after": None})


def chosen_faults(text: str) -> list[str]:
    """`kill,hang` as a list. Raises UserError: one is unknown."""
    from burnish.launch.sabotage import FAULTS

    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in FAULTS]
    if unknown or not kinds:
        raise UserError(f"no fault '{', '.join(unknown)}'", where="--faults", cure=f"any of {', '.join(FAULTS)}")
    return kinds


def line(trial: Trial) -> str:
    """One trial for a person."""
    what = "; ".join(trial.faults) or "no fault came to pass before the end"
    if trial.passed:
        lost = f", {sum(trial.lost_steps)} steps done again" if trial.lost_steps else ""
        return f"trial {trial.number}: bit-identical{lost}  ({what})"
    if not trial.ended:
        return f"trial {trial.number}: DID NOT END  ({what})\n  {trial.problem}"
    wrong = " and ".join(n for n, same in (("losses", trial.same_losses), ("weights", trial.same_weights)) if not same)
    return f"trial {trial.number}: OTHER {wrong.upper()}  ({what})"


def _counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none came to pass"


def conclusion(verdict: Verdict, recipe: Recipe, folder: Path) -> str:
    """The verdict for a person."""
    facts = verdict.summary()
    lines = [
        f"{facts['passed']} of {facts['trials']} trials passed: {facts['recovered']} ended by themselves after "
        f"{sum(facts['faults'].values())} faults ({_counted(facts['faults'])}), {facts['bit_equal']} bit-identical in "
        f"losses and weights",
        f"steps done again after a fault: {facts['lost_steps_mean']} on average, {facts['lost_steps_max']} at most, "
        f"with a checkpoint every {recipe.checkpoint.save_every}",
    ]
    if facts["detect_seconds_max"] is not None:
        lines.append(
            f"noticed within {facts['detect_seconds_max']} s, back at work {facts['recover_seconds_max']} s later"
        )
    if facts["passed"] < facts["trials"]:
        lines.append(f"what did not pass is in {folder}, with all that was printed in trials.log")
    return "\n".join(lines)
