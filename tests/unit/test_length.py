"""What becomes of documents that are too long; every token accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from burnish.data.length import fit_length
from burnish.types import Group, Rendered, Row, Sample

ROW = Row({}, "data/train.jsonl:7")


def sample(mask: str, **columns: np.ndarray) -> Sample:
    """`..xx`: four tokens, 400 to 403, the last two trained."""
    ids = 100 * len(mask) + np.arange(len(mask), dtype=np.int32)
    return Sample(ids, np.array([c == "x" for c in mask]), ROW.where, columns)


def rendered(*samples: Sample, boundary: int = 0) -> Rendered:
    total = sum(map(len, samples))
    trained = sum(int(s.loss_mask.sum()) for s in samples)
    fates = Counter(trained=trained, boundary=boundary, masked=total - trained - boundary)
    return Rendered(ROW, Group(samples), fates)


@pytest.mark.parametrize("policy", ["refuse", "truncate", "drop"])
def test_what_fits_is_left_alone(policy) -> None:
    one = rendered(sample("..xx"))
    assert fit_length(one, 4, policy, 4) is one


def test_refuse_says_how_long_and_where() -> None:
    one = fit_length(rendered(sample("." * 1000 + "x" * 204)), 512, "refuse", 512)
    assert one.group is None and one.fates == {"dropped: longer than max_length": 1204}
    assert str(one.refusal).startswith(
        "data/train.jsonl:7: 1,204 tokens, max_length is 512\n  cure: set `data.over_length`"
    )


def test_drop_accounts_for_the_whole_group() -> None:
    one = fit_length(rendered(sample("..xx"), sample("...xxx")), 5, "drop", 16)
    assert one.group is None and one.refusal is None
    assert one.fates == {"dropped: longer than max_length": 10}


def test_truncate_keeps_the_beginning_and_moves_the_fates() -> None:
    per_token = np.arange(7.0)
    one = fit_length(
        rendered(sample("..xxx.x", weight=np.array(2.0), advantages=per_token), boundary=1), 4, "truncate", 4
    )
    assert one.group is not None
    (kept,) = one.group.samples
    assert kept.token_ids.tolist() == [700, 701, 702, 703] and kept.loss_mask.tolist() == [False, False, True, True]
    assert kept.columns["weight"] == 2.0 and kept.columns["advantages"].tolist() == [0, 1, 2, 3]
    assert one.fates == {"trained": 2, "masked": 1, "boundary": 1, "truncated": 3}


def test_truncate_cuts_each_document_of_a_group() -> None:
    one = fit_length(rendered(sample(".x"), sample("..xxxx")), 3, "truncate", 16)
    assert one.group is not None
    assert [len(s) for s in one.group.samples] == [2, 3]
    assert one.fates == {"trained": 2, "masked": 3, "truncated": 3}


def test_truncate_drops_what_has_nothing_trained_left() -> None:
    one = fit_length(rendered(sample("....xx")), 4, "truncate", 4)
    assert one.group is None and one.refusal is None
    assert one.fates == {"dropped: no trained token before max_length": 6}


def pair(prompt: str, chosen: str, rejected: str) -> Rendered:
    """A prompt and two answers behind it."""
    answers = [replace(sample(mask, part=np.array(1.0)), prefix=0) for mask in (chosen, rejected)]
    return rendered(sample(prompt, part=np.array(0.0)), *answers)


def lengths(one: Rendered) -> list[int]:
    assert one.group is not None
    assert one.fates.total() == len(one.group) + sum(n for fate, n in one.fates.items() if "truncated" in fate)
    assert one.fates["trained"] == sum(int(s.loss_mask.sum()) for s in one.group.samples)
    return [len(s) for s in one.group.samples]


def test_a_shared_prompt_counts_in_each_document() -> None:
    one = pair("....", "xx", "xxx.")
    assert fit_length(one, 8, "refuse", 10) is one  # 4 + 4 tokens, all together 10
    assert str(fit_length(one, 7, "refuse", 10).refusal).startswith(f"{ROW.where}: 8 tokens, max_length is 7")
    assert fit_length(one, 7, "drop", 10).fates == {"dropped: longer than max_length": 10}
    cut = fit_length(one, 6, "truncate", 10)
    assert lengths(cut) == [4, 2, 2]
    assert cut.fates == {"trained": 4, "masked": 4, "truncated": 2}
    assert cut.group is not None and [s.prefix for s in cut.group.samples] == [None, 0, 0]


def test_a_pair_goes_where_one_answer_loses_what_it_trained() -> None:
    one = fit_length(pair("....", "xx", "..xx"), 6, "truncate", 16)
    assert one.group is None and one.refusal is None
    assert one.fates == {"dropped: no trained token before max_length": 10}
    assert fit_length(pair("....", "xx", "xx"), 4, "truncate", 16).fates == {
        "dropped: no trained token before max_length": 8
    }


def test_a_group_must_fit_into_a_row() -> None:
    one = pair("....", "xxxxxx", "xx")
    refused = fit_length(one, 10, "refuse", 10)
    assert str(refused.refusal) == (
        f"{ROW.where}: 12 tokens in 3 documents that must stand in one packed row, which has 10\n"
        "  cure: raise `data.packing.row_length`; or set `data.over_length` to truncate or drop"
    )
    assert refused.fates == {"dropped: longer than a packed row": 12}
    assert fit_length(one, 10, "drop", 10).fates == {"dropped: longer than a packed row": 12}
    assert lengths(fit_length(one, 10, "truncate", 10)) == [4, 4, 2]  # the longest loses
    assert lengths(fit_length(one, 10, "truncate", 7)) == [4, 1, 1]
    # max_length 8 leaves 4 + 4 + 2, of which a row of 9 leaves 4 + 3 + 2: what was cut for which is told apart
    assert fit_length(one, 8, "truncate", 9).fates == {
        "trained": 5, "masked": 4, "truncated": 2, "truncated to a packed row": 1,
    }  # fmt: skip
    assert fit_length(one, 10, "truncate", 5).fates == {
        "dropped: no trained token before the end of the packed row": 12
    }


def test_documents_that_train_nothing_are_cut_like_others() -> None:
    assert lengths(fit_length(rendered(sample("....."), sample(".x")), 3, "truncate", 8)) == [3, 2]


def test_more_documents_than_a_row_holds_are_refused() -> None:
    one = fit_length(rendered(*[sample(".x")] * 9), 64, "truncate", 64)
    assert str(one.refusal).startswith(f"{ROW.where}: 9 documents, a packed row of 64 tokens holds 8")
    assert one.group is None and one.fates.total() == 18
    assert fit_length(rendered(*[sample(".x")] * 9), 64, "truncate", 72).group is not None


def test_a_pair_goes_where_its_answers_differ_behind_the_cut() -> None:
    one = rendered(sample(".xxxx"), replace(sample(".xxxx"), token_ids=np.array([500, 501, 502, 503, 9], np.int32)))
    assert fit_length(one, 5, "truncate", 10) is one
    cut = fit_length(one, 4, "truncate", 10)
    assert cut.group is None and cut.refusal is None
    assert cut.fates == {"dropped: documents of a group are the same when cut": 10}
