"""Rewards and environments in processes of their own: what bad ones cost, and what they cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from burnish.environments.base import Environment, Observation
from burnish.environments.single_turn import SingleTurn
from burnish.errors import ModelError, RunFailed, UserError
from burnish.rewards.base import Reward
from burnish.rewards.function import Function
from burnish.rewards.pool import CallFailed, Draft, RewardPool, Score
from burnish.rollouts import Prompt
from tests.reward_helpers import FAULTS, Calculator, Unready

HANGS = ("spins", "hangs_in_c")


def function(name: str, /, **fields: Any) -> Function:
    return Function(path=f"tests.reward_helpers:{name}", **fields)


def prompt(**columns: Any) -> Prompt:
    return Prompt(0, "train.jsonl:4", [1, 2], "2+2?", columns)


def drafts(*said: str) -> list[Draft]:
    return [Draft(each, list(range(len(each))), "stop") for each in said]


@contextmanager
def pool_of(
    rewards: Sequence[Reward], environment: Environment | None = None, num_workers: int = 1
) -> Iterator[tuple[RewardPool, list[tuple[str, dict[str, Any]]]]]:
    """The pool, and the events that it tells."""
    events: list[tuple[str, dict[str, Any]]] = []
    pool = RewardPool(
        rewards, environment or SingleTurn(), num_workers, lambda kind, **facts: events.append((kind, facts))
    )
    try:
        yield pool, events
    finally:
        pool.close()


def answers(pool: RewardPool, count: int = 1, seconds: float = 60) -> dict[Any, Any]:
    """The next `count` results by key."""
    found: dict[Any, Any] = {}
    until = time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < until, f"{len(found)} of {count} results in {seconds} s"
        found |= dict(pool.poll(0.5))
    return found


def scored(pool: RewardPool, said: list[Draft], **columns: Any) -> list[Score]:
    pool.score("group", prompt(**columns), said)
    return answers(pool)["group"]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not so after {seconds} s"
        time.sleep(0.02)


def test_terms_are_named_weighted_and_summed() -> None:
    rewards = [
        function("length", weight=0.5),
        function("length_later", weight=-1.0, name="short"),
        function("answered", arguments={"bonus": 3.0}),
    ]
    said = drafts("four", "4")
    said[1] = Draft("4", [7], "length", terms={"solved": 0.25, "function": 8.0}, failed=("environment",))
    with pool_of(rewards, num_workers=2) as (pool, _):
        assert pool.names == ["function", "short", "function_2"]
        first, second = scored(pool, said, answer="4", completions="a column of this name is not passed on")
    assert first == Score({"function": 4.0, "short": 4.0, "function_2": 0.0}, 0.5 * 4 - 4 + 0)
    terms = {"function": 1.0, "short": 1.0, "function_2": 3.0, "solved": 0.25, "function_3": 8.0}
    assert second == Score(terms, 0.5 - 1 + 3 + 0.25 + 8, ("environment",))


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="two are called 'a'"), pool_of([function("length", name="a")] * 2):
        pass


@pytest.fixture(scope="module")
def faults() -> tuple[dict[str, list[float]], dict[str, list[bool]], dict[str, float]]:
    """(values, whether they failed, facts): all faulty rewards asked about one group of a pool, the second bad."""
    rewards = [
        function("faulty", name=name, arguments={"fault": name}, seconds=1 if name in HANGS else 30, failed_value=-1)
        for name in FAULTS
    ]
    rewards.append(function("too_few", name="wrong_length", failed_value=-1))
    with pool_of(rewards, num_workers=2) as (pool, _):
        scores = scored(pool, drafts("aa", "bad", "cccc"))
        facts = pool.facts() | {"signs_of_life": pool.signs_of_life}
    values = {name: [score.terms[name] for score in scores] for name in pool.names}
    return values, {name: [name in score.failed for score in scores] for name in pool.names}, facts


@pytest.mark.parametrize("fault", [*FAULTS, "wrong_length"])
def test_only_the_guilty_rollout_gets_the_failed_value(fault: str, faults: Any) -> None:
    values, failed, _ = faults
    assert values[fault] == [2.0, -1.0, 4.0]
    assert failed[fault] == [False, True, False]


def test_failures_and_restarts_are_counted(faults: Any) -> None:
    facts = faults[2]
    assert facts["reward_failures"] == len(FAULTS) + 1
    # Hangs: once with the group and once alone; deaths: once more, for it might have been something else.
    assert facts["reward_restarts"] == 2 * len(HANGS) + 3 * len(("dies", "crashes"))


def test_every_call_that_comes_to_an_end_is_a_sign_of_life(faults: Any) -> None:
    """A verifier that hangs for each rollout alone finishes no group for long, and is not silent."""
    # By group and alone: 4 calls for a hang, an exception and a wrong length, 5 for a death, 2 for what is no number.
    calls = 4 * len(HANGS) + 4 * len(("raises", "exits", "wrong_length")) + 5 * len(("dies", "crashes")) + 2 * 6
    opened = 2 + faults[2]["reward_restarts"]
    assert calls == 42 and faults[2]["signs_of_life"] >= calls + opened - 2  # the last may not be open yet


def test_a_reward_that_always_fails_is_told_once_and_the_run_goes_on() -> None:
    rewards = [function("length"), function("never", name="judge", failed_value=-2.0), function("number", name="one")]
    with pool_of(rewards) as (pool, events):
        for _ in range(3):
            for score in scored(pool, drafts("a", "b")):
                assert score.terms == {"function": 1.0, "judge": -2.0, "one": 0.0}
                assert score.failed == ("judge", "one")
        assert pool.facts()["reward_failures"] == 12
        assert pool.facts()["reward_restarts"] == 0
    told = [(kind, facts["reward"]) for kind, facts in events if "worker" not in kind]
    expected = [(kind, name) for name in ("judge", "one") for kind in ("reward_asked_again", "reward_failed")]
    assert sorted(told) == sorted(expected)
    why = {facts["reward"]: facts["why"] for kind, facts in events if kind == "reward_failed"}
    assert why["judge"].endswith("KeyError: 'the verifier was not deployed'")
    assert "tests/reward_helpers.py" in why["judge"]
    assert "burnish/rewards/worker.py" not in why["judge"]
    assert why["one"].endswith("TypeError: it said a float, not a list of numbers")
    assert {facts["where"] for kind, facts in events if kind == "reward_failed"} == {"train.jsonl:4"}


def test_prints_go_to_standard_error_with_their_origin(capfd: pytest.CaptureFixture[str]) -> None:
    with pool_of([function("prints")]) as (pool, _):
        assert [score.reward for score in scored(pool, drafts("abc"))] == [3.0]
    out, err = capfd.readouterr()
    assert out == ""
    assert "[reward] hello\n[reward] from python\n" in err
    assert "[reward] no line end\n" in err
    assert "from the descriptor\n" in err
    assert "from a child\n" in err


def test_forks_neither_answer_nor_outlive_the_pool(tmp_path: Path) -> None:
    with pool_of([function("forks", arguments={"folder": str(tmp_path)})]) as (pool, _):
        for said in ("a", "bb", "ccc"):
            assert [score.reward for score in scored(pool, drafts(said))] == [float(len(said))]
        assert pool.facts()["reward_restarts"] == 0
        children = [int(name) for name in os.listdir(tmp_path)]
        assert len(children) == 6
        assert sum(map(is_alive, children)) >= 3
    wait_until(lambda: not any(map(is_alive, children)))


def test_what_a_reward_starts_in_a_session_of_its_own_ends_with_it(tmp_path: Path) -> None:
    with pool_of([function("leaves_the_session", arguments={"folder": str(tmp_path)}, seconds=60)]) as (pool, _):
        pool.score("group", prompt(), drafts("aa"))
        pool.poll(0)
        wait_until(lambda: len(os.listdir(tmp_path)) == 2)
        started = [int(name) for name in os.listdir(tmp_path)]
        assert all(map(is_alive, started)) and pool.pids[0] not in started
    wait_until(lambda: not any(map(is_alive, started)))


def test_rewards_know_neither_the_rank_nor_the_cluster_s_token(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RAY_AUTH_TOKEN", "JUDGE_URL"]
    for name in names:
        monkeypatch.setenv(name, "1")
    with pool_of([function("tells_its_environment")]) as (pool, _):
        assert [score.reward for score in scored(pool, drafts(*names))] == [0.0] * 6 + [1.0]


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    with pool_of([function("marked", arguments={"folder": str(tmp_path)}, seconds=60)]) as (pool, events):
        pool.score("group", prompt(), drafts("aa"))
        assert pool.poll(0) == []
        wait_until(lambda: bool(os.listdir(tmp_path)))
        os.kill(pool.pids[0], signal.SIGKILL)
        assert answers(pool)["group"] == [Score({"function": 2.0}, 2.0)]
        assert pool.facts()["reward_restarts"] == 1
    lost = [facts for kind, facts in events if kind == "reward_worker_lost"]
    assert [facts["why"] for facts in lost] == ["its process is gone: ended by SIGKILL"]
    assert next(facts["pid"] for kind, facts in events if kind == "reward_worker_started") == lost[0]["pid"]


def test_an_idle_process_that_dies_is_replaced() -> None:
    with pool_of([function("length")]) as (pool, _):
        os.kill(pool.pids[0], signal.SIGKILL)
        wait_until(lambda: not is_alive(pool.pids[0]))
        assert scored(pool, drafts("aa"))[0] == Score({"function": 2.0}, 2.0)


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = f"""
from tests.unit.test_reward_pool import *
with pool_of([function("spinning_with_child", arguments={{"folder": {str(tmp_path)!r}}}, seconds=1000)]) as (pool, _):
    pool.score("group", prompt(), drafts("a"))
    answers(pool, seconds=1000)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        wait_until(lambda: len(os.listdir(tmp_path)) == 2)
        pids = [int(name) for name in os.listdir(tmp_path)]
        assert all(map(is_alive, pids))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize(
    ("how", "kind", "reason"),
    [
        ("refuses", ModelError, "workflow.rewards.1: judge/7b: no weights\n  cure: download them"),
        ("raises", UserError, "OSError: port 8000 is taken"),
        ("dies", UserError, "a reward cannot be opened: its process is gone: exit code 7"),
    ],
)
def test_what_cannot_be_opened_is_refused_at_the_start(how: str, kind: type[UserError], reason: str) -> None:
    unready = Unready.model_validate({"type": "tests.reward_helpers:Unready", "how": how})
    with pytest.raises(UserError) as caught, pool_of([function("length"), unready]):
        pass
    assert type(caught.value) is kind
    assert reason in str(caught.value)


