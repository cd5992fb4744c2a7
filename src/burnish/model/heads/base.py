"""What a head is: it reads hidden states and says something else than the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from burnish.component import Component

if TYPE_CHECKING:
    from torch import nn


class Head(Component):
    """Config of what reads the backbone's last hidden states. `lm`, the language model's own head, is the default."""

    makes: ClassVar[Literal["tokens", "scores", "embeddings", "several"]] = "scores"
    """What of `TokenOutputs` it fills: `tokens` all that the projection makes; `scores`; `embeddings`."""

    def parts(self) -> dict[str, Head]:
        """The heads this one stands for, by name; the name is the module's and, with `scores`, the output's."""
        return {"score": self}

    def classes(self) -> tuple[str, ...]:
        """Names of what its outputs stand for, where they are classes; () for numbers."""
        return ()

    def num_outputs(self, hf_config: Any) -> int:
        """Length L of its output vector. `hf_config` is None where the model is not known yet: scores are compared with
        labels before anything is loaded, so their number must not depend on it."""
        raise AssertionError(f"{type(self).__name__} does not say how long its outputs are")

    def open(self, hf_config: Any, *, name: str, seed: int) -> nn.Module | None:
        """The module, float32 on the CPU, its weights drawn from (seed, parameter name); None: it has none of its own.

        Its forward is `(hidden_TH, block, reads_T) -> Tensor`: [T, L] scores, 0 where nothing is read, or [D, E].
        """
        from burnish.model.heads.scores import Scores

        return Scores.drawn(hf_config, self.num_outputs(hf_config), name=name, seed=seed)
