"""Projection and loss against full logits: `python -m bench.projection`, about two minutes.

Times are CPU seconds of one thread, forward and backward, the best of several rounds in which all ways take turns: what
else the machine does then matters little.
Memory is measured in a fresh process for each case, as the growth of its peak resident set (`ru_maxrss`) over one
forward and backward pass: everything the pass held at once, the gradients it leaves behind included (`peak_mib`) or
taken off (`transient_mib`), since those are results that both must deliver.
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

from bench.report import report
from burnish.model.project import project

TOKENS, VOCAB = 1024, 151_936
CASES = [  # hidden width, is the head trained, share of the tokens that the loss reads
    (256, True, 0.4),
    (256, True, 1.0),
    (576, False, 0.4),
]


def inputs(hidden_size: int, trained: bool, kept: float) -> dict[str, Tensor]:
    """Hidden states, head, ids and the tokens that are read, made without temporaries that would raise the peak."""
    generator = torch.Generator().manual_seed(0)
    reads = torch.rand(TOKENS, generator=generator) < kept
    reads[0] = False
    return {
        "hidden": torch.randn(TOKENS, hidden_size, generator=generator).requires_grad_(),
        "weight": torch.randn(VOCAB, hidden_size, generator=generator).mul_(0.02).requires_grad_(trained),
        "ids": torch.randint(VOCAB, (TOKENS,), generator=generator),
        "reads": reads,
    }


def full_logits(hidden: Tensor, weight: Tensor, ids: Tensor, reads: Tensor) -> Tensor:
    """What a trainer does by default: logits of every token, labels of the unread ones ignored."""
    labels = torch.where(reads, ids, -100)
    return torch.nn.functional.cross_entropy(hidden[:-1] @ weight.t(), labels[1:], reduction="sum")


def weighted_nll(hidden: Tensor, weight: Tensor, ids: Tensor, reads: Tensor) -> Tensor:
    """A loss that is linear in the log-probabilities: gradients made in the forward pass."""
    previous = torch.arange(-1, TOKENS - 1)
    needs = frozenset({"weighted_nll"})
    outputs = project(hidden, weight, ids, reads, needs, previous_T=previous, coefficients_T=reads.float())
    assert outputs.weighted_nll is not None
    return outputs.weighted_nll


def logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, reads: Tensor) -> Tensor:
    """A loss of log-probability vectors: logits made again in the backward pass."""
    outputs = project(hidden, weight, ids, reads, frozenset({"logprobs"}), previous_T=torch.arange(-1, TOKENS - 1))
    assert outputs.logprobs is not None
    return -outputs.logprobs.sum()


WAYS: dict[str, Callable[..., Tensor]] = {"full": full_logits, "weighted_nll": weighted_nll, "logprobs": logprobs}


def seconds(way: str, tensors: dict[str, Tensor]) -> float:
    """Of one forward and backward pass."""
    started = time.process_time()
    WAYS[way](**tensors).backward()
    elapsed = time.process_time() - started
    for tensor in tensors.values():
        tensor.grad = None
    return elapsed


def peak_growth_mib(way: str, case: int) -> float:
    """MiB by which one pass raises this process's peak."""
    tensors = inputs(*CASES[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    WAYS[way](**tensors).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peaks_in_fresh_processes() -> list[dict[str, float]]:
    """`peak_growth_mib` of each case and way; called while this process is small, as a child inherits its peak."""
    command = [sys.executable, "-m", "bench.projection", "--case"]
    return [
        {way: float(subprocess.check_output([*command, str(case), "--way", way], text=True)) for way in WAYS}
        for case in range(len(CASES))
    ]


def measure(rounds: int) -> list[dict[str, object]]:
    rows, peaks_of_cases = [], peaks_in_fresh_processes()
    for index, (hidden_size, trained, kept) in enumerate(CASES):
        tensors = inputs(hidden_size, trained, kept)
        times = {way: seconds(way, tensors) for way in WAYS}
        for _ in range(rounds - 1):
            times = {way: min(best, seconds(way, tensors)) for way, best in times.items()}
        peaks = peaks_of_cases[index]
        gradients = (TOKENS + VOCAB * trained) * hidden_size * 4 / 2**20
        for way in WAYS:
            rows.append(
                {
                    "hidden": hidden_size,
                    "head": "trained" if trained else "frozen",
                    "kept": kept,
                    "way": way,
                    "seconds": times[way],
                    "speedup": times["full"] / times[way],
                    "peak_mib": peaks[way],
                    "peak_ratio": peaks[way] / peaks["full"],
                    "transient_mib": peaks[way] - gradients,
                    "transient_ratio": (peaks[way] - gradients) / (peaks["full"] - gradients),
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
        print(peak_growth_mib(arguments.way, arguments.case))
    else:
        report("projection", measure(arguments.rounds))
