"""Every decision of the supervisor, on ranks that follow a script and a clock that the script moves."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import DataError, RecipeError, RefusedElsewhere, RestartsExhausted, RunFailed, Stopped, UserError
from burnish.launch.attempt import Limits
from burnish.launch.blame import first_failing, hanging, is_echo
from burnish.launch.heartbeat import BeatBoard, Silence
from burnish.launch.processes import num_gpus
from burnish.launch.supervise import Supervisor
from burnish.launch.supervised import FolderReport, newest_checkpoint, valid_worlds
from burnish.launch.worker_group import Beat, Ended, Outcome, Stack, outcome_of
from burnish.recipe import Recipe
from tests import tiny_run
from tests.supervision_helpers import Recorded

DONE, PAUSED, KILLED = Outcome(0, retry=False), Outcome(75, "stopped after step 7", retry=False), Outcome(-9)
BROKEN = Outcome(
    1,
    'Traceback (most recent call last):\n  File "distributed_c10d.py", line 3252, in all_reduce\n    work.wait()\n'
    "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:11904. Check the logs of the remote worker.\n",
)
BUG = Outcome(1, 'Traceback (most recent call last):\n  File "mine.py", line 7, in loss\n    x[9]\nIndexError: 9\n')


@dataclass
class Script:
    """What the ranks of one attempt do, in seconds from its start; each beats every second from `loads` on."""

    ends: list[tuple[float, int, Outcome]] = field(default_factory=list)
    silent: dict[int, float] = field(default_factory=dict)
    loads: float = 1.0
    stops: dict[int, tuple[float, Outcome]] | None = None
    """Seconds after it is asked, how each rank ends; None: all are paused after a second."""
    stacks: dict[int, Stack] = field(default_factory=dict)
    jump: tuple[float, float] | None = None
    """At a time, so many seconds pass in which only the supervisor sleeps."""
    progress: int | None = None
    """Step of the checkpoint that it leaves."""


class World:
    """Clock, backend and everything that the supervisor sees."""

    def __init__(self, *scripts: Script, available: Sequence[int] = (8,)) -> None:
        self.now, self.scripts, self.sizes = 1000.0, list(scripts), list[int]()
        self.room, self.reached, self.signal_at = list(available), -1, float("inf")
        self.report, self.groups = Recorded(), list[Group]()

    def start(self, size: int, attempt: int) -> Group:
        self.sizes.append(size)
        script = self.scripts.pop(0)
        assert attempt == len(self.sizes)
        if script.loads == float("inf"):
            raise OSError("no room in the cluster")
        self.groups.append(Group(self, script, size))
        return self.groups[-1]

    def available(self) -> int:
        return self.room.pop(0) if len(self.room) > 1 else self.room[0]

    def close(self) -> None:
        pass

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, size: int = 2, worlds: Sequence[int] = (), **limits: Any) -> int:
        allowed = Limits(
            **({"max_restarts": 3, "heartbeat_seconds": 30, "start_seconds": 100, "grace_seconds": 10} | limits)
        )
        return Supervisor(
            self,
            worlds or [size],
            size,
            allowed,
            self.report,
            progress=lambda: self.reached,
            stop_requested=lambda: "SIGTERM" if self.now >= self.signal_at else None,
            clock=lambda: self.now,
            sleep=self.sleep,
        ).run()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.report.events if event["event"] == kind]


class Group:
    """Ranks that follow a script."""

    def __init__(self, world: World, script: Script, size: int) -> None:
        self.world, self.script, self.size = world, script, size
        self.began, self.killed_at, self.asked = world.now, 0.0, 0
        self.ends = sorted(((at, rank, how) for at, rank, how in script.ends), key=lambda end: end[0])

    @property
    def passed(self) -> float:
        return self.world.now - self.began

    def wait(self, seconds: float) -> list[Ended]:
        if self.script.jump is not None and self.passed >= self.script.jump[0]:
            self.world.now += self.script.jump[1]
            self.began += self.script.jump[1]  # the ranks slept too
            self.script.jump = None
        next_end = self.ends[0][0] if self.ends else float("inf")
        self.world.now = self.began + max(min(self.passed + seconds, next_end), self.passed)
        due = [end for end in self.ends if end[0] <= self.passed + 1e-6]
        self.ends = self.ends[len(due) :]
        if due and self.script.progress is not None:
            self.world.reached = self.script.progress
        return [Ended(rank, outcome) for _, rank, outcome in due]

    def beats(self) -> list[Beat]:
        lived = [min(self.passed, self.script.silent.get(rank, float("inf"))) for rank in range(self.size)]
        counts = [1 + int(max(seconds - self.script.loads + 1.0, 0.0)) for seconds in lived]
        return [Beat(count, f"step {count}" if count > 1 else "start") for count in counts]

    def stop(self) -> None:
        self.asked += 1
        stops = self.script.stops
        if stops is None:
            stops = dict.fromkeys(range(self.size), (1.0, PAUSED))
        self.ends += [(self.passed + after, rank, how) for rank, (after, how) in stops.items()]

    def stacks(self, ranks: Sequence[int]) -> dict[int, Stack]:
        return {rank: self.script.stacks.get(rank, Stack("", stopped=False)) for rank in ranks}

    def kill(self) -> None:
        self.killed_at = self.killed_at or self.world.now


def both(at: float, outcome: Outcome = DONE) -> list[tuple[float, int, Outcome]]:
    return [(at, 0, outcome), (at, 1, outcome)]


def test_a_run_that_ends_by_itself_is_one_attempt():
    world = World(Script(both(500.0)))
    assert world.run() == 0
    assert world.sizes == [2] and world.report.events == []


def test_the_rank_that_died_is_named_and_not_the_one_whose_connection_broke():
    world = World(Script([(5.0, 0, BROKEN), (5.4, 1, KILLED)]), Script(both(20.0), loads=3.0))
    assert world.run() == 0
    (died,), (restarted,) = world.events("worker_died"), world.events("restarted")
    assert (died["rank"], died["attempt"], died["reason"], died["phase"]) == (1, 1, "ended by SIGKILL", "step 6")
    assert restarted["attempt"] == 2 and restarted["seconds"] == pytest.approx(3.0, abs=0.5)
    first, second = world.groups
    assert first.killed_at == 1005.4 == second.began  # no pause before the first restart
    assert world.report.notes[1] == "restarting from the beginning (restart 1 of 3 since the last progress)"


def test_a_death_without_a_broken_connection_is_acted_on_at_once():
    world = World(Script([(5.0, 1, KILLED)]), Script(both(20.0)))
    world.run()
    assert world.groups[0].killed_at == 1005.0


def test_a_broken_connection_without_any_death_is_no_bug_however_often():
    world = World(*[Script([(5.0, 0, BROKEN)]) for _ in range(3)], Script(both(20.0)))
    assert world.run() == 0
    assert [event["rank"] for event in world.events("worker_died")] == [0, 0, 0]


def test_a_refusal_ends_the_run_with_the_words_of_the_rank_that_refused():
    refused = outcome_of(lambda: _raise(DataError("not JSON", where="train.jsonl:7", cure="mend it")))
    world = World(Script([(5.0, 0, outcome_of(lambda: _raise(RefusedElsewhere(1)))), (5.2, 1, refused)]))
    with pytest.raises(UserError) as refusal:
        world.run()
    assert str(refusal.value) == "train.jsonl:7: not JSON\n  cure: mend it"
    assert refusal.value.exit_code == 2 and world.groups[0].killed_at > 0


def test_a_run_that_failed_by_itself_is_not_tried_again():
    world = World(Script(both(5.0, outcome_of(lambda: _raise(RunFailed("the third bad step in a row"))))))
    with pytest.raises(RunFailed, match="^the third bad step in a row$"):
        world.run()


def test_all_paused_is_paused():
    world = World(Script(both(5.0, PAUSED)))
    with pytest.raises(Stopped, match="^stopped after step 7$"):
        world.run()


def test_an_error_that_comes_again_at_the_same_step_ends_the_run_with_its_traceback():
    world = World(Script([(5.5, 1, BUG)]), Script([(5.5, 0, BUG)]))
    with pytest.raises(RunFailed, match=r"(?s)same step twice.*mine\.py.*IndexError: 9"):
        world.run()
    assert len(world.groups) == 2


@pytest.mark.parametrize("second", [Script([(9.5, 1, BUG)]), Script([(5.5, 1, BUG)], progress=4)])
def test_an_error_at_another_step_or_after_progress_is_tried_again(second: Script):
    world = World(Script([(5.5, 1, BUG)]), second, Script(both(20.0)))
    assert world.run() == 0
    assert "IndexError" in world.events("worker_died")[0]["traceback"]


def test_the_budget_ends_the_run_with_every_failure():
    world = World(*[Script([(5.0 + n, n % 2, KILLED)]) for n in range(4)])
    with pytest.raises(RestartsExhausted) as exhausted:
        world.run()
    assert len(exhausted.value.failures) == 4 and isinstance(exhausted.value, RunFailed)
    assert "rank 1 at step 7: ended by SIGKILL" in str(exhausted.value)
    # 0, 1 and 2 s before the restarts.
    starts = [group.began for group in world.groups]
    ends = [group.killed_at for group in world.groups]
    assert [after - before for before, after in zip(ends, starts[1:], strict=False)] == [0.0, 1.0, 2.0]


def test_a_new_checkpoint_fills_the_budget():
    scripts = [Script([(5.0, 1, KILLED)], progress=n) for n in range(9)]
    world = World(*scripts, Script(both(20.0)))
    assert world.run(max_restarts=1) == 0
    assert world.report.notes[-1] == "restarting from checkpoint-8 (restart 1 of 1 since the last progress)"


@pytest.mark.parametrize("silent_from", [3.2, 11.9])
def test_a_hung_rank_is_found_by_its_deadline_and_its_stacks_kept(silent_from: float):
    stacks = {0: Stack(WAITS, stopped=False), 1: Stack(BUSY, stopped=False)}
    script = Script(silent={1: silent_from, 0: silent_from + 0.7}, stacks=stacks)
    world = World(script, Script(both(20.0)))
    assert world.run() == 0
    (hung,) = world.events("worker_hung")
    assert hung["rank"] == 1 and world.report.files[hung["stacks"]] == BUSY and hung["stacks"] == "stacks-rank1-1.txt"
    last_beat = 1000.0 + int(silent_from)
    assert 28.4 <= world.groups[0].killed_at - last_beat <= 30.0


def test_a_rank_that_does_not_answer_is_named_although_all_are_silent():
    stacks = {0: Stack(BUSY, stopped=False), 1: Stack("", stopped=True)}
    world = World(Script(silent={0: 5.0, 1: 5.0}, stacks=stacks), Script(both(20.0)))
    world.run()
    (hung,) = world.events("worker_hung")
    assert hung["rank"] == 1 and hung["stopped"] and "stacks" not in hung


def test_loading_may_take_longer_than_a_step_but_not_forever():
    world = World(Script(both(200.0), loads=80.0))
    assert world.run() == 0 and world.report.events == []
    world = World(Script(loads=1e9), Script(both(20.0)))
    assert world.run() == 0
    assert [event["rank"] for event in world.events("worker_hung")] == [0, 1]
    assert 98.0 <= world.groups[0].killed_at - 1000.0 <= 100.0


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_a_clock_that_jumps_takes_no_rank_for_hung(seconds: float):
    world = World(Script(both(200.0), jump=(20.0, seconds)))
    assert world.run() == 0
    assert world.report.events == []


def test_sigterm_reaches_all_ranks_once_and_their_pause_is_the_run_s():
    world = World(Script())
    world.signal_at = 1007.0
    with pytest.raises(Stopped, match="^stopped after step 7$"):
        world.run()
    assert world.groups[0].asked == 1 and world.now < 1009.0


@pytest.mark.parametrize(
    ("stops", "until", "why"),
    [
        ({0: (1.0, PAUSED)}, 1017.0, "within 10 s"),
        ({0: (1.0, PAUSED), 1: (2.0, Outcome(-15))}, 1009.0, "rank 1 at step 10: ended by SIGTERM"),
    ],
)
def test_ranks_that_do_not_stop_in_time_or_die_are_killed(stops: Any, until: float, why: str):
    world = World(Script(stops=stops))
    world.signal_at = 1007.0
    with pytest.raises(Stopped, match=f"SIGTERM.*{why}.*same command goes on"):
        world.run()
    assert world.groups[0].killed_at == pytest.approx(until, abs=0.6)


def test_a_signal_before_a_restart_stops_there():
    world = World(Script([(5.0, 1, KILLED)]), Script([(5.0, 1, KILLED)]))
    world.signal_at = 1010.5  # in the pause of a second before the third attempt
    with pytest.raises(Stopped, match="while no rank ran"):
        world.run()


def test_an_elastic_run_shrinks_and_grows_with_what_can_be_had():
    # 8 ranks, then 5 of which 4 are valid, then 8 again; asked at each start, and every three minutes while too few.
    world = World(Script([(5.0, 7, KILLED)]), Script(), Script([(9.0, rank, DONE) for rank in range(8)]))
    world.room = [8, 5, 7, 8, 8]
    assert world.run(8, worlds=[1, 2, 4, 8]) == 0
    assert world.sizes == [8, 4, 8]
    assert [(event["before"], event["ranks"]) for event in world.events("resized")] == [(8, 4), (4, 8)]
    assert world.groups[1].asked == 1
    assert world.groups[1].killed_at - world.groups[1].began == pytest.approx(2 * 180.0, abs=3.0)
    assert len(world.events("worker_died")) == 1


def test_a_signal_while_the_ranks_stop_to_be_more_stops_the_run():
    world = World(Script(stops={0: (20.0, PAUSED), 1: (25.0, PAUSED)}), available=[2, 4])
    world.signal_at = 1000.0 + 180.0 + 22.0
    with pytest.raises(Stopped, match="^stopped after step 7$"):
        world.run(2, worlds=[2, 4])


def test_a_run_waits_for_ranks_and_says_how_many_are_missing():
    world = World(Script(both(5.0)), available=[1, 1, 1, 2])
    assert world.run() == 0 and world.groups[0].began == 1001.5
    with pytest.raises(RunFailed, match="needs 2 ranks, and 1 could be had for 100 s"):
        World(Script(), available=[1]).run()


def test_ranks_that_cannot_be_started_are_tried_again_within_the_budget():
    world = World(Script(loads=float("inf")), Script(loads=float("inf")), Script(both(5.0)))
    assert world.run() == 0
    with pytest.raises(RestartsExhausted, match="no room in the cluster"):
        World(*[Script(loads=float("inf"))] * 2).run(max_restarts=1)


WAITS = """Thread 0x00007f (most recent call first):
  File "threading.py", line 331 in wait

