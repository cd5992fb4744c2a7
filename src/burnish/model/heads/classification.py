"""A score for each of several classes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import model_validator

from burnish.model.heads.base import Head


class Classification(Head):
    """W h of the last hidden state h at a token: the logit of each class."""

    type: Literal["classification"] = "classification"
    labels: Annotated[list[str], MinLen(2)] | None = None
    """Names of the classes in the order of their numbers; exports carry them as `id2label`. This or `num_labels`."""
    num_labels: Annotated[int, Ge(2)] | None = None
    """How many classes, where they are known by number alone: 0, 1, ..."""

    @model_validator(mode="after")
    def _sized(self) -> Self:
        if (self.labels is None) == (self.num_labels is None):
            raise ValueError("name the classes with `labels: [...]`, or say how many with `num_labels:`")
        twice = sorted({label for label in self.labels or () if self.labels and self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"the class {', '.join(twice)} is named twice")
        return self

    def classes(self) -> tuple[str, ...]:
        return tuple(self.labels or map(str, range(self.num_labels or 0)))

    def num_outputs(self, hf_config: Any) -> int:
        return len(self.classes())
