"""The same recipe on one rank and on several, as torchrun would start them: the same run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_run
from tests.e2e.test_embedding import scrambled
from tests.e2e_helpers import events, ledger
from tests.ranks import run_ranks

LORA = {"type": "lora", "r": 4, "lora_dropout": 0.1}


class Ranks:
    """A folder with a tiny model and conversations, where commands run on several ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_run.write_model(folder / "model")
        self.data = tiny_run.write_jsonl(folder / "train.jsonl", tiny_run.conversations(60))
        self.eval = tiny_run.write_jsonl(folder / "eval.jsonl", tiny_run.conversations(7, seed=1))

    def recipe(self, name: str, **changes: Any) -> Path:
        """`<name>.yaml` of 8 steps of 4 rows, evaluated on 7 conversations; blocks of `changes` replace its own."""
        blocks = tiny_run.recipe(self.model, self.data, self.folder / name)
        blocks |= {"global_batch_size": 4, "num_steps": 8, "checkpoint": {"save_every": 3, "keep": 2}}
        blocks["data"] |= {"eval": [{"type": "jsonl", "path": str(self.eval)}]} | changes.pop("data", {})
        blocks["model"] |= changes.pop("model", {})
        blocks = {key: value for key, value in (blocks | changes).items() if value is not None}
        return tiny_run.write_recipe(self.folder / f"{name}.yaml", blocks)

    def train(self, recipe: Path, ranks: int, *overrides: str, expect: int = 0, signal_at: int | None = None) -> Path:
        """Runs or resumes it on so many ranks; its run folder. The last one gets SIGTERM at step `signal_at`."""
        run_ranks(ranks, _train, [str(recipe), *overrides], str(self.folder), signal_at)
        for rank in range(ranks):
            log = (self.folder / f"rank{rank}.log").read_text()
            assert (self.folder / f"rank{rank}.code").read_text() == str(expect), log
        return recipe.with_suffix("")

    def log(self, rank: int) -> str:
        """What a rank of the last command said."""
        return (self.folder / f"rank{rank}.log").read_text()


def _train(rank: int, argv: list[str], folder: str, signal_at: int | None) -> None:
    from burnish.launch.rank import run_rank
    from burnish.recipe import load_recipe

    def beat(phase: str) -> None:
        if phase == f"step {signal_at}" and rank == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with open(Path(folder) / f"rank{rank}.log", "w") as log, contextlib.redirect_stdout(log):
        try:
            code = run_rank(load_recipe(argv[0], argv[1:]), beat=beat)
        except BaseException as error:
            code = getattr(error, "exit_code", None)
            if code is None:
                raise
            print(error, file=log)
    (Path(folder) / f"rank{rank}.code").write_text(str(code))
    sys.stdout.flush()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


