"""The policy's verbs on a tiny Llama: gradients against plain transformers, splits, refused steps, exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from burnish.errors import ResumeError
from burnish.losses.base import Loss
from burnish.losses.nll import NLL
from burnish.mesh import Mesh, open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.policy.optimizers.adamw import AdamW
from burnish.policy.policy import Policy, Update
from burnish.types import Block, LossOutput, TokenOutputs
from tests.policy_model_helpers import largest_difference, pack, plain_loss, random_documents
from tests.tiny_models import VOCAB_SIZE, tiny_model

LENGTHS = [9, 4, 2, 12, 5, 3, 7]
DOCUMENTS = random_documents(LENGTHS, VOCAB_SIZE)
# 13 + 14 + 8 + 7 tokens in rows of 16: a different number of trained tokens and of padding in each
ROWS = [DOCUMENTS[0:2], DOCUMENTS[2:4], DOCUMENTS[4:6], DOCUMENTS[6:7]]
TRAINED = sum(LENGTHS) - len(LENGTHS)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


def blocks(rows: list[list[list[int]]] = ROWS) -> list[Block]:
    return [pack(row, 16) for row in rows]


def policy(
    mesh: Mesh,
    *,
    micro_batch_size: int = 1,
    max_grad_norm: float | None = None,
    sgd: bool = False,
    lora: LoRA | None = None,
    dtype: str = "float32",
) -> Policy:
    model = PolicyModel.from_hf(tiny_model("llama"), projection_chunk=5)
    prepare(model, ModelConfig.model_validate({"path": "tiny", "dtype": dtype, "adapter": lora}), mesh, seed=0)
    parameters = model.trainable_parameters()
    if sgd:
        optimizer = torch.optim.SGD([{"params": [p for _, p in parameters], "lr_scale": 0.5}], lr=1.0)
    else:
        optimizer = AdamW(weight_decay=0.1).open(parameters)
    return Policy(model, optimizer, mesh=mesh, micro_batch_size=micro_batch_size, max_grad_norm=max_grad_norm)


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.trainable_parameters() if p.grad is not None}


def parameters(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.trainable_parameters()}


def saved_state(policy: Policy) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a checkpoint on one rank holds."""
    pieces, json = policy.state()
    return {part: {name: piece.tensor for name, piece in named.items()} for part, named in pieces.items()}, json


def assert_bit_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_loss_and_gradients_are_the_token_mean_of_plain_transformers(mesh: Mesh) -> None:
    packed = policy(mesh, micro_batch_size=2)
    metrics = packed.forward_backward(blocks(), NLL())
    plain = tiny_model("llama")
    loss = plain_loss(plain, DOCUMENTS) / TRAINED
    loss.backward()
    summed, count = metrics["loss"]
    assert count == TRAINED
    assert summed / count == pytest.approx(loss.item(), rel=1e-6)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    difference, name = largest_difference(gradients(packed), theirs)
    assert difference < 5e-6, name


def test_packed_is_one_by_one(mesh: Mesh) -> None:
    packed, alone = policy(mesh), policy(mesh)
    (packed_sum, _), (alone_sum, _) = (
        policy.forward_backward(rows, NLL())["loss"]
        for policy, rows in ((packed, blocks()), (alone, [pack([document], len(document)) for document in DOCUMENTS]))
    )
    assert packed_sum == pytest.approx(alone_sum, rel=1e-6)
    difference, name = largest_difference(gradients(packed), gradients(alone))
    assert difference < 1e-6, name


