"""Divergences from a second model against their formulas on whole logits in float64, and against another library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from burnish.model.divergence import BUFFERS, Reference
from burnish.model.project import project
from burnish.types import Divergence
from tests.projection_helpers import HEADS, READ, UNREAD, Case, H, T, V, same_gradients, whole_logits

DIVERGENCES = {
    "forward": Divergence("forward"),
    "reverse": Divergence("reverse"),
    "jsd": Divergence("jsd"),
    "jsd, near the teacher": Divergence("jsd", beta=0.9),
    "forward, warm": Divergence("forward", temperature=2.5),
    "reverse, cold": Divergence("reverse", temperature=0.6),
    "jsd, warm": Divergence("jsd", beta=0.2, temperature=1.7),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_is_the_formula_on_whole_logits_and_so_are_its_gradients(name: str, head: str) -> None:
    """The temperature of the head, where it has one, is that of log-probabilities and not of the divergence."""
    case, divergence = Case(**HEADS[head]), DIVERGENCES[name]
    vector = case.project("full_kl", divergence=divergence).full_kl
    assert vector is not None
    expected = case.expected_divergence(divergence)
    torch.testing.assert_close(vector[READ], expected, rtol=1e-12, atol=1e-14)
    assert not vector[UNREAD].any()

    towards = torch.randn_like(expected)
    same_gradients((vector[READ] * towards).sum(), (expected * towards).sum(), case.leaves)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradcheck(name: str) -> None:
    case, divergence = Case(**HEADS["all of it"]), DIVERGENCES[name]

    def full_kl(*leaves: Tensor) -> Tensor:
        vector = case.project("full_kl", divergence=divergence, leaves=list(leaves)).full_kl
        assert vector is not None
        return vector

    assert torch.autograd.gradcheck(full_kl, case.leaves)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_any_chunk_gives_what_the_whole_gives_and_other_needs_keep_their_temperature(name: str) -> None:
    case, divergence = Case(**HEADS["all of it"]), DIVERGENCES[name]
    needs = ("full_kl", "logprobs", "entropy", "weighted_nll")

    def gradients(chunk: int) -> list[Tensor]:
        outputs = case.project(*needs, divergence=divergence, chunk=chunk)
        total = torch.stack([getattr(outputs, need).square().sum() for need in needs]).sum()
        return [total, *torch.autograd.grad(total, case.leaves)]

    whole = gradients(100)
    for chunk in (1, 3, 6, 9):  # chunks of 1, 1, 2 and 3 tokens
        for mine, other in zip(gradients(chunk), whole, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)
    expected = case.expected()
    parts = [case.expected_divergence(divergence), *(expected[need] for need in needs[1:])]
    torch.testing.assert_close(whole[0], torch.stack([part.square().sum() for part in parts]).sum())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_block_where_nothing_is_read_still_has_a_graph(name: str) -> None:
    case = Case(**HEADS["all of it"])
    nothing = torch.zeros(T, dtype=torch.bool)
    vector = case.project("full_kl", divergence=DIVERGENCES[name], reads=nothing).full_kl
    assert vector is not None and not vector.any()
    for gradient in torch.autograd.grad(vector.sum(), case.leaves):
        assert not gradient.any()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_model_is_not_away_from_itself(kind: str) -> None:
    """In float32, of 700 tokens whose probabilities run from 0.9 down to 1e-10: off by the rounding of sums only."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 8, generator=generator), torch.randn(700, 8, generator=generator) * 2
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    outputs = _projected(hidden, weight, Reference(hidden.detach().roll(1, 0), weight.detach(), Divergence(kind)))  # pyright: ignore[reportArgumentType]
    assert outputs.abs().max() < 2e-6
    for gradient in torch.autograd.grad(outputs.sum(), leaves):
        assert gradient.abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_models_that_exclude_each_others_tokens_stay_finite(kind: str) -> None:
    """Logits of +-1e4: p = (1, 0), q = (0, 1), the gap of log-probabilities is 2e4, the most a JSD can be is ln 2."""
    hidden = torch.ones(2, 1).requires_grad_()
    weight = torch.tensor([[1e4], [-1e4]]).requires_grad_()
    reference = Reference(torch.ones(2, 1), torch.tensor([[-1e4], [1e4]]), Divergence(kind))  # pyright: ignore[reportArgumentType]
    value = _projected(hidden, weight, reference).sum()
    assert value.item() == pytest.approx({"forward": 2e4, "reverse": 2e4, "jsd": 0.693147}[kind])
    gradient = torch.autograd.grad(value, weight)[0].flatten().tolist()
    # forward: p - q = (1, -1). reverse and jsd: p (r - mean) is 0 at both, a softmax that is sure cannot be moved.
    assert gradient == ([1.0, -1.0] if kind == "forward" else [0.0, 0.0])


