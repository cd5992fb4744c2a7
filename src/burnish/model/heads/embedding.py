"""One vector a document, for search and retrieval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from burnish.model.heads.base import Head

if TYPE_CHECKING:
    from burnish.model.heads.pooling import Pooled


class Embedding(Head):
    """Hidden states of a document, pooled to one vector that stands for it.

    In a causal model only the last token has read the whole document; the mean weighs in what was known half way.
    """

    type: Literal["embedding"] = "embedding"
    makes: ClassVar[Literal["embeddings"]] = "embeddings"
    pooling: Literal["last", "mean"] = "mean"
    """`last`: the hidden state of the document's last token; `mean`: of all its tokens."""
    normalize: bool = True
    """Bring vectors to length 1, so that their inner product is the cosine of the angle between them."""
    dimensions: Annotated[int, Ge(1)] | None = None
    """Length of the vectors, by a new linear map without bias; null: the model's hidden size, and no map."""

    def parts(self) -> dict[str, Head]:
        return {"embedding": self}

    def num_outputs(self, hf_config: Any) -> int:
        return self.dimensions or hf_config.get_text_config().hidden_size

    def open(self, hf_config: Any, *, name: str, seed: int) -> Pooled:
        from burnish.model.heads.pooling import Pooled

        return Pooled(self, hf_config.get_text_config().hidden_size, name=name, seed=seed)