def lines(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must not depend on how a run was cut or shared."""
    names = ("step", "loss", "grad_norm", "eval_loss", "tokens", "learning_rate", "fill")
    return [tuple(line.get(name) for name in names) for line in tiny_run.read_metrics(run_dir)]


def exported(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "model").glob("*.safetensors"))}


@pytest.mark.parametrize("model", [{}, pytest.param({"adapter": LORA}, marks=pytest.mark.long)], ids=["full", "lora"])
def test_elastic_runs_are_bit_equal_however_many_ranks_and_resumes(model: dict[str, Any], ranks: Ranks) -> None:
    name = "lora" if model else "full"
    changes = {"model": model, "determinism": "elastic"}
    alone = ranks.train(ranks.recipe(f"{name}-1", **changes), 1)
    four = ranks.train(ranks.recipe(f"{name}-4", **changes), 4)
    assert lines(four) == lines(alone)
    assert exported(four) == exported(alone)
    cut = ranks.recipe(f"{name}-cut", **changes)
    ranks.train(cut, 1, "stop_after=2", expect=75)
    folder = ranks.train(cut, 2, "stop_after=5", expect=75)
    assert len(list((folder / "checkpoint-5").glob("model-*.safetensors"))) == 2
    ranks.train(cut, 1)
    assert lines(folder) == lines(alone)
    assert exported(folder) == exported(alone)
    assert ledger(folder) == ledger(alone) == ledger(four)


@pytest.mark.long
def test_without_elastic_two_ranks_agree_to_rounding(ranks: Ranks) -> None:
    alone = ranks.train(ranks.recipe("fixed-1", num_steps=None, num_epochs=1), 1)
    two = ranks.train(ranks.recipe("fixed-2", num_steps=None, num_epochs=1), 2)
    assert [line[0] for line in lines(two)] == [line[0] for line in lines(alone)]
    for found, expected in zip(lines(two), lines(alone), strict=True):
        assert [a for a in found if a is not None] == pytest.approx([b for b in expected if b is not None], rel=1e-4)
    assert ledger(two) == ledger(alone)
    again = ranks.recipe("fixed-2b", num_steps=None, num_epochs=1)
    ranks.train(again, 2, "stop_after=3", expect=75)
    assert lines(ranks.train(again, 2)) == lines(two)


def test_a_row_that_one_rank_refuses_ends_all_with_a_checkpoint(ranks: Ranks) -> None:
    rows = tiny_run.conversations(300)
    rows[241] = {"messages": [{"role": "nobody", "content": "x"}]}
    bad = tiny_run.write_jsonl(ranks.folder / "bad.jsonl", rows)
    source = {"type": "jsonl", "path": str(bad)}
    recipe = ranks.recipe("refused", data={"train": [source], "shuffle": False, "prefetch": 1}, num_steps=40)
    folder = ranks.train(recipe, 2, expect=2)
    logs = [ranks.log(0), ranks.log(1)]
    assert sum(f"{bad}:242" in log and "nobody" in log and "refused after" not in log.splitlines()[-1] for log in logs)
    assert any("which refused its input" in log for log in logs)
    (event,) = events(folder, "refused")
    assert str(bad) in event["reason"]
    assert json.loads((folder / f"checkpoint-{event['step']}" / "state.json").read_text())["step"] == event["step"]
    ranks.train(recipe, 2, "seed=5", expect=2)  # now rank 0 refuses, before there is a model
    assert "seed: 0 -> 5" in ranks.log(0) and "rank 0, which refused its input" in ranks.log(1)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks: Ranks) -> None:
    undisturbed = ranks.train(ranks.recipe("whole"), 2)
    recipe = ranks.recipe("signalled")
    folder = ranks.train(recipe, 2, expect=75, signal_at=4)
    (event,) = events(folder, "stopped")
    assert (event["reason"], event["step"]) == ("SIGTERM", 4)
    assert lines(ranks.train(recipe, 2)) == lines(undisturbed)


def test_a_run_may_change_its_mesh_between_two_starts(ranks: Ranks) -> None:
    alone = ranks.train(ranks.recipe("meshes-1", model={"adapter": LORA | {"lora_dropout": 0.0}}), 1)
    recipe = ranks.recipe("meshes", model={"adapter": LORA | {"lora_dropout": 0.0}})
    ranks.train(recipe, 2, "mesh={tp: 2}", "stop_after=2", expect=75)
    ranks.train(recipe, 2, "mesh={cp: 2}", "stop_after=4", expect=75)
    ranks.train(recipe, 2, "mesh={dp_replicate: 2}", "stop_after=6", expect=75)
    folder = ranks.train(recipe, 1)
    for found, expected in zip(lines(folder), lines(alone), strict=True):
        assert [a for a in found if a is not None] == pytest.approx([b for b in expected if b is not None], rel=1e-4)


def test_queries_of_all_ranks_are_set_against_documents_of_all(ranks: Ranks) -> None:
    train = tiny_run.write_jsonl(ranks.folder / "queries.jsonl", scrambled(200, seed=0))
    held_out = tiny_run.write_jsonl(ranks.folder / "held-out.jsonl", scrambled(30, seed=1))
    sources = {"train": [{"type": "jsonl", "path": str(train)}], "eval": [{"type": "jsonl", "path": str(held_out)}]}
    changes = {
        "workflow": {"type": "embedding"},
        "model": {"head": {"type": "embedding", "pooling": "last", "dimensions": 16}},
        "num_steps": 4,
    }
    alone = ranks.train(ranks.recipe("embedding-1", data=dict(sources), **changes), 1)
    two = ranks.train(ranks.recipe("embedding-2", data=dict(sources), **changes), 2)
    for name in ("loss", "grad_norm", "eval_mrr", "eval_recall@1"):
        found = [line[name] for line in tiny_run.read_metrics(two) if name in line]
        assert found and found == pytest.approx(
            [line[name] for line in tiny_run.read_metrics(alone) if name in line], rel=1e-4
        )
