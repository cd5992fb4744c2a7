"""What a launch is: where a recipe's workflow runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from burnish.component import Component

if TYPE_CHECKING:
    from burnish.recipe import Recipe


class Launch(Component):
    """Brings up processes, builds what the workflow is handed, and runs it to its end."""

    def run(self, recipe: Recipe, *, json_lines: bool = False) -> int:
        """Runs `recipe` from where its run folder stands and returns the exit code (see `errors.py`).

        With `json_lines` the console speaks one JSON object a line.
        """
        raise AssertionError(f"{type(self).__name__} cannot run")
