"""The pass over all data in which a second model is asked about every document, before any step is trained.

It must not know which model answers, nor recipes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.errors import DataError
from burnish.losses.base import Asking
from burnish.policy.answer_writer import FILE_BYTES, Writer
from burnish.policy.answers import FORMAT, Document, documents_of
from burnish.policy.policy import in_chunks

if TYPE_CHECKING:
    from collections.abc import Set

    from burnish.policy.second import Second, Surroundings

PROGRESS_SECONDS = 15.0


def answer_all(
    second: Second,
    around: Surroundings,
    columns: Set[str],
    folder: Path,
    of: Mapping[str, Any],
    *,
    file_bytes: int = FILE_BYTES,
) -> str:
    """Asks `second` for `columns` of every document that `around` has, and writes `folder`, which it replaces when all
    is there: a pass that was cut short leaves nothing behind that would be read. A line about what was written.

    Every rank asks for all rows, because a sharded model needs all of them; rank 0 writes.

    Args:
        of: JSON: who is asked about what; `Answers.are_of` compares it.
        file_bytes: a file is finished once it holds as much.

    Raises:
        DataError: a row of the data is refused; the folder holds something else, or cannot be written.
    """
    started, num_documents = time.monotonic(), 0
    writer = Writer(folder, file_bytes) if around.mesh.rank == 0 else None
    for document, values in _asked(second, around, columns):
        num_documents += 1
        if writer is not None:
            writer.add(document.key, values)
    if not num_documents:
        raise DataError("there is no trained token to ask about", str(folder), "`burnish data` shows the rows")
    if writer is not None:
        writer.commit({"format": FORMAT, "of": of, "num_documents": num_documents})
    around.mesh.barrier()
    return f"{num_documents:,} documents in {folder}, {time.monotonic() - started:.1f} s"


def _asked(second: Second, around: Surroundings, columns: Set[str]) -> Iterator[tuple[Document, dict[str, Tensor]]]:
    """Every document that `around` has, once, with its columns at its trained tokens."""
    seen: set[bytes] = set()
    loss = Asking(columns=frozenset(columns))
    told = time.monotonic()
    for rows in in_chunks(around.blocks(), around.micro_batch_size):
        for block in second.annotate(rows, loss):
            for document in documents_of(block):
                if document.key in seen:
                    continue
                seen.add(document.key)
                at = torch.from_numpy(document.trained).to(block.token_ids.device)
                yield document, {name: block.columns[name][at].cpu() for name in sorted(columns)}
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            around.say(f"{len(seen):,} documents so far")
