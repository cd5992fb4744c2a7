"""Preference losses through a real tiny model and `Policy`: against plain transformers, one answer at a time, in
float64; and the same under any packing, split, order and sharing of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.data.packing.layout import empty_block
from burnish.losses.apo_down import APODown
from burnish.losses.apo_zero import APOZero
from burnish.losses.base import Loss
from burnish.losses.cpo import CPO
from burnish.losses.dpo import DPO
from burnish.losses.hinge import Hinge
from burnish.losses.ipo import IPO
from burnish.losses.kto import KTO
from burnish.losses.orpo import ORPO
from burnish.losses.robust import Robust
from burnish.losses.simpo import SimPO
from burnish.losses.sum import Sum
from burnish.mesh import Mesh, open_mesh
from burnish.model.config import ModelConfig
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.policy.policy import Policy
from burnish.types import Block, previous_token
from tests.policy_model_helpers import gradients, largest_difference
from tests.preference_helpers import TokenPair, token_block, token_pairs
from tests.tiny_models import VOCAB_SIZE, tiny_model

if TYPE_CHECKING:
    from burnish.policy.second import Second

PAIRS = token_pairs([(6, 5, 3), (2, 9, 12), (4, 1, 7), (8, 3, 3), (3, 10, 2)], VOCAB_SIZE)
CHOSEN_TOKENS = 5 + 9 + 1 + 3 + 10
KL = 0.75


class GivenKTO(KTO):
    """KTO whose columns are in the data."""

    asks: ClassVar[frozenset[str]] = frozenset()


DPO_AND_NLL = Sum.model_validate({"terms": [{"loss": {"type": "dpo"}}, {"weight": 0.3, "loss": {"type": "nll"}}]})
PACKINGS: dict[str, Callable[[], list[Block]]] = {
    "shared": lambda: [token_block(PAIRS[:3], 64, shared=True), token_block(PAIRS[3:], 64, shared=True)],
    "own-prompts": lambda: [token_block(PAIRS[:2], 64, shared=False), token_block(PAIRS[2:], 64, shared=False)],
    "rejected-first": lambda: [
        token_block(PAIRS[::-1][:4], 64, shared=True, chosen_first=False),
        token_block(PAIRS[:1], 64, shared=True, chosen_first=False),
    ],
    "one-by-one": lambda: [token_block([pair], 64, shared=False) for pair in PAIRS],
    "with-empty-rows": lambda: [
        empty_block(64, 12, token_block(PAIRS[:1], 64, shared=True).columns),
        *(token_block([pair], 64, shared=True) for pair in PAIRS),
    ],
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


@dataclass
class FromModel:
    """A reference in the place of the run's own: another model, asked row by row; what a step calls of `Second`."""

    model: PolicyModel

    @torch.no_grad()
    def annotate(self, blocks: list[Block], loss: Loss) -> list[Block]:
        return [replace(b, columns={**b.columns, "ref_logprobs": all_logprobs(self.model, b)}) for b in blocks]

    def reference(self, block: Block, loss: Loss) -> None:
        return None


def all_logprobs(model: PolicyModel, block: Block) -> Tensor:
    return model(block, needs=frozenset({"logprobs"}), reads=previous_token(block) >= 0).logprobs


def policy(mesh: Mesh, *, reference_seed: int = 1, micro_batch_size: int = 1) -> Policy:
    model, reference = (
        PolicyModel.from_hf(tiny_model("llama", seed), projection_chunk=5) for seed in (0, reference_seed)
    )
    prepare(model, ModelConfig(path="tiny"), mesh, seed=0)
    optimizer = torch.optim.SGD([{"params": [p for _, p in model.trainable_parameters()], "lr_scale": 1.0}], lr=1.0)
    return Policy(
        model,
        optimizer,
        mesh=mesh,
        micro_batch_size=micro_batch_size,
        max_grad_norm=None,
        second=cast("Second", FromModel(reference)),
    )


