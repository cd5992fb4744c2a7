"""Losses on sampled tokens through a real tiny model and `Policy`: against plain transformers and plain formulas, one
episode at a time, in float64; and the same under any packing, split, order and sharing of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.component import OneOf
from burnish.losses.rl.base import PolicyLoss
from burnish.losses.rl.ppo import PPO
from burnish.mesh import Mesh, open_mesh
from burnish.model.config import ModelConfig
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.policy.policy import Policy
from burnish.types import Block
from tests.policy_loss_helpers import Episode, episodes, packings
from tests.policy_model_helpers import gradients, largest_difference
from tests.tiny_models import VOCAB_SIZE, tiny_model

SHAPES = [(5, [[6], [2], [3, 4, 2]]), (3, [[1], [7]]), (6, [[4], [2, 1, 3], [5]])]
"""Three prompts with 3, 2 and 3 rollouts of 1 to 9 tokens; two of them have a second turn."""
HEAD = {"type": "multi", "heads": {"lm": {"type": "lm"}, "value": {"type": "scalar"}}}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


def said_logits(causal_lm: Any, prompt: list[int], said: list[int]) -> tuple[Tensor, Tensor]:
    """(log-probabilities [n, V], hidden states [n, H]) that each token was drawn from."""
    hidden = causal_lm.model(input_ids=torch.tensor([prompt + said]), use_cache=False).last_hidden_state[0]
    before = hidden[len(prompt) - 1 : -1]
    return causal_lm.lm_head(before).log_softmax(-1), before


@cache
def groups() -> list[list[Episode]]:
    """Rollouts whose other policies are near the model."""
    causal_lm = tiny_model("llama").double()

    @torch.no_grad()
    def logprobs(prompt: list[int], said: list[int]) -> Tensor:
        return said_logits(causal_lm, prompt, said)[0].gather(1, torch.tensor(said)[:, None]).squeeze(1)

    return episodes(SHAPES, VOCAB_SIZE, logprobs)


TOKENS = sum(sum(turns[::2]) for _, group in SHAPES for turns in group)


Policies = Callable[[PolicyLoss], Policy]


@pytest.fixture(scope="module")
def policies(mesh: Mesh) -> Policies:
    """The policy for a loss, with a value head where it reads one. None of them ever moves."""
    made = cache(partial(open_policy, mesh))
    return lambda loss: made(isinstance(loss, PPO))


def open_policy(mesh: Mesh, has_values: bool) -> Policy:
    model = PolicyModel.from_hf(tiny_model("llama"), projection_chunk=5)
    head = {"head": HEAD} if has_values else {}
    prepare(model, ModelConfig.model_validate({"path": "tiny", **head}), mesh, seed=0)
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=1.0)
    return Policy(model, optimizer, mesh=mesh, micro_batch_size=1, max_grad_norm=None)


def step(
    trained: Policy, loss: PolicyLoss, blocks: list[Block], size: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics, gradients) with `size` rows in a micro-batch."""
    trained.micro_batch_size = size
    metrics = trained.forward_backward(blocks, loss)
    return {name: total / (count or 1.0) for name, (total, count) in metrics.items()}, gradients(trained.model)


# Plain formulas, a float64 vector over the sampled tokens of one episode.


class Plain:
    """An episode under the plain model."""

    def __init__(self, episode: Episode, causal_lm: Any, value_weight: Tensor | None = None) -> None:
        logits, hidden = said_logits(causal_lm, episode.prompt, episode.said)
        ids, mask = torch.tensor(episode.said), episode.mask
        self.logp = logits.gather(1, ids[:, None]).squeeze(1)[mask]
        self.entropy = -(logits.exp() * logits).sum(1)[mask]
        self.values = None if value_weight is None else (hidden @ value_weight.T).squeeze(1)[mask]
        self.a, self.mu, self.old = (
            episode.column(name) for name in ("advantages", "rollout_logprobs", "old_logprobs")
        )
        self.ref, self.returns, self.old_values = (
            episode.column(name) for name in ("ref_logprobs", "returns", "old_values")
        )


