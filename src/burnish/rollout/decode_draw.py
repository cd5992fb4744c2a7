"""Drawing the next token of many sequences from their logits, each by its own parameters and its own seed.

The one random number of a token is a function of its request's seed and of its place among the sampled tokens, so a
request draws the same tokens in whatever company it is computed, but for a number that falls within the rounding
(1e-7) of the border between two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from burnish.errors import RunFailed
from burnish.rollouts import SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) of place `index` in the stream of `seed`, a multiple of 2^-24.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), jumped to: its state
    after i steps is the seed, itself mixed, plus i times a constant.
    """
    return (_mixed(_mixed(seed) + (index + 1) * 0x9E3779B97F4A7C15) >> 40) * 2.0**-24


def _mixed(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def draw(
    logits_nV: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """A token of each row, and its log-probability under the distribution that it was drawn from.

    Token i is drawn where the number falls between the summed probabilities of the tokens before it and with it. At
    temperature 0 it is the likeliest one, and its log-probability that of the distribution at temperature 1.

    Args:
        logits_nV: float32; spent.

    Raises:
        RunFailed: a logit is NaN or +inf.
    """
    temperatures = [each.temperature or 1.0 for each in params]
    if any(temperature != 1.0 for temperature in temperatures):
        logits_nV.div_(torch.tensor(temperatures, device=logits_nV.device).unsqueeze(1))
    narrowed = [
        row
        for row, each in enumerate(params)
        if each.temperature and (each.top_p < 1 or 0 < each.top_k < logits_nV.shape[1])
    ]
    if narrowed:
        logits_nV[narrowed] = _narrowed(logits_nV[narrowed], [params[row] for row in narrowed])
    largest = logits_nV.amax(1, keepdim=True)
    sums = (logits_nV - largest).exp_().cumsum_(1)
    total = sums[:, -1:].clone()
    if not total.isfinite().all():
        raise RunFailed("the model's logits are not finite: the policy has diverged, or its weights are damaged")
    numbers = torch.tensor(uniforms, device=logits_nV.device).unsqueeze(1)
    # Below the total, whatever the product rounds to: the first sum above it then belongs to a token that can be drawn.
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(sums, target, right=True)
    greedy = [row for row, each in enumerate(params) if each.temperature == 0]
    if greedy:
        tokens[greedy] = logits_nV[greedy].argmax(1, keepdim=True)
    logprobs = logits_nV.gather(1, tokens) - largest - total.log()
    return tokens.squeeze(1).tolist(), logprobs.squeeze(1).tolist()


def _narrowed(logits_nV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """-inf for all but the `top_k` likeliest tokens, and of those for all but the fewest that hold `top_p` of what is
    then left (nucleus sampling: Holtzman et al., arXiv:1904.09751, section 3.1). Of equal logits the smaller id stays.
    """
    size = logits_nV.shape[1]
    in_order, ids = logits_nV.sort(stable=True, dim=1, descending=True)
    counts = torch.tensor([each.top_k or size for each in params], device=logits_nV.device).unsqueeze(1)
    in_order.masked_fill_(torch.arange(size, device=logits_nV.device) >= counts, float("-inf"))
    probabilities = in_order.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    shares = torch.tensor([each.top_p for each in params], device=logits_nV.device).unsqueeze(1)
    beyond = before >= shares
    beyond[:, 0] = False
    # A share of 1 keeps all, where rounding might say that the sum was reached before the last ones.
    in_order.masked_fill_(beyond & (shares < 1), float("-inf"))
    return torch.empty_like(logits_nV).scatter_(1, ids, in_order)
