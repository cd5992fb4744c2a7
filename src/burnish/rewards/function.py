"""A Python function of your own, with the signature that TRL's reward functions have."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from burnish.errors import UserError
from burnish.rewards.base import LiveReward, Reward

_GIVEN = ("prompts", "completions", "completion_ids", "finish_reason")


class Function(Reward):
    """Calls `my_reward(prompts, completions, **columns)`, which returns a number for each completion. Columns of the
    rows that it does not name are left out, unless it takes `**kwargs`. It may be `async`."""

    type: Literal["function"] = "function"
    path: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """`my_module:my_reward`; a module beside the recipe or in the current folder is found."""
    arguments: dict[str, Any] = {}
    """Further keyword arguments, the same for all calls."""

    def open(self) -> LiveReward:
        function = self._found()
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # of builtins some have none: they get everything
            return functools.partial(_call, function, None, self.arguments)
        self._check(parameters)
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = None if takes_all else frozenset(parameter.name for parameter in parameters)
        return functools.partial(_call, function, named, self.arguments)

    def _found(self) -> Callable[..., Any]:
        module_name, _, name = self.path.partition(":")
        if module_name.endswith(".py"):
            raise self._refused("it names a file, not a module", f"`{module_name.removesuffix('.py')}:{name}`")
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # the module is the user's, and half written as often as not
            raise self._refused(
                f"cannot be imported: {type(error).__name__}: {error}",
                "a module beside the recipe or in the current folder is found",
            ) from error
        for part in name.split("."):
            if not hasattr(found, part):
                near = difflib.get_close_matches(part, vars(found), n=1)
                raise self._refused(f"there is no '{part}'", f"did you mean '{near[0]}'?" if near else "check the name")
            found = getattr(found, part)
        if not callable(found) or isinstance(found, type):
            raise self._refused(
                f"it is a {type(found).__name__}, not a function", "name a function, or a callable object"
            )
        return found

    def _check(self, parameters: Any) -> None:
        kinds = {parameter.name: parameter.kind for parameter in parameters}
        positional = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_ONLY]
        if positional:
            raise self._refused(f"`{positional[0]}` can only be given by position", "remove the `/` from its signature")
        if inspect.Parameter.VAR_KEYWORD in kinds.values():
            kinds |= dict.fromkeys(self.arguments) | {"completions": None}
        if not kinds.keys() & {"completions", "completion_ids"}:
            raise self._refused(
                f"it takes ({', '.join(kinds)}), and nothing of what was answered",
                "write it as `def my_reward(prompts, completions, **columns) -> list[float]`",
            )
        for name in self.arguments:
            if name in _GIVEN:
                raise self._refused(f"`arguments` has `{name}`, which every call brings", "remove it")
            if name not in kinds:
                near = difflib.get_close_matches(name, kinds, n=1)
                raise self._refused(
                    f"it takes no argument `{name}`",
                    f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(kinds)}",
                )

    def _refused(self, reason: str, cure: str) -> UserError:
        return UserError(reason, where=self.path, cure=cure)


def _call(
    function: Callable[..., Any],
    named: frozenset[str] | None,
    arguments: dict[str, Any],
    /,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    **columns: Sequence[Any],
) -> Any:
    """What it says for what it takes; `named` None: for everything."""
    everything = columns | {"prompts": prompts, "completions": completions}
    given = everything if named is None else {name: values for name, values in everything.items() if name in named}
    said = function(**given | arguments)
    if not inspect.isawaitable(said):
        return said
    import asyncio  # 40 ms that most processes are spared

    return asyncio.run(_awaited(said))


async def _awaited(said: Any) -> Any:
    return await said
