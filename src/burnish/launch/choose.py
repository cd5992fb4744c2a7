"""What the word `auto` stands for in a recipe: mesh, recomputation and precision, chosen from the model, the devices
and the predicted memory.

    model.dtype                      bfloat16 where the device computes in it, else float32
    mesh                             the fewest ranks to a row (tp x cp) for which everything divides and fits; of those
                                     the fewest whole nodes to a copy of the model, whose ranks share it (dp_shard)
    model.activation_checkpointing   the least of none, selective and full that fits

The same inputs choose the same. A run keeps what it began with, but for a mesh on another number of ranks. What
`checkpoint.save_every: auto` stands for is only known once a save was timed: see `with_save_every`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from burnish.errors import RecipeError, UserError
from burnish.launch.layout import Misfit, misfits, with_mesh
from burnish.mesh_config import MeshConfig, Sizes

if TYPE_CHECKING:
    from burnish.model.config import ModelConfig
    from burnish.model.footprint import Recompute
    from burnish.model.plan import Plan
    from burnish.recipe import Recipe

    Planned = Callable[[int, int], Plan]

HEADROOM = 0.9
"""Share of a device's memory that a prediction may fill: the allocator's fragments and the libraries' own buffers are
in none."""
HOST_BYTES = 700 * 2**20
"""Resident size of Python with torch and transformers imported, before any weight."""
LEAST_TOKENS = 1024
"""Of a row on one rank of `cp`: with fewer, a rank would wait for keys and values more than it computes."""
DTYPE, MESH = "model.dtype", "mesh"
RECOMPUTE, SAVE_EVERY = "model.activation_checkpointing", "checkpoint.save_every"


class DeviceFacts(NamedTuple):
    """What a rank computes on."""

    name: str
    memory_bytes: int
    computes_bfloat16: bool
    per_node: int
    """Devices that share the fastest links."""
    is_host: bool = False
    """Its memory is that of the process, too."""

    @property
    def usable(self) -> int:
        return int(HEADROOM * self.memory_bytes)


def device_facts(world_size: int) -> DeviceFacts:
    """Of this process's device; `world_size` ranks share this machine unless LOCAL_WORLD_SIZE says how many do."""
    import torch

    local = os.environ.get("LOCAL_WORLD_SIZE")
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return DeviceFacts(facts.name, facts.total_memory, bfloat16, int(local or torch.cuda.device_count()))
    ranks = int(local or min(world_size, 8))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = "this machine" if ranks == 1 else f"each of {ranks} ranks on this machine"
    return DeviceFacts(name, memory // ranks, False, ranks, is_host=True)


def choose_here(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """`choose` for the rank that this process is, and the run in its folder. Ranks with equal devices that see the same
    folder choose alike; whoever calls this compares what they chose."""
    from burnish.launch.run_folder import saved_recipe
    from burnish.launch.stored_run import find_stored_run, open_store

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not asks(recipe):
        return recipe, []
    store, run_dir = recipe.checkpoint.store, Path(recipe.run_dir)
    if store is None:
        saved = saved_recipe(run_dir)
    else:
        stored = find_stored_run(open_store(store, run_dir))
        saved = None if stored is None else stored.recipe()
    return choose(recipe, ranks, device_facts(ranks), saved)


def choose(
    recipe: Recipe, world_size: int, facts: DeviceFacts, saved: Mapping[str, Any] | None = None
) -> tuple[Recipe, list[str]]:
    """The recipe without the word `auto` (but in `checkpoint.save_every`, until a save was timed), with what was chosen
    in its `chosen`; and a line about each choice.

    Args:
        recipe: as it was written, or as a run folder has it.
        saved: the `recipe.json` of the run that goes on; None: a new run.

    Raises:
        RecipeError: no mesh of so many ranks fits the recipe.
        ModelError: the model cannot be had, or not with its adapter and heads; only looked at where it matters.
    """
    values, reasons = _kept(recipe, saved, world_size)
    asked = _asked(recipe)
    if not asked:
        return recipe, []
    if DTYPE in asked and DTYPE not in values:
        values[DTYPE], reasons[DTYPE] = _dtype(facts)
    recipe = _with(recipe, values)
    if {MESH, RECOMPUTE} & set(asked) - values.keys():
        planned, hf_config = _planner(recipe)
        if MESH in asked and MESH not in values:
            sizes, reasons[MESH] = _mesh(recipe, world_size, facts, planned, hf_config)
            recipe = with_mesh(recipe, sizes)
        if RECOMPUTE in asked and RECOMPUTE not in values:
            assert recipe.mesh != "auto"
            sizes = recipe.mesh.sizes(world_size)
            laid_out = planned(sizes.cp, sizes.tp).laid_out(sizes.dp_replicate, sizes.dp_shard)
            values[RECOMPUTE], reasons[RECOMPUTE] = _recompute(laid_out, facts)
            recipe = _with(recipe, values)
    reasons = {key: reasons[key] for key in asked if key in reasons}
    chosen = {"world_size": world_size, "reasons": reasons} if reasons else None
    recipe = recipe.model_validate({**recipe.resolved(), "chosen": chosen})
    return recipe, [f"{key}: {_shown(recipe, key)}, {reason}" for key, reason in reasons.items()]


def asks(recipe: Recipe) -> bool:
    """Whether anything of the recipe is, or was, to be chosen."""
    return bool(_asked(recipe))


def without_choice(recipe: Recipe) -> Recipe:
    """The recipe with the defaults where it says `auto`: for looking at what does not depend on it."""
    plain = {DTYPE: "float32", RECOMPUTE: "none", MESH: {}}
    return _with(recipe, {key: value for key, value in plain.items() if key in _asked(recipe)})


def with_save_every(recipe: Recipe, steps: int, reason: str) -> Recipe:
    """The recipe with the interval that `auto` stood for, once it is known."""
    before = recipe.chosen
    world_size, reasons = (1, {}) if before is None else (before.world_size, before.reasons)
    chosen = {"world_size": world_size, "reasons": {**reasons, SAVE_EVERY: reason}}
    checkpoint = {**recipe.resolved()["checkpoint"], "save_every": steps}
    return recipe.model_validate({**recipe.resolved(), "checkpoint": checkpoint, "chosen": chosen})


def _asked(recipe: Recipe) -> list[str]:
    """Keys that say `auto`, or did when the run began whose `recipe.json` this is; in the order of choosing."""
    written = {
        DTYPE: recipe.model.dtype,
        MESH: recipe.mesh,
        RECOMPUTE: recipe.model.activation_checkpointing,
        SAVE_EVERY: recipe.checkpoint.save_every,
    }
    before = recipe.chosen.reasons if recipe.chosen is not None else {}
    return [key for key, value in written.items() if value == "auto" or key in before]


def _kept(recipe: Recipe, saved: Mapping[str, Any] | None, world_size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(values, reasons) of what the run began with."""
    saved = saved if saved is not None else (recipe.resolved() if recipe.chosen is not None else None)
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    if saved is None:
        return values, reasons
    before = saved.get("chosen") or {"world_size": None, "reasons": {}}
    for key in _asked(recipe):
        value: Any = saved
        for name in key.split("."):
            value = value[name]
        was_chosen = key in before["reasons"]
        if key == MESH and not (was_chosen and before["world_size"] == world_size):
            continue
        if value != "auto" and (was_chosen or key in (DTYPE, RECOMPUTE)):
            values[key], reasons[key] = value, before["reasons"].get(key, "as when the run began")
    return values, reasons


def _with(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    model = {key.partition(".")[2]: value for key, value in values.items() if key in (DTYPE, RECOMPUTE)}
    update: dict[str, Any] = {"model": recipe.model.model_copy(update=model)}
    if MESH in values:
        update["mesh"] = MeshConfig.model_validate(values[MESH])
    if SAVE_EVERY in values:
        update["checkpoint"] = recipe.checkpoint.model_copy(update={"save_every": values[SAVE_EVERY]})
    return recipe.model_copy(update=update)


def _for_tokenizer(recipe: Recipe) -> ModelConfig:
    """A fresh model has as many tokens as its tokenizer."""
    model = recipe.model
    if model.config is None or "vocab_size" in model.config:
        return model
    from burnish.model.fresh import for_tokenizer

    return for_tokenizer(model, recipe.data.tokenizer.open(model.path, model.revision))


def _planner(recipe: Recipe) -> tuple[Planned, Any]:
    """What plans the recipe's model for (cp, tp) with all of the data on those ranks, each pair once; and the model's
    configuration."""
    from burnish.model.load import load_config
    from burnish.model.plan import Work, plan

    model = _for_tokenizer(recipe)
    hf_config = load_config(model)
    row_length = recipe.data.packing.tokens_per_row(recipe.data.max_length)
    work = Work(recipe.global_batch_size, recipe.micro_batch_size, row_length)

    @cache
    def planned(cp: int, tp: int) -> Plan:
        return plan(model, hf_config, Sizes(1, 1, cp, tp), work)

    return planned, hf_config


def _dtype(facts: DeviceFacts) -> tuple[str, str]:
    if facts.computes_bfloat16:
        return "bfloat16", f"in which {facts.name} computes; what trains has a float32 master"
    return "float32", f"since {facts.name} does not compute in bfloat16"


def _recompute(plan: Plan, facts: DeviceFacts) -> tuple[Recompute, str]:
    needs: list[str] = []
    for mode in ("none", "selective", "full"):
        need = _need(plan, mode, facts)
        needs.append(f"{mode} {need / 2**30:.1f} GB")
        if need <= facts.usable:
            return mode, f"the least that fits: predicted are {', '.join(needs)} of {facts.usable / 2**30:.1f} usable"
    return "full", f"and even that may not fit: predicted are {', '.join(needs)} of {facts.usable / 2**30:.1f} usable"


def _need(plan: Plan, recompute: Recompute, facts: DeviceFacts) -> int:
    return sum(size for size, _ in plan.memory(recompute).values()) + HOST_BYTES * facts.is_host


def _mesh(recipe: Recipe, world_size: int, facts: DeviceFacts, planned: Planned, hf_config: Any) -> tuple[Sizes, str]:
    """The first that fits, in the order of the module's docstring; else the one that needs least.

    Raises:
        RecipeError: the recipe divides by none.
    """
    wanted = recipe.model.activation_checkpointing
    recompute: Recompute = "full" if wanted == "auto" else wanted
    passed_over: list[str] = []
    wrong: list[Misfit] = []
    least: tuple[int, Sizes] | None = None
    for cp, tp in _sharing(recipe, world_size, facts, can_be_cut=not planned(1, 1).obstacle):
        data = world_size // (cp * tp)
        found = misfits(with_mesh(recipe, Sizes(1, data, cp, tp)), world_size, hf_config)
        if found:
            passed_over.append(f"{_said(cp, tp)}: {found[0].reason}")
            wrong += found
            continue
        for shard in _shards(data, facts.per_node // (cp * tp)):
            sizes = Sizes(data // shard, shard, cp, tp)
            need = _need(planned(cp, tp).laid_out(sizes.dp_replicate, shard), recompute, facts)
            if need <= facts.usable:
                return sizes, _because(sizes, facts, passed_over, need)
            least = min(least or (need, sizes), (need, sizes))
        passed_over.append(f"{_said(cp, tp)}: does not fit into {facts.usable / 2**30:.1f} GB")
    if least is None:
        reason, cure = wrong[0].reason, f"{'.'.join(map(str, wrong[0].path))}: {wrong[0].cure}"
        raise RecipeError((UserError(f"no mesh of {world_size} ranks fits: {reason}", where="mesh", cure=cure),))
    need, sizes = least
    return sizes, f"and even that may not fit: {need / 2**30:.1f} GB predicted of {facts.usable / 2**30:.1f} usable"


def _sharing(recipe: Recipe, world_size: int, facts: DeviceFacts, *, can_be_cut: bool) -> list[tuple[int, int]]:
    """(cp, tp) to try: few ranks to a row first, and of as many ranks those that share layers. `tp` stays in a node."""
    row = recipe.data.packing.tokens_per_row(recipe.data.max_length)
    tps = [n for n in _divisors(world_size) if n == 1 or (n <= facts.per_node and can_be_cut)]
    pairs = [(cp, tp) for tp in tps for cp in _divisors(world_size // tp) if cp == 1 or row // cp >= LEAST_TOKENS]
    return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))


def _shards(data: int, in_node: int) -> Iterator[int]:
    """Ranks to a copy of the model: those of one node, of two, ..., all of them."""
    yield from (n for n in _divisors(data) if n >= in_node or n == data)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _said(cp: int, tp: int) -> str:
    return f"tp {tp}" if cp == 1 else f"cp {cp} x tp {tp}"


def _because(sizes: Sizes, facts: DeviceFacts, passed_over: list[str], need: int) -> str:
    fits = f"{need / 2**30:.1f} GB predicted of {facts.usable / 2**30:.1f} usable"
    if sizes.world == 1:
        return f"of one rank; {fits}"
    copies = f"{sizes.dp_replicate} copies" if sizes.dp_replicate > 1 else "one copy"
    ranks = sizes.dp_shard * sizes.cp * sizes.tp
    where = "in one node" if ranks <= facts.per_node else f"over {-(-ranks // facts.per_node)} nodes"
    why = f"{copies} of the model, {'each ' * (sizes.dp_replicate > 1)}{where}; {fits}"
    ends = dict.fromkeys((passed_over[0], passed_over[-1])) if passed_over else {}
    return "; passed over ".join([why, *ends])


def _shown(recipe: Recipe, key: str) -> str:
    if key == MESH:
        assert recipe.mesh != "auto"
        return " x ".join(f"{name} {getattr(recipe.mesh, name)}" for name in Sizes._fields)
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return str(value)
