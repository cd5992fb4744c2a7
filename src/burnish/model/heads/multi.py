"""Several heads on one backbone, for several losses."""

from __future__ import annotations

import keyword
from typing import Annotated, ClassVar, Literal, Self

from annotated_types import MinLen
from pydantic import model_validator

from burnish.component import OneOf
from burnish.model.heads.base import Head


class Multi(Head):
    """`heads: {lm: {type: lm}, quality: {type: scalar}}`: each says its own, a sum of losses trains them together."""

    type: Literal["multi"] = "multi"
    makes: ClassVar[Literal["several"]] = "several"
    heads: Annotated[dict[str, Annotated[Head, OneOf("burnish.model.heads", without=("multi",))]], MinLen(1)]
    """By name: losses name a head by it, and its parameters begin with it."""

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        for name in self.heads:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(f"'{name}' cannot name a head: letters, digits and _ only")
        for makes in ("tokens", "embeddings"):
            names = [name for name, head in self.heads.items() if head.makes == makes]
            if len(names) > 1:
                raise ValueError(f"{' and '.join(names)} would both make {makes}, which have no name; keep one")
        return self

    def parts(self) -> dict[str, Head]:
        return dict(self.heads)