def step(
    mesh: Mesh, loss: Loss, blocks: list[Block], *, micro_batch_size: int = 1, reference_seed: int = 1
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """(loss, metrics, gradients)"""
    trained = policy(mesh, micro_batch_size=micro_batch_size, reference_seed=reference_seed)
    if isinstance(loss, KTO):
        assert trained.second is not None
        blocks = trained.second.annotate(blocks, loss)
        for block in blocks:
            block.columns["kto_kl"] = torch.full(block.group_ids.shape, KL)
    found = {name: summed / (count or 1.0) for name, (summed, count) in trained.forward_backward(blocks, loss).items()}
    return found["loss"], found, gradients(trained.model)


# Plain transformers, one sequence at a time.


def answer_logprobs(causal_lm: torch.nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    ids = torch.tensor([prompt + answer])
    logprobs = causal_lm(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).squeeze(1)


def plain(pair: TokenPair, causal_lm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    return (
        answer_logprobs(causal_lm, pair.prompt, pair.chosen),
        answer_logprobs(causal_lm, pair.prompt, pair.rejected),
    )


def dpo(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor) -> Tensor:
    return -logsigmoid(0.1 * (c.sum() - ref_c.sum() - r.sum() + ref_r.sum()))


def orpo(c: Tensor, r: Tensor, _ref_c: Tensor, _ref_r: Tensor) -> Tensor:
    p_c, p_r = c.mean().exp(), r.mean().exp()
    return -c.mean() - 0.1 * logsigmoid((p_c / (1 - p_c)).log() - (p_r / (1 - p_r)).log())


def kto(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor) -> Tensor:
    """Of the answers of a pair as if each had come alone; half, since there are two answers a pair."""
    chosen, rejected = (c - ref_c).sum() - KL, KL - (r - ref_r).sum()
    return ((1 - torch.sigmoid(0.1 * chosen)) + (1 - torch.sigmoid(0.1 * rejected))) / 2


def dpo_and_nll(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor) -> Tensor:
    """The likelihood is a mean over the tokens of all pairs: here times the pairs, which the mean over them divides."""
    return dpo(c, r, ref_c, ref_r) - 0.3 * c.sum() / CHOSEN_TOKENS * len(PAIRS)


def cpo(c: Tensor, r: Tensor, _ref_c: Tensor, _ref_r: Tensor) -> Tensor:
    return -logsigmoid(0.1 * (c.sum() - r.sum())) - c.sum() / CHOSEN_TOKENS * len(PAIRS)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [(DPO(), dpo), (ORPO(), orpo), (CPO(), cpo), (DPO_AND_NLL, dpo_and_nll), (GivenKTO(), kto)],
    ids=["dpo", "orpo", "cpo", "dpo+nll", "kto"],
)
def test_loss_and_gradients_are_those_of_plain_transformers(
    mesh: Mesh, loss: Loss, formula: Callable[..., Tensor]
) -> None:
    """Shared prompts, packed, against a float64 model that sees each answer alone."""
    trained, reference = (tiny_model("llama", seed).double() for seed in (0, 1))
    with torch.no_grad():
        ref = [plain(pair, reference) for pair in PAIRS]
    expected = torch.stack([formula(*plain(pair, trained), *r) for pair, r in zip(PAIRS, ref, strict=True)]).mean()
    expected.backward()
    found, _, ours = step(mesh, loss, PACKINGS["shared"](), micro_batch_size=2)
    assert found == pytest.approx(expected.item(), rel=1e-6)
    theirs = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    difference, name = largest_difference(ours, theirs)
    assert difference < 5e-6, name


ALL = [DPO(), Hinge(), IPO(), Robust(), APOZero(), APODown(), SimPO(), ORPO(), CPO(), GivenKTO(), DPO_AND_NLL]


@pytest.mark.parametrize("loss", ALL, ids=[loss.type for loss in ALL])
def test_packing_order_and_split_change_nothing(mesh: Mesh, loss: Loss) -> None:
    expected, metrics, theirs = step(mesh, loss, PACKINGS["one-by-one"]())
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-4  # there is something to compare
    for packing, size in (("shared", 1), ("own-prompts", 3), ("rejected-first", 1), ("with-empty-rows", 3)):
        found, others, ours = step(mesh, loss, PACKINGS[packing](), micro_batch_size=size)
        assert found == pytest.approx(expected, rel=2e-6), packing
        assert others == pytest.approx(metrics, rel=2e-5, abs=1e-6), packing
        difference, parameter = largest_difference(ours, theirs)
        assert difference < 1e-5, (packing, parameter)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss", [DPO(beta=0.5), Robust(), DPO(length_normalised=True)], ids=["dpo", "robust", "mean"])
def test_a_policy_that_is_its_reference_begins_at_ln_2(mesh: Mesh, loss: Loss, packing: str) -> None:
    value, metrics, _ = step(mesh, loss, PACKINGS[packing](), micro_batch_size=3, reference_seed=0)
    assert value == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=2e-6)


def test_ln_2_whatever_rows_the_reference_saw(mesh: Mesh) -> None:
    """Long answers, asked of the reference one by one and of the policy packed with a shared prompt."""
    pairs = token_pairs([(20, 90, 70), (5, 60, 30)], VOCAB_SIZE, seed=3)
    trained = policy(mesh, reference_seed=0)
    assert trained.second is not None
    alone = [trained.second.annotate([token_block([pair], 256, shared=False)], DPO())[0] for pair in pairs]
    packed = token_block(pairs, 288, shared=True)
    ref_logprobs = torch.zeros(288)
    for index, block in enumerate(alone):
        for document, answer in enumerate(("chosen", "rejected")):
            source = block.document_ids == document
            target = packed.document_ids == 3 * index + 1 + document
            ref_logprobs[target] = block.columns["ref_logprobs"][source][-len(getattr(pairs[index], answer)) :]
    packed = replace(packed, columns={**packed.columns, "ref_logprobs": ref_logprobs})
    output = DPO(beta=0.1)(trained.model(packed, needs=frozenset({"logprobs"}), reads=packed.loss_mask), packed)
    assert output.total.item() / 2 == pytest.approx(math.log(2), abs=1e-6)


def test_the_loss_of_a_sum_is_its_terms_means_added(mesh: Mesh) -> None:
    """The policy says it, in training and in evaluation, since no (sum, count) can."""
    loss, metrics, _ = step(mesh, DPO_AND_NLL, PACKINGS["shared"](), micro_batch_size=1)
    assert loss == pytest.approx(metrics["dpo/loss"] + 0.3 * metrics["nll/loss"], rel=1e-6)
    evaluated = policy(mesh).evaluate(PACKINGS["one-by-one"](), DPO_AND_NLL)
    assert evaluated["loss"] == (pytest.approx(loss, rel=2e-6), 1.0)
    assert evaluated["dpo/loss"][1] == 5 and evaluated["nll/loss"][1] == CHOSEN_TOKENS
