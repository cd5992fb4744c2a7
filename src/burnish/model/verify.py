"""The logit verifier: every path we changed against the plain transformers model, on the same tokens.

The reference is what anybody would get: `AutoModelForCausalLM`, one document at a time, eager attention, full logits.
A path is one way Burnish computes the same thing: our attention, packed rows, recomputed activations, compiled layers,
a fresh adapter (which must change nothing), a merged one. For each: the largest difference of the logits, the layer
where it is largest, and the parameter whose gradient differs most. Equal losses are not enough: a wrong gradient of one
norm leaves the loss as it is.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from burnish.model.config import Compile, ModelConfig
from burnish.model.policy_model import decoder_layers
from burnish.model.shards import whole
from burnish.types import Block

if TYPE_CHECKING:
    from burnish.mesh import Mesh
    from burnish.model.policy_model import PolicyModel

LENGTHS = (41, 23, 11, 6)
"""Tokens of the probe documents: uneven, none a multiple of a kernel's tile; 15 slots of padding follow."""
ROW = 96
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (6e-2, 3e-1)}
"""By dtype: largest difference of logits and of a gradient, each relative to the largest reference value."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one path is from the reference; all relative to the largest reference value of that tensor."""

    path: str
    logits: float
    layer: tuple[str, float]
    """The layer whose output differs most, and by how much."""
    gradient: tuple[str, float]
    """The parameter whose gradient differs most, and by how much; ("", 0.0) where only other parameters are trained."""
    passed: bool


@dataclass(slots=True)
class Observation:
    """What a model computed on the probe documents."""

    logits: list[Tensor]
    """[T_i, V] a document."""
    layers: dict[str, list[Tensor]]
    """Layer name -> [T_i, H] a document."""
    gradients: dict[str, Tensor] = field(default_factory=dict)


def verify(config: ModelConfig, mesh: Mesh, *, compile_too: bool, seed: int = 0) -> Iterator[Difference]:
    """Yields a `Difference` a path, cheapest first; the model is loaded anew for each.

    Raises:
        ModelError: the model cannot be loaded, or cannot be changed as a path asks.
    """
    from burnish.model.load import load_config, load_model

    documents = probe_documents(load_config(config).get_text_config().vocab_size, seed)
    reference = observe_reference(config, documents, mesh)
    plain = config.model_copy(update={"adapter": None, "compile": None, "activation_checkpointing": "none"})
    paths = [
        ("our attention, one document a row", plain, False),
        ("packed rows", plain, True),
        ("packed, activations recomputed", plain.model_copy(update={"activation_checkpointing": "full"}), True),
    ]
    if compile_too:
        paths.append(("packed, compiled", plain.model_copy(update={"compile": Compile()}), True))
    if config.adapter is not None:
        paths.append(("packed, fresh adapter", plain.model_copy(update={"adapter": config.adapter}), True))
    for name, variant, packed in paths:
        model = load_model(variant, mesh, seed=seed)
        yield compare(name, observe_policy(model, documents, mesh, packed=packed), reference, config.dtype)
        if variant.adapter is not None:
            yield merged_against_unmerged(model, documents, mesh, config)
        del model
        gc.collect()


def merged_against_unmerged(model: PolicyModel, documents: list[Tensor], mesh: Mesh, config: ModelConfig) -> Difference:
    """A trained adapter beside the weights against the same adapter folded into them, written and read back."""
    from transformers import AutoModelForCausalLM

    from burnish.model.export import write_model
    from burnish.model.load import quiet

    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.trainable_parameters():
        if "lora_B" in name:  # zero until trained
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.detach().copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    beside = observe_policy(model, documents, mesh, packed=True)
    # Written and read back as an export is, so that its files are what is compared.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_model(model, Path(folder))
        with quiet():
            reread: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
        reread.to(mesh.device)
        ids = [tokens.to(mesh.device).unsqueeze(0) for tokens in documents]
        logits = [reread(input_ids=document, use_cache=False).logits[0].float() for document in ids]
    return compare("adapter merged, exported", Observation(logits, {}), beside, config.dtype)