def test_a_reward_that_is_gone_at_a_restart_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "fading_rewards.py"
    module.write_text("def one(completions):\n    return [1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pool_of([Function(path="fading_rewards:one")]) as (pool, _):
        assert scored(pool, drafts("a"))[0].reward == 1.0
        module.write_text("one = 1\n")
        os.kill(pool.pids[0], signal.SIGKILL)
        with pytest.raises(RunFailed, match="it is a int, not a function"):
            answers(pool)


def test_memory_beyond_the_limit_fails_one_rollout() -> None:
    with pool_of([function("allocates", memory_mib=256)]) as (pool, events):
        scores = scored(pool, drafts("1", "2000", "3"))
    assert [score.reward for score in scores] == [1 << 20, 0.0, 3 << 20]
    assert [score.failed for score in scores] == [(), ("function",), ()]
    assert [facts["why"][-11:] for kind, facts in events if kind == "reward_failed"] == ["MemoryError"]


def test_requests_larger_than_a_socket_takes() -> None:
    with pool_of([function("length")], num_workers=2) as (pool, _):
        for key in range(4):
            pool.score(key, prompt(document="x" * (1 << 20)), drafts("y" * (1 << 19), "z"))
        assert [scores[0].reward for scores in answers(pool, 4).values()] == [1 << 19] * 4


def test_what_is_aborted_is_not_heard_of_again() -> None:
    with pool_of([function("hang", seconds=0.4)]) as (pool, _):
        for key in range(3):
            pool.score(key, prompt(), drafts("a", "b"))
        assert pool.poll(0) == []
        assert pool.num_unfinished == 3
        pool.abort()
        assert pool.num_unfinished == 0
        pool.score("new", prompt(), drafts("a"))
        assert answers(pool) == {"new": [Score({"function": 0.0}, 0.0, ("function",))]}
        assert pool.num_unfinished == 0


def test_without_rewards_the_environment_says_all() -> None:
    with pool_of([]) as (pool, events):
        pool.score("group", prompt(), [Draft("a", [1], "stop", {"solved": 2.0}), Draft("b", [1], "stop")])
        assert answers(pool) == {"group": [Score({"solved": 2.0}, 2.0), Score({}, 0.0)]}
    assert events == []


def test_an_environment_steps_and_fails_by_itself(tmp_path: Path) -> None:
    calculator = Calculator.model_validate({"type": "tests.reward_helpers:Calculator", "folder": str(tmp_path)})
    with pool_of([], calculator) as (pool, events):
        pool.reset("a", {"start": 5}, seed=2)
        pool.reset("b", {}, seed=0)
        states = answers(pool, 2)
        assert states["a"] == {"sum": 7, "calls": 0}
        assert isinstance(states["b"], CallFailed)
        assert states["b"].why.endswith("KeyError: 'start'")
        for action in ("1", "3", "die once", "hang", "tuple", "nan", "not json"):
            pool.step(action, states["a"], action)
        said = answers(pool, 7)
    assert said["1"] == Observation([{"role": "tool", "content": "8"}], {"sum": 8, "calls": 1}, False, {"step": 0.5})
    assert said["3"].done
    assert said["die once"].state == {"sum": 7, "calls": 1}
    reasons = {
        "hang": "step(): no answer in 1 s",
        "tuple": "step() returned a tuple, not an Observation",
        "nan": "step() gave a reward that is no number: {'solved': nan}",
        "not json": "Object of type set is not JSON serializable",
    }
    for action, reason in reasons.items():
        assert said[action].why.endswith(reason)
    assert [kind for kind, _ in events].count("environment_failed") == 1


@pytest.mark.long
def test_a_trained_reward_model_scores_in_the_pool(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    from burnish.rewards.model import Model

    torch.manual_seed(0)
    config: Any = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "turn around: red sun"}]
    said = [[{"role": "assistant", "content": text}] for text in ("red", "blue stone")]
    expected = Model(path=str(tmp_path)).open()([messages] * 2, said)
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)
    with pool_of([Model(path=str(tmp_path), seconds=100)]) as (pool, _):
        pool.score("group", Prompt(0, "here", [1], messages), [Draft(each, [1], "stop") for each in said])
        scores = answers(pool)["group"]
    assert [score.reward for score in scores] == pytest.approx(expected, abs=1e-5)
