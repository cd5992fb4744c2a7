"""What happens to documents longer than the recipe allows; every token that is cut or dropped is accounted for."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from burnish.data.packing.base import max_documents
from burnish.errors import DataError
from burnish.types import Group, Rendered, Sample


def fit_length(
    rendered: Rendered, max_length: int, policy: Literal["refuse", "truncate", "drop"], row_length: int
) -> Rendered:
    """`rendered` with no document longer than `max_length` tokens, its shared prompt counted, and none of its groups
    longer than a packed row.

    `refuse`: the row carries a DataError that says how long it is. `drop`: the whole group goes. `truncate`: each
    document keeps its beginning, in a row too short for all of them the longest lose most; a group goes where a
    document that had trained tokens has none left, or where two that differed are the same now.

    >>> # 9 tokens, the last 2 trained, max_length 8, truncate: {"trained": 1, "masked": 7, "truncated": 1}
    """
    group = rendered.group
    if group is None:
        return rendered
    if len(group.samples) > (most := max_documents(row_length)):
        reason = f"{len(group.samples)} documents, a packed row of {row_length:,} tokens holds {most}"
        refusal = DataError(reason, rendered.row.where, "raise `data.packing.row_length`, or shorten the row's list")
        return _dropped(replace(rendered, refusal=refusal), "more documents than a packed row holds")
    longest, total = longest_document(group), len(group)
    if longest <= max_length and total <= row_length:
        return rendered
    too_long = "longer than max_length" if longest > max_length else "longer than a packed row"
    if policy == "refuse":
        refusal = _refusal(rendered, longest, max_length, row_length)
        return _dropped(replace(rendered, refusal=refusal), too_long)
    if policy == "drop":
        return _dropped(rendered, too_long)
    rooms = _rooms(group, max_length, row_length)
    samples = tuple(_cut(sample, room) for sample, room in zip(group.samples, rooms, strict=True))
    before_after = list(zip(group.samples, samples, strict=True))
    if not all(len(kept) and kept.loss_mask.any() >= sample.loss_mask.any() for sample, kept in before_after):
        at = "max_length" if longest > max_length else "the end of the packed row"
        return _dropped(rendered, f"no trained token before {at}")
    if _num_different(samples) < _num_different(group.samples):
        return _dropped(rendered, "documents of a group are the same when cut")
    num_cut = sum(len(sample) - len(kept) for sample, kept in before_after)
    trained_cut = sum(int(sample.loss_mask[len(kept) :].sum()) for sample, kept in before_after)
    fates = Counter(rendered.fates)
    cut_by_row = sum(_rooms(group, max_length, total)) - sum(map(len, samples))
    fates["truncated"] += num_cut - cut_by_row
    fates["truncated to a packed row"] += cut_by_row
    fates["trained"] -= trained_cut
    # Which of the other cut tokens were boundaries is not kept: they count as masked as far as there are any.
    from_masked = min(num_cut - trained_cut, fates["masked"])
    fates["masked"] -= from_masked
    fates["boundary"] -= num_cut - trained_cut - from_masked
    return replace(rendered, group=Group(samples), fates=+fates)


def longest_document(group: Group) -> int:
    """Tokens of the longest document, its shared prompt counted."""
    return max(_before(group, sample) + len(sample) for sample in group.samples)


def _before(group: Group, sample: Sample) -> int:
    """Tokens of the shared prompt."""
    return 0 if sample.prefix is None else len(group.samples[sample.prefix])


def _refusal(rendered: Rendered, longest: int, max_length: int, row_length: int) -> DataError:
    where = rendered.row.where
    if longest > max_length:
        cure = (
            "set `data.over_length` to truncate or drop, with which a stopped run goes on; or raise `data.max_length`"
        )
        return DataError(f"{longest:,} tokens, max_length is {max_length:,}", where, cure)
    assert rendered.group is not None
    reason = f"{len(rendered.group):,} tokens in {len(rendered.group.samples)} documents that must stand in one packed "
    cure = "raise `data.packing.row_length`; or set `data.over_length` to truncate or drop"
    return DataError(f"{reason}row, which has {row_length:,}", where, cure)


def _rooms(group: Group, max_length: int, row_length: int) -> list[int]:
    """How many tokens each document keeps: a shared prompt all, the others at most as many as all of them can have.

    >>> # prompt 10 and answers of 30 and 6 behind it, max_length 32, row_length 36: [10, 20, 6]
    """
    prompts = {sample.prefix for sample in group.samples}
    rooms = [max(min(len(sample), max_length - _before(group, sample)), 0) for sample in group.samples]
    left = row_length - sum(room for i, room in enumerate(rooms) if i in prompts)
    own = [room for i, room in enumerate(rooms) if i not in prompts]
    cap = bisect_right(range(max_length + 1), left, key=lambda cap: sum(min(room, cap) for room in own)) - 1
    return [room if i in prompts else min(room, max(cap, 0)) for i, room in enumerate(rooms)]


def _cut(sample: Sample, length: int) -> Sample:
    columns = {name: column[:length] if column.ndim else column for name, column in sample.columns.items()}
    return replace(sample, token_ids=sample.token_ids[:length], loss_mask=sample.loss_mask[:length], columns=columns)


def _num_different(samples: Sequence[Sample]) -> int:
    return len({(sample.prefix, sample.token_ids.tobytes()) for sample in samples})


def _dropped(rendered: Rendered, reason: str) -> Rendered:
    fates = Counter({f"dropped: {reason}": rendered.fates.total()})
    return replace(rendered, group=None, fates=fates)