def probe_documents(vocab_size: int, seed: int) -> list[Tensor]:
    """Random token ids, one tensor a document: text would hide what rare tokens reveal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in LENGTHS]


def observe_reference(config: ModelConfig, documents: list[Tensor], mesh: Mesh) -> Observation:
    """The plain transformers model, a document at a time, eager attention, gradients of the summed cross-entropy."""
    from burnish.model.load import load_causal_lm

    model = load_causal_lm(config, attention="eager").to(mesh.device)
    seen = Observation([], {})
    with watched(decoder_layers(model), seen.layers):
        for tokens in documents:
            ids = tokens.to(mesh.device).unsqueeze(0)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").backward()
            seen.logits.append(logits.detach())
    seen.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return seen


def observe_policy(model: PolicyModel, documents: list[Tensor], mesh: Mesh, *, packed: bool) -> Observation:
    """The same through our layers; gradients through the projection, logits from the hidden states."""
    seen = Observation([], {})
    blocks = [pack(documents, ROW)] if packed else [pack([tokens], len(tokens)) for tokens in documents]
    blocks = [block.to(mesh.device) for block in blocks]
    rows: dict[str, list[Tensor]] = {}
    with torch.no_grad(), watched(decoder_layers(model.causal_lm), rows):
        for block in blocks:
            logits = model.logits(block).float()
            seen.logits += [logits[start:end] for start, end in spans(block)]
    seen.layers = {
        name: [output[start:end] for block, output in zip(blocks, outputs, strict=True) for start, end in spans(block)]
        for name, outputs in rows.items()
    }
    for block in blocks:
        outputs = model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask)
        assert outputs.logprobs is not None
        (-outputs.logprobs).sum().backward()
    seen.gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return seen


def compare(path: str, observed: Observation, reference: Observation, dtype: str) -> Difference:
    """Largest differences, each relative to the largest reference value of its tensor."""
    logits = max(relative(a, b) for a, b in zip(observed.logits, reference.logits, strict=True))
    layers = {
        name: max(relative(a, b) for a, b in zip(outputs, reference.layers[name], strict=True))
        for name, outputs in observed.layers.items()
    }
    shared = observed.gradients.keys() & reference.gradients.keys()
    gradients = {name: relative(observed.gradients[name], reference.gradients[name]) for name in shared}
    most_logits, most_gradient = TOLERANCE[getattr(torch, dtype)]
    passed = logits <= most_logits and all(value <= most_gradient for value in gradients.values())
    return Difference(path, logits, largest(layers), largest(gradients), passed)


def relative(observed: Tensor, reference: Tensor) -> float:
    """max |a - b| / max |b|, over the rows both have: a padded vocabulary has more. NaN counts as infinitely far."""
    observed = observed[: reference.shape[0]].float()
    difference = (observed - reference.float()).abs().max() / reference.float().abs().max().clamp(min=1e-30)
    return difference.nan_to_num(nan=torch.inf).item()


def largest(differences: dict[str, float]) -> tuple[str, float]:
    """Name and value of the largest; ("", 0.0) of nothing."""
    return max(differences.items(), key=lambda item: item[1], default=("", 0.0))


@contextmanager
def watched(layers: Iterable[nn.Module], outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collects each layer's output [T, H] of every forward pass in the block."""

    def keeper(name: str) -> Callable[..., None]:
        def keep(_layer: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            outputs.setdefault(name, []).append(states.detach().squeeze(0))

        return keep

    hooks = [layer.register_forward_hook(keeper(f"layer {index}")) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def spans(block: Block) -> list[tuple[int, int]]:
    """(start, end) of the documents in use."""
    return [(start, end) for start, end, *_ in block.documents.tolist() if end > start]


def pack(documents: list[Tensor], row_length: int) -> Block:
    """Documents laid into one row, every token but the first of each trained."""
    tokens = torch.zeros(row_length, dtype=torch.int64)
    positions, document_ids = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    entries = torch.zeros(len(LENGTHS), 4, dtype=torch.int32)
    start = 0
    for index, document in enumerate(documents):
        end = start + len(document)
        tokens[start:end], positions[start:end] = document, torch.arange(len(document))
        document_ids[start:end] = index
        entries[index, :2] = torch.tensor([start, end])
        start = end
    return Block(
        token_ids=tokens,
        loss_mask=(document_ids >= 0) & (positions > 0),
        position_ids=positions,
        document_ids=document_ids,
        documents=entries,
        group_ids=torch.where(entries[:, 1] > 0, torch.arange(len(entries)), -1),
        sample_ids=tuple(f"probe {index}" for index in range(len(documents))),
    )
