"""Estimates for `burnish check`: packing, parameters, bytes on disk and in memory. Each says its formula."""

from __future__ import annotations

import itertools
import os
from copy import deepcopy
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from burnish.model.config import ModelConfig
    from burnish.recipe import Recipe
    from burnish.types import NewTokens

NUM_PACKED = 4096
"""Documents that are packed, by length alone, to estimate fill."""
MASTER_BYTES = 4
"""Trained weights, their gradients and AdamW's two moments are float32."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS_BYTES = 700 * 2**20
"""Resident size of Python with torch and transformers imported, before any weight."""


class NumParameters(NamedTuple):
    """Of the model with its adapter."""

    all: int
    trained: int
    packed: int = 0
    """Frozen ones that are held in `Adapter.frozen_bytes` each."""
    trains_head: bool = True
    """Of the language model."""


def show(num_bytes: float) -> str:
    """`1.5 GB`, in powers of 1024."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GB"


def epoch(recipe: Recipe, sources: list[tuple[float, list[int]]]) -> tuple[int, float, float]:
    """(tokens of a row, share of them filled, documents in one), by packing the lengths that were seen.

    `sources` are (weight, lengths seen); lengths are drawn from each in proportion to its weight, over and over.
    """
    length = recipe.data.packing.tokens_per_row(recipe.data.max_length)
    packer = recipe.data.packing.open(length)
    total = sum(weight for weight, _ in sources)
    drawn: list[tuple[float, int]] = []
    for weight, seen in sources:
        count = max(1, round(NUM_PACKED * weight / total))
        # Spread evenly, as the mixture is: one source after the other would pack each with itself.
        drawn += [
            ((k + 0.5) / count, tokens) for k, tokens in enumerate(itertools.islice(itertools.cycle(seen), count))
        ]
    lengths = [tokens for _, tokens in sorted(drawn, key=lambda pair: pair[0])]
    num_rows = 1 + max(packer.add(n)[0] for n in lengths)
    return length, sum(lengths) / (num_rows * length), len(lengths) / num_rows


def count_parameters(
    model: ModelConfig, hf_config: PretrainedConfig, new_tokens: NewTokens | None = None
) -> NumParameters:
    """Counted on the meta device, where adapter, new tokens and heads are applied: no weight is allocated.

    Raises:
        ModelError: one of them cannot be: see `Adapter.apply`, `vocabulary.train_rows` and `heads.attach`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from burnish.model.heads.attach import attach
    from burnish.model.policy_model import PolicyModel
    from burnish.model.vocabulary import grow, train_rows

    with torch.device("meta"):
        # A copy: `grow` notes the new size in it.
        module = AutoModelForCausalLM.from_config(deepcopy(hf_config), trust_remote_code=model.trust_remote_code)
        if new_tokens is not None:
            grow(module, new_tokens)
    policy, adapter = PolicyModel(module), model.adapter
    linear = [m.weight for m in policy.backbone.modules() if isinstance(m, torch.nn.Linear)]
    if adapter is not None:
        adapter.apply(policy, seed=0)
    if new_tokens is not None:
        train_rows(policy, new_tokens)
    attach(policy, model.head, seed=0)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in policy.parameters()]
    return NumParameters(
        all=sum(count for count, _ in counts),
        trained=sum(count for count, trains in counts if trains),
        packed=sum(weight.numel() for weight in linear) if adapter and adapter.frozen_bytes is not None else 0,
        trains_head=any(parameter.requires_grad for parameter in policy.head.parameters()),
    )


def disk_bytes(recipe: Recipe, num_parameters: NumParameters) -> int:
    """Checkpoints (`keep` and the one being written: trained weights and two moments) and the export, which is the
    adapter alone where one is trained and can be told from the model: not with new tokens or vectors of documents."""
    checkpoint = 3 * MASTER_BYTES * num_parameters.trained
    new_tokens = getattr(recipe.data.tokenizer, "add_tokens", None)
    if recipe.model.adapter is None or new_tokens or recipe.model.head.makes == "embeddings":
        export = DTYPE_BYTES[recipe.model.dtype] * num_parameters.all
    else:
        export = MASTER_BYTES * num_parameters.trained
    return (recipe.checkpoint.keep + 1) * checkpoint + export


def memory_bytes(recipe: Recipe, hf_config: PretrainedConfig, count: NumParameters) -> dict[str, tuple[int, str]]:
    """What a rank holds at the height of a step: name -> (bytes, formula)."""
    c, size = hf_config.get_text_config(), DTYPE_BYTES[recipe.model.dtype]
    tokens = recipe.micro_batch_size * recipe.data.packing.tokens_per_row(recipe.data.max_length)
    layers, hidden = c.num_hidden_layers, c.hidden_size
    heads = c.num_attention_heads * (getattr(c, "head_dim", None) or hidden // c.num_attention_heads)
    keys = heads * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) // c.num_attention_heads
    inner = getattr(c, "intermediate_size", None) or 4 * hidden
    whole = 4 * hidden + 3 * heads + 4 * keys + 4 * inner
    products = 2 * hidden + 2 * heads + 2 * keys + 2 * inner
    a_token, kept = {
        "none": (layers * whole, "layers x (4 hidden + 3 q + 4 kv + 4 inner)"),
        "selective": (layers * products + whole, "layers x (2 hidden + 2 q + 2 kv + 2 inner) + one whole layer"),
        "full": (layers * hidden + whole, "layers x hidden + one whole layer"),
    }[recipe.model.activation_checkpointing]
    reads_tokens = any(part.makes == "tokens" for part in recipe.model.head.parts().values())
    chunk = min(recipe.model.projection_chunk, tokens) if reads_tokens else 0
    trains_head, frozen = count.trains_head and reads_tokens, count.all - count.trained - count.packed
    packed_bytes = (recipe.model.adapter and recipe.model.adapter.frozen_bytes) or 0
    packed = f"{count.packed:,} in four bits x {packed_bytes} bytes + " if count.packed else ""
    return {
        "weights": (
            round(packed_bytes * count.packed) + size * frozen + MASTER_BYTES * count.trained,
            f"{packed}{frozen:,} frozen x {size} bytes + {count.trained:,} trained x {MASTER_BYTES}",
        ),
        "gradients": (MASTER_BYTES * count.trained, f"{count.trained:,} trained x {MASTER_BYTES}"),
        "optimizer": (2 * MASTER_BYTES * count.trained, f"two moments x {count.trained:,} x {MASTER_BYTES}"),
        "activations": (size * tokens * a_token, f"{tokens:,} tokens x {size} x {kept}"),
        "projection": (
            4 * c.vocab_size * (2 * chunk + hidden * trains_head),
            f"{c.vocab_size:,} vocabulary x 4 x (2 x {chunk} tokens{' + hidden, the gradient' * trains_head})",
        ),
        "process": (PROCESS_BYTES, "Python, torch and transformers"),
    }


def available_memory() -> tuple[str, int]:
    """(name, bytes) of what a rank would run on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    return "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
