"""The projection against plain full-logits arithmetic in float64, and against itself in other chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from burnish.model.head_chunks import Head
from burnish.model.project import VECTORS, Reference, previous_token, project
from burnish.types import Block, TokenOutputs, collate

T, H, V, K = 9, 5, 13, 3
PREVIOUS = torch.tensor([-1, 0, 1, 2, -1, 4, 5, 5, -1])  # documents 0..4 and 4..7; token 7 hangs on 5; padding
READS = torch.tensor([False, True, True, False, True, True, True, True, False])
READ = [1, 2, 5, 6, 7]  # token 4 is marked and has nothing before it: it is passed over

HEADS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "temperature and scale": {"temperature": 0.7, "logit_scale": 1.3},
    "all of it": {"softcap": 1.5, "temperature": 1.4, "logit_scale": 0.8, "with_bias": True, "vocab_size": 10},
}


class Case:
    """A small head in float64 whose logits exceed 1, so that a forgotten cap or scale shows."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, with_bias: bool = False, **head: float | int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.head = head
        self.vocab_size = int(head.get("vocab_size", V))
        self.hidden = draw(T, H).requires_grad_()
        self.weight = draw(V, H).requires_grad_()
        self.bias = draw(V).requires_grad_() if with_bias else None
        self.ids = torch.randint(self.vocab_size, (T,), generator=generator)
        self.topk_ids = torch.randint(self.vocab_size, (T, K), generator=generator)
        self.coefficients = draw(T)
        self.teacher = draw(T, H + 1), draw(V, H + 1)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])

    def reference(self, kind: str) -> Reference:
        return Reference(*self.teacher, kind=kind, softcap=3.0)  # pyright: ignore[reportArgumentType]

    def project(
        self, *needs: str, kind: str = "forward", chunk: int = 2, leaves: list[Tensor] | None = None
    ) -> TokenOutputs:
        hidden, weight, *bias = leaves or self.leaves
        return project(
            hidden, weight, self.ids, READS, frozenset(needs), previous_T=PREVIOUS, coefficients_T=self.coefficients,
            topk_ids_TK=self.topk_ids, reference=self.reference(kind), bias=bias[0] if bias else None, chunk=chunk,
            **self.head,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def expected(self, kind: str = "forward") -> dict[str, Tensor]:
        """The same by definition, from whole logits, at the tokens in READ."""

        def log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, scale: float) -> Tensor:
            z = hidden[PREVIOUS[READ]] @ weight.t() + (0 if bias is None else bias)
            z = scale * z
            z = cap * torch.tanh(z / cap) if cap else z
            return (z[:, : self.vocab_size] / self.head.get("temperature", 1.0)).log_softmax(1)

        log_p = log_softmax(
            self.hidden, self.weight, self.bias, self.head.get("softcap"), self.head.get("logit_scale", 1.0)
        )
        log_q = log_softmax(*self.teacher, None, 3.0, 1.0)
        logprobs = log_p.gather(1, self.ids[READ, None]).squeeze(1)
        kl = {"forward": log_q.exp() * (log_q - log_p), "reverse": log_p.exp() * (log_p - log_q)}[kind]
        return {
            "weighted_nll": -(self.coefficients[READ] * logprobs).sum(),
            "logprobs": logprobs,
            "entropy": -(log_p.exp() * log_p).sum(1),
            "topk_logprobs": log_p.gather(1, self.topk_ids[READ]),
            "full_kl": kl.sum(1),
        }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("need", sorted(VECTORS))
