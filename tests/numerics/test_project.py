"""The projection against plain full-logits arithmetic in float64, and against itself in other chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from burnish.model.head_chunks import Head
from burnish.model.project import project
from burnish.types import Block, Ranking, collate, previous_token
from tests.projection_helpers import HEADS, READ, UNREAD, Case, H, T, V, same_gradients

VECTORS = ("candidate_logits", "entropy", "hidden_states", "logprobs", "topk_logprobs")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("need", VECTORS)
def test_vectors_and_their_gradients_are_those_of_whole_logits(need: str, head: str) -> None:
    case = Case(**HEADS[head])
    vector = getattr(case.project(need), need)
    expected = case.expected()[need]
    torch.testing.assert_close(vector[READ], expected, rtol=1e-12, atol=1e-13)
    assert not vector[UNREAD].any()

    towards = torch.randn_like(expected)
    same_gradients((vector[READ] * towards).sum(), (expected * towards).sum(), case.leaves)


@pytest.mark.parametrize("need", VECTORS)
def test_gradcheck(need: str) -> None:
    case = Case(**HEADS["all of it"])
    leaves = case.leaves[:1] if need == "hidden_states" else case.leaves
    assert torch.autograd.gradcheck(
        lambda *moved: getattr(case.project(need, leaves=[*moved, *case.leaves[len(moved) :]]), need), leaves
    )


@pytest.mark.parametrize("head", HEADS)
def test_weighted_nll_and_its_gradient_are_those_of_whole_logits(head: str) -> None:
    case = Case(**HEADS[head])
    total = case.project("weighted_nll").weighted_nll
    assert total is not None
    expected = case.expected()["weighted_nll"]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    same_gradients(total * 0.25, expected * 0.25, case.leaves)


def test_every_need_in_one_pass_and_any_chunk() -> None:
    needs = ("weighted_nll", *VECTORS)
    case = Case(**HEADS["all of it"])

    def gradients(chunk: int, needs: tuple[str, ...]) -> list[Tensor]:
        outputs = case.project(*needs, chunk=chunk)
        total = torch.stack([getattr(outputs, need).square().sum() for need in needs]).sum()
        return [total, *torch.autograd.grad(total, case.leaves, materialize_grads=True)]

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


@pytest.mark.parametrize("need", ["weighted_nll", *VECTORS])
def test_a_block_where_nothing_is_read_still_has_a_graph(need: str) -> None:
    case = Case(**HEADS["all of it"])
    value = getattr(case.project(need, reads=torch.zeros(T, dtype=torch.bool)), need)
    leaves = case.leaves[:1] if need == "hidden_states" else case.leaves
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert not gradient.any()
    assert not value.any()


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


def test_bfloat16_candidates_of_one_id_add_up_in_float32() -> None:
    """400 tokens of one id: its row's gradient adds up 400 states of 1, which bfloat16 would end at 256."""
    hidden = torch.ones(401, 1, dtype=torch.bfloat16)
    weight = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    ids, reads, previous = torch.zeros(401, dtype=torch.int64), torch.arange(401) > 0, torch.arange(-1, 400)
    outputs = project(hidden, weight, ids, reads, frozenset({"candidate_logits"}), previous_T=previous,
                      candidates_K=torch.tensor([2, 2]))  # fmt: skip
    assert outputs.candidate_logits is not None and outputs.candidate_logits.dtype == torch.float32
    gradient = torch.autograd.grad(outputs.candidate_logits.sum(), weight)[0]
    assert gradient.flatten().tolist() == [400.0, 0.0, 800.0]


RANKED = torch.tensor(
    [[3.0], [1.0], [2.0], [2.0], [0.0], [9.0]]
)  # logits of ids 0..5 where the state is 1; 5 is padding


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        # token 1 is id 2: above it id 0; id 3 ties. Token 2 is id 1: above it 0, 2, 3. Token 4 is id 4: the last of 5.
        (Ranking(), [0, 1.5, 3, 0, 4, 0]),
        # the same without what stood before: token 1 has seen 0; token 2 has seen 0 and 2; token 4 has seen 3.
        (Ranking(exclude_seen=True), [0, 0.5, 1, 0, 3, 0]),
        # only 1, 2 and 3 compete, and a token's own id always does: token 4 stands below all three.
        (Ranking(among=torch.tensor([False, True, True, True, False, True])), [0, 0.5, 2, 0, 3, 0]),
        (Ranking(torch.tensor([False, True, True, True, False, True]), True), [0, 0.5, 1, 0, 2, 0]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 256])
def test_ranks_count_what_is_likelier_and_half_of_what_ties(
    ranking: Ranking, expected: list[float], chunk: int
) -> None:
    block = _block([(0, 3, 0, 0), (3, 5, 0, 0)], 6)  # ids 0 2 1 | 3 4
    block.token_ids = torch.tensor([0, 2, 1, 3, 4, 0])
    outputs = project(
        torch.ones(6, 1), RANKED, block.token_ids, block.loss_mask, frozenset({"ranks"}), ranking=ranking, block=block,
        previous_T=previous_token(block), vocab_size=5, chunk=chunk,
    )  # fmt: skip
    assert outputs.ranks is not None and outputs.ranks.tolist() == expected


def test_a_token_that_comes_again_is_ranked_and_a_shared_prefix_counts_as_seen() -> None:
    # prompt ids 0 2, completion ids 3 2: token 2 (id 3) has seen 0 and 2, none is left above it; token 3 is id 2 again,
    # which stays in the running: 0 is seen, 3 (which ties) is seen, nothing is above.
    block = _block([(0, 2, 0, 0), (2, 4, 0, 2)], 4)
    block.token_ids = torch.tensor([0, 2, 3, 2])
    outputs = project(
        torch.ones(4, 1), RANKED, block.token_ids, block.loss_mask, frozenset({"ranks"}), block=block,
        ranking=Ranking(exclude_seen=True), previous_T=previous_token(block), vocab_size=5,
    )  # fmt: skip
    assert outputs.ranks is not None and outputs.ranks.tolist() == [0, 0.5, 0, 0]


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
