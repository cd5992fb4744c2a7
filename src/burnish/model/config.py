"""The `model:` block of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator

from burnish.component import Component, Config, OneOf
from burnish.model.heads.base import Head

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from burnish.model.policy_model import PolicyModel


HEADS = OneOf("burnish.model.heads", default="lm")


class Adapter(Component):
    """Small trainable weights beside frozen ones."""

    frozen_bytes: ClassVar[float | None] = None
    """Of a weight of the frozen model's linear layers; None: those of its dtype."""

    def load_arguments(self, dtype: str) -> dict[str, Any]:
        """What `from_pretrained` needs to be told about the frozen model, whose weights are `dtype`."""
        return {}

    def apply(self, model: PolicyModel, *, seed: int) -> None:
        """Freezes `model` and adds the adapter in place; its outputs stay what they were until the first step."""
        raise AssertionError(f"{type(self).__name__} cannot be applied")

    def off(self, model: PolicyModel) -> AbstractContextManager[None]:
        """Inside it, a `model` that this was applied to computes what it computed before, bit for bit. What trains and
        what is frozen stays as it is, so it may be entered before the first step, and under FSDP."""
        raise AssertionError(f"{type(self).__name__} cannot be switched off")


class Compile(Config):
    """torch.compile of each transformer layer: one graph over all packed layouts."""

    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's `mode`."""


class ModelConfig(Config):
    """Which model, in which precision, and what is done to it before training."""

    path: str | None = None
    """A hub id, a folder with Hugging Face files, or a `.gguf` file. This or `config`."""
    config: dict[str, Any] | None = None
    """A fresh model, its weights drawn from `seed`: `{model_type: llama, hidden_size: 64, num_hidden_layers: 2, ...}`,
    the fields of the family's configuration in transformers. Those that are absent have its defaults, and `vocab_size`
    and the special ids are the tokenizer's. This or `path`."""
    revision: str = "main"
    """Commit hash, branch or tag on the hub. A commit hash is required with `trust_remote_code`."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model; only from the commit that `revision` names."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision of the weights in the forward and backward pass. `auto`: bfloat16 on a device that computes in it, else
    float32."""
    attention: Literal["auto", "sdpa", "varlen", "flex"] = "auto"
    """Kernel under the document-masked attention operator. `auto`: per-document SDPA on CPU, varlen on CUDA."""
    activation_checkpointing: Literal["none", "full", "selective", "auto"] = "none"
    """Recompute each layer's activations in the backward pass; `selective` keeps matrix products and attention. `auto`:
    the least of none, selective and full that the predicted memory allows."""
    compile: Compile | None = None
    """Present: compile the layers."""
    adapter: Annotated[Adapter, OneOf("burnish.model.adapters")] | None = None
    """Present: train an adapter and freeze the rest. Absent: full fine-tuning."""
    head: Annotated[Head, HEADS] = HEADS.field(Head)
    """What reads the last hidden states: the model's own head, or a new one that trains from the first step on."""
    pad_vocab_to: Annotated[int, Ge(1)] = 64
    """Rows of the head are padded to a multiple of this, for the kernels' sake; neither loss nor exports see it."""
    projection_chunk: Annotated[int, Gt(0)] = 256
    """Tokens projected to the vocabulary at once; transient memory is about this times the vocabulary times 4 bytes."""

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("name a model by `path`, or describe a fresh one by `config`: one of the two")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("`config` needs a family: `model_type: llama`")
        if self.config is not None and self.adapter is not None:
            raise ValueError("`adapter` freezes a model's weights, and those of a fresh `config` are random")
        return self

    @property
    def name(self) -> str:
        """What people call the model: where it is, or that it is fresh."""
        return self.path or "model.config"