def test_vectors_and_their_gradients_are_those_of_whole_logits(need: str, kind: str, head: str) -> None:
    case = Case(**HEADS[head])
    vector = getattr(case.project(need, kind=kind), need)
    expected = case.expected(kind)[need]
    torch.testing.assert_close(vector[READ], expected, rtol=1e-12, atol=1e-13)
    assert not vector[[0, 3, 4, 8]].any()

    towards = torch.randn_like(expected)
    ours = torch.autograd.grad((vector[READ] * towards).sum(), case.leaves)
    theirs = torch.autograd.grad((expected * towards).sum(), case.leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize("need", sorted(VECTORS))
def test_gradcheck(need: str, kind: str) -> None:
    case = Case(**HEADS["all of it"])
    assert torch.autograd.gradcheck(
        lambda *leaves: getattr(case.project(need, kind=kind, leaves=list(leaves)), need), case.leaves
    )


@pytest.mark.parametrize("head", HEADS)
def test_weighted_nll_and_its_gradient_are_those_of_whole_logits(head: str) -> None:
    case = Case(**HEADS[head])
    total = case.project("weighted_nll").weighted_nll
    assert total is not None
    expected = case.expected()["weighted_nll"]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(total * 0.25, case.leaves)
    theirs = torch.autograd.grad(expected * 0.25, case.leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_every_need_in_one_pass_and_any_chunk(kind: str) -> None:
    needs = ("weighted_nll", *sorted(VECTORS))
    case = Case(**HEADS["all of it"])

    def gradients(chunk: int, needs: tuple[str, ...]) -> list[Tensor]:
        outputs = case.project(*needs, kind=kind, chunk=chunk)
        total = torch.stack([getattr(outputs, need).square().sum() for need in needs]).sum()
        return [total, *torch.autograd.grad(total, case.leaves)]

    whole = gradients(100, needs)
    alone = [gradients(100, (need,)) for need in needs]
    for index, value in enumerate(whole):
        torch.testing.assert_close(value, torch.stack([parts[index] for parts in alone]).sum(0), rtol=1e-12, atol=1e-13)
    for chunk in (1, 2, 3, 4):
        for mine, other in zip(gradients(chunk, needs), whole, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_nll_is_torchs_cross_entropy_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(300, 16, generator=generator), torch.randn(500, 16, generator=generator)
    ids = torch.randint(500, (300,), generator=generator)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    previous, reads = torch.arange(-1, 299), torch.ones(300, dtype=torch.bool)
    total = project(
        hidden,
        weight,
        ids,
        reads,
        frozenset({"weighted_nll"}),
        previous_T=previous,
        coefficients_T=torch.ones(300),
        chunk=64,
    ).weighted_nll
    assert total is not None
    expected = torch.nn.functional.cross_entropy(hidden[:-1] @ weight.t(), ids[1:], reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for mine, other in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
@pytest.mark.parametrize("need", ["weighted_nll", "logprobs"])
def test_no_gradient_is_computed_for_what_is_frozen(need: str, frozen: str) -> None:
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    other = case.hidden if frozen == "weight" else case.weight
    with FlopCounterMode(display=False) as counter:
        getattr(case.project(need), need).sum().backward()
    products = 2 if need == "weighted_nll" else 3  # logits (again in backward), and one gradient
    assert counter.get_total_flops() == products * 2 * len(READ) * H * V
    assert other.grad is not None and getattr(case, frozen).grad is None


def test_without_grad_the_head_runs_once() -> None:
    case = Case()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = case.project("weighted_nll")
        assert counter.get_total_flops() == 2 * len(READ) * H * V
        logprobs = case.project("logprobs").logprobs
    assert counter.get_total_flops() == 2 * 2 * len(READ) * H * V
    assert outputs.weighted_nll is not None and logprobs is not None
    torch.testing.assert_close(outputs.weighted_nll, -(case.coefficients * logprobs).sum())


@pytest.mark.parametrize("need", ["weighted_nll", *sorted(VECTORS)])
def test_a_block_where_nothing_is_read_still_has_a_graph(need: str) -> None:
    case = Case(**HEADS["all of it"])
    value = project(
        case.hidden, case.weight, case.ids, torch.zeros(T, dtype=torch.bool), frozenset({need}), previous_T=PREVIOUS,
        coefficients_T=case.coefficients, topk_ids_TK=case.topk_ids, reference=case.reference("forward"),
        bias=case.bias,
    )  # fmt: skip
    getattr(value, need).sum().backward()
    for leaf in case.leaves:
        assert leaf.grad is not None and not leaf.grad.any()
    assert not getattr(value, need).any()


def test_bfloat16_heads_reduce_in_float32() -> None:
    """What is lost is the rounding of the logits to bfloat16, nothing else: sums over V are float32."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 8, generator=generator).bfloat16() for n in (40, 700))
    ids = torch.randint(700, (40,), generator=generator)
    reads, previous = torch.arange(40) > 0, torch.arange(-1, 39)
    outputs = project(hidden, weight, ids, reads, frozenset({"logprobs", "weighted_nll"}), previous_T=previous,
                      coefficients_T=torch.ones(40), chunk=16)  # fmt: skip
    rounded = (hidden[:-1] @ weight.t()).double().log_softmax(1)
    expected = rounded.gather(1, ids[1:, None]).squeeze(1)
    assert outputs.logprobs is not None and outputs.weighted_nll is not None
    assert outputs.logprobs.dtype == outputs.weighted_nll.dtype == torch.float32
    torch.testing.assert_close(outputs.logprobs[1:].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs.weighted_nll.double(), -expected.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("need", ["weighted_nll", "logprobs"])
def test_bfloat16_head_gradients_add_up_over_chunks_in_float32(need: str) -> None:
    """400 equal tokens, one a chunk: summed in bfloat16 the gradient would stop growing after 256 of them."""
    hidden = torch.ones(401, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    ids, reads, previous = torch.zeros(401, dtype=torch.int64), torch.arange(401) > 0, torch.arange(-1, 400)
    outputs = project(hidden, weight, ids, reads, frozenset({need}), previous_T=previous,
                      coefficients_T=-torch.ones(401), chunk=1)  # fmt: skip
    gradient = torch.autograd.grad(getattr(outputs, need).sum(), weight)[0]
    assert gradient.dtype == torch.bfloat16
    assert gradient.flatten().tolist() == [200.0, -200.0]  # 400 * (1 - p), p = 1/2


def test_weighted_nll_refuses_a_second_backward() -> None:
    total = Case().project("weighted_nll").weighted_nll
    assert total is not None
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward"):
        total.backward()


def _block(documents: list[tuple[int, int, int, int]], length: int) -> Block:
    document_ids = torch.full((length,), -1)
    for index, (start, end, _, _) in enumerate(documents):
        document_ids[start:end] = index
    used = document_ids >= 0
    return Block(
        token_ids=torch.arange(length), loss_mask=used, position_ids=torch.zeros(length, dtype=torch.int64),
        document_ids=document_ids, documents=torch.tensor([*documents, (0, 0, 0, 0)], dtype=torch.int32),
        group_ids=torch.tensor([0] * len(documents) + [-1]), sample_ids=tuple(map(str, range(len(documents)))),
    )  # fmt: skip


def test_previous_token_of_documents_prefixes_and_padding() -> None:
    # a prompt 0..3 shared by the completions 3..5 and 5..8; a document of its own 8..10; padding 10..11
    block = _block([(0, 3, 0, 0), (3, 5, 0, 3), (5, 8, 0, 3), (8, 10, 0, 0)], 11)
    expected = [-1, 0, 1, 2, 3, 2, 5, 6, -1, 8, -1]
    assert previous_token(block).tolist() == expected
    shifted = [index + 11 if index >= 0 else -1 for index in expected]
    assert previous_token(collate([block, block])).tolist() == expected + shifted


def test_a_shared_prefix_reads_its_last_state_twice() -> None:
    """Both completions' first tokens are drawn from the prompt's last state, whose gradient is then the sum of two."""
    block = _block([(0, 3, 0, 0), (3, 5, 0, 3), (5, 8, 0, 3)], 8)
    hidden, weight = torch.randn(8, H).requires_grad_(), torch.randn(V, H)
    reads = torch.zeros(8, dtype=torch.bool)
    reads[[3, 5]] = True
    outputs = project(hidden, weight, block.token_ids, reads, frozenset({"logprobs"}), previous_T=previous_token(block))
    expected = (hidden[2] @ weight.t()).log_softmax(0)[[3, 5]]
    assert outputs.logprobs is not None
    torch.testing.assert_close(outputs.logprobs[[3, 5]], expected)
    ours, theirs = (torch.autograd.grad(total, hidden)[0] for total in (outputs.logprobs.sum(), expected.sum()))
    torch.testing.assert_close(ours, theirs)


def test_extreme_logits_stay_finite() -> None:
    """Logits of +-1e4: the target's probability underflows, its log-probability and gradient do not."""
    weight = torch.tensor([[1e4], [-1e4], [0.0]]).requires_grad_()
    hidden = torch.ones(2, 1).requires_grad_()
    ids, reads = torch.tensor([0, 1]), torch.tensor([False, True])
    for need in ("weighted_nll", "logprobs", "entropy"):
        value = getattr(
            project(
                hidden,
                weight,
                ids,
                reads,
                frozenset({need}),
                previous_T=torch.tensor([-1, 0]),
                coefficients_T=torch.ones(2),
            ),
            need,
        ).sum()
        expected = {"weighted_nll": 2e4, "logprobs": -2e4, "entropy": 0.0}[need]
        assert value.item() == expected
        gradient = torch.autograd.grad(value, weight)[0]
        sign = {"weighted_nll": 1.0, "logprobs": -1.0, "entropy": 0.0}[need]
        assert gradient.flatten().tolist() == [sign, -sign, 0.0]


def test_chunks_cover_every_token_once_and_are_even() -> None:
    for num_tokens, chunk in itertools.product((0, 1, 7, 256, 257, 410), (1, 3, 256)):
        slices = list(Head(V, None, 1.0, 1.0, chunk).slices(num_tokens))
        sizes = [s.stop - s.start for s in slices]
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(num_tokens))
        assert not sizes or (max(sizes) <= chunk and max(sizes) - min(sizes) <= 1)