def clipped(a: Tensor, ratio: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(a * ratio, a * torch.clamp(ratio, 1 - low, 1 + high))


def by_token(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).sum() / TOKENS


def by_rollout(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.mean() for part in parts]).mean()


def by_length(length: float) -> Callable[[list[Tensor]], Tensor]:
    return lambda parts: torch.stack([part.sum() / length for part in parts]).mean()


def grpo(e: Plain) -> Tensor:
    return clipped(e.a, (e.logp - e.old).exp(), 0.2, 0.2)


def dapo_corrected(e: Plain) -> Tensor:
    weight = (e.old - e.mu).exp().clamp(max=1.2)
    return weight * clipped(e.a, (e.logp - e.old).exp(), 0.2, 0.28) - 0.01 * e.entropy


def dr_grpo_with_kl(e: Plain) -> Tensor:
    r = e.logp - e.ref
    return clipped(e.a, (e.logp - e.mu).exp(), 0.2, 0.2) + 0.1 * ((-r).exp() - 1 + r)


def grpo_unbiased_kl(e: Plain) -> Tensor:
    ratio, r = (e.logp - e.old).exp(), e.logp - e.ref
    return clipped(e.a, ratio, 0.2, 0.2) + 0.1 * ratio * r


def gspo(e: Plain) -> Tensor:
    """The paper's eq. 13: tokens of a rollout may have different advantages."""
    s = (e.logp - e.old).mean().exp()
    own = s.detach() * (e.logp - e.logp.detach()).exp()
    return clipped(e.a, own, 0.1, 0.1)


def cispo(e: Plain) -> Tensor:
    weight = (e.logp - e.old).exp().detach()
    mask = ((e.old - e.mu).sum().exp() <= 1.5).double() * (e.old - e.mu).sum().exp()
    return -mask * weight.clamp(0.5, 1.3) * e.a * e.logp


def rloo(e: Plain) -> Tensor:
    return -e.a * e.logp


def off_policy(e: Plain) -> Tensor:
    return -(e.logp - e.mu).exp().detach() * e.a * e.logp


def ppo(e: Plain) -> Tensor:
    assert e.values is not None
    moved = e.old_values + torch.clamp(e.values - e.old_values, -0.2, 0.2)
    error = torch.maximum((e.values - e.returns) ** 2, (moved - e.returns) ** 2)
    return clipped(e.a, (e.logp - e.old).exp(), 0.2, 0.2) + 0.3 * 0.5 * error


def dual(e: Plain) -> Tensor:
    kept = ((e.old - e.mu).mean().exp() >= 0.9) & ((e.old - e.mu).mean().exp() <= 1.2)
    loss = clipped(e.a, (e.logp - e.old).exp(), 0.2, 0.2)
    return torch.where(e.a < 0, torch.minimum(loss, -1.25 * e.a), loss) * kept


Case = tuple[dict[str, Any], Callable[[Plain], Tensor], Callable[[list[Tensor]], Tensor]]
CASES: dict[str, Case] = {
    "grpo": ({"type": "ppo_clip", "aggregation": "sequence"}, grpo, by_rollout),
    "dapo, corrected, entropy": (
        {
            "type": "ppo_clip",
            "clip_high": 0.28,
            "correction": {"type": "token_truncated", "max_weight": 1.2},
            "entropy_coef": 0.01,
        },
        dapo_corrected,
        by_token,
    ),
    "dr_grpo against the rollout, kl": (
        {
            "type": "ppo_clip",
            "aggregation": "constant",
            "constant_length": 16,
            "old_logprobs": "rollout",
            "kl_coef": 0.1,
        },
        dr_grpo_with_kl,
        by_length(16),
    ),
    "grpo, unbiased kl": (
        {"type": "ppo_clip", "aggregation": "sequence", "kl_coef": 0.1, "kl_estimator": "k1", "kl_unbiased": True},
        grpo_unbiased_kl,
        by_rollout,
    ),
    "gspo": ({"type": "gspo", "clip_low": 0.1, "clip_high": 0.1}, gspo, by_rollout),
    "cispo, masked": (
        {
            "type": "cispo",
            "min_ratio": 0.5,
            "max_ratio": 1.3,
            "correction": {"type": "sequence_mask", "max_ratio": 1.5},
        },
        cispo,
        by_token,
    ),
    "rloo": ({"type": "reinforce", "aggregation": "constant", "constant_length": 1}, rloo, by_length(1)),
    "off-policy reinforce": (
        {"type": "reinforce", "importance_weights": True, "old_logprobs": "rollout"},
        off_policy,
        by_token,
    ),
    "ppo": ({"type": "ppo", "value_coef": 0.3}, ppo, by_token),
    "dual clip, masked": (
        {
            "type": "ppo_clip",
            "dual_clip": 1.25,
            "correction": {"type": "geometric_mask", "min_ratio": 0.9, "max_ratio": 1.2},
        },
        dual,
        by_token,
    ),
}


