"""`burnish generate MODEL|RUN "prompt"`: talk to a model."""

from __future__ import annotations

import argparse
import os
import sys

from burnish.commands._arguments import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish generate`."""
    parser.add_argument("model", metavar="MODEL|RUN", help="a run folder, a model folder or a hub id")
    parser.add_argument("prompt", help="what the user says")
    parser.add_argument("--max-new-tokens", type=count, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Prints the answer as it is generated."""
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
