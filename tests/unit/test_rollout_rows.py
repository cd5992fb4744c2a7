"""Groups of rollouts as packed rows: every sampled token once, at its place, on one rank."""

from __future__ import annotations

import pytest
import torch

from burnish.mesh_config import Sizes
from burnish.rollouts import Prompt, Rollout, RolloutGroup
from burnish.workflows.rollout_rows import Batch, Layout
from tests.rank_helpers import ThreadMesh, on_ranks


class Share:
    """What packing needs of a mesh: one share of the data, of as many as there are ranks."""

    def __init__(self, mesh: ThreadMesh | None = None) -> None:
        self.mesh, self.data_rank = mesh, 0 if mesh is None else mesh.rank
        self.sizes = Sizes(1, 1 if mesh is None else mesh.world_size, 1, 1)

    def gather_tensor(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self.mesh is None:
            return [tensor]
        return [torch.tensor(each, dtype=tensor.dtype) for each in self.mesh.gather(tensor.tolist())]


def group(index: int, prompt: list[int], completions: list[list[int]], cut: tuple[int, ...] = ()) -> RolloutGroup:
    rollouts = tuple(
        Rollout(
            token_ids=prompt + said,
            loss_mask=[False] * len(prompt) + [True] * len(said),
            logprobs=[0.0] * len(prompt) + [-0.1 * token for token in said],
            versions=[-1] * len(prompt) + [2] * len(said),
            num_prompt=len(prompt),
            said="",
            terms={},
            reward=float(i),
            finish_reason="length" if i in cut else "stop",
        )
        for i, said in enumerate(completions)
    )
    return RolloutGroup(Prompt(index, f"rows.jsonl:{index}", prompt, ""), rollouts, 2)


GROUPS = [group(0, [7, 8, 9], [[11, 12], [13]]), group(1, [5], [[21, 22, 23], []], cut=(0,))]
"""Sampled tokens in order: 11 12, 13, 21 22 23; the last rollout is empty."""


def sampled(blocks: list) -> list[list[int]]:
    return [block.token_ids[block.loss_mask].tolist() for block in blocks]


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        (Layout(16, share_prompts=True, one_a_row=False), [[11, 12, 13, 21, 22, 23]]),
        (Layout(16, share_prompts=False, one_a_row=False), [[11, 12, 13, 21, 22, 23]]),
        (Layout(8, share_prompts=True, one_a_row=False), [[11, 12, 13], [21, 22, 23]]),
        (Layout(8, share_prompts=False, one_a_row=True), [[11, 12], [13], [21, 22, 23]]),
    ],
)
def test_every_sampled_token_is_in_one_row_however_they_are_laid(layout, rows):
    batch = Batch(GROUPS, layout, Share(), version=3)
    assert sorted(map(sorted, sampled(batch.blocks))) == sorted(map(sorted, rows))
    for block in batch.blocks:
        expected = torch.where(block.loss_mask, -0.1 * block.token_ids, 0.0)
        assert torch.allclose(block.columns["rollout_logprobs"], expected)


def test_a_vector_over_sampled_tokens_goes_into_rows_and_comes_back():
    batch = Batch(GROUPS, Layout(8, share_prompts=True, one_a_row=False), Share(), version=3)
    assert batch.num_tokens == 6
    values = torch.tensor([1.5, 2.5, 3.5, 4.5, 5.5, 6.5], dtype=torch.float64)
    batch.write("advantages", values)
    by_token = {
        token: value
        for block in batch.blocks
        for token, value in zip(
            block.token_ids[block.loss_mask].tolist(),
            block.columns["advantages"][block.loss_mask].tolist(),
            strict=True,
        )
    }
    assert by_token == {11: 1.5, 12: 2.5, 13: 3.5, 21: 4.5, 22: 5.5, 23: 6.5}
    assert all(float(block.columns["advantages"][~block.loss_mask].abs().sum()) == 0.0 for block in batch.blocks)
    assert torch.equal(batch.read_column("advantages"), values)
    assert batch.advantage_of(batch.rollouts[0]) == 2.0
    assert batch.advantage_of(batch.rollouts[3]) is None


def test_a_shared_prompt_stands_once_before_its_rollouts():
    (block,) = Batch([GROUPS[0]], Layout(8, share_prompts=True, one_a_row=False), Share(), version=3).blocks
    assert block.token_ids[:6].tolist() == [7, 8, 9, 11, 12, 13]
    assert block.documents[:3].tolist() == [[0, 3, 0, 0], [3, 5, 0, 3], [5, 6, 0, 3]]
    assert block.position_ids[:6].tolist() == [0, 1, 2, 3, 4, 3]
    assert block.columns["lag"][:3].tolist() == [1.0, 1.0, 1.0]


def test_rollouts_of_a_long_group_stand_behind_copies_of_their_prompt():
    long = group(0, [7, 8, 9], [[11, 12], [13, 14], [15, 16]])
    batch = Batch([long], Layout(8, share_prompts=True, one_a_row=False), Share(), version=3)
    assert sampled(batch.blocks) == [[11, 12, 13, 14], [15, 16]]
    assert [block.token_ids[:3].tolist() for block in batch.blocks] == [[7, 8, 9]] * 2


def test_minibatches_split_the_prompts_and_truncated_rollouts_may_be_left_out():
    layout = Layout(8, share_prompts=True, one_a_row=False)
    batch = Batch(GROUPS, layout, Share(), version=3, num_minibatches=2)
    assert [sampled(blocks) for blocks in batch.minibatches] == [[[11, 12, 13]], [[21, 22, 23]]]
    assert [batch.num_trained(number) for number in range(2)] == [3, 3]
    batch.leave_out_truncated()
    assert [sampled(blocks) for blocks in batch.minibatches] == [[[11, 12, 13]], [[]]]
    assert [batch.num_trained(number) for number in range(2)] == [3, 0]
    assert batch.read_column("rollout_logprobs")[3:].tolist() == pytest.approx([-2.1, -2.2, -2.3])  # known all the same
    assert batch.scored().rewards.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert batch.scored().lengths.tolist() == [2, 1, 3, 0]


def test_ranks_share_the_rows_and_all_know_every_token():
    layout = Layout(8, share_prompts=False, one_a_row=True)
    values = torch.arange(6, dtype=torch.float64)

    def work(mesh: ThreadMesh) -> tuple[list[int], torch.Tensor]:
        batch = Batch(GROUPS, layout, Share(mesh), version=3)
        assert len(batch.blocks) == 2  # three rows and a spare one
        batch.write("advantages", values)
        return [token for row in sampled(batch.blocks) for token in row], batch.read_column("advantages")

    (first, one), (second, other) = on_ranks(2, work)
    assert sorted(first + second) == [11, 12, 13, 21, 22, 23] and first and second
    assert torch.equal(one, values) and torch.equal(other, values)
