"""What a step's rollouts say about the policy: numbers for a person, by the names of the field."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb

from burnish.rewards.base import free_name
from burnish.rollouts import Rollout, RolloutGroup


def metric_name(words: str) -> str:
    """What trackers take for a name.

    >>> metric_name("sampled again"), metric_name("Judge (7B)")
    ('sampled_again', 'judge_7b_')
    """
    return re.sub(r"[^a-z0-9_/@]+", "_", words.lower())


def prompt_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """What became of the prompts so far, by `Buffer.counts`: `prompts_trained`, `prompts_sampled_again`."""
    found: Counter[str] = Counter()
    for words, count in counts.items():
        found[f"prompts_{metric_name(words)}"] += count
    return {name: float(count) for name, count in found.items()}


def pass_at_k(num_rollouts: int, num_solved: int, k: int) -> float:
    """Chance that at least one of k rollouts out of `num_rollouts` is solved, without bias: 1 - C(n - c, k) / C(n, k)
    (Chen et al., arXiv:2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - comb(num_rollouts - num_solved, k) / comb(num_rollouts, k)


def group_metrics(groups: Sequence[RolloutGroup], *, solved_at: float | None = None) -> dict[str, float]:
    """Rewards, lengths and what went wrong, over all rollouts of `groups`; nothing of no rollouts.

    Args:
        solved_at: reward from which a rollout counts as solved, for `pass@k`.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    lengths = [rollout.num_sampled for rollout in rollouts]
    spreads = [statistics.pstdev(group.rewards) for group in groups]
    metrics = {
        "reward": statistics.fmean(rollout.reward for rollout in rollouts),
        "reward_std": statistics.fmean(spreads),
        "uniform_groups": statistics.fmean(spread == 0.0 for spread in spreads),
        "completion_tokens": statistics.fmean(lengths),
        "completion_tokens_max": float(max(lengths)),
        "prompt_tokens": statistics.fmean(rollout.num_prompt for rollout in rollouts),
        "truncated": statistics.fmean(rollout.finish_reason == "length" for rollout in rollouts),
        "turns": statistics.fmean(rollout.num_turns for rollout in rollouts),
        "empty_completions": float(sum(length == 0 for length in lengths)),
    }
    metrics |= _terms(rollouts)
    if solved_at is not None:
        metrics |= _passes(groups, solved_at)
    return metrics


def lag_metrics(groups: Iterable[RolloutGroup], version: int) -> dict[str, float]:
    """How many updates are between the weights that drew tokens and those that train on them: mean and largest over
    rollouts, and the share of each lag (`lag_share_1`)."""
    lags = [version - rollout.oldest_version for g in groups for rollout in g.rollouts if rollout.num_sampled]
    if not lags:
        return {}
    shares = {f"lag_share_{lag}": count / len(lags) for lag, count in sorted(Counter(lags).items())}
    return {"lag": statistics.fmean(lags), "lag_max": float(max(lags)), **shares}


def work_metrics(before: Mapping[str, float], now: Mapping[str, float], seconds: float) -> dict[str, float]:
    """What engines and reward processes did in the `seconds` between two readings of their counters."""
    done = {name: now[name] - before.get(name, 0.0) for name in now}
    workers = max(now.get("workers", 1.0), 1.0)
    metrics = {
        "rollout_tokens_per_second": done.get("sampled_tokens", 0.0) / seconds,
        "engine_busy": done.get("busy_seconds", 0.0) / (seconds * workers),
    }
    if judges := now.get("reward_workers"):
        metrics["reward_busy"] = done.get("reward_seconds", 0.0) / (seconds * judges)
    watched = ("restarts", "resubmitted", "environment_failures")
    metrics |= {f"rollout_{name}": now[name] for name in watched if now.get(name)}
    metrics |= {name: now[name] for name in ("reward_restarts", "reward_retries") if now.get(name)}
    return metrics | {name: count for name, count in done.items() if name.startswith("prompts_") and count}


def _terms(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over all rollouts: where an environment gave none of a name, it gave 0."""
    names: dict[str, str] = {}
    for name in sorted({name for rollout in rollouts for name in (*rollout.terms, *rollout.failed)}):
        names[name] = free_name(metric_name(name), set(names.values()))
    terms = sorted({name for rollout in rollouts for name in rollout.terms})
    means = {name: statistics.fmean(rollout.terms.get(name, 0.0) for rollout in rollouts) for name in terms}
    failed = Counter(name for rollout in rollouts for name in rollout.failed)
    found = {f"reward/{names[name]}": mean for name, mean in means.items()}
    return found | {f"reward_failures/{names[name]}": float(count) for name, count in sorted(failed.items())}


def _passes(groups: Sequence[RolloutGroup], solved_at: float) -> dict[str, float]:
    size = min(len(group.rollouts) for group in groups)
    solved = [(len(g.rollouts), sum(reward >= solved_at for reward in g.rewards)) for g in groups]
    lengths = sorted({1, size} | {2**i for i in range(1, size.bit_length()) if 2**i < size})
    return {f"pass@{k}": statistics.fmean(pass_at_k(n, c, k) for n, c in solved) for k in lengths}
