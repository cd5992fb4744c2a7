"""Member histories: what each user watched, clicked or bought, in order.

Two kinds of files hold them: tables of interactions, one event a line, which are grouped by user and ordered by time in
memory (28 bytes an event, and 4 more for each further column); and rows that are histories already. Both become
`{"user": "196", "events": [{"item": "242", "timestamp": 881250949.0, "rating": "3"}, ...], "given": 0}`, where the
first `given` events are known and only those after them are to be predicted. Knows neither tokens nor lengths in them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge

from burnish.data.sources._files import DataFile, find_files
from burnish.data.sources.base import RowTable, Source
from burnish.data.sources.interactions import identifier, moment, named, place, read_events
from burnish.data.sources.jsonl import JsonlTable
from burnish.data.sources.parquet import ParquetTable
from burnish.errors import DataError
from burnish.types import Row

Part = Literal["all", "train", "valid", "test"]
_SINGULAR = {"items": "item", "timestamps": "timestamp", "ratings": "rating"}
_HISTORY = 'a history is {"user": "7", "items": ["a", "b"], "timestamps": [1, 2]}, or has a list of `events`'


class Events(Source):
    """Histories of users. A table's events are put in order by `timestamp`, and by line where that is equal or absent;
    histories must be in order already."""

    type: Literal["events"] = "events"
    path: str
    """A .csv, .tsv, .inter, .jsonl or .parquet file, a glob, or a URL that fsspec reads: one event a row, with columns
    `user` (or `user_id`), `item` (or `item_id`), mostly `timestamp`; or, in .jsonl and .parquet, one history a row."""
    part: Part = "all"
    """Leave-last-out: `train` is every history but its last two events; `valid` predicts the last but one from those
    before it, `test` the last from all others. `all` splits nothing."""
    window: Annotated[int, Ge(2)] | None = None
    """Longer histories become several rows of at most this many events, each beginning half a window after the one
    before; every event is predicted once. For `all` and `train`. Absent: one row a user."""
    future: Annotated[int, Ge(1)] | None = None
    """Of every row the last so many events are to be predicted, together, from all before them: what a policy that
    recommends several is compared with. `part: test` with 2 is what `train` leaves out. Absent: as `part` says."""
    min_user_events: Annotated[int, Ge(1)] = 1
    """Users of a table with fewer events are left out, as often as leaving out items makes new ones (k-core)."""
    min_item_events: Annotated[int, Ge(1)] = 1
    """Items of a table with fewer events are left out, as often as leaving out users makes new ones (k-core)."""
    unordered: Literal["refuse", "sort"] = "refuse"
    """What happens to a history whose timestamps are out of order."""

    def open(self) -> RowTable:
        files = find_files(self.path, "")
        histories = _history_table(files, self.renamed)
        if histories is not None and max(self.min_user_events, self.min_item_events) > 1:
            reason = "min_user_events and min_item_events count the events of a table, and these rows are histories"
            raise DataError(reason, self.path, "remove them, or write one event a row")
        table = _Table(files, self.renamed, self) if histories is None else _Histories(histories, self)
        if not len(table):
            raise DataError("holds no history", where=self.path)
        return table


class Span(NamedTuple):
    """A part of a history: events start..end, of which the first `given` are not predicted."""

    start: int
    end: int
    given: int


def spans(length: int, part: Part, window: int | None, future: int | None = None) -> list[Span]:
    """The rows that become of a history.

    >>> spans(6, "test", None)
    [Span(start=0, end=6, given=5)]
    >>> spans(9, "train", 4)    # 7 events: 0..3, then 4 and 5 after 2 and 3, then 6 after 4 and 5
    [Span(start=0, end=4, given=0), Span(start=2, end=6, given=2), Span(start=4, end=7, given=2)]
    >>> spans(6, "test", None, future=2)
    [Span(start=0, end=6, given=4)]
    """
    if future is not None:
        return [span._replace(given=max(0, span.end - span.start - future)) for span in spans(length, part, window)]
    if part == "valid" or part == "test":
        end = max(0, length - (part == "valid"))
        return [Span(0, end, max(0, end - 1))]
    end = max(0, length - 2) if part == "train" else length
    if window is None or end <= window:
        return [Span(0, end, 0)]
    step = window // 2
    later = range(step, end - window + step, step)
    return [Span(0, window, 0), *(Span(start, min(start + window, end), window - step) for start in later)]


class _Table:
    """Interactions of all users, sorted by user and time, numbered by span."""

    def __init__(
        self, files: list[DataFile], renamed: Callable[[dict[str, Any]], dict[str, Any]], config: Events
    ) -> None:
        self._files = files
        read = _read(files, renamed)
        kept = _core(read.user, read.item, config.min_user_events, config.min_item_events)
        order = kept[np.lexsort((kept, read.time[kept], read.user[kept]))]
        self._events = {name: (codes[order], values) for name, (codes, values) in read.columns.items()}
        self._time = read.time[order] if read.timed else None
        self._file, self._line, user = read.file[order], read.line[order], read.user[order]
        edges = np.flatnonzero(np.diff(user, prepend=-1, append=-1)).tolist()
        self._users = [read.users[code] for code in user[edges[:-1]]]
        self._spans = np.array(
            [
                (number, start + span.start, start + span.end, span.given)
                for number, (start, end) in enumerate(pairwise(edges))
                for span in spans(end - start, config.part, config.window, config.future)
            ],
            np.int64,
        ).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._spans)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The histories of these numbers, in this order."""
        return [self._row(*self._spans[index].tolist()) for index in indices]

    def _row(self, user: int, start: int, end: int, given: int) -> Row:
        events: list[dict[str, Any]] = [{} for _ in range(start, end)]
        for name, (codes, values) in self._events.items():
            for event, code in zip(events, codes[start:end].tolist(), strict=True):
                if code >= 0:
                    event[name] = values[code]
        if self._time is not None:
            for event, time in zip(events, self._time[start:end].tolist(), strict=True):
                event["timestamp"] = time
        places = [
            place(self._files[file], line)
            for file, line in zip(self._file[start:end].tolist(), self._line[start:end].tolist(), strict=True)
        ]
        where = f"{places[0] if places else self._files[0].path}, user {self._users[user]}"
        return Row({"user": self._users[user], "events": events, "given": given, "places": places}, where)