@pytest.mark.parametrize("micro_batch_size", [2, 3, 4, 8])
def test_the_gradient_is_the_same_under_any_split(mesh: Mesh, micro_batch_size: int) -> None:
    one, other = policy(mesh), policy(mesh, micro_batch_size=micro_batch_size)
    metrics = [p.forward_backward(blocks(), NLL())["loss"] for p in (one, other)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    difference, name = largest_difference(gradients(other), gradients(one))
    assert difference < 1e-6, name


def test_padded_rows_at_the_end_of_a_run_change_nothing(mesh: Mesh) -> None:
    one, other = policy(mesh), policy(mesh)
    one.forward_backward(blocks(), NLL())
    other.forward_backward([*blocks(), pack([], 16), pack([], 16)], NLL())
    assert_bit_equal(gradients(other), gradients(one))


def test_a_step_that_trains_no_token_has_no_gradient(mesh: Mesh) -> None:
    for rows in ([pack([], 16)], [pack([[5]], 16)]):
        idle = policy(mesh, sgd=True)
        before = parameters(idle)
        assert idle.forward_backward(rows, NLL()) == {"loss": (0.0, 0.0)}
        assert idle.optim_step(1.0) == Update(grad_norm=0.0)
        assert_bit_equal(parameters(idle), before)


def test_a_step_is_clipped_to_the_norm_and_scaled_by_its_group(mesh: Mesh) -> None:
    """Plain gradient descent: the parameters move by learning rate * lr_scale * clipped gradient."""
    for max_grad_norm in (0.01, 1e9, None):
        descent = policy(mesh, sgd=True, max_grad_norm=max_grad_norm)
        before = parameters(descent)
        descent.forward_backward(blocks(), NLL())
        gradient = gradients(descent)
        norm = torch.cat([g.flatten().double() for g in gradient.values()]).norm().item()
        update = descent.optim_step(learning_rate=0.2)
        assert update.grad_norm == pytest.approx(norm, rel=1e-6)
        factor = min(1.0, (max_grad_norm or norm) / norm) * 0.2 * 0.5
        for name, after in parameters(descent).items():
            torch.testing.assert_close(after, before[name] - factor * gradient[name], rtol=1e-6, atol=1e-7)
        assert not gradients(descent)


class WeightedMean(NLL):
    """Divided by the weights of its tokens, whatever they add up to."""

    type: str = "weighted_mean"  # pyright: ignore[reportIncompatibleVariableOverride]

    def count(self, block: Block) -> Tensor:
        return self.coefficients(block).sum()


def test_a_count_below_one_is_divided_by(mesh: Mesh) -> None:
    plain, weighted = policy(mesh), policy(mesh)
    rows = blocks()
    for row in rows:
        row.columns["weight"] = torch.full((4,), 2.0**-10)
    plain.forward_backward(blocks(), NLL())
    _, count = weighted.forward_backward(rows, WeightedMean())["loss"]
    assert count == TRAINED * 2.0**-10 < 1
    difference, name = largest_difference(gradients(weighted), gradients(plain))
    assert difference < 1e-6, name


class NotFinite(Loss):
    """Zero, with a gradient that is not a number: d sqrt(0 * x)."""

    type: Literal["not_finite"] = "not_finite"
    needs: ClassVar[frozenset[str]] = frozenset({"logprobs"})

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.logprobs is not None
        return LossOutput((0.0 * outputs.logprobs.sum()).sqrt(), {})


def test_what_is_not_finite_moves_nothing(mesh: Mesh) -> None:
    poisoned, healthy = policy(mesh), policy(mesh)
    bad_row = blocks()[1]
    bad_row.columns["weight"] = torch.tensor([1.0, torch.inf, 0.0, 0.0])
    good_rows = blocks()
    for row in good_rows:
        row.columns["weight"] = torch.ones(4)
    for step in range(3):
        if step == 1:
            poisoned.forward_backward([good_rows[0], bad_row], NLL())
            assert poisoned.optim_step(1e-3).reason == "the loss is not finite"
            poisoned.forward_backward(blocks(), NotFinite())
            update = poisoned.optim_step(1e-3)
            assert update.skipped and update.reason == "the gradient is not finite"
            assert not gradients(poisoned)
        for either in (poisoned, healthy):
            either.forward_backward(good_rows, NLL())
            assert not either.optim_step(1e-3).skipped
    for ours, theirs in zip(saved_state(poisoned)[0].values(), saved_state(healthy)[0].values(), strict=True):
        assert_bit_equal(ours, theirs)


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [(None, "float32"), (LoRA(r=2, lora_dropout=0.3), "float32"), (None, "bfloat16")],
    ids=["full", "lora with dropout", "bfloat16 with sharded masters"],
)
def test_a_resumed_policy_goes_on_bit_for_bit(mesh: Mesh, lora: LoRA | None, dtype: str) -> None:
    def train(policy: Policy, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(policy.forward_backward(blocks()[step % 3 :], NLL())["loss"][0])
            losses.append(policy.optim_step(1e-2 / (step + 1)).grad_norm)
        return losses

    torch.manual_seed(0)
    undisturbed = policy(mesh, max_grad_norm=1.0, lora=lora, dtype=dtype)
    train(undisturbed, range(3))
    live, json = saved_state(undisturbed)
    saved = {part: {name: tensor.clone() for name, tensor in tensors.items()} for part, tensors in live.items()}
    trained = [name for name, _ in undisturbed.model.trainable_parameters()]
    assert list(saved["model"]) == trained
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert sorted(saved["optimizer"]) == sorted(f"{kind}.{name}" for kind in kinds for name in trained)
    rest = train(undisturbed, range(3, 6))

    torch.manual_seed(1)
    resumed = policy(mesh, max_grad_norm=1.0, lora=lora, dtype=dtype)
    resumed.load(saved, json)
    assert train(resumed, range(3, 6)) == rest
    for ours, theirs in zip(saved_state(resumed)[0].values(), saved_state(undisturbed)[0].values(), strict=True):
        assert_bit_equal(ours, theirs)
    for part, tensors in saved.items():  # loading copied: what was loaded is still what was saved
        for name, tensor in tensors.items():
            assert part != "model" or not torch.equal(tensor, saved_state(resumed)[0]["model"][name])


def test_state_before_the_first_step_loads(mesh: Mesh) -> None:
    fresh, other = policy(mesh), policy(mesh)
    tensors, json = saved_state(fresh)
    assert not tensors["optimizer"]
    other.forward_backward(blocks(), NLL())
    other.optim_step(1e-2)
    other.load(tensors, json)
    assert not saved_state(other)[0]["optimizer"]
    assert_bit_equal(parameters(other), parameters(fresh))


def test_state_of_another_model_or_optimizer_is_refused(mesh: Mesh) -> None:
    tensors, json = saved_state(policy(mesh))
    with pytest.raises(ResumeError, match=r"AdamW, not by SGD"):
        policy(mesh, sgd=True).load(tensors, json)
    name = "model.layers.1.mlp.up_proj.weight"
    cut = {**tensors, "model": {**tensors["model"], name: tensors["model"][name][:3]}}
    with pytest.raises(ResumeError, match=rf"1 parameters differ, the first is {name}: \(3, 32\) in the checkpoint"):
        policy(mesh).load(cut, json)
    missing = {**tensors, "model": {n: t for n, t in tensors["model"].items() if n != name}}
    with pytest.raises(ResumeError, match="absent in the checkpoint"):
        policy(mesh).load(missing, json)


def test_evaluation_is_the_loss_of_training_and_leaves_no_trace(mesh: Mesh) -> None:
    one, other = policy(mesh, micro_batch_size=3), policy(mesh)
    state = torch.get_rng_state()
    evaluated = one.evaluate((block for block in blocks()), NLL())
    assert not gradients(one) and torch.equal(torch.get_rng_state(), state)
    assert evaluated["loss"] == pytest.approx(other.forward_backward(blocks(), NLL())["loss"], rel=1e-6)
    assert one.evaluate(iter([]), NLL()) == {}


def test_evaluation_has_no_dropout(mesh: Mesh) -> None:
    dropping = policy(mesh, lora=LoRA(r=2, lora_dropout=0.9))
    with torch.no_grad():
        for name, parameter in dropping.model.trainable_parameters():
            parameter.fill_(0.1 if "lora_B" in name else 0.2)
    first = dropping.evaluate(blocks(), NLL())["loss"][0]
    assert dropping.forward_backward(blocks(), NLL())["loss"][0] != pytest.approx(first, rel=1e-3)
    assert dropping.evaluate(blocks(), NLL())["loss"][0] == first


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_logprobs_of_every_predicted_token(mesh: Mesh, micro_batch_size: int) -> None:
    plain, rows = tiny_model("llama"), blocks()
    found = policy(mesh, micro_batch_size=micro_batch_size).logprobs(rows)
    assert len(found) == len(ROWS)
    for row, logprobs in zip(ROWS, found, strict=True):
        expected = torch.zeros(16)
        start = 0
        for document in row:
            ids = torch.tensor(document)
            with torch.no_grad():
                log_p = plain(input_ids=ids[None], use_cache=False).logits[0].log_softmax(1)
            expected[start + 1 : start + len(ids)] = log_p[:-1].gather(1, ids[1:, None]).squeeze(1)
            start += len(ids)
        torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_exported_weights_are_the_plain_models(mesh: Mesh) -> None:
    exported = dict(policy(mesh).export_weights())
    assert_bit_equal(exported, dict(tiny_model("llama").state_dict()))