def test_bfloat16_models_are_compared_in_float32() -> None:
    """What is lost is the rounding of both models' logits to bfloat16, nothing else."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight, other_hidden, other_weight = (
        torch.randn(n, 8, generator=generator).bfloat16() for n in (40, 700) * 2
    )
    ours = _projected(hidden, weight, Reference(other_hidden.roll(1, 0), other_weight, Divergence("forward")))[1:]
    log_p, log_q = (
        (h[:-1] @ w.t()).double().log_softmax(1) for h, w in ((hidden, weight), (other_hidden, other_weight))
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), (log_q.exp() * (log_q - log_p)).sum(1), rtol=1e-5, atol=1e-6)


def test_products_with_a_trained_and_with_a_frozen_head() -> None:
    """Trained: both models' logits twice, dH and dW. Frozen: both models' logits and dH, in the forward pass."""
    case, divergence = Case(), DIVERGENCES["jsd"]
    logits, gradient = 2 * len(READ) * V * (H + H + 1), 2 * len(READ) * V * H
    expected = case.expected_divergence(divergence).sum()
    for frozen, (forward, whole) in {
        False: (logits, 2 * logits + 2 * gradient),
        True: (logits + gradient, logits + gradient),
    }.items():
        case.weight.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            vector = case.project("full_kl", divergence=divergence).full_kl
            assert vector is not None and counter.get_total_flops() == forward
            (ours,) = torch.autograd.grad((vector * vector).sum(), case.hidden)
        assert counter.get_total_flops() == whole
        (theirs,) = torch.autograd.grad(case.expected_divergence(divergence).square().sum(), case.hidden)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(vector.sum(), expected)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            case.project("full_kl", divergence=divergence)
        assert counter.get_total_flops() == logits


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_neither_models_logits_are_ever_whole(kind: str) -> None:
    """60 tokens in chunks of 12: no tensor has more rows of the vocabulary than the buffers of 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(60, 4, generator=generator), torch.randn(997, 4, generator=generator)
    reference = Reference(hidden + 1, weight + 0.1, Divergence(kind))  # pyright: ignore[reportArgumentType]
    with _LargestTensor() as largest:
        _projected(hidden.requires_grad_(), weight.requires_grad_(), reference, chunk=12).sum().backward()
    assert largest.numel == BUFFERS * 4 * 997


def _projected(hidden: Tensor, weight: Tensor, reference: Reference, chunk: int = 256) -> Tensor:
    """[T] divergences of one document."""
    index = torch.arange(hidden.shape[0])
    outputs = project(
        hidden, weight, index, index > 0, frozenset({"full_kl"}), previous_T=index - 1, reference=reference, chunk=chunk
    )
    assert outputs.full_kl is not None
    return outputs.full_kl


class _LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trls_generalized_jsd_is_the_same(beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's beta of 0 is the forward KL, of 1 the reverse."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    kind = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
    divergence = Divergence(kind, beta=beta, temperature=temperature)  # pyright: ignore[reportArgumentType]
    case = Case()
    student, teacher = case.logits(), whole_logits(*case.teacher, 3.0, 0.9)[:, :V]
    theirs = trl.generalized_jsd_loss(student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum")
    ours = case.project("full_kl", divergence=divergence).full_kl
    assert ours is not None
    torch.testing.assert_close(ours.sum(), theirs, rtol=1e-12, atol=0)
    same_gradients(ours.sum(), theirs, case.leaves)
