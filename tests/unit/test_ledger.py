"""Sums of the token ledger, by hand."""

from __future__ import annotations

import json
from collections import Counter

from burnish.data.ledger import Ledger, Seen, add_states


def filled() -> Ledger:
    ledger = Ledger(["data.train.0", "data.train.1"], row_length=20)
    ledger.count(
        [Seen(0, Counter(trained=5, masked=6, boundary=1), False), Seen(1, Counter(trained=4, masked=2), False)]
    )
    ledger.count_block(18)
    ledger.count([Seen(1, Counter({"dropped: longer than max_length": 30}), True)])
    ledger.count([Seen(1, Counter(trained=10, masked=10, truncated=7), False)])
    ledger.count_block(20)
    ledger.count_block(0)
    return ledger


def test_report() -> None:
    assert filled().report() == {
        "samples": 4,
        "dropped": 1,
        "tokens": {
            "trained": 19,
            "masked": 18,
            "boundary": 1,
            "truncated": 7,
            "dropped: longer than max_length": 30,
        },
        "blocks": 3,
        "slots": 60,
        "padding": 22,
        "fill": 38 / 60,
        "sources": {
            "data.train.0": {"samples": 1, "dropped": 0, "tokens": {"trained": 5, "masked": 6, "boundary": 1}},
            "data.train.1": {
                "samples": 3,
                "dropped": 1,
                "tokens": {
                    "trained": 14,
                    "masked": 12,
                    "dropped: longer than max_length": 30,
                    "truncated": 7,
                },
            },
        },
    }


def test_a_ledger_before_its_first_row() -> None:
    report = Ledger(["data.train.0"], row_length=20).report()
    assert report["fill"] == 0.0 and report["tokens"] == {} and report["padding"] == 0


def test_state_goes_through_json_and_counting_goes_on() -> None:
    again = Ledger(["data.train.0", "data.train.1"], row_length=20)
    again.load(json.loads(json.dumps(filled().state())))
    assert again.report() == filled().report()
    again.count([Seen(0, Counter(trained=1), False)])
    again.count_block(1)
    assert again.report()["sources"]["data.train.0"] == {
        "samples": 2,
        "dropped": 0,
        "tokens": {"trained": 6, "masked": 6, "boundary": 1},
    }


def test_the_ledgers_of_ranks_add_up() -> None:
    other = Ledger(["data.train.0", "data.train.1"], row_length=20)
    other.count([Seen(0, Counter(trained=3, truncated=2), False)])
    other.count_block(3)
    total = Ledger(["data.train.0", "data.train.1"], row_length=20)
    total.load(add_states([filled().state(), other.state()]))
    report = total.report()
    assert (report["samples"], report["dropped"], report["blocks"], report["padding"]) == (5, 1, 4, 80 - 41)
    assert report["tokens"]["trained"] == 22 and report["tokens"]["truncated"] == 9
    assert report["sources"]["data.train.0"]["tokens"] == {"trained": 8, "masked": 6, "boundary": 1, "truncated": 2}