class _Read(NamedTuple):
    """A table as it stands in its files; arrays are by event."""

    users: list[str]
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    timed: bool
    file: np.ndarray
    line: np.ndarray
    columns: dict[str, tuple[np.ndarray, list[Any]]]
    """name -> (codes, -1 where an event has none; what a code stands for)"""


def _read(files: list[DataFile], renamed: Callable[[dict[str, Any]], dict[str, Any]]) -> _Read:
    users: dict[str, int] = {}
    user, file, line, time = array("i"), array("i"), array("q"), array("d")
    columns: dict[str, tuple[array[int], dict[Any, int], list[Any]]] = {"item": (array("i"), {}, [])}
    timed = False
    for number, data_file in enumerate(files):
        for record, line_number in read_events(data_file, renamed):
            where = place(data_file, line_number)
            user.append(users.setdefault(identifier(record, "user", where), len(users)))
            file.append(number)
            line.append(line_number)
            has_time = "timestamp" in record
            if len(user) > 1 and has_time != timed:
                raise DataError(
                    "some events have a timestamp and some have none", where, "give one to each, or to none"
                )
            timed = has_time
            time.append(moment(record["timestamp"], where) if has_time else 0.0)
            record = {**record, "item": identifier(record, "item", where)}
            for name, value in record.items():
                if name not in ("user", "timestamp"):
                    codes, numbers, values = columns.setdefault(name, (array("i"), {}, []))
                    codes.extend([-1] * (len(user) - 1 - len(codes)))
                    key = value if isinstance(value, str) else (type(value), repr(value))
                    if key not in numbers:
                        numbers[key] = len(values)
                        values.append(value)
                    codes.append(numbers[key])
    for codes, _, _ in columns.values():
        codes.extend([-1] * (len(user) - len(codes)))
    arrays = {name: (np.array(codes, np.int32), values) for name, (codes, _, values) in columns.items()}
    return _Read(
        list(users),
        np.array(user, np.int32),
        arrays["item"][0],
        np.array(time, np.float64),
        timed,
        np.array(file, np.int32),
        np.array(line, np.int64),
        arrays,
    )


