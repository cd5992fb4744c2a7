"""Ranks on Ray that do what a file says when they start, so that one cluster serves many tests."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from burnish.launch.attempt import Limits
from burnish.launch.ray import Ray, RayActors
from burnish.launch.supervise import Supervisor
from tests.supervision_helpers import Recorded, count, done


def as_ordered(orders: Path, beat: Callable[[str], None]) -> int:
    """Leaves its environment behind, then counts, with the modules that it was told to import."""
    order = json.loads(orders.read_text())
    for name in order["modules"]:
        importlib.import_module(name)
    folder = Path(order["folder"])
    (folder / f"environment{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))
    code = count(folder, order["faults"], beat)
    time.sleep(0.7)  # longer than an agent listens before it tells of a beat
    return code


class Cluster:
    """Two ranks behind a Ray launch."""

    def __init__(self, launch: Ray, orders: Path, largest: int = 2) -> None:
        self.orders, self.launch = orders, launch
        self.actors = RayActors(launch, partial(as_ordered, orders), largest)

    def order(self, folder: Path, faults: dict[str, str], modules: tuple[str, ...] = ()) -> None:
        """What ranks do that are started from now on."""
        self.orders.write_text(json.dumps({"folder": str(folder), "faults": faults, "modules": modules}))

    def count(
        self,
        folder: Path,
        faults: dict[str, str],
        heartbeat_seconds: float = 30.0,
        sizes: tuple[int, ...] = (2,),
        report: Recorded | None = None,
        modules: tuple[str, ...] = (),
    ) -> Recorded:
        """Supervises counting ranks to their end."""
        self.order(folder, faults, modules)
        report = report or Recorded()
        limits = Limits(3, heartbeat_seconds, start_seconds=60.0, grace_seconds=5.0)
        progress = partial(done, folder)
        assert Supervisor(self.actors, sizes, sizes[-1], limits, report, progress=progress).run() == 0
        assert done(folder) == 7
        return report


@contextmanager
def opened(launch: Ray, folder: Path, largest: int = 2) -> Iterator[Cluster]:
    """A cluster that is left, or taken down, at the end."""
    cluster = Cluster(launch, folder / "orders.json", largest)
    try:
        yield cluster
    finally:
        cluster.actors.close()
