"""The `model:` block of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from burnish.component import Component, Config, OneOf

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel


class Adapter(Component):
    """Small trainable weights beside frozen ones."""

    def apply(self, model: PolicyModel, *, seed: int) -> None:
        """Freezes `model` and adds the adapter in place; its outputs stay what they were until the first step."""
        raise AssertionError(f"{type(self).__name__} cannot be applied")


class Compile(Config):
    """torch.compile of each transformer layer: one graph over all packed layouts."""

    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's `mode`."""


class ModelConfig(Config):
    """Which model, in which precision, and what is done to it before training."""

    path: str
    """A hub id, a folder with Hugging Face files, or a `.gguf` file."""
    revision: str = "main"
    """Commit hash, branch or tag on the hub. A commit hash is required with `trust_remote_code`."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model; only from the commit that `revision` names."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in the forward and backward pass."""
    attention: Literal["auto", "sdpa", "varlen", "flex"] = "auto"
    """Kernel under the document-masked attention operator. `auto`: per-document SDPA on CPU, varlen on CUDA."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute each layer's activations in the backward pass; `selective` keeps matrix products and attention."""
    compile: Compile | None = None
    """Present: compile the layers."""
    adapter: Annotated[Adapter, OneOf("burnish.model.adapters")] | None = None
    """Present: train an adapter and freeze the rest. Absent: full fine-tuning."""
    pad_vocab_to: Annotated[int, Ge(1)] = 64
    """Rows of the head are padded to a multiple of this, for the kernels' sake; neither loss nor exports see it."""
    projection_chunk: Annotated[int, Gt(0)] = 256
    """Tokens projected to the vocabulary at once; transient memory is about this times the vocabulary times 4 bytes."""
