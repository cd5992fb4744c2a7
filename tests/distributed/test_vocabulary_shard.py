"""A head whose rows lie on two ranks makes what it makes on one, without all logits on either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.mesh import Mesh, open_mesh
from burnish.mesh_config import MeshConfig
from burnish.model.project import project
from burnish.model.vocabulary_shard import WHOLE, VocabularyShard
from burnish.types import Divergence, Ranking
from tests.policy_model_helpers import pack
from tests.projection_helpers import HEADS, PREVIOUS, READS, Case
from tests.ranks import run_ranks

ROWS = 14
"""Of the head, of which 13 or 10 stand for tokens: the second rank has padding."""
DIVERGENCES = {kind: Divergence(kind, 0.3, 1.7) for kind in ("forward", "reverse", "jsd")}
NEEDS = (
    "weighted_nll",
    "logprobs",
    "entropy",
    "topk_logprobs",
    "candidate_logits",
    "hidden_states",
    "ranks",
    *DIVERGENCES,
)


def projected(head: str, needs: str, mesh: Mesh | None = None, *, frozen: bool = False) -> tuple[Tensor, list[Tensor]]:
    """An output of the projection, and of a number that hangs on all of it the gradients in hidden states, weight and
    bias; with half of the rows here if there is a mesh.

    Args:
        frozen: the head does not train.
    """
    case = Case(**HEADS[head])  # pyright: ignore[reportArgumentType]
    rank = 0 if mesh is None else mesh.axis_rank("tp")
    rows = slice(0, ROWS) if mesh is None else slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    padded = [nn.functional.pad(leaf.detach(), (0, 0) * (leaf.ndim - 1) + (0, 1))[rows] for leaf in case.leaves[1:]]
    leaves = [case.hidden, *(leaf.clone().requires_grad_(not frozen) for leaf in padded)]
    divergence = DIVERGENCES.get(needs)
    name = needs if divergence is None else "full_kl"
    block = pack([[0] * 4, [0] * 4], len(PREVIOUS))
    output: Tensor = getattr(
        project(
            leaves[0],
            leaves[1],
            case.ids,
            READS,
            frozenset({name}),
            previous_T=PREVIOUS,
            coefficients_T=case.coefficients,
            topk_ids_TK=case.topk_ids,
            candidates_K=case.candidates,
            reference=None if divergence is None else of_rows(case, divergence, rows),
            ranking=Ranking(among=torch.arange(13) != 3, exclude_seen=True),
            block=replace(block, token_ids=case.ids),
            bias=leaves[2] if len(leaves) > 2 else None,
            chunk=2,
            shard=WHOLE if mesh is None else VocabularyShard(rows.start, mesh.tp_group),
            **{"vocab_size": 13} | case.head,  # pyright: ignore[reportArgumentType]
        ),
        name,
    )
    if not output.requires_grad:
        return output, []
    weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad((output * weights).sum(), trained, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(trained, gradients, strict=True)]
    if mesh is not None:
        gradients[1:] = [of_both(gradient, mesh) for gradient in gradients[1:]]
    return output.detach(), gradients


def of_rows(case: Case, divergence: Divergence, rows: slice) -> Any:
    """The second model with some of its head's rows."""
    reference = case.reference(divergence)
    assert reference.bias is not None
    return replace(reference, weight_VH=reference.weight_VH[rows], bias=reference.bias[rows])


def of_both(part: Tensor, mesh: Mesh) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part, group=mesh.tp_group)
    return torch.cat(parts)


def chosen(shard: VocabularyShard, z: Tensor) -> tuple[Tensor, ...]:
    """Seven of ten entries, more than either rank has, and what the softmax divides by."""
    return *shard.topk(z, 7), shard.logsumexp(z)


LOGITS = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))


def one_of_two(rank: int, folder: str) -> None:
    with open_mesh("cpu", MeshConfig(tp=2)) as mesh:
        found: dict[Any, Any] = {(head, needs): projected(head, needs, mesh) for head in HEADS for needs in NEEDS}
        found |= {("frozen", needs): projected("all of it", needs, mesh, frozen=True) for needs in NEEDS}
        shard = VocabularyShard(6 * rank, mesh.tp_group)
        found["chosen"] = chosen(shard, LOGITS[:, :6] if rank == 0 else LOGITS[:, 6:])
        found["other rows"] = refusal(mesh)
        torch.save(found, Path(folder) / f"{rank}.pt")
        mesh.barrier()


def refusal(mesh: Mesh) -> str:
    """What a second model is told whose rows on a rank are not those of the policy."""
    case = Case()
    reference = of_rows(case, DIVERGENCES["forward"], slice(0, 8))
    with pytest.raises(ModelError) as error:
        project(
            case.hidden, case.weight[:6], case.ids, READS, frozenset({"full_kl"}), previous_T=PREVIOUS, vocab_size=12,
            reference=reference, shard=VocabularyShard(6 * mesh.rank, mesh.tp_group),
        )  # fmt: skip
    return str(error.value)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("two-ranks")
    run_ranks(2, one_of_two, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("head", [*HEADS, "frozen"])
def test_outputs_and_gradients_are_those_of_one_rank(head: str, needs: str, two_ranks: list[dict[Any, Any]]) -> None:
    name = "all of it" if head == "frozen" else head
    expected, expected_gradients = projected(name, needs, frozen=head == "frozen")
    assert len(expected_gradients) == (0 if needs == "ranks" else {"frozen": 1, "all of it": 3}.get(head, 2))
    for found in two_ranks:
        output, gradients = found[head, needs]
        assert output.abs().max() > 0.1
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_likeliest_tokens_are_found_over_both_ranks(two_ranks: list[dict[Any, Any]]) -> None:
    for found in two_ranks:
        values, ids, log_sums = found["chosen"]
        expected = LOGITS.topk(7)
        assert torch.equal(values, expected.values)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(log_sums, LOGITS.logsumexp(1, keepdim=True))


def test_a_second_model_with_other_rows_on_a_rank_is_refused(two_ranks: list[dict[Any, Any]]) -> None:
    assert "6 rows on each rank and the second model's 8" in two_ranks[0]["other rows"]
    assert "pad_vocab_to" in two_ranks[1]["other rows"]
