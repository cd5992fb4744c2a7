"""One number: a reward, a grade, a regression."""

from __future__ import annotations

from typing import Any, Literal

from burnish.model.heads.base import Head


class Scalar(Head):
    """w . h of the last hidden state h at a token: one number."""

    type: Literal["scalar"] = "scalar"

    def num_outputs(self, hf_config: Any) -> int:
        return 1