def loss_of(case: str) -> PolicyLoss:
    fields = CASES[case][0]
    return OneOf("burnish.losses.rl").find(PolicyLoss, fields["type"]).model_validate(fields)


def unused(loss: PolicyLoss) -> list[str]:
    """Columns that a run would not have written for it."""
    return ["old_logprobs"] if loss.old_logprobs == "rollout" else []


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_plain_transformers(policies: Policies, case: str) -> None:
    """Shared prompts, packed, against a float64 model that sees each rollout alone."""
    loss, (_, formula, aggregate) = loss_of(case), CASES[case]
    metrics, ours = step(policies(loss), loss, packings(groups(), unused(loss))["shared"], 2)
    causal_lm, value_weight = tiny_model("llama").double(), None
    if isinstance(loss, PPO):
        value_weight = policies(loss).model.head_tensors()["value.weight"].double().requires_grad_()
    expected = aggregate([formula(Plain(episode, causal_lm, value_weight)) for group in groups() for episode in group])
    expected.backward()
    theirs = {name: p.grad for name, p in causal_lm.named_parameters() if p.grad is not None}
    if value_weight is not None:
        assert value_weight.grad is not None
        theirs["value.weight"] = value_weight.grad
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    difference, name = largest_difference(ours, theirs)
    assert difference < 2e-5, name


@pytest.mark.parametrize("case", CASES)
def test_packing_order_and_split_change_nothing(policies: Policies, case: str) -> None:
    loss = loss_of(case)
    rows = packings(groups(), unused(loss))
    expected, theirs = step(policies(loss), loss, rows["one-by-one"], 1)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3  # there is something to compare
    for packing, size in (("shared", 1), ("own-prompts", 3), ("other-order", 2), ("with-empty-rows", 3)):
        found, ours = step(policies(loss), loss, rows[packing], size)
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-6), packing
        difference, parameter = largest_difference(ours, theirs)
        assert difference < 2e-5, (packing, parameter)


@pytest.mark.parametrize("case", ["grpo", "gspo", "ppo"])
def test_the_first_update_has_a_ratio_of_exactly_one(policies: Policies, case: str) -> None:
    """No column of old log-probabilities, as before any update: nothing is clipped, whatever the rows."""
    loss = loss_of(case)
    metrics, _ = step(policies(loss), loss, packings(groups(), ["old_logprobs"])["shared"], 1)
    assert (metrics["ratio"], metrics["approx_kl"]) == (1.0, 0.0)
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0.0
    assert metrics["mismatch_abs"] > 0.1  # of the engine's log-probabilities, which are others


def test_values_that_a_policy_reads_are_those_it_trains(policies: Policies) -> None:
    """What is written down before the step as `old_values` is what the loss compares in it: nothing has moved."""
    loss = PPO()
    trained, blocks = policies(loss), packings(groups())["shared"]
    values = trained.read(blocks, loss, loss.values)
    for block, values_T in zip(blocks, values, strict=True):
        assert values_T[~block.loss_mask].abs().max() == 0 and values_T[block.loss_mask].abs().min() > 0
        block.columns["old_values"] = values_T.detach()
    metrics, _ = step(trained, loss, blocks, 2)
    assert metrics["values"] == pytest.approx(sum(float(v.sum()) for v in values) / TOKENS, rel=1e-5)
    assert metrics["value_clip_fraction"] == 0.0
