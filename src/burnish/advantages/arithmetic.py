"""Arithmetic over groups, rollouts and their tokens. Float64 throughout; knows no estimator."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.advantages.base import Scored


def of_rollouts(scored: Scored) -> Tensor:
    """[N]: each rollout's reward, less the penalties of all its tokens."""
    rewards = scored.rewards.double()
    if scored.penalties is None:
        return rewards
    return rewards - rewards.new_zeros(len(rewards)).index_add(0, owners(scored), scored.penalties.double())


def of_tokens(scored: Scored, rewards_N: Tensor) -> Tensor:
    """[A]: minus each token's penalty, and at a rollout's last token its reward. One without tokens gives nothing."""
    penalties = scored.penalties
    tokens = rewards_N.new_zeros(int(scored.lengths.sum())) if penalties is None else -penalties.double()
    has_tokens = scored.lengths > 0
    return tokens.index_add(0, (scored.lengths.cumsum(0) - 1)[has_tokens], rewards_N.double()[has_tokens])


def owners(scored: Scored) -> Tensor:
    """int64 [A]: which rollout each token is of."""
    import torch

    return torch.arange(len(scored.lengths)).repeat_interleave(scored.lengths)


def less_group_mean(values_N: Tensor, groups_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N] each: every value less its group's mean, exactly 0 where all of a group are equal; the number of its group;
    and the sum of the squares of its group's differences.

    >>> less_group_mean([1., 0., 2., 2.], [0, 0, 1, 1])
    ([.5, -.5, 0., 0.], [2, 2, 2, 2], [.5, .5, 0., 0.])
    """
    import torch

    _, group, number = torch.unique(groups_N, return_inverse=True, return_counts=True)
    lowest = values_N.new_zeros(len(number)).scatter_reduce(0, group, values_N, "amin", include_self=False)
    above = values_N - lowest[group]  # from there on equal values are zeros, and so is whatever is made of them
    centred = above - _sums(above, group, len(number))[group] / number[group]
    return centred, number[group], _sums(centred**2, group, len(number))[group]


def discounted(values_A: Tensor, lengths_N: Tensor, factor: float) -> Tensor:
    """[A]: x_t = values_t + factor x_(t + 1) within each rollout, 0 behind its last token.

    >>> discounted([1., 1., 1., 8.], [3, 1], 0.5)
    [1.75, 1.5, 1., 8.]
    """
    import torch

    if not len(values_A):
        return values_A
    inside = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    found = values_A.new_zeros(inside.shape)
    found[inside] = values_A
    for t in range(inside.shape[1] - 2, -1, -1):
        found[:, t] += factor * found[:, t + 1]  # behind a rollout's end stand zeros
    return found[inside]


def whitened(values_A: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-8) over all tokens, by the unbiased standard deviation; 0 where all are equal."""
    if len(values_A) < 2:
        return values_A * 0
    above = values_A - values_A.min()
    centred = above - above.mean()
    return centred / ((centred**2).sum().div(len(values_A) - 1).sqrt() + 1e-8)


def _sums(values_N: Tensor, group_N: Tensor, number: int) -> Tensor:
    return values_N.new_zeros(number).index_add(0, group_N, values_N)
