"""Rollouts with everything that losses on sampled tokens read of them, and ways to lay them into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from burnish.data.packing.layout import empty_block, layout
from burnish.types import Block, Group, Sample

ROW, DOCUMENTS = 64, 12


@dataclass(frozen=True)
class Episode:
    """A prompt and what follows it: sampled tokens, and others between two turns."""

    prompt: list[int]
    said: list[int]
    sampled: list[bool]
    """Which of `said` the policy drew."""
    columns: dict[str, list[float]]
    """Of each of `said`; what stands at tokens that were not sampled must not matter."""

    @property
    def mask(self) -> Tensor:
        return torch.tensor(self.sampled)

    def column(self, name: str) -> Tensor:
        """float64, of the sampled tokens."""
        return torch.tensor(self.columns[name], dtype=torch.float64)[self.mask]


def episodes(
    shapes: Sequence[tuple[int, Sequence[Sequence[int]]]],
    vocab_size: int,
    logprobs_of: Callable[[list[int], list[int]], Tensor],
    seed: int = 0,
) -> list[list[Episode]]:
    """Groups of episodes.

    Args:
        shapes: of each group: length of its prompt, then for each episode lengths of turns, alternately sampled and
            not.
        logprobs_of: log-probabilities of what was said after a prompt; those of the other policies are near them.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    groups = []
    for num_prompt, turns in shapes:
        prompt = torch.randint(3, vocab_size, (num_prompt,), generator=generator).tolist()
        group = []
        for lengths in turns:
            sampled = [i % 2 == 0 for i, length in enumerate(lengths) for _ in range(length)]
            said = torch.randint(3, vocab_size, (len(sampled),), generator=generator).tolist()
            logprobs = logprobs_of(prompt, said).double()
            columns = {
                "advantages": noise(logprobs, 1.0),
                "old_logprobs": logprobs + noise(logprobs, 0.3),
                "rollout_logprobs": logprobs + noise(logprobs, 0.3),
                "ref_logprobs": logprobs + noise(logprobs, 0.5),
                "returns": noise(logprobs, 1.0),
                "old_values": noise(logprobs, 0.3),
            }
            rounded = {name: values.float().tolist() for name, values in columns.items()}
            group.append(Episode(prompt, said, sampled, rounded))
        groups.append(group)
    return groups


def row(groups: Sequence[Sequence[Episode]], *, shared: bool, without: Sequence[str] = ()) -> Block:
    """A row of episodes, with their prompt once for a group or before each."""
    packed = []
    for group in groups:
        if shared:
            prompt = _sample(group[0], len(group[0].prompt), None, without, only_prompt=True)
            packed.append(Group((prompt, *(_sample(episode, 0, 0, without) for episode in group))))
        else:
            packed += [Group((_sample(episode, len(episode.prompt), None, without),)) for episode in group]
    return layout(packed, ROW, DOCUMENTS)


def packings(groups: Sequence[Sequence[Episode]], without: Sequence[str] = ()) -> dict[str, list[Block]]:
    """The same three groups in rows of every kind."""
    one, two, three = groups
    alone = [row([[episode]], shared=False, without=without) for group in groups for episode in group]
    return {
        "one-by-one": alone,
        "shared": [row([one, two], shared=True, without=without), row([three], shared=True, without=without)],
        "own-prompts": [row([[episode] for episode in g], shared=False, without=without) for g in (one, two, three)],
        "other-order": [
            row([three, two[::-1]], shared=True, without=without),
            row([one[::-1]], shared=False, without=without),
        ],
        "with-empty-rows": [
            empty_block(ROW, DOCUMENTS, alone[0].columns),
            *(row([group], shared=True, without=without) for group in groups),
        ],
    }


def _sample(
    episode: Episode, num_prompt: int, prefix: int | None, without: Sequence[str], *, only_prompt: bool = False
) -> Sample:
    said = [] if only_prompt else episode.said
    ids = episode.prompt[:num_prompt] + said
    mask = [False] * num_prompt + ([] if only_prompt else episode.sampled)
    columns = {
        name: np.array([9.0] * num_prompt + ([] if only_prompt else values), np.float32)
        for name, values in episode.columns.items()
        if name not in without
    }
    return Sample(np.array(ids, np.int32), np.array(mask), "by hand", columns, prefix)
