"""One turn and no answer: the rewards say all."""

from __future__ import annotations

from typing import Literal

from burnish.environments.base import Environment


class SingleTurn(Environment):
    """An episode is one completion."""

    type: Literal["single_turn"] = "single_turn"

    @property
    def is_interactive(self) -> bool:
        return False
