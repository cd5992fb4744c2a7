"""Low-rank adapters, through PEFT: what a recipe says of them, and how they come onto a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Ge, Interval
from pydantic import model_validator

from burnish.errors import ModelError
from burnish.model.config import Adapter

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Holds back what PEFT says of an embedding and a head that are one weight, of which an adapter changes a side (the
    merge and `PolicyModel.is_tied` know of it), and of `Conv1D` layers beside others (it does what is right)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`|fan_in_fan_out is set to")
        yield


class LoRA(Adapter):
    """W x + scale B A x with W frozen. Hu et al., arXiv:2106.09685, eq. 3."""

    type: Literal["lora"] = "lora"
    r: Annotated[int, Ge(1)] = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Ge(0)] = 32
    """The update is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input; not on a token embedding's, whose input are ids."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead: its size then does not fall with the rank. arXiv:2312.03732."""
    use_dora: bool = False
    """Train each output's norm apart from its direction: m (W + scale B A) / |W + scale B A|, the norms taken over a
    row of W and constant to the gradient. Liu et al., arXiv:2402.09353, eq. 5 and section 4.3."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the head); names such as [q_proj, mlp.up_proj, embed_tokens, lm_head], each
    the end of a layer's dotted name; or a regular expression that matches whole dotted names."""
    layers_to_transform: list[Annotated[int, Ge(0)]] | None = None
    """Only in these transformer layers, counted from 0; not with a regular expression."""
    modules_to_save: list[str] = []
    """Modules trained in full beside the adapter, named as in `target_modules`: [embed_tokens, lm_head, norm]. Of an
    embedding and a head that are one weight, naming either trains both, and they stay one weight."""

    @model_validator(mode="after")
    def _regular_expression(self) -> Self:
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules: '{self.target_modules}' is no regular expression: {error}"
                ) from error
            if self.layers_to_transform is not None:
                raise ValueError("layers_to_transform: put the layers into the regular expression of target_modules")
        return self

    def apply(self, model: PolicyModel, *, seed: int) -> None:
        """Freezes the language model and puts an adapter beside each target; its outputs stay what they were, bit for
        bit. What is drawn depends on (seed, parameter name), so it is the same whatever else was drawn before.

        Raises:
            ModelError: a target that no layer has; modules to save that do not exist; PEFT is not installed.
        """
        try:
            from peft import inject_adapter_in_model
        except ImportError as error:
            raise ModelError("LoRA needs peft", where="model.adapter", cure='pip install "burnish[lora]"') from error
        from burnish.model.adapters.weights import ADAPTER, initialise
        from burnish.model.deferred import is_deferred

        was_tied, config = model.is_tied, self.peft_config(model)
        deferred = is_deferred(model.head.weight)
        model.causal_lm.requires_grad_(False)  # not the heads beside the language model's: they are new, and train
        with without_known_warnings():
            # Beside deferred weights PEFT makes its own without memory; `initialise` says what they hold.
            inject_adapter_in_model(config, model.causal_lm, adapter_name=ADAPTER, low_cpu_mem_usage=deferred)
        model.add_module(model.head_name, getattr(model.causal_lm, model.head_name))
        embedding = model.causal_lm.get_input_embeddings()
        if was_tied and hasattr(model.head, "modules_to_save"):
            model.head.modules_to_save[ADAPTER].weight = embedding.modules_to_save[ADAPTER].weight
        initialise(model, seed)
        model.adapter = self

    @contextmanager
    def off(self, model: PolicyModel) -> Iterator[None]:
        """PEFT's switch, flipped by hand: its own `enable_adapters` also takes `requires_grad` from the adapter, and
        FSDP remembers the answer of the first forward pass for good."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        switches = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        before = [module.disable_adapters for module in switches]
        for module in switches:
            module._disable_adapters = True
        try:
            yield
        finally:
            for module, was_off in zip(switches, before, strict=True):
                module._disable_adapters = was_off

    def peft_config(self, model: PolicyModel) -> Any:
        """The `LoraConfig` that selects the same modules of the plain transformers model; PEFT and vLLM read it beside
        the adapter's weights.

        Raises:
            ModelError: see `apply`.
        """
        from peft import LoraConfig

        from burnish.model.adapters.targets import saved_modules, target_modules, verify_targets

        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.lora_alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            target_modules=target_modules(self, model),
            layers_to_transform=self.layers_to_transform,
            modules_to_save=saved_modules(self, model) or None,
            inference_mode=False,
        )
        verify_targets(self, config, model)
        return config

    def saved_config(self, model: PolicyModel, base_path: str, base_revision: str) -> Any:
        """The same as it stands in a PEFT folder; `base_path` (hub id or folder) is what the adapter belongs to."""
        config = self.peft_config(model)
        config.base_model_name_or_path = str(Path(base_path).resolve()) if Path(base_path).exists() else base_path
        config.revision = base_revision
        config.inference_mode = True
        return config
