"""Counted operations against PyTorch's own counter, against formulas written out by hand, and peaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from burnish.losses.base import Loss
from burnish.losses.nll import NLL
from burnish.mesh import Mesh, open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.parallel import recompute_layers
from burnish.model.policy_model import PolicyModel
from burnish.policy.policy import Policy
from burnish.policy.throughput import Throughput, _listed_peak, peak_flops
from burnish.types import Block, LossOutput, TokenOutputs
from tests.policy_model_helpers import pack, random_documents
from tests.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

LENGTHS = [9, 4, 2, 12]
DOCUMENTS = random_documents(LENGTHS, VOCAB_SIZE)
HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 48, 2, 4, 2, 8  # of the tiny Llama
PAIRS = sum(length * (length + 1) // 2 for length in LENGTHS)


class Entropic(Loss):
    """Log-probability plus entropy: a loss of vectors, whose logits are made again in the backward pass."""

    type: Literal["entropic"] = "entropic"
    needs: ClassVar[frozenset[str]] = frozenset({"logprobs", "entropy"})

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.logprobs is not None and outputs.entropy is not None
        return LossOutput(outputs.logprobs.sum() + outputs.entropy.sum(), {})


class Sampled(Loss):
    """Each token against five ids: a product with five rows of the head, not with all of them."""

    type: Literal["sampled"] = "sampled"
    needs: ClassVar[frozenset[str]] = frozenset({"candidate_logits"})

    def candidates(self, block: Block) -> Tensor:
        return torch.arange(5)

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.candidate_logits is not None
        return LossOutput(outputs.candidate_logits.sum(), {})


class States(Loss):
    """Hidden states alone: no product with the head."""

    type: Literal["states"] = "states"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    def __call__(self, outputs: TokenOutputs, block: Block) -> LossOutput:
        assert outputs.hidden_states is not None
        return LossOutput(outputs.hidden_states.sum(), {})


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with open_mesh("cpu") as mesh:
        yield mesh


def blocks() -> list[Block]:
    """Rows of 16 with 3 and 2 slots of padding, and one of nothing else."""
    return [pack(DOCUMENTS[:2], 16), pack(DOCUMENTS[2:], 16), pack([], 16)]


def counted(model: PolicyModel, mesh: Mesh, rows: list[Block], loss: Loss) -> dict[str, int]:
    """What FlopCounterMode sees of a real step: `attention` and the rest."""
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()])
    policy = Policy(model, optimizer, mesh=mesh, micro_batch_size=1, max_grad_norm=None)
    with FlopCounterMode(display=False) as counter:
        policy.forward_backward(rows, loss)
    by_operator = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in by_operator.items() if "attention" in op)
    return {"attention": attention, "products": sum(by_operator.values()) - attention}


def build(family: str, change: Callable[[PolicyModel], object]) -> PolicyModel:
    model = PolicyModel.from_hf(tiny_model(family), projection_chunk=5)
    change(model)
    return model


def useful(model: PolicyModel, loss: Loss) -> float:
    flops = Throughput(model).flops(blocks(), loss)
    assert flops is not None
    return flops[0]


def freeze_the_lower_half(model: PolicyModel) -> None:
    model.requires_grad_(False)
    for part in (model.layers[1], model.head):
        part.requires_grad_(True)


CHANGES: dict[str, Callable[[PolicyModel], object]] = {
    "full": lambda model: None,
    "lora": lambda model: LoRA(r=2).apply(model, seed=0),
    "lora on q and v": lambda model: LoRA(r=3, target_modules=["q_proj", "v_proj"]).apply(model, seed=0),
    "lora on the mlp": lambda model: LoRA(r=3, target_modules=["down_proj"]).apply(model, seed=0),
    "half frozen": freeze_the_lower_half,
    "recomputed": lambda model: recompute_layers(model, selective=False),
    "recomputed, products kept": lambda model: recompute_layers(model, selective=True),
}


@pytest.mark.parametrize("loss", [NLL(), Entropic(), Sampled(), States()], ids=lambda loss: loss.type)
@pytest.mark.parametrize("change", CHANGES)
def test_executed_is_what_the_counter_sees(mesh: Mesh, change: str, loss: Loss) -> None:
    model = build("llama", CHANGES[change])
    throughput = Throughput(model)
    assert throughput.obstacle is None
    flops = throughput.flops(blocks(), loss)
    assert flops is not None and flops[1] == sum(counted(model, mesh, blocks(), loss).values())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_every_family_is_counted_as_the_counter_sees_it(mesh: Mesh, family: str) -> None:
    """Routed experts count only where tokens go, windows only what they show."""
    model = build(family, CHANGES["full"])
    throughput = Throughput(model)
    assert throughput.obstacle is None
    flops = throughput.flops(blocks(), NLL())
    assert flops is not None and flops[1] == sum(counted(model, mesh, blocks(), NLL()).values())


@pytest.mark.parametrize("loss", [NLL(), Sampled(), States()], ids=lambda loss: loss.type)
@pytest.mark.parametrize("change", ["full", "lora", "lora on q and v", "lora on the mlp", "half frozen"])
def test_useful_products_without_padding_are_what_the_counter_sees(mesh: Mesh, change: str, loss: Loss) -> None:
    """Where no slot is padding and nothing is recomputed, all products that ran are useful. Attention is left out: its
    backward pass makes the scores again, five products for the four that are useful."""
    model = build("llama", CHANGES[change])
    throughput = Throughput(model)
    rows = [pack([document], len(document)) for document in DOCUMENTS]
    flops = throughput.flops(rows, loss)
    assert flops is not None
    useful_flops, executed = flops
    seen = counted(model, mesh, rows, loss)
    assert executed == sum(seen.values())
    layers_back = sum(n for (*_, needs_grad), n in throughput.attention.items() if needs_grad)
    forward = 2 * HEADS * PAIRS * 2 * HEAD_DIM
    assert useful_flops - seen["products"] == forward * LAYERS + 2 * forward * layers_back
    assert seen["attention"] == forward * LAYERS + 2.5 * forward * layers_back


def test_useful_operations_of_full_fine_tuning_by_hand() -> None:
    """Padding, recomputation and unread tokens are free; the embedding is trained, so all products count thrice."""
    tokens, read = sum(LENGTHS), sum(LENGTHS) - len(LENGTHS)
    weights = LAYERS * (2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * MLP)
    attention = LAYERS * 2 * HEADS * PAIRS * 2 * HEAD_DIM
    expected = 3 * (2 * tokens * weights + attention + 2 * read * HIDDEN * VOCAB_SIZE)
    for change in ("full", "recomputed"):
        for loss in (NLL(), Entropic()):
            assert useful(build("llama", CHANGES[change]), loss) == expected


def test_useful_operations_of_lora_by_hand() -> None:
    """Frozen weights have no dW. Under the first adapters nothing needs a gradient: no dX for q, k and v of layer 0,
    nor for their A; the head is frozen."""
    tokens, read, r = sum(LENGTHS), sum(LENGTHS) - len(LENGTHS), 2
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    reads_layer_input = [(HIDDEN, q), (HIDDEN, kv), (HIDDEN, kv)]
    above = [(q, HIDDEN), (HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)]
    products = 0
    for layer in range(LAYERS):
        for index, (wide, out) in enumerate(reads_layer_input + above):
            input_gradient = layer > 0 or index >= len(reads_layer_input)
            products += wide * out * (1 + input_gradient)  # frozen: forward, dX
            products += wide * r * (2 + input_gradient) + r * out * 3  # A and B: forward, dW, dX
    attention = 3 * LAYERS * 2 * HEADS * PAIRS * 2 * HEAD_DIM
    head = 2 * 2 * read * HIDDEN * VOCAB_SIZE  # logits, dX
    assert useful(build("llama", CHANGES["lora"]), NLL()) == 2 * tokens * products + attention + head


def test_the_probe_leaves_no_trace() -> None:
    model = build("llama", lambda model: LoRA(r=2, lora_dropout=0.5).apply(model, seed=0))
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    Throughput(model)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_what_cannot_be_counted_is_absent_with_a_reason() -> None:
    convolutions = Throughput(build("lfm2", CHANGES["full"]))
    assert convolutions.obstacle is not None and "not understood" in convolutions.obstacle
    assert convolutions.flops(blocks(), NLL()) is None

    def mixes_tokens(_module: object, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        return out + (out @ out.transpose(-1, -2)) @ out

    model = build("llama", CHANGES["full"])
    model.layers[0].register_forward_hook(mixes_tokens)
    quadratic = Throughput(model)
    assert quadratic.obstacle is not None and "linearly" in quadratic.obstacle
    assert quadratic.flops(blocks(), NLL()) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA B200", 2250), ("NVIDIA H20", 148),
        ("AMD Instinct MI300X", 1307), ("NVIDIA GeForce GT 1030", None),
    ],
)  # fmt: skip
def test_peaks_of_known_devices(name: str, tera: float | None) -> None:
    assert _listed_peak(name) == (None if tera is None else tera * 1e12)


def test_a_measured_peak_is_reachable_and_measured_once() -> None:
    peak = peak_flops("cpu")
    a = torch.ones(1024, 1024)
    started = time.perf_counter()
    torch.mm(a, a)
    assert 1e9 < 2 * 1024**3 / (time.perf_counter() - started) < 4 * peak
    started = time.perf_counter()
    assert peak_flops("cpu") == peak
    assert time.perf_counter() - started < 0.1
