"""`burnish verify MODEL`: what we changed, against the plain transformers model."""

from __future__ import annotations

import argparse
import json

from burnish.errors import EXIT_DONE, EXIT_FAILED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish verify`."""
    parser.add_argument("model", metavar="MODEL", help="a hub id, a model folder or a .gguf file")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="also with compiled layers (a minute or more)")
    parser.add_argument("--json", action="store_true", help="one JSON object a path")


def run(args: argparse.Namespace) -> int:
    """Prints the differences path by path; exit code 1 if one is too large."""
    from burnish.mesh import open_mesh
    from burnish.model.adapters.lora import LoRA
    from burnish.model.config import ModelConfig
    from burnish.model.verify import TOLERANCE, verify

    config = ModelConfig(path=args.model, dtype=args.dtype, adapter=LoRA())
    if not args.json:
        print(f"{'path':36} {'logits':>9}  {'layer':20} {'gradient'}")
    passed = True
    with open_mesh() as mesh:
        for found in verify(config, mesh, compile_too=args.compile):
            passed &= found.passed
            if args.json:
                facts = {"path": found.path, "logits": found.logits, "layer": found.layer, "gradient": found.gradient}
                print(json.dumps(facts | {"passed": found.passed}), flush=True)
            else:
                verdict = "" if found.passed else "  TOO FAR"
                print(
                    f"{found.path:36} {found.logits:9.1e}  {shown(found.layer):20} {shown(found.gradient)}{verdict}",
                    flush=True,
                )
    if not args.json:
        import torch

        logits, gradient = TOLERANCE[getattr(torch, args.dtype)]
        print(
            f"{'equal' if passed else 'NOT EQUAL'} to plain transformers in {args.dtype}; differences are relative to "
            f"the largest value, at most {logits:g} of a logit and {gradient:g} of a gradient are accepted"
        )
    return EXIT_DONE if passed else EXIT_FAILED


def shown(difference: tuple[str, float]) -> str:
    """`layer 3 1.2e-06`, or a dash."""
    name, value = difference
    return f"{name} {value:.1e}" if name else "-"
