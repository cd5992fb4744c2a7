"""A line of the report of `burnish check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from burnish.errors import UserError

MAX_REFUSALS = 20
"""Bad rows shown for each source; the rest is a number."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    stage: str
    verdict: Literal["ok", "warning", "refused"]
    text: str
    cure: str = ""

    @staticmethod
    def refusal(stage: str, error: UserError, prefix: str = "") -> Finding:
        """What a UserError says, as a line."""
        place = f"{error.where}: " if error.where else ""
        return Finding(stage, "refused", f"{prefix}{place}{error.reason}", error.cure)

    def __str__(self) -> str:
        cure = f"\n{'':20}cure: {self.cure}" if self.cure else ""
        return f"{self.verdict:8} {self.stage:10} {self.text}{cure}"

    def as_dict(self) -> dict[str, str]:
        """The same for `--json`."""
        return {"stage": self.stage, "verdict": self.verdict, "text": self.text, "cure": self.cure}
