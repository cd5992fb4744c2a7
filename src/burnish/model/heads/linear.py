"""Several numbers, whatever they stand for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge

from burnish.model.heads.base import Head


class Linear(Head):
    """W h of the last hidden state h at a token: `size` numbers, for a loss of your own."""

    type: Literal["linear"] = "linear"
    size: Annotated[int, Ge(1)]
    """How many."""

    def num_outputs(self, hf_config: Any) -> int:
        return self.size
