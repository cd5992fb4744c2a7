"""A run whose checkpoints lie in an object store: what else an empty machine needs to go on, and which run it is.

Beside each checkpoint the store holds the run's `recipe.json`, `tokens.json` and `metrics.jsonl` of that moment. In the
run folder is `store-owner`, by which a process knows a claim on the store as its run's own. Must not know how a store
is written.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from burnish.errors import ResumeError, Unreachable
from burnish.launch.metrics_file import read_metrics, write_atomically

if TYPE_CHECKING:
    from burnish.policy.checkpoint.object_place import ObjectPlace

RECIPE, TOKENS, METRICS = "recipe.json", "tokens.json", "metrics.jsonl"
OWNER = "store-owner"


def open_store(url: str, run_dir: Path) -> ObjectPlace:
    """The place of `checkpoint.store`, on any rank; nothing is asked of it yet.

    Raises:
        UserError: no store can be made of the url and the environment.
    """
    from burnish.policy.checkpoint.object_place import ObjectPlace

    return ObjectPlace(url, along=[run_dir / name for name in (RECIPE, TOKENS, METRICS)])


def place_of(store: str | None, run_dir: Path) -> ObjectPlace | Path:
    """Where the checkpoints of a run lie, for those who only read them."""
    return run_dir if store is None else open_store(store, run_dir)


def claim_store(place: ObjectPlace, run_dir: Path) -> None:
    """Makes the run in `run_dir`, whose lock rank 0 holds, the one that writes to the store.

    Raises:
        ResumeError: another run writes there, or the store cannot keep two apart.
        UserError: it refuses.
        Unreachable: it does not answer.
    """
    path = run_dir / OWNER
    if not path.exists():
        write_atomically(path, secrets.token_hex(8).encode())
    place.claim(path.read_text(), f"run folder {run_dir.resolve()}")


class StoredRun(NamedTuple):
    """The run whose checkpoints a store holds."""

    step: int
    files: dict[str, bytes]

    def recipe(self) -> dict[str, Any]:
        """What its checkpoints were trained with."""
        return json.loads(self.files[RECIPE])

    def restore(self, run_dir: Path) -> None:
        """Brings into the run folder what it lacks, or what another machine has written since it trained here. To be
        called once the recipe is known to be this run's."""
        for name, data in self.files.items():
            path = run_dir / name
            is_behind = name == METRICS and path.exists() and _last_step(path) < self.step
            if name == TOKENS or not path.exists() or is_behind:
                write_atomically(path, data)


def find_stored_run(place: ObjectPlace) -> StoredRun | None:
    """The run in a store, with the files of its newest checkpoint that has them intact; None: no checkpoint is there.

    Raises:
        ResumeError: there are checkpoints, and of none the recipe can be read.
        Unreachable: it cannot be read now.
    """
    problems = []
    try:
        for step in reversed(place.steps()):
            try:
                files = place.carried(step)
                json.loads(files[RECIPE])
                return StoredRun(step, files)
            except (ConnectionError, PermissionError):
                raise
            except (OSError, KeyError, ValueError) as error:
                problems.append(f"{place.describe(step)}: {error}")
    except OSError as error:
        raise Unreachable(f"the checkpoints cannot be read: {error}; the same command tries again") from error
    if problems:
        raise ResumeError(
            "the recipe that the checkpoints here belong to cannot be read: " + "; ".join(problems),
            where=str(place),
            cure="give another checkpoint.store to start again",
        )
    return None


def refuse_moved(run_dir: Path, store: str | None, stored: StoredRun | None) -> None:
    """Raises ResumeError where the run in `run_dir` has its checkpoints elsewhere than the recipe looks for them: it
    would begin anew and leave them behind."""
    if stored is not None:
        return
    if store is not None and any(run_dir.glob("checkpoint-*/manifest.json")):
        raise ResumeError(
            "this run has its checkpoints here, and the store has none",
            where=str(run_dir),
            cure="go on without checkpoint.store, or give another run_dir to start a new run",
        )
    before = _store_before(run_dir)
    if before is not None and before != store and _has_saved(run_dir):
        raise ResumeError(
            f"this run has its checkpoints in {before}",
            where=str(run_dir),
            cure=f"go on with `checkpoint.store={before}`, or give another run_dir to start a new run",
        )


def _store_before(run_dir: Path) -> str | None:
    path = run_dir / RECIPE
    saved = json.loads(path.read_bytes()) if path.exists() else {}
    return saved.get("checkpoint", {}).get("store")


def _has_saved(run_dir: Path) -> bool:
    path = run_dir / "events.jsonl"
    return path.exists() and '"checkpoint_saved"' in path.read_text()


def _last_step(path: Path) -> int:
    return max((line["step"] for line in read_metrics(path)), default=0)