Current thread 0x00007e (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/site-packages/burnish/policy/policy.py", line 90 in optim_step
"""
BUSY = """Current thread 0x00007e (most recent call first):
  File "/site-packages/burnish/model/project.py", line 12 in forward
"""


@pytest.mark.parametrize(
    ("texts", "counts", "blamed"),
    [
        ([WAITS, BUSY, WAITS], [9, 9, 9], [1]),
        ([BUSY, BUSY, BUSY], [9, 9, 8], [2]),  # on a GPU all stand in a synchronisation
        ([WAITS, WAITS, WAITS], [9, 8, 9], [1]),
        ([WAITS, WAITS, WAITS], [9, 9, 9], [0, 1, 2]),  # each waits for the others in another exchange
    ],
)
def test_the_rank_that_others_wait_for(texts: list[str], counts: list[int], blamed: list[int]):
    stacks = {rank: Stack(text, stopped=False) for rank, text in enumerate(texts)}
    assert hanging(stacks, [Beat(count, "step") for count in counts]) == blamed


def test_an_own_error_followed_by_a_broken_connection_is_its_own():
    joint = "\nDuring handling of the above exception, another exception occurred:\n\n"
    assert is_echo(BROKEN) and not is_echo(BUG) and not is_echo(KILLED)
    assert not is_echo(Outcome(1, BUG.words + joint + BROKEN.words))
    assert is_echo(Outcome(1, BROKEN.words + joint + BROKEN.words))
    assert first_failing([Ended(0, DONE), Ended(1, PAUSED)]) is None
    assert first_failing([Ended(0, BROKEN), Ended(2, KILLED), Ended(1, BUG)]) == Ended(2, KILLED)


def _raise(error: BaseException) -> int:
    raise error


def test_what_comes_of_a_rank_s_work():
    assert outcome_of(lambda: 0) == Outcome(0, retry=False)
    assert outcome_of(lambda: 1) == Outcome(1)
    assert outcome_of(lambda: _raise(Stopped("after step 3"))) == Outcome(75, "after step 3", retry=False)
    bug = outcome_of(lambda: _raise(SystemExit(0)))  # a rank has no business to leave like that
    assert bug.code == 1 and bug.retry and bug.summary() == "SystemExit: 0"
    assert Outcome(-signal.SIGSEGV, "Fatal Python error: Segmentation fault\n\nThread 1\n  File x").summary() == (
        "ended by SIGSEGV: Fatal Python error: Segmentation fault"
    )
    assert Outcome(134).summary() == "exit code 134"


def test_beats_are_read_through_another_mapping_of_the_board():
    board = BeatBoard.create(3)
    theirs = BeatBoard(board.fd).writer(1)
    for step in range(300):
        theirs(f"step {step}")
    theirs("evaluation of something with a very long name that does not fit into its line")
    assert board.read(3)[1] == Beat(301, "evaluation of something with a very long name that does ")
    assert board.read(3)[2] == Beat(0, "") and not board.read(3)[2].started
    board.clear()
    assert board.read(2) == [Beat(0, ""), Beat(0, "")]
    board.close()


def test_a_watcher_that_slept_forgives_and_still_finds_the_silent():
    now = [0.0]
    silence = Silence(1, 10.0, 10.0, lambda: now[0])
    assert silence.look([Beat(1, "step 1")]) == []
    now[0] = 500.0  # asleep, as the rank may have been
    assert silence.look([Beat(1, "step 1")]) == [] and silence.seconds == [2.5]
    looks = 0
    while not silence.look([Beat(1, "step 1")]):
        now[0] += silence.look_every
        looks += 1
    assert 7.1 <= looks * silence.look_every <= 7.5


def a_recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(tiny_run.recipe(Path("model"), Path("train.jsonl"), Path("run"), **changes))


def test_the_worlds_of_an_elastic_run_are_those_that_divide_it():
    def worlds(**changes: Any) -> list[int]:
        launch = {"type": "processes", "num_workers": 4, "elastic": {"min_workers": 1, "max_workers": 8}}
        recipe = a_recipe(launch=launch, **changes)
        return valid_worlds(recipe, recipe.launch)  # pyright: ignore[reportArgumentType]

    assert worlds(global_batch_size=8) == [1, 2, 4]  # four lanes
    with pytest.raises(RecipeError, match="global_batch_size"):
        worlds(global_batch_size=2)
    with pytest.raises(ValueError, match="num_workers 4 is not within elastic's 5 to 8"):
        a_recipe(launch={"type": "processes", "num_workers": 4, "elastic": {"min_workers": 5, "max_workers": 8}})


def test_gpus_are_those_that_the_driver_shows_less_the_hidden_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert num_gpus(tmp_path) == 3
    for visible, count in (("0,2", 2), ("", 0), ("GPU-5a,GPU-6b,GPU-7c,GPU-8d", 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert num_gpus(tmp_path) == count


def test_what_supervision_says_is_in_the_run_folder_and_on_the_screen(tmp_path: Path):
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "manifest.json").touch()
    assert newest_checkpoint(tmp_path) == 12 and newest_checkpoint(tmp_path / "none") == -1
    screen = io.StringIO()
    report = FolderReport(tmp_path, json_lines=True, output=screen)
    report.event("worker_died", rank=1)
    report.note("rank 1: gone")
    assert report.stacks(1, 2, BUSY) == report.stacks(1, 2, WAITS) == "stacks-rank1-2.txt"
    assert json.loads((tmp_path / "events.jsonl").read_text())["rank"] == 1
    assert json.loads(screen.getvalue()) == {"note": "rank 1: gone"}
    assert BUSY in (tmp_path / "stacks-rank1-2.txt").read_text()
