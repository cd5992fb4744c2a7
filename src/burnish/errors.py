"""Every error a person can meet, in one tree.

    BurnishError
    |-- UserError (ValueError)      refused: the input is wrong, nothing was spent      exit 2
    |   |-- RecipeError             the recipe: schema, or parts that do not fit together
    |   |-- DataError               a file, a row, a conversation, a template
    |   |-- ModelError              weights, tokenizer or architecture
    |   |-- RefusedElsewhere        another rank refused its input
    |   `-- ResumeError             the run folder: another owner, another recipe, no intact checkpoint
    |-- RunFailed (RuntimeError)    the run went wrong by itself: three bad steps in a row     exit 1
    |   |-- Unreachable             a store does not answer now
    |   |-- SyncFailed              an engine does not hold the policy's weights
    |   `-- RestartsExhausted       ranks or workers died or hung more often than the recipe allows
    `-- Stopped                     paused on purpose, the same command goes on                exit 75

To add one: subclass the nearest, say in its docstring who meets it, and keep it picklable (all state in `args`).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 75


class BurnishError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = EXIT_FAILED


class UserError(BurnishError, ValueError):
    """What was asked for cannot be done. Says where, why, and what to do about it.

    >>> print(DataError("the row is not JSON", where="data/train.jsonl:17", cure="fix or remove the line"))
    data/train.jsonl:17: the row is not JSON
      cure: fix or remove the line
    """

    exit_code = EXIT_REFUSED

    def __init__(self, reason: str, where: str = "", cure: str = "") -> None:
        super().__init__(reason, where, cure)
        self.reason, self.where, self.cure = reason, where, cure

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        cure = f"\n  cure: {self.cure}" if self.cure else ""
        return f"{place}{self.reason}{cure}"


class RecipeError(UserError):
    """The recipe is wrong in itself; `problems` holds every one that was found, not only the first."""

    def __init__(self, problems: tuple[UserError, ...]) -> None:
        assert problems, "a RecipeError without a problem"
        BurnishError.__init__(self, problems)
        self.problems = problems
        self.reason, self.where, self.cure = problems[0].reason, problems[0].where, problems[0].cure

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class DataError(UserError):
    """A row, a file or a chat template cannot be used."""


class ModelError(UserError):
    """Weights, tokenizer or architecture cannot be used as the recipe asks."""


class ResumeError(UserError):
    """The run folder cannot be continued by this command."""


class RefusedElsewhere(UserError):
    """This rank ends because another one refused its input, and says why there."""

    def __init__(self, rank: int) -> None:
        BurnishError.__init__(self, rank)
        self.reason, self.where, self.cure = f"stopped with rank {rank}, which refused its input", "", ""


class RunFailed(BurnishError, RuntimeError):
    """The run was accepted, and failed by itself."""


class Unreachable(RunFailed):
    """A store does not answer now. What supervises the run tries again, as it does with a rank that died."""


class SyncFailed(RunFailed):
    """An engine does not hold the policy's weights: they did not arrive, not whole, or not as they were sent."""


class RestartsExhausted(RunFailed):
    """Processes died or hung more often than `max_restarts` of those that start them, and nothing came of it.

    Args:
        failures: one line each, the first first.
        words: traceback of the last, where it has one.
        without: what would have been progress.
    """

    def __init__(self, failures: tuple[str, ...], words: str = "", without: str = "a new checkpoint") -> None:
        super().__init__(failures, words, without)
        self.failures, self.words, self.without = failures, words, without

    def __str__(self) -> str:
        lines = "".join(f"\n    {failure}" for failure in self.failures)
        last = f"\n{self.words.rstrip()}" if self.words else ""
        cure = "\n  cure: the same command goes on from the newest checkpoint, once what broke is mended"
        return f"given up after {len(self.failures)} failures without {self.without}:{lines}{last}{cure}"


class Stopped(BurnishError):
    """The run was paused with everything saved; the same command resumes it."""

    exit_code = EXIT_STOPPED
