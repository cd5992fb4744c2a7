"""`burnish export RUN [--merge] --to DIR`: a folder that transformers, PEFT and vLLM load."""

from __future__ import annotations

import argparse
from pathlib import Path

from burnish.errors import EXIT_DONE, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a person can type after `burnish export`."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights: one whole model")
    parser.add_argument("--to", metavar="DIR", required=True, help="the folder to write; it must not exist yet")


def run(args: argparse.Namespace) -> int:
    """Exports the newest intact checkpoint of a run, reads it back and says how far its logits are."""
    import torch

    from burnish.launch.rank import mark_steps
    from burnish.launch.run_folder import require_tokens
    from burnish.launch.second import student_of
    from burnish.launch.stored_run import place_of
    from burnish.launch.texts import open_texts
    from burnish.mesh import open_mesh
    from burnish.model.export import export
    from burnish.model.fresh import for_tokenizer
    from burnish.model.load import load_model
    from burnish.policy.checkpoint import load_latest
    from burnish.policy.policy import local
    from burnish.recipe import load_recipe

    folder, to = Path(args.folder), Path(args.to)
    if to.exists():
        raise UserError("the folder exists already", where=str(to), cure="name another, or remove it")
    recipe = load_recipe(folder)
    loaded = load_latest(place_of(recipe.checkpoint.store, folder))
    if loaded is None:
        raise UserError("the run has no checkpoint yet", where=str(folder), cure=f"burnish train {folder}")
    for reason in loaded.rejected:
        print(f"passed over: {reason}")
    tokenizer, renderer, new_tokens = texts = open_texts(recipe)
    require_tokens(folder, student_of(recipe, texts).facts())
    config = for_tokenizer(recipe.model, tokenizer).model_copy(
        update={"compile": None, "activation_checkpointing": "none"}
    )
    with open_mesh() as mesh, torch.no_grad():
        model = load_model(config, mesh, seed=recipe.seed, new_tokens=new_tokens)
        for name, parameter in model.trainable_parameters():
            local(parameter).copy_(loaded.tensors["model"][name])
        mark_steps(recipe, model)
        report = export(
            model,
            tokenizer,
            to,
            merge=args.merge,
            base_path=config.name,
            base_revision=config.revision,
            chat_template=getattr(renderer, "chat_template", None),
        )
    print(f"step {loaded.step} exported to {to}, {report}")
    return EXIT_DONE
