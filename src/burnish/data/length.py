"""What happens to documents longer than the recipe allows; every token that is cut or dropped is accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

from burnish.errors import DataError
from burnish.types import Group, Rendered, Sample


def fit_length(rendered: Rendered, max_length: int, policy: Literal["refuse", "truncate", "drop"]) -> Rendered:
    """`rendered` with no document longer than `max_length` tokens.

    `refuse`: the row carries a DataError that says how long it is. `drop`: the whole group goes. `truncate`: each
    document keeps its beginning; a group with a document that has no trained token left goes.

    >>> # 9 tokens, the last 2 trained, max_length 8, truncate: {"trained": 1, "masked": 7, "truncated": 1}
    """
    group = rendered.group
    if group is None or all(len(sample) <= max_length for sample in group.samples):
        return rendered
    if policy == "refuse":
        longest = max(len(sample) for sample in group.samples)
        refusal = DataError(
            f"{longest:,} tokens, max_length is {max_length:,}",
            rendered.row.where,
            "set `data.over_length` to truncate or drop, with which a stopped run goes on; or raise `data.max_length`",
        )
        return _dropped(replace(rendered, refusal=refusal), "longer than max_length")
    if policy == "drop":
        return _dropped(rendered, "longer than max_length")
    samples = tuple(_cut(sample, max_length) for sample in group.samples)
    if not all(sample.loss_mask.any() for sample in samples):
        return _dropped(rendered, "no trained token before max_length")
    num_cut = len(group) - sum(map(len, samples))
    trained_cut = sum(int(sample.loss_mask[max_length:].sum()) for sample in group.samples)
    fates = Counter(rendered.fates)
    fates["truncated"] += num_cut
    fates["trained"] -= trained_cut
    # Which of the other cut tokens were boundaries is not kept: they count as masked as far as there are any.
    from_masked = min(num_cut - trained_cut, fates["masked"])
    fates["masked"] -= from_masked
    fates["boundary"] -= num_cut - trained_cut - from_masked
    return replace(rendered, group=Group(samples), fates=+fates)


def _cut(sample: Sample, length: int) -> Sample:
    columns = {name: column[:length] if column.ndim else column for name, column in sample.columns.items()}
    return Sample(sample.token_ids[:length], sample.loss_mask[:length], sample.sample_id, columns)


def _dropped(rendered: Rendered, reason: str) -> Rendered:
    fates = Counter({f"dropped: {reason}": rendered.fates.total()})
    return replace(rendered, group=None, fates=fates)
