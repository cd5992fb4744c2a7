"""Where a run says what it has to say: its folder, its trackers and the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from burnish.launch.console import Console
    from burnish.launch.metrics_file import MetricsFile
    from burnish.launch.run_folder import RunFolder
    from burnish.track.base import LiveTracker


class FolderJournal:
    """Everything a run says, to its folder, its trackers and the screen. Rank 0 has it."""

    def __init__(self, folder: RunFolder, metrics: MetricsFile, console: Console) -> None:
        self.folder, self.metrics, self.console = folder, metrics, console
        self.trackers: list[LiveTracker] = []
        self.keep_rollouts = True
        """Of every step; else of the last one alone."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished step, to every place that shows metrics."""
        self.metrics.write(step, metrics)
        self.console.step(step, metrics)
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def event(self, kind: str, **facts: Any) -> None:
        """Something that is not a metric; a person sees it unless all went as planned."""
        self.folder.event(kind, **facts)
        if kind == "refused":  # the reason and its cure are the last thing that the command says
            still = "the data must keep their number of rows: mend a bad one in place"
            self.console.note(f"refused after step {facts['step']}, {facts['checkpoint']} is saved; {still}")
        elif kind not in ("checkpoint_saved", "begun"):
            self.console.note(f"{kind}: " + ", ".join(f"{name}={value}" for name, value in facts.items()))

    def ledger(self, totals: Mapping[str, Any]) -> None:
        """Where every token went so far."""
        self.folder.write_ledger(totals)

    def rollouts(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """What the policy said in a step, for `burnish data RUN --rollouts`."""
        self.folder.write_rollouts(step, groups, keep=self.keep_rollouts)

    def selected(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that a step has made, for another run to train on."""
        self.folder.write_selected(step, rows)

    def rollbacks(self, listed: Mapping[str, Any]) -> None:
        """The steps whose rows are passed over, durably."""
        self.folder.write_rollbacks(listed)

    def cut(self, step: int) -> None:
        """Steps after this one are written again. A tracker that cannot forget shows them twice."""
        self.metrics.cut(step)

    def note(self, text: str) -> None:
        """A sentence for the person who watches."""
        self.console.note(text)


class SilentJournal:
    """What the other ranks say: rank 0 has said it."""

    keep_rollouts = True

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def event(self, kind: str, **facts: Any) -> None:
        pass

    def ledger(self, totals: Mapping[str, Any]) -> None:
        pass

    def rollouts(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        pass

    def selected(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def rollbacks(self, listed: Mapping[str, Any]) -> None:
        pass

    def cut(self, step: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
