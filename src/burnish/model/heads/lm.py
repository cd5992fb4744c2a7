"""The language model's own head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from burnish.model.heads.base import Head


class LM(Head):
    """The next token, by the head that came with the model."""

    type: Literal["lm"] = "lm"
    makes: ClassVar[Literal["tokens"]] = "tokens"

    def parts(self) -> dict[str, Head]:
        return {"lm": self}

    def open(self, hf_config: Any, *, name: str, seed: int) -> None:
        return None
