"""Distillation against full logits: `python -m bench.distillation`, about four minutes.

Student and teacher of 256 and 512 columns over a vocabulary of 151,936, 1,024 tokens, all of them read. Times are CPU
seconds of one thread, forward and backward, the best of several rounds in which both ways take turns. Memory is
measured in a fresh process for each case, as the growth of its peak resident set (`ru_maxrss`) over one forward and
backward pass, less the gradients that it leaves behind (`transient_mib`). `of_two_logits` is its share of what both
models' logits would take in float32, 1,187 MiB, before anything is done with them; the target is 0.15.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from bench.report import report
from burnish.model.divergence import Reference
from burnish.model.project import project
from burnish.types import Divergence

TOKENS, VOCAB = 1024, 151_936
STUDENT, TEACHER = 256, 512
TWO_LOGITS_MIB = 2 * TOKENS * VOCAB * 4 / 2**20
CASES = [("forward", True), ("forward", False), ("reverse", True), ("jsd", True)]  # kind, is the student's head trained
BETA = 0.5

Tensors = dict[str, Tensor]


def inputs(trained: bool) -> Tensors:
    """Hidden states and heads of both, made without temporaries that would raise the peak."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale)

    return {
        "student": draw(TOKENS, STUDENT, scale=1.0).requires_grad_(),
        "head": draw(VOCAB, STUDENT, scale=0.1).requires_grad_(trained),
        "teacher": draw(TOKENS, TEACHER, scale=1.0),
        "teacher_head": draw(VOCAB, TEACHER, scale=0.1),
    }


def full_logits(kind: str, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """What a trainer does by default: logits, log-softmax and the product of all tokens."""
    log_p = (student @ head.t()).log_softmax(1)
    with torch.no_grad():
        log_q = (teacher @ teacher_head.t()).log_softmax(1)
    if kind == "forward":
        return kl_div(log_p, log_q, reduction="sum", log_target=True)
    if kind == "reverse":
        return kl_div(log_q, log_p, reduction="sum", log_target=True)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) + torch.tensor(BETA).log()
    to_teacher = kl_div(log_m, log_q, reduction="sum", log_target=True)
    return BETA * to_teacher + (1 - BETA) * kl_div(log_m, log_p, reduction="sum", log_target=True)


def chunks(kind: str, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """Ours, by the projection's default of 256 tokens' logits in memory. Row n of the states predicts token n + 1."""
    previous = torch.arange(-1, TOKENS)
    reference = Reference(teacher[previous.clamp(min=0)], teacher_head, Divergence(kind, BETA))  # pyright: ignore[reportArgumentType]
    outputs = project(
        student, head, previous, previous >= 0, frozenset({"full_kl"}), previous_T=previous, reference=reference
    )
    assert outputs.full_kl is not None
    return outputs.full_kl.sum()


WAYS: dict[str, Callable[..., Tensor]] = {"full": full_logits, "chunks": chunks}


def seconds(way: str, kind: str, tensors: Tensors) -> float:
    """Of one forward and backward pass."""
    started = time.process_time()
    WAYS[way](kind, **tensors).backward()
    elapsed = time.process_time() - started
    for tensor in tensors.values():
        tensor.grad = None
    return elapsed


def transient_mib(way: str, kind: str, trained: bool) -> float:
    """MiB by which one pass raises this process's peak, less the gradients."""
    tensors = inputs(trained)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](kind, **tensors).backward()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return growth - (TOKENS + VOCAB * trained) * STUDENT * 4 / 2**20


def in_fresh_process(way: str, case: int) -> float:
    """`transient_mib`; called while this process is small, as a child inherits its peak."""
    command = [sys.executable, "-m", "bench.distillation", "--case", str(case), "--way", way]
    return float(subprocess.check_output(command, text=True))


def measure(rounds: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    memory = [{way: in_fresh_process(way, case) for way in WAYS} for case in range(len(CASES))]
    for (kind, trained), used in zip(CASES, memory, strict=True):
        tensors = inputs(trained)
        times = {way: seconds(way, kind, tensors) for way in WAYS}
        for _ in range(rounds - 1):
            times = {way: min(best, seconds(way, kind, tensors)) for way, best in times.items()}
        for way in WAYS:
            rows.append(
                {
                    "kind": kind,
                    "head": "trained" if trained else "frozen",
                    "way": way,
                    "seconds": times[way],
                    "time_ratio": times[way] / times["full"],
                    "transient_mib": used[way],
                    "of_full": used[way] / used["full"],
                    "of_two_logits": used[way] / TWO_LOGITS_MIB,
                }
            )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.way:
        print(transient_mib(arguments.way, *CASES[arguments.case]))
    else:
        report("distillation", measure(arguments.rounds))
