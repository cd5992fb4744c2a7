"""A small head in float64, and what the projection must make of it by definition, from whole logits."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.model.divergence import Reference
from burnish.model.project import project
from burnish.types import Divergence, TokenOutputs

T, H, V, K = 9, 5, 13, 3
PREVIOUS = torch.tensor([-1, 0, 1, 2, -1, 4, 5, 5, -1])  # documents 0..4 and 4..7; token 7 hangs on 5; padding
READS = torch.tensor([False, True, True, False, True, True, True, True, False])
READ = [1, 2, 5, 6, 7]  # token 4 is marked and has nothing before it: it is passed over
UNREAD = [0, 3, 4, 8]

HEADS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "temperature and scale": {"temperature": 0.7, "logit_scale": 1.3},
    "all of it": {"softcap": 1.5, "temperature": 1.4, "logit_scale": 0.8, "with_bias": True, "vocab_size": 10},
}


class Case:
    """Leaves and arguments of a projection whose logits exceed 1, so that a forgotten cap or scale shows.

    The second model is one column wider, two rows of padding longer, and has a cap and a bias of its own.
    """

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
        self.candidates = torch.tensor([7, int(self.ids[2]), 7, 0])  # one twice, one that is also a token's own
        self.coefficients = draw(T)
        self.teacher = draw(T, H + 1), draw(V + 2, H + 1), draw(V + 2)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients flow into."""
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])

    def reference(self, divergence: Divergence) -> Reference:
        """The second model."""
        hidden, weight, bias = self.teacher
        return Reference(hidden[PREVIOUS.clamp(min=0)], weight, divergence, bias=bias, softcap=3.0, logit_scale=0.9)

    def project(
        self,
        *needs: str,
        divergence: Divergence | None = None,
        chunk: int = 2,
        leaves: list[Tensor] | None = None,
        reads: Tensor = READS,
    ) -> TokenOutputs:
        """Our projection of it."""
        hidden, weight, *bias = leaves or self.leaves
        return project(
            hidden, weight, self.ids, reads, frozenset(needs), previous_T=PREVIOUS, coefficients_T=self.coefficients,
            topk_ids_TK=self.topk_ids, candidates_K=self.candidates, bias=bias[0] if bias else None, chunk=chunk,
            reference=None if divergence is None else self.reference(divergence),
            **self.head,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def logits(self) -> Tensor:
        """[n, V] whole, at temperature 1, of the tokens in READ."""
        cap, scale = self.head.get("softcap"), self.head.get("logit_scale", 1.0)
        return whole_logits(self.hidden, self.weight, self.bias, cap, scale)[:, : self.vocab_size]

    def expected(self) -> dict[str, Tensor]:
        """What there is to know of the policy, at the tokens in READ."""
        z = self.logits() / self.head.get("temperature", 1.0)
        log_p, ids = z.log_softmax(1), self.ids[READ, None]
        logprobs = log_p.gather(1, ids).squeeze(1)
        return {
            "weighted_nll": -(self.coefficients[READ] * logprobs).sum(),
            "logprobs": logprobs,
            "entropy": -(log_p.exp() * log_p).sum(1),
            "topk_logprobs": log_p.gather(1, self.topk_ids[READ]),
            "candidate_logits": torch.cat([z.gather(1, ids), z[:, self.candidates]], 1),
            "hidden_states": self.hidden[PREVIOUS[READ]],
        }

    def expected_divergence(self, divergence: Divergence) -> Tensor:
        """[n] by the formulas, at the tokens in READ."""
        q_logits = whole_logits(*self.teacher, 3.0, 0.9)[:, : self.vocab_size]
        log_p = (self.logits() / divergence.temperature).log_softmax(1)
        log_q = (q_logits / divergence.temperature).log_softmax(1)

        def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
            return (log_a.exp() * (log_a - log_b)).sum(1)

        if divergence.kind == "forward":
            return kl(log_q, log_p)
        if divergence.kind == "reverse":
            return kl(log_p, log_q)
        log_m = (divergence.beta * log_q.exp() + (1 - divergence.beta) * log_p.exp()).log()
        return divergence.beta * kl(log_q, log_m) + (1 - divergence.beta) * kl(log_p, log_m)


def whole_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None, scale: float) -> Tensor:
    """[n, V] of the tokens in READ."""
    z = scale * (hidden[PREVIOUS[READ]] @ weight.t() + (0 if bias is None else bias))
    return cap * torch.tanh(z / cap) if cap else z


def same_gradients(
    ours: Tensor, theirs: Tensor, leaves: list[Tensor], rtol: float = 1e-11, atol: float = 1e-12
) -> None:
    """Of two sums, in all leaves; one that a sum does not depend on has none in either."""
    pairs = (torch.autograd.grad(total, leaves, allow_unused=True) for total in (ours, theirs))
    for mine, other in zip(*pairs, strict=True):
        if mine is not None or other is not None:
            torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)
