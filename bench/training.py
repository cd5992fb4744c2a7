"""Packed rows against padded batches: trained tokens a second, same model, same documents, same optimizer.

    python -m bench.training

Documents have log-normal lengths, as conversations do. The padded side is what a plain loop does: a batch of random
documents padded to its longest, a padding mask, the model's own cross-entropy. Padded efficiency is the share of its
slots that hold a token; what packing can gain from the linear layers alone is 1 / efficiency.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.report import report
from burnish.data.packing.best_fit import BestFit
from burnish.data.packing.layout import layout
from burnish.losses.nll import NLL
from burnish.mesh import open_mesh
from burnish.model.policy_model import PolicyModel
from burnish.policy.optimizers.adamw import AdamW
from burnish.policy.policy import Policy
from burnish.types import Group, Sample

VOCABULARY, ROW, BATCH = 4096, 1024, 8
DOCUMENTS = 96


def small_model() -> torch.nn.Module:
    """8 million parameters: large enough that matrix products, not Python, take the time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=ROW,
        )
    )


def documents() -> list[Tensor]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.6, 0.9, DOCUMENTS)), 8, ROW).astype(int)
    return [torch.from_numpy(rng.integers(0, VOCABULARY, length)) for length in lengths]


def padded(model: torch.nn.Module, batch: list[Tensor]) -> None:
    """One step of the plain loop."""
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(document) for document in batch], batch_first=True)
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()


def best_of(repeats: int, function: Callable[[], None]) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    corpus = documents()
    trained = sum(len(document) - 1 for document in corpus)
    batches = [corpus[i : i + BATCH] for i in range(0, len(corpus), BATCH)]
    slots = sum(max(map(len, batch)) * len(batch) for batch in batches)
    efficiency = sum(map(len, corpus)) / slots

    plain = small_model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)

    def padded_epoch() -> None:
        for batch in batches:
            padded(plain, batch)
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    packer = BestFit(open_bins=16).open(ROW)
    bins: dict[int, list[Group]] = {}
    for number, document in enumerate(corpus):
        mask = np.ones(len(document), bool)
        mask[0] = False
        sample = Sample(document.numpy().astype(np.int32), mask, f"document {number}")
        bins.setdefault(packer.add(len(document))[0], []).append(Group((sample,)))
    rows = [layout(groups, ROW, ROW // 8) for groups in bins.values()]

    with open_mesh() as mesh:
        model = PolicyModel.from_hf(small_model())
        adamw = AdamW(learning_rate=1e-4).open(model.trainable_parameters())
        policy = Policy(model, adamw, mesh=mesh, micro_batch_size=1, max_grad_norm=1.0)

        def packed_epoch() -> None:
            for i in range(0, len(rows), 2):
                policy.forward_backward(rows[i : i + 2], NLL())
                policy.optim_step(1e-4)

        padded_seconds, packed_seconds = best_of(2, padded_epoch), best_of(2, packed_epoch)
    gain = padded_seconds / packed_seconds
    report(
        "training",
        [
            {
                "documents": len(corpus),
                "padded efficiency": efficiency,
                "packed fill": sum(map(len, corpus)) / (len(rows) * ROW),
                "padded tokens/s": trained / padded_seconds,
                "packed tokens/s": trained / packed_seconds,
                "gain": gain,
                "1 / efficiency": 1 / efficiency,
                "gain * efficiency": gain * efficiency,
                "asked": 0.9,
            }
        ],
    )


if __name__ == "__main__":
    main()
