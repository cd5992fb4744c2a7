"""AdamW as the recipe opens it."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from burnish.policy.optimizers.adamw import AdamW


def _parameters() -> dict[str, torch.nn.Parameter]:
    return {
        "weight": torch.nn.Parameter(torch.tensor([[1.0, -2.0]])),
        "norm": torch.nn.Parameter(torch.tensor([3.0])),
    }


def test_two_steps_by_hand() -> None:
    """Moments, bias corrections and decay written out; only the matrix decays."""
    parameters = _parameters()
    optimizer = AdamW(learning_rate=0.1, weight_decay=0.5, betas=[0.5, 0.75], eps=0.01).open(parameters.items())
    expected = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    mean = {name: torch.zeros_like(p) for name, p in expected.items()}
    square = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, gradient in ((1, 2.0), (2, -1.0)):
        for name, parameter in parameters.items():
            parameter.grad = torch.full_like(parameter, gradient)
            mean[name] = 0.5 * mean[name] + 0.5 * gradient
            square[name] = 0.75 * square[name] + 0.25 * gradient**2
            decay = 0.1 * 0.5 if name == "weight" else 0.0
            root = (square[name] / (1 - 0.75**step)).sqrt() + 0.01
            expected[name] = (1 - decay) * expected[name] - 0.1 * mean[name] / (1 - 0.5**step) / root
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-6)


def test_groups_carry_a_learning_rate_scale() -> None:
    optimizer = AdamW(weight_decay=0.1).open(_parameters().items())
    assert [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in optimizer.param_groups] == [
        (1, 0.1, 1.0),
        (1, 0.0, 1.0),
    ]


def test_a_model_without_vectors_has_one_group() -> None:
    parameters = _parameters()
    del parameters["norm"]
    assert len(AdamW().open(parameters.items()).param_groups) == 1


def test_defaults_are_those_of_the_paper_and_of_full_fine_tuning() -> None:
    defaults = AdamW()
    assert (defaults.learning_rate, defaults.betas, defaults.eps, defaults.weight_decay) == (
        2e-5,
        [0.9, 0.999],
        1e-8,
        0.0,
    )


@pytest.mark.parametrize(
    "fields",
    [{"betas": [0.9, 1.0]}, {"betas": [0.9]}, {"betas": [0.9, 0.9, 0.9]}, {"learning_rate": 0}, {"momentum": 0.9}],
)
def test_impossible_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AdamW.model_validate(fields)
