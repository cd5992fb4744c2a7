"""Samples from the policy's own model, token by token, with our own continuous batching."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from burnish.errors import ModelError
from burnish.rollout.engine import Engine, EngineSetup, LiveEngine

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel


class Embedded(Engine):
    """In the training process it samples from the policy as it is, without a copy; in a process of its own it loads the
    model once and takes every version's weights. Its log-probabilities are those of training: the same modules, the
    same attention, the same head.

    A prompt that several requests have in common is computed once.
    """

    type: Literal["embedded"] = "embedded"
    max_concurrent: Annotated[int, Ge(1)] = 64
    """Requests in flight at once; the others wait. Keys and values of each take memory. Where it runs out, the engine
    goes on with fewer."""
    max_batch_tokens: Annotated[int, Ge(1)] = 2048
    """Tokens of a forward pass, at most, beside one for each request: prompts beyond that are read over several."""

    @property
    def capacity(self) -> int:
        return self.max_concurrent

    @property
    def is_policy_code(self) -> bool:
        return True

    def open(self, setup: EngineSetup, model: PolicyModel | None = None) -> LiveEngine:
        """See `Engine`.

        Raises:
            ModelError: the policy is cut over several ranks, or its model cannot be sampled token by token.
        """
        from burnish.rollout.decode_engine import DecodeEngine

        if model is not None:
            if model.mesh is not None and model.mesh.world_size > 1:
                raise ModelError(
                    f"the policy is cut over {model.mesh.world_size} ranks, and one alone cannot sample from it",
                    where="rollout.workers",
                    cure="engines of their own: `workers: {type: processes}` or `{type: ray}`",
                )
            return DecodeEngine(model, setup, self.max_concurrent, self.max_batch_tokens)
        from burnish.mesh import open_mesh
        from burnish.model.load import load_model
        from burnish.rollout.weights import load_into

        config = setup.model.model_copy(update={"activation_checkpointing": "none", "compile": None})
        with ExitStack() as stack:
            mesh = stack.enter_context(open_mesh())
            frozen = config.adapter is None  # in bfloat16 what trains would be kept in float32, and cast in every pass
            loaded = load_model(config, mesh, seed=setup.seed, new_tokens=setup.new_tokens, frozen=frozen)
            loaded.requires_grad_(False).eval()
            loaded.temperature = setup.temperature
            engine = DecodeEngine(loaded, setup, self.max_concurrent, self.max_batch_tokens, take=load_into)
            kept = stack.pop_all()
        engine.on_close = kept.close
        return engine
