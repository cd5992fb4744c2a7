"""What becomes of documents that are too long; every token accounted for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from burnish.data.length import fit_length
from burnish.types import Group, Rendered, Row, Sample

ROW = Row({}, "data/train.jsonl:7")


def sample(mask: str, **columns: np.ndarray) -> Sample:
    """`..xx`: four tokens, the last two trained."""
    return Sample(np.arange(len(mask), dtype=np.int32), np.array([c == "x" for c in mask]), ROW.where, columns)


def rendered(*samples: Sample, boundary: int = 0) -> Rendered:
    total = sum(map(len, samples))
    trained = sum(int(s.loss_mask.sum()) for s in samples)
    fates = Counter(trained=trained, boundary=boundary, masked=total - trained - boundary)
    return Rendered(ROW, Group(samples), fates)


@pytest.mark.parametrize("policy", ["refuse", "truncate", "drop"])
def test_what_fits_is_left_alone(policy) -> None:
    one = rendered(sample("..xx"))
    assert fit_length(one, 4, policy) is one


def test_refuse_says_how_long_and_where() -> None:
    one = fit_length(rendered(sample("." * 1000 + "x" * 204)), 512, "refuse")
    assert one.group is None and one.fates == {"dropped: longer than max_length": 1204}
    assert str(one.refusal).startswith(
        "data/train.jsonl:7: 1,204 tokens, max_length is 512\n  cure: set `data.over_length`"
    )


def test_drop_accounts_for_the_whole_group() -> None:
    one = fit_length(rendered(sample("..xx"), sample("...xxx")), 5, "drop")
    assert one.group is None and one.refusal is None
    assert one.fates == {"dropped: longer than max_length": 10}


def test_truncate_keeps_the_beginning_and_moves_the_fates() -> None:
    per_token = np.arange(7.0)
    one = fit_length(rendered(sample("..xxx.x", weight=np.array(2.0), advantages=per_token), boundary=1), 4, "truncate")
    assert one.group is not None
    (kept,) = one.group.samples
    assert kept.token_ids.tolist() == [0, 1, 2, 3] and kept.loss_mask.tolist() == [False, False, True, True]
    assert kept.columns["weight"] == 2.0 and kept.columns["advantages"].tolist() == [0, 1, 2, 3]
    assert one.fates == {"trained": 2, "masked": 1, "boundary": 1, "truncated": 3}


def test_truncate_cuts_each_document_of_a_group() -> None:
    one = fit_length(rendered(sample(".x"), sample("..xxxx")), 3, "truncate")
    assert one.group is not None
    assert [len(s) for s in one.group.samples] == [2, 3]
    assert one.fates == {"trained": 2, "masked": 3, "truncated": 3}


def test_truncate_drops_what_has_nothing_trained_left() -> None:
    one = fit_length(rendered(sample("....xx")), 4, "truncate")
    assert one.group is None and one.refusal is None
    assert one.fates == {"dropped: no trained token before max_length": 6}
