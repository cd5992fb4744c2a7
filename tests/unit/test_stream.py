"""The stream of packed rows: nothing lost, the same for any number of ranks, resumed exactly at any row."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from burnish.data.feed import WINDOW, Cursor, ShardFeed
from burnish.data.ledger import Ledger
from burnish.data.once import eval_blocks
from burnish.data.prefetch import Prefetch
from burnish.data.stream import Stream, merge_states, open_stream
from burnish.errors import DataError, ResumeError, RunFailed
from burnish.types import Block, Group, Row
from tests.stream_helpers import (
    BAD_JSON,
    REFUSED,
    LengthRenderer,
    Lengths,
    ListShards,
    ShardLengths,
    data_config,
    same,
)


def lengths(count: int, seed: int = 0, longest: int = 30) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randint(2, longest) for _ in range(count))


def taken(stream: Stream, steps: int | None = None, num_blocks: int = 2) -> list[list[Block]]:
    """The steps of a stream, all of them or the next few; closes it when it is over."""
    result = []
    while steps is None or len(result) < steps:
        blocks = stream.take(num_blocks)
        if not blocks:
            break
        result.append(blocks)
    return result


def documents(steps: list[list[Block]]) -> Counter[str]:
    return Counter(name for blocks in steps for block in blocks for name in block.sample_ids)


TWO_SOURCES = (Lengths(lengths=lengths(70), weight=2.0), Lengths(lengths=lengths(30, seed=1), name="b"))
SHARDS = ShardLengths(shards=(lengths(40), lengths(9, seed=1), lengths(25, seed=2)))
SCENARIOS = {
    "two sources to the end": (data_config(*TWO_SOURCES), 2),
    "dropped rows": (data_config(Lengths(lengths=lengths(120, longest=44))), 1),
    "truncated rows": (data_config(Lengths(lengths=lengths(120, longest=44)), over_length="truncate"), 1),
    "one document a row": (data_config(Lengths(lengths=lengths(37)), packing={"type": "none"}), 1),
    "without end": (data_config(*TWO_SOURCES), None),
    "streamed beside a table": (data_config(SHARDS, Lengths(lengths=lengths(30, seed=1))), None),
    "in file order": (data_config(*TWO_SOURCES, shuffle=False), 1),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_stream_resumed_at_any_row_gives_the_identical_rest(name: str) -> None:
    data, num_epochs = SCENARIOS[name]
    whole = open_stream(data, LengthRenderer(), seed=3, num_epochs=num_epochs)
    states, rows = [whole.state()], []
    while (num_epochs or len(rows) < 60) and (blocks := whole.take(1)):
        rows += blocks
        states.append(json.loads(json.dumps(whole.state())))
    assert len(rows) > 20
    ledger = whole.ledger()
    whole.close()
    for start, state in enumerate(states):
        rest = open_stream(data, LengthRenderer(), seed=3, num_epochs=num_epochs)
        rest.load(state)
        assert rest.state() == state
        for expected in rows[start:]:
            (block,) = rest.take(1)
            assert same(block, expected)
        if num_epochs is not None:
            assert rest.take(1) == []
        assert rest.ledger() == ledger
        rest.close()


def test_resuming_beyond_the_first_chunk_of_the_mixed_order() -> None:
    """Which source comes next is computed 1,024 samples at a time; a state in a later chunk carries its counts."""
    data = data_config(Lengths(lengths=lengths(900), weight=1.7), Lengths(lengths=lengths(600, seed=1), name="b"))
    whole = open_stream(data, LengthRenderer(), seed=3, num_epochs=2)
    rows, states = [], {0: whole.state()}
    while blocks := whole.take(25):
        rows += blocks
        states[len(rows)] = whole.state()
    whole.close()
    counts = Counter(name[0] for block in rows for name in block.sample_ids)
    assert counts == {"a": 1889, "b": 1111}  # 3,000 * 1.7 / 2.7 = 1,888.9
    for start in (200, 700, len(rows) - 25):
        rest = open_stream(data, LengthRenderer(), seed=3, num_epochs=2)
        rest.load(states[start])
        again = rest.take(25)
        assert all(same(a, b) for a, b in zip(again, rows[start : start + 25], strict=True))
        rest.close()


def test_every_sample_of_every_epoch_comes_once_and_whole() -> None:
    data = data_config(Lengths(lengths=lengths(101)), prefetch=5)
    stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=3)
    steps = taken(stream)
    assert documents(steps) == {f"a:{index}": 3 for index in range(101)}
    for block in (block for blocks in steps for block in blocks):
        ids, spans = block.token_ids.tolist(), block.documents[: block.num_documents, :2].tolist()
        for name, (start, end) in zip(block.sample_ids, spans, strict=True):
            length = lengths(101)[int(name.removeprefix("a:"))]
            assert ids[start:end] == list(range(length, 2 * length))
    assert stream.progress() == 1.0
    assert stream.over and stream.take(2) == []
    stream.close()


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_last_step_is_known_as_such(num_blocks: int) -> None:
    """Whether it is exactly full or not, and rows dropped behind the last one are in the ledger by then."""
    data = data_config(Lengths(lengths=(*[20] * 12, 40, 40)), shuffle=False)
    stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=1)
    for _ in range(12 // num_blocks - 1):
        stream.take(num_blocks)
        assert not stream.over
    stream.take(num_blocks)
    assert stream.over and stream.progress() == 1.0 and stream.ledger()["dropped"] == 2
    stream.close()


def test_rows_of_one_document_come_in_the_order_of_the_samples() -> None:
    """Lane 0 of 2 has samples 0, 2, 4, ... and lane 1 the others; rows take turns."""
    data = data_config(Lengths(lengths=(5,) * 7), shuffle=False, packing={"type": "none", "lanes": 2})
    steps = taken(open_stream(data, LengthRenderer(), seed=0, num_epochs=1), num_blocks=3)
    names = [[block.sample_ids for block in blocks] for blocks in steps]
    assert names == [
        [("a:0",), ("a:1",), ("a:2",)],
        [("a:3",), ("a:4",), ("a:5",)],
        [("a:6",), (), ()],
    ]
    padding = steps[-1][-1]
    assert (padding.document_ids == -1).all() and not padding.loss_mask.any()
    assert padding.columns.keys() == {"weight", "twice"}


def test_two_lanes_packed_by_hand() -> None:
    """Rows of 10 tokens, one open bin a lane, file order.

    lane 0: rows 0, 2, 4, 6 of 6, 4, 7, 2 tokens: [0, 2] is exactly full; 4 and 6 stay open, 9 tokens
    lane 1: rows 1, 3, 5    of 5, 8, 1 tokens: 3 does not fit behind 1 and is fuller; 1 and 5 stay open, 6 tokens
    In turn: [0, 2], [3], then lane 0 has none. Both open rows are under 31/32 full: 7, 5, 2, 1 anew: [4, 6, 5], [1].
    """
    source = Lengths(lengths=(6, 5, 4, 8, 7, 1, 2))
    data = data_config(source, shuffle=False, max_length=10, packing={"lanes": 2, "open_bins": 1})
    steps = taken(open_stream(data, LengthRenderer(), seed=0, num_epochs=1), num_blocks=1)
    names = [block.sample_ids for (block,) in steps]
    assert names == [("a:0", "a:2"), ("a:3",), ("a:4", "a:6", "a:5"), ("a:1",)]


def test_samples_are_mixed_by_weight_whatever_their_length() -> None:
    data = data_config(Lengths(lengths=(30,) * 50, weight=3.0), Lengths(lengths=(3,) * 50, name="b"))
    stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=4)
    counts = Counter(name[0] for name in documents(taken(stream)).elements())
    assert counts == {"a": 300, "b": 100}
    assert stream.ledger()["sources"]["data.train.0"]["samples"] == 300
    stream.close()


def test_epochs_are_shuffled_differently_and_seeds_too() -> None:
    data = data_config(Lengths(lengths=(5,) * 40), packing={"type": "none", "lanes": 1})
    orders = set()
    for seed in (0, 1):
        stream = open_stream(data, LengthRenderer(), seed=seed, num_epochs=2)
        names = [block.sample_ids[0] for (block,) in taken(stream, num_blocks=1)]
        assert set(names[:40]) == set(names[40:]) == {f"a:{index}" for index in range(40)}
        orders |= {tuple(names[:40]), tuple(names[40:])}
    assert len(orders) == 4 and tuple(f"a:{index}" for index in range(40)) not in orders


@pytest.mark.parametrize("num_epochs", [None, 2])
def test_rows_do_not_depend_on_the_number_of_ranks(num_epochs: int | None) -> None:
    def steps(world_size: int) -> list[list[Block]]:
        ranks = [
            open_stream(data, LengthRenderer(), seed=1, num_epochs=num_epochs, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        shares = [taken(stream, 12, num_blocks=4 // world_size) for stream in ranks]
        for stream in ranks:
            stream.close()
        samples = sum(stream.ledger()["samples"] for stream in ranks)
        # row g of the run belongs to rank g mod world_size
        joined = [[block for turn in zip(*step, strict=True) for block in turn] for step in zip(*shares, strict=True)]
        assert samples == sum(documents(joined).values())
        return joined

    data = data_config(*TWO_SOURCES)
    alone = steps(1)
    assert len(alone) > 5
    for world_size in (2, 4):
        for blocks, expected in zip(steps(world_size), alone, strict=True):
            assert [b.sample_ids for b in blocks] == [b.sample_ids for b in expected]
            assert all(same(a, b) for a, b in zip(blocks, expected, strict=True) if b.num_documents)


@pytest.mark.parametrize("num_epochs", [None, 2])
def test_rows_that_belong_together_go_to_one_rank(num_epochs: int | None) -> None:
    data = data_config(*TWO_SOURCES)
    alone = open_stream(data, LengthRenderer(), seed=1, num_epochs=num_epochs)
    ranks = [
        open_stream(data, LengthRenderer(), seed=1, num_epochs=num_epochs, rank=rank, world_size=2, together=2)
        for rank in (0, 1)
    ]
    expected, shares = taken(alone, 5, num_blocks=8), [taken(stream, 5, num_blocks=4) for stream in ranks]
    for step, (first, second) in zip(expected, zip(*shares, strict=True), strict=True):
        joined = [*first[:2], *second[:2], *first[2:], *second[2:]]
        assert [block.sample_ids for block in joined] == [block.sample_ids for block in step]
    for stream in (alone, *ranks):
        stream.close()


def test_what_fills_up_the_last_step_has_the_columns_of_the_run_on_every_rank() -> None:
    data = data_config(Lengths(lengths=(30, 30, 30)), packing={"open_bins": 1})
    states, columns = [], []
    for rank in (0, 1):
        stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=1, rank=rank, world_size=2)
        stream.take(1)
        states.append(stream.state())
        stream.close()
    for rank in (0, 1):
        resumed = open_stream(data, LengthRenderer(), seed=0, num_epochs=1, rank=rank, world_size=2)
        resumed.load(merge_states(states))
        (block,) = resumed.take(1)
        columns.append({name: column.shape for name, column in block.columns.items()})
        assert bool(block.num_documents) == (rank == 0)
        resumed.close()
    assert columns[0] == columns[1] and set(columns[0]) == {"weight", "twice"}


def test_a_stream_that_goes_back_gives_the_same_rows_again() -> None:
    stream = open_stream(data_config(*TWO_SOURCES), LengthRenderer(), seed=1, num_epochs=2)
    stream.take(2)
    state = stream.state()
    rows, ledger = taken(stream, 2, num_blocks=3), stream.ledger()
    stream.load(state)
    again = taken(stream, 2, num_blocks=3)
    assert all(same(a, b) for x, y in zip(again, rows, strict=True) for a, b in zip(x, y, strict=True))
    assert stream.ledger() == ledger
    stream.close()


@pytest.mark.parametrize("num_epochs", [None, 2])
def test_a_run_goes_on_with_another_number_of_ranks(num_epochs: int | None) -> None:
    data = data_config(*TWO_SOURCES)
    alone = open_stream(data, LengthRenderer(), seed=1, num_epochs=num_epochs)
    before, after = taken(alone, 3, num_blocks=4), taken(alone, 2, num_blocks=4)
    ranks = [
        open_stream(data, LengthRenderer(), seed=1, num_epochs=num_epochs, rank=rank, world_size=2) for rank in (0, 1)
    ]
    shares = [taken(stream, 3, num_blocks=2) for stream in ranks]
    assert documents(shares[0]) + documents(shares[1]) == documents(before)
    merged = merge_states([stream.state() for stream in ranks])
    again = open_stream(data, LengthRenderer(), seed=1, num_epochs=num_epochs)
    again.load(merged)
    assert all(
        same(a, b)
        for blocks, expected in zip(taken(again, 2, 4), after, strict=True)
        for a, b in zip(blocks, expected, strict=True)
    )
    assert again.ledger() == alone.ledger()
    for stream in (alone, again, *ranks):
        stream.close()


@pytest.mark.parametrize(("bad", "reason"), [(REFUSED, "nothing to train"), (BAD_JSON, "the row is not JSON")])
def test_a_refused_row_is_raised_when_it_is_reached_and_nothing_before_it_is_lost(bad: int, reason: str) -> None:
    good = lengths(200)
    spoilt = (*good[:100], bad, *good[101:])
    data, broken = (
        data_config(Lengths(lengths=good), shuffle=False),
        data_config(Lengths(lengths=spoilt), shuffle=False),
    )
    expected = taken(open_stream(data, LengthRenderer(), seed=0, num_epochs=1), num_blocks=4)
    stream = open_stream(broken, LengthRenderer(), seed=0, num_epochs=1)
    steps, state = [], stream.state()
    with pytest.raises(DataError, match=reason) as refused:
        while True:
            steps.append(stream.take(4))
            state = stream.state()
            assert not stream.over
    assert refused.value.where == "a:100"
    assert len(steps) > 5
    for blocks, others in zip(steps, expected, strict=False):
        assert all(same(a, b) for a, b in zip(blocks, others, strict=True))
    assert stream.state() == state
    with pytest.raises(DataError, match=reason):
        stream.take(4)
    stream.close()
    # The row is mended, the run goes on where it stopped.
    mended = open_stream(data, LengthRenderer(), seed=0, num_epochs=1)
    mended.load(json.loads(json.dumps(state)))
    rest = taken(mended, num_blocks=4)
    assert [b.sample_ids for s in rest for b in s] == [b.sample_ids for s in expected[len(steps) :] for b in s]


def test_a_row_that_the_run_cannot_use_is_refused_like_a_bad_one() -> None:
    """Row 100 has 27 tokens: whoever accepts rows sees it cut to 20."""
    sizes = (*[9] * 100, 27, *[9] * 100)
    data = data_config(Lengths(lengths=sizes), eval=[Lengths(lengths=sizes)], shuffle=False, max_length=20)
    data = data.model_copy(update={"over_length": "truncate"})
    seen: set[int] = set()

    def accept(group: Group) -> None:
        seen.add(len(group))
        if len(group) == 20:
            raise DataError("nobody was asked about it", where=group.samples[0].sample_id)

    stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=1, accept=accept)
    steps, state = 0, stream.state()
    with pytest.raises(DataError, match="nobody was asked") as refused:
        while stream.take(4):
            steps, state = steps + 1, stream.state()
    assert (refused.value.where, seen) == ("a:100", {9, 20})
    assert steps > 5 and stream.state() == state
    stream.close()
    with pytest.raises(DataError, match="nobody was asked"):
        list(eval_blocks(data, LengthRenderer(), accept=accept))


def test_the_first_rows_do_not_wait_for_the_data_set() -> None:
    renderer = LengthRenderer()
    stream = open_stream(data_config(Lengths(lengths=lengths(20_000))), renderer, seed=0, num_epochs=1)
    stream.take(2)
    stream.close()
    assert renderer.rendered < 1500


def test_the_ledger_accounts_for_every_token() -> None:
    first, second = lengths(150, longest=44), lengths(50, seed=1, longest=40)
    data = data_config(Lengths(lengths=first), Lengths(lengths=second, weight=0.25, name="b"), prefetch=1)
    stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=1)  # 200 samples: 160 and 40
    steps = taken(stream, num_blocks=3)
    ledger = stream.ledger()
    seen = Counter[str]()
    for block in (block for blocks in steps for block in blocks):
        seen["trained"] += int(block.loss_mask.sum())
        seen["masked"] += int((block.document_ids >= 0).sum() - block.loss_mask.sum())
        seen["padding"] += int((block.document_ids < 0).sum())
    packed = sum(documents(steps).values())
    assert ledger["samples"] == 200 and ledger["dropped"] == 200 - packed > 10
    assert [part["samples"] for part in ledger["sources"].values()] == [160, 40]
    assert (ledger["tokens"]["trained"], ledger["tokens"]["masked"]) == (seen["trained"], seen["masked"])
    (dropped,) = (n for fate, n in ledger["tokens"].items() if fate.startswith("dropped"))
    by_source = [sum(part["tokens"].values()) for part in ledger["sources"].values()]
    assert dropped > 32 * 10 and sum(by_source) == seen["trained"] + seen["masked"] + dropped
    assert ledger["blocks"] == 3 * len(steps) and ledger["slots"] == 32 * 3 * len(steps)
    assert ledger["padding"] == seen["padding"]
    assert ledger["fill"] == (seen["trained"] + seen["masked"]) / ledger["slots"]
    stream.close()


def test_the_ledger_speaks_of_what_was_taken_not_of_what_was_made_ahead() -> None:
    stream = open_stream(
        data_config(Lengths(lengths=lengths(500)), prefetch=20), LengthRenderer(), seed=0, num_epochs=1
    )
    blocks = stream.take(2)
    time.sleep(0.05)
    assert stream.ledger()["samples"] == sum(block.num_documents for block in blocks)
    assert stream.progress() == sum(block.num_documents for block in blocks) / 500
    stream.close()


def test_streamed_shards_give_every_row_once_an_epoch() -> None:
    """3 shards and 4 lanes: lanes 0 and 3 share shard 0."""
    shards, lanes = ((5,) * (2 * WINDOW + 300), (5,) * 40, (5,) * 7), 4
    feed = ShardFeed(0, ListShards(shards, "s"), seed=0, shuffle=True, lanes=lanes)
    epochs: dict[int, Counter[tuple[int, int]]] = {0: Counter(), 1: Counter()}
    orders = {}
    for lane in range(lanes):
        cursor = Cursor()
        while True:
            ref, cursor = feed.next(0, lane, cursor)
            if cursor.epoch > 1:
                break
            epochs[cursor.epoch][ref.shard, ref.row] += 1
            orders.setdefault((cursor.epoch, lane), []).append(ref.row)
            assert feed.fetch([ref])[0].where == f"s{ref.shard}:{ref.row}"
    every = {(shard, row): 1 for shard, rows in enumerate(shards) for row in range(len(rows))}
    assert epochs[0] == every and epochs[1] == every
    assert orders[0, 1] != orders[1, 1] and orders[0, 1] != sorted(orders[0, 1])
    assert abs(len(orders[0, 0]) - len(orders[0, 3])) <= 1
    # Windows of 2 * 1,024 rows for the two lanes of shard 0: no row leaves its window.
    assert max(orders[0, 0][: 2 * WINDOW // 2]) < 2 * WINDOW <= min(orders[0, 0][WINDOW:])


def test_lanes_that_change_windows_together_read_every_row_once() -> None:
    """8 lanes in turn, as a stream asks them: after two windows each, no shard was begun a second time."""

    class Counted(ListShards):
        begun = 0

        def read(self, shard: int, start: int) -> Iterator[Row]:
            self.begun += 1
            return super().read(shard, start)

    shards = Counted(((5,) * (3 * WINDOW),) * 8, "s")
    feed, cursors = ShardFeed(0, shards, seed=0, shuffle=True, lanes=8), [Cursor()] * 8
    for _ in range(2 * WINDOW // 100 + 1):
        for lane in range(8):
            refs = []
            for _ in range(100):
                ref, cursors[lane] = feed.next(0, lane, cursors[lane])
                refs.append(ref)
            feed.fetch(refs)
    assert {cursor.window for cursor in cursors} == {2}
    assert shards.begun == 8


def test_a_bad_row_of_a_shard_keeps_its_place() -> None:
    feed = ShardFeed(0, ListShards(((3, 4, BAD_JSON, 6, 7),), "s"), seed=0, shuffle=False, lanes=1)
    cursor, refs = Cursor(), []
    for _ in range(5):
        ref, cursor = feed.next(0, 0, cursor)
        refs.append(ref)
    rows = feed.fetch(refs)
    assert [ref.row for ref in refs] == [0, 1, 2, 3, 4]
    assert isinstance(rows[2], DataError) and rows[2].where == "s0:2"
    assert [row.where for row in rows if not isinstance(row, DataError)] == ["s0:0", "s0:1", "s0:3", "s0:4"]


def test_a_lane_without_a_row_is_refused() -> None:
    data = data_config(ShardLengths(shards=((3, 4), (), (5,), (6,))))
    stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=None)
    with pytest.raises(DataError, match=r"lane 1 of 4 found no row in a whole epoch of its shards \[1\]"):
        stream.take(4)
    stream.close()


def test_what_cannot_be_streamed_is_refused_at_the_start() -> None:
    with pytest.raises(DataError, match="number of rows of a streamed source is not known") as refused:
        open_stream(data_config(SHARDS), LengthRenderer(), seed=0, num_epochs=1)
    assert refused.value.where == "data.train.0" and "num_steps" in refused.value.cure
    with pytest.raises(DataError, match="3 ranks do not divide 4 lanes"):
        open_stream(data_config(*TWO_SOURCES), LengthRenderer(), seed=0, num_epochs=1, world_size=3)


@pytest.mark.parametrize("num_epochs", [1, None])
def test_a_data_set_of_which_nothing_is_left_is_refused(num_epochs: int | None) -> None:
    data = data_config(Lengths(lengths=(33, 40, 50)))
    stream = open_stream(data, LengthRenderer(), seed=0, num_epochs=num_epochs)
    with pytest.raises(DataError, match="dropped"):
        stream.take(1)
    stream.close()


def test_other_data_than_the_checkpoint_saw_are_refused() -> None:
    stream = open_stream(data_config(Lengths(lengths=lengths(50))), LengthRenderer(), seed=0, num_epochs=1)
    stream.take(3)
    state = stream.state()
    stream.close()
    more = open_stream(data_config(Lengths(lengths=lengths(51))), LengthRenderer(), seed=0, num_epochs=1)
    with pytest.raises(ResumeError, match="51 rows now, 50 rows when the run was saved"):
        more.load(state)
    spoilt = open_stream(data_config(Lengths(lengths=(REFUSED,) * 50)), LengthRenderer(), seed=0, num_epochs=1)
    spoilt.load(state)
    with pytest.raises(ResumeError, match="used before the checkpoint"):
        spoilt.take(1)
    sharded = open_stream(data_config(SHARDS), LengthRenderer(), seed=0, num_epochs=None)
    fewer = ShardLengths(shards=SHARDS.shards[:-1])
    with pytest.raises(ResumeError, match=f"{len(SHARDS.shards) - 1} shards now, {len(SHARDS.shards)} shards when"):
        open_stream(data_config(fewer), LengthRenderer(), seed=0, num_epochs=None).load(sharded.state())


def test_evaluation_goes_through_every_row_once_in_order() -> None:
    """Rows of 10, one open bin: 6 and 4 are exactly full; 8 does not fit behind 5 and is fuller; 5 and 7 stay open."""
    files = [Lengths(lengths=(6, 4, 5)), Lengths(lengths=(8, 11, 1), name="b"), ShardLengths(shards=((7,),))]
    data = data_config(TWO_SOURCES[0], eval=files, max_length=10, packing={"open_bins": 1})
    ledger = Ledger(["first", "second", "third"], 10)
    names = [block.sample_ids for block in eval_blocks(data, LengthRenderer(), ledger)]
    assert names == [("a:0", "a:1"), ("b:0",), ("s0:0",), ("a:2", "b:2")]
    assert ledger.report()["tokens"] == {"trained": 25, "masked": 6, "dropped: longer than max_length": 11}
    assert [part["samples"] for part in ledger.report()["sources"].values()] == [3, 3, 1]
    assert ledger.report()["slots"] == 40 and ledger.report()["padding"] == 40 - 31
    refused = data_config(TWO_SOURCES[0], eval=[Lengths(lengths=(6, REFUSED))])
    with pytest.raises(DataError, match="nothing to train"):
        list(eval_blocks(refused, LengthRenderer()))


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    idle = open_stream(data_config(*TWO_SOURCES), LengthRenderer(), seed=0, num_epochs=None)
    idle.close()
    stream = open_stream(data_config(*TWO_SOURCES), LengthRenderer(), seed=0, num_epochs=None)
    stream.take(1)
    assert set(threading.enumerate()) - before
    stream.close()
    stream.close()
    broken = open_stream(data_config(Lengths(lengths=(REFUSED,) * 9)), LengthRenderer(), seed=0, num_epochs=None)
    with pytest.raises(DataError):
        broken.take(1)
    broken.close()
    assert not set(threading.enumerate()) - before


def test_making_ahead_is_bounded() -> None:
    made = []

    def items() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            yield item

    prefetch = Prefetch(items(), 4, lambda: "counting")
    assert [prefetch.get() for _ in range(3)] == [0, 1, 2]
    time.sleep(0.05)
    assert len(made) <= 3 + 4 + 1  # taken, waiting, and the one in hand
    prefetch.close()


def test_waiting_has_a_deadline_that_says_for_what() -> None:
    release = threading.Event()

    def items() -> Iterator[int]:
        release.wait(20)
        yield 1

    prefetch = Prefetch(items(), 4, lambda: "reading data.train.0")
    with pytest.raises(RunFailed, match="the data thread is reading data.train.0"):
        prefetch.get(deadline_seconds=0.05)
    release.set()
    assert prefetch.get() == 1 and prefetch.get() is None
    prefetch.close()


def test_a_whole_step_is_made_ahead_whatever_prefetch_says() -> None:
    """Rows of one document: 200 are taken, and 200 more must have been rendered before anyone asks."""
    data = data_config(Lengths(lengths=(5,) * 2000), packing={"type": "none", "lanes": 1}, prefetch=1)
    renderer = LengthRenderer()
    stream = open_stream(data, renderer, seed=0, num_epochs=None)
    assert len(stream.take(200)) == 200
    deadline = time.monotonic() + 10
    while renderer.rendered < 600 and time.monotonic() < deadline:
        time.sleep(0.01)
    stream.close()
    assert renderer.rendered >= 600  # prefetch: 1 stops at 16 + 32 + 64 + 128 and the 128 begun then, 368


def test_waiting_is_measured() -> None:
    class Slow(LengthRenderer):
        def render(self, rows):
            time.sleep(0.1)
            return super().render(rows)

    stream = open_stream(data_config(Lengths(lengths=lengths(64))), Slow(), seed=0, num_epochs=1)
    stream.take(1)
    assert stream.wait_seconds >= 0.1
    stream.close()


def test_a_row_edited_while_it_was_being_packed_is_refused_on_resume() -> None:
    before = lengths(60)
    stream = open_stream(data_config(Lengths(lengths=before)), LengthRenderer(), seed=0, num_epochs=None)
    stream.take(2)
    state = json.loads(json.dumps(stream.state()))
    stream.close()
    edited = data_config(Lengths(lengths=tuple(length - 1 for length in before)))
    resumed = open_stream(edited, LengthRenderer(), seed=0, num_epochs=None)
    resumed.load(state)
    with pytest.raises(ResumeError, match="was used before the checkpoint and is another now"):
        resumed.take(2)
    resumed.close()