def _core(user: np.ndarray, item: np.ndarray, min_user: int, min_item: int) -> np.ndarray:
    """Numbers of the events whose user and item both have enough of those that are left."""
    kept = np.arange(len(user))
    while len(kept):
        enough = (np.bincount(user[kept])[user[kept]] >= min_user) & (np.bincount(item[kept])[item[kept]] >= min_item)
        if enough.all():
            break
        kept = kept[enough]
    return kept


def _history_table(
    files: list[DataFile], renamed: Callable[[dict[str, Any]], dict[str, Any]]
) -> JsonlTable | ParquetTable | None:
    """The rows, where they are histories already: the first row of the first file has a list of items or events."""
    kind = {"jsonl": JsonlTable, "parquet": ParquetTable}.get(files[0].path.rpartition(".")[2].lower())
    if kind is None:
        return None
    record = next(read_events(files[0], renamed), ({}, 0))[0]
    return kind(files, renamed) if "items" in record or "events" in record else None


class _Histories:
    """Rows that are histories, checked and cut into spans as they are fetched."""

    def __init__(self, table: JsonlTable | ParquetTable, config: Events) -> None:
        self._table, self._config = table, config
        # Without windows a history is one row, whatever its length; with them, one pass over the files finds out.
        self._numbers = None if config.window is None else self._counted()

    def _counted(self) -> list[tuple[int, int]]:
        numbers = []
        for number in range(len(self._table)):
            length = len(self._history(self._table.rows([number])[0]).record["events"])
            numbers += [(number, k) for k in range(len(self._spans(length)))]
        return numbers

    def _spans(self, length: int) -> list[Span]:
        return spans(length, self._config.part, self._config.window, self._config.future)

    def __len__(self) -> int:
        return len(self._table) if self._numbers is None else len(self._numbers)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The histories of these numbers, in this order. Raises DataError naming file and line."""
        wanted = [(index, 0) if self._numbers is None else self._numbers[index] for index in indices]
        fetched = self._table.rows([number for number, _ in wanted])
        return [self._part(self._history(row), k) for row, (_, k) in zip(fetched, wanted, strict=True)]

    def _part(self, row: Row, k: int) -> Row:
        events = row.record["events"]
        start, end, given = self._spans(len(events))[k]
        return Row({**row.record, "events": events[start:end], "given": given}, row.where)

    def _history(self, row: Row) -> Row:
        record = named(row.record)
        events = record.get("events")
        if events is None and isinstance(record.get("items"), list):
            lists = {name: value for name, value in record.items() if isinstance(value, list)}
            lengths = {name: len(value) for name, value in lists.items()}
            if len(set(lengths.values())) > 1:
                said = ", ".join(f"{length} {name}" for name, length in lengths.items())
                raise DataError(f"its lists are of different lengths: {said}", row.where, "write one entry an event")
            names = [_SINGULAR.get(name, name) for name in lists]
            events = [dict(zip(names, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise DataError("the row is not a history", row.where, _HISTORY)
        events = [self._event(named(event), f"{row.where}, event {i}") for i, event in enumerate(events)]
        user = record.get("user", "")
        return Row({"user": str(user), "events": self._ordered(events, row.where)}, row.where)

    def _event(self, event: dict[str, Any], where: str) -> dict[str, Any]:
        event = {**event, "item": identifier(event, "item", where)}
        if "timestamp" in event:
            event["timestamp"] = moment(event["timestamp"], where)
        return event

    def _ordered(self, events: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
        if not events or not all("timestamp" in event for event in events):
            return events
        for i in range(1, len(events)):
            if events[i]["timestamp"] < events[i - 1]["timestamp"]:
                if self._config.unordered == "sort":
                    return sorted(events, key=lambda event: event["timestamp"])
                reason = f"event {i} is from before event {i - 1}: timestamp {events[i]['timestamp']:.15g}"
                raise DataError(reason, where, "put the events in order, or set the source's `unordered: sort`")
        return events
