"""Embeddings of packed rows, and gradient caching: the gradient of a whole step's in-batch loss, cut in any way.

Gradients are compared in float64, on a GPT-NeoX: the norm of a Llama computes in float32 whatever it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from burnish.losses.base import Loss
from burnish.losses.info_nce import InfoNCE
from burnish.mesh import Mesh, open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.parallel import prepare
from burnish.model.policy_model import PolicyModel
from burnish.policy.policy import Policy, local
from burnish.types import Block, LossOutput, Metric, TokenOutputs, collate
from burnish.workflows.embedding import CachedGradient, Embedding
from tests.embedding_helpers import pack_groups
from tests.policy_model_helpers import largest_difference, random_documents
from tests.tiny_models import VOCAB_SIZE, tiny_model

LENGTHS = [[3, 5], [2, 7, 4], [6, 1], [4, 4], [1, 2, 3, 2], [5, 6], [2, 2]]
ROLES = [0, 1, 2, 2]
TOKENS = iter(random_documents([length for group in LENGTHS for length in group], VOCAB_SIZE))
GROUPS = [[(role, next(TOKENS)) for role, _ in zip(ROLES, group, strict=False)] for group in LENGTHS]
HEADS: list[dict[str, Any]] = [
    {"type": "embedding", "pooling": pooling, "normalize": normalised, "dimensions": dimensions}
    for pooling, normalised, dimensions in (("mean", True, None), ("last", True, 7), ("mean", False, 5))
]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


def rows(*sizes: int, row_length: int = 24, max_documents: int = 12) -> list[Block]:
    """The seven groups in order, `sizes` of them to a row."""
    groups = iter(GROUPS)
    packed = [pack_groups([next(groups) for _ in range(size)], row_length, max_documents) for size in sizes]
    assert next(groups, None) is None
    return packed


def policy(
    mesh: Mesh,
    head: dict[str, Any],
    *,
    family: str = "llama",
    micro_batch_size: int = 1,
    lora: LoRA | None = None,
    dtype: str = "float32",
) -> Policy:
    model = PolicyModel.from_hf(tiny_model(family))
    config = {"path": "tiny", "head": head, "adapter": lora, "dtype": dtype}
    prepare(model, ModelConfig.model_validate(config), mesh, seed=0)
    optimizer = torch.optim.SGD([{"params": [p for _, p in model.trainable_parameters()], "lr_scale": 1.0}], lr=1.0)
    return Policy(model, optimizer, mesh=mesh, micro_batch_size=micro_batch_size, max_grad_norm=None)


def double(mesh: Mesh, head: dict[str, Any], *, micro_batch_size: int = 1) -> Policy:
    made = policy(mesh, head, family="gpt_neox", micro_batch_size=micro_batch_size)
    made.model.double()
    return made


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.model.trainable_parameters() if p.grad is not None}


def used(vectors: list[Tensor], blocks: list[Block]) -> Tensor:
    return torch.cat([v[: block.num_documents] for v, block in zip(vectors, blocks, strict=True)])


def step(policy: Policy, blocks: list[Block], loss: Loss) -> dict[str, Metric]:
    """What `Embedding.run` does with a step."""
    workflow = Embedding(loss=loss)
    metrics, found = workflow.cached(policy, policy.embeddings(blocks, training=True), blocks)
    cached = [
        replace(block, columns=block.columns | {"embedding_gradient": gradient})
        for block, gradient in zip(blocks, found, strict=True)
    ]
    policy.forward_backward(cached, CachedGradient(of=loss))
    return metrics


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_embeddings_are_pooled_hidden_states_of_plain_transformers(mesh: Mesh, head: dict[str, Any]) -> None:
    made, plain = policy(mesh, head, micro_batch_size=2), tiny_model("llama")
    blocks = rows(2, 2, 2, 1)
    found = made.embeddings(blocks)
    expected = []
    for _, tokens in (document for group in GROUPS for document in group):
        with torch.no_grad():
            states = plain.model(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
        vector = states[-1] if head["pooling"] == "last" else states.mean(0)
        if head["dimensions"]:
            vector = dict(made.model.named_parameters())["embedding.weight"].detach() @ vector
        expected.append(vector / vector.norm() if head["normalize"] else vector)
    torch.testing.assert_close(used(found, blocks), torch.stack(expected), rtol=0, atol=2e-6)
    for vectors, block in zip(found, blocks, strict=True):
        assert vectors.dtype == torch.float32
        assert not vectors[block.num_documents :].any()


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_packed_is_one_by_one(mesh: Mesh, head: dict[str, Any]) -> None:
    """In value, and in the gradient of a sum of all vectors by fixed weights."""
    found = []
    one_a_row = [pack_groups([[document]], len(document[1])) for group in GROUPS for document in group]
    for blocks in (rows(2, 2, 2, 1), one_a_row):
        made = double(mesh, head)
        vectors = [
            made.model(block, needs=frozenset({"embeddings"}), reads=block.loss_mask).embeddings for block in blocks
        ]
        vectors = used(vectors, blocks)
        weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (vectors * weights).sum().backward()
        found.append((vectors.detach(), gradients(made)))
    (packed, packed_gradients), (alone, alone_gradients) = found
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-13)
    difference, name = largest_difference(packed_gradients, alone_gradients)
    assert difference < 1e-12, name


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_caching_is_autograd_of_the_whole_step(mesh: Mesh, head: dict[str, Any], symmetric: bool) -> None:
    loss = InfoNCE(temperature=0.2 if head["normalize"] else 2.0, symmetric=symmetric)
    whole = double(mesh, head)
    batch = collate(rows(2, 2, 2, 1))
    vectors = whole.model(batch, needs=loss.needs, reads=loss.reads(batch)).embeddings
    expected = loss(TokenOutputs(embeddings=vectors), batch).total / 7
    expected.backward()
    for micro_batch_size, blocks in [
        (1, rows(2, 2, 2, 1)),
        (2, rows(2, 2, 2, 1)),
        (4, rows(2, 2, 2, 1)),
        (3, rows(1, 1, 1, 1, 1, 1, 1, row_length=16)),
        (1, rows(7, row_length=64, max_documents=20)),
    ]:
        cached = double(mesh, head, micro_batch_size=micro_batch_size)
        total, count = step(cached, blocks, loss)["loss"]
        assert count == 7
        assert total / count == pytest.approx(expected.item(), rel=1e-12)
        difference, name = largest_difference(gradients(cached), gradients(whole))
        assert difference < 1e-12, (name, micro_batch_size, len(blocks))


def test_the_naive_way_would_depend_on_the_micro_batch(mesh: Mesh) -> None:
    """What the workflow is for: a loss that sees a micro-batch at a time has other negatives, and another gradient."""
    found = []
    for micro_batch_size in (1, 4):
        naive = policy(mesh, HEADS[0], micro_batch_size=micro_batch_size)
        naive.forward_backward(rows(2, 2, 2, 1), InfoNCE())
        found.append(gradients(naive))
    assert largest_difference(*found)[0] > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_passes_drop_the_same_units(mesh: Mesh, dtype: str) -> None:
    """Dropout of a half: vectors of two passes differ by tenths unless their random numbers are the same."""
    lora = LoRA(r=4, lora_alpha=64, lora_dropout=0.5)
    trained = policy(mesh, HEADS[1], micro_batch_size=2, lora=lora, dtype=dtype)
    for name, parameter in trained.model.trainable_parameters():
        if "lora_B" in name:
            local(parameter.data).normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    blocks = rows(2, 2, 2, 1)
    torch.manual_seed(5)
    first = used(trained.embeddings(blocks, training=True), blocks)
    recorder = Recorder()
    trained.forward_backward(blocks, recorder)
    assert torch.equal(torch.cat(recorder.seen), first)
    again = used(trained.embeddings(blocks, training=True), blocks)
    assert (again - first).abs().max() > 0.1
    assert torch.equal(used(trained.embeddings(blocks), blocks), used(trained.embeddings(blocks), blocks))


class Recorder(Loss):
    """Keeps the vectors that a training pass made."""

    type: str = "recorder"
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})
    seen: list[Any] = []

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.embeddings is not None
        self.seen.append(outputs.embeddings.detach()[block.documents[:, 1] > 0])
        return LossOutput(outputs.embeddings.sum(), {})


class Two(Loss):
    """Terms that are counted differently: InfoNCE by positive, and the length of all vectors by document."""

    type: Literal["two"] = "two"
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})

    def count(self, block: Block) -> Tensor:
        return torch.stack([InfoNCE().count(block), (block.documents[:, 1] > 0).sum()])

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.embeddings is not None
        contrast = InfoNCE(temperature=2.0)(outputs, block).total
        return LossOutput(torch.stack([contrast, outputs.embeddings.square().sum()]), {})


def test_a_sum_of_losses_is_divided_term_by_term(mesh: Mesh) -> None:
    whole, cached = (double(mesh, HEADS[2], micro_batch_size=n) for n in (4, 1))
    batch = collate(rows(2, 2, 2, 1))
    vectors = whole.model(batch, needs=Two.needs, reads=batch.loss_mask).embeddings
    contrast, length = Two()(TokenOutputs(embeddings=vectors), batch).total
    (contrast / 7 + length / 17).backward()
    metrics = step(cached, rows(2, 2, 2, 1), Two())
    assert metrics == {"loss": (pytest.approx((contrast / 7 + length / 17).item(), rel=1e-12), 1.0)}
    difference, name = largest_difference(gradients(cached), gradients(whole))
    assert difference < 1e-12, name


def test_new_weights_depend_on_seed_and_name_alone() -> None:
    config = tiny_model("llama").config
    head = ModelConfig.model_validate({"path": "tiny", "head": HEADS[1]}).head
    torch.manual_seed(1)
    first, again = head.open(config, name="embedding", seed=0), head.open(config, name="embedding", seed=0)
    other = head.open(config, name="embedding", seed=1)
    assert first is not None and again is not None and other is not None
    one, two, three = (dict(module.named_parameters())["weight"] for module in (first, again, other))
    assert one.shape == (7, 32)
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert one.abs().max() <= 32**-0.5  # uniform in +-1/sqrt(H)


def test_a_corpus_of_held_out_rows_is_measured_whole(mesh: Mesh) -> None:
    """Four rows by two at a time: the loss is of pairs of rows, the ranking of all of them."""
    made, workflow = policy(mesh, HEADS[0]), Embedding(top_k=[1, 3])
    blocks = rows(2, 2, 2, 1)
    metrics = workflow.measure(made, 2, iter(blocks))
    vectors = made.embeddings(blocks)
    totals = [
        InfoNCE()(TokenOutputs(embeddings=torch.cat(vectors[i : i + 2])), collate(blocks[i : i + 2])).total.item()
        for i in (0, 2)
    ]
    assert metrics["loss"] == (pytest.approx(sum(totals), rel=1e-6), 7)
    documents = normalize(used(vectors, blocks), dim=1)
    is_query = torch.tensor([role == 0 for group in GROUPS for role, _ in group])
    is_positive = torch.tensor([role == 1 for group in GROUPS for role, _ in group])
    scores = documents[is_query] @ documents[~is_query].T
    own = scores.gather(1, torch.nonzero(is_positive[~is_query]))
    rank = (scores > own).sum(1) + 1
    assert metrics["recall@3"] == ((rank <= 3).sum().item(), 7)
    assert metrics["mrr"] == (pytest.approx((1 / rank).sum().item()), 7)
    assert 1 < (rank <= 3).sum() < 7
