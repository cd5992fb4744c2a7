"""Presets: what they are made of, and what a recipe changes of them."""

from __future__ import annotations

import copy
import json
from typing import Annotated, Any

import pytest

from burnish.advantages.base import Advantage
from burnish.component import Config, OneOf
from burnish.losses.rl.base import PolicyLoss
from burnish.workflows.presets import PRESETS, expand
from burnish.workflows.rl import RL


class Parts(Config):
    """The blocks of a preset that are made here."""

    advantage: Annotated[Advantage, OneOf("burnish.advantages")]
    loss: Annotated[PolicyLoss, OneOf("burnish.losses.rl")]


def parts(preset: str, **given: Any) -> Parts:
    expanded = expand(preset, given)
    return Parts(advantage=expanded["advantage"], loss=expanded["loss"])


def test_there_is_one_for_each_algorithm() -> None:
    assert list(PRESETS) == [
        "grpo",
        "dr_grpo",
        "dapo",
        "gspo",
        "cispo",
        "rloo",
        "reinforce_pp",
        "ppo",
        "aligned",
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_visible(preset: str) -> None:
    """What it says of advantage and loss stands in what a run saves; nothing is said that a default would not allow."""
    made, expanded = parts(preset), expand(preset, {})
    for name in ("advantage", "loss"):
        saved = made.model_dump()[name]
        assert {key: saved[key] for key in expanded[name]} == expanded[name]
    assert made.advantage.needs_values == ("scores" in made.loss.needs)
    assert expanded.keys() <= {"advantage", "loss", "rollout", "kl_penalty", "num_passes"}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_workflow_takes_it_and_takes_what_it_saved(preset: str) -> None:
    made = RL.model_validate({"preset": preset, "rewards": [{"type": "exact_match"}]})
    assert (made.kl_penalty is not None) == ("kl_penalty" in PRESETS[preset])
    assert made.num_passes == PRESETS[preset].get("num_passes", 1)
    assert RL.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("preset", PRESETS)
def test_expanding_again_changes_nothing(preset: str) -> None:
    """A resumed run expands what its `recipe.json` holds, every field written out."""
    given = {"preset": preset, "kl_penalty": None, "rollout": {"sampling": {"max_new_tokens": 77}, "group_size": 2}}
    once = expand(preset, given)
    saved = json.loads(Parts(advantage=once["advantage"], loss=once["loss"]).model_dump_json())
    full = {**once, **saved}
    assert expand(preset, full) == full
    assert expand(preset, once) == once


def test_what_is_given_stands_over_the_preset() -> None:
    before = copy.deepcopy(PRESETS)
    expanded = expand("dapo", {"loss": {"clip_high": 0.3}, "rollout": {"group_size": 4}, "num_passes": 2})
    assert expanded == {
        "advantage": {"type": "group_norm"},
        "loss": {"type": "ppo_clip", "clip_low": 0.2, "clip_high": 0.3, "aggregation": "token"},
        "rollout": {"drop_uniform": True, "group_size": 4},
        "num_passes": 2,
    }
    expanded["rollout"]["drop_uniform"] = False
    assert before == PRESETS


def test_none_takes_a_block_away() -> None:
    assert expand("rloo", {})["kl_penalty"] == {"coef": 0.05, "estimator": "k1"}
    assert expand("rloo", {"kl_penalty": None})["kl_penalty"] is None


def test_a_block_of_another_type_is_the_recipe_s_whole() -> None:
    """The bounds of a clipped surrogate mean nothing to another loss."""
    given = {"loss": {"type": "cispo", "max_ratio": 4.0}, "advantage": {"type": "group_norm", "eps": 1e-6}}
    expanded = expand("dapo", given)
    assert expanded["loss"] == {"type": "cispo", "max_ratio": 4.0}
    assert expanded["advantage"] == {"type": "group_norm", "eps": 1e-6}
    assert parts("dapo", **given).loss.aggregation == "token"


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({}, 256.0),  # the default of rollout.sampling.max_new_tokens
        ({"rollout": {"sampling": {"max_new_tokens": 40}}}, 40.0),
        ({"rollout": {"sampling": {"max_new_tokens": 40}}, "loss": {"constant_length": 9}}, 9),
        ({"rollout": {"sampling": "wrong"}}, 256.0),  # the schema says so, at its place
    ],
    ids=str,
)
def test_dr_grpo_divides_by_the_longest_completion(given: dict[str, Any], length: float) -> None:
    assert expand("dr_grpo", given)["loss"]["constant_length"] == length


def test_dr_grpo_with_another_aggregation_has_no_length() -> None:
    assert parts("dr_grpo", loss={"aggregation": "token"}).loss.constant_length is None


def test_a_loss_that_is_no_block_is_left_to_the_schema() -> None:
    assert expand("grpo", {"loss": "ppo_clip"})["loss"] == "ppo_clip"


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no preset 'dr-grpo': did you mean 'dr_grpo'\? one of: grpo, dr_grpo"):
        expand("dr-grpo", {})
