"""After a sync a worker's model computes bit for bit what the trainer's does; what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.errors import SyncFailed
from burnish.mesh import open_mesh
from burnish.model.adapters.lora import LoRA
from burnish.model.config import ModelConfig
from burnish.model.load import load_model
from burnish.model.policy_model import PolicyModel
from burnish.model.vocabulary import grow, train_rows
from burnish.model.wire import describe
from burnish.rollout.sync.file import File
from burnish.rollout.sync.shared_memory import SharedMemory
from burnish.rollout.weights import adapter_alone, digest_of, load_into
from burnish.types import NewTokens
from tests.lora_helpers import VARIANTS, adapted, move_off_zero
from tests.policy_model_helpers import pack, random_documents
from tests.tiny_models import VOCAB_SIZE, tiny_model
from tests.weight_sync_helpers import InMemory, copied, send

BLOCK = pack(random_documents([9, 14], VOCAB_SIZE), 32)


@torch.no_grad()
def logprobs(model: PolicyModel) -> torch.Tensor:
    return model.eval()(BLOCK, needs=frozenset({"logprobs"}), reads=BLOCK.loss_mask).logprobs.clone()


def plain(family: str, seed: int, **overrides: Any) -> PolicyModel:
    return PolicyModel.from_hf(tiny_model(family, seed=seed, **overrides), pad_vocab_to=128)


def sent(sync: Any, tmp_path: Path, model: PolicyModel, *, adapter_only: bool = False) -> Any:
    """The weights as they come out of a transport, which is open no longer."""
    sender = sync.sender(tmp_path)
    weights = sync.receiver().receive(
        send(sender, 3, copied(model, adapter_only=adapter_only), adapter_only=adapter_only)
    )
    sender.close()
    return weights


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("llama", False),
        ("llama", True),
        ("gemma2", True),
        ("qwen3_moe", False),
        ("gpt_oss", False),
        ("gpt_neox", False),
    ],
)
def test_a_worker_computes_what_the_trainer_does(family, tied, tmp_path):
    trainer, worker = (plain(family, seed, tie_word_embeddings=tied) for seed in (1, 2))
    assert trainer.is_tied is tied
    assert not torch.equal(logprobs(worker), logprobs(trainer))
    weights = sent(SharedMemory(), tmp_path, trainer)
    receipt = load_into(worker, weights)
    assert torch.equal(logprobs(worker), logprobs(trainer))
    assert (receipt.version, receipt.digest) == (3, digest_of(copied(trainer)))
    assert receipt.num_bytes == sum(tensor.nbytes for _, tensor in copied(trainer))
    assert worker.is_tied is tied


@pytest.mark.parametrize("variant", ["rslora", "embedding and head, dora", "saved head and norms"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_alone_makes_the_worker_s_model_the_trainer_s(variant, tied, tmp_path):
    lora = VARIANTS[variant]
    trainer, worker = (adapted("llama", lora, seed=s, pad_vocab_to=128, tie_word_embeddings=tied) for s in (1, 2))
    move_off_zero(trainer)
    assert adapter_alone(trainer)
    for version in (0, 1):
        load_into(worker, sent(File(), tmp_path, trainer, adapter_only=True))
        assert torch.equal(logprobs(worker), logprobs(trainer)), version
        move_off_zero(trainer)


@pytest.mark.parametrize("variant", ["rslora", "embedding and head, dora", "saved head and norms"])
def test_merged_weights_go_into_a_worker_with_or_without_the_adapter(variant, tmp_path):
    lora = VARIANTS[variant]
    trainer, worker = (adapted("llama", lora, seed=s, pad_vocab_to=128, tie_word_embeddings=True) for s in (1, 2))
    move_off_zero(trainer)
    weights = InMemory(copied(trainer))
    load_into(worker, weights)
    assert torch.allclose(logprobs(worker), logprobs(trainer), atol=2e-5, rtol=0)
    load_into(worker, weights)
    with pytest.raises(SyncFailed, match="merged weights did before"):
        load_into(worker, InMemory(copied(trainer, adapter_only=True), adapter_only=True))


def test_rows_of_new_tokens_travel_in_the_matrices_they_extend(tmp_path):
    new = NewTokens(VOCAB_SIZE, sources=((3, 4), ()))
    models = []
    for seed in (1, 2):
        causal_lm = tiny_model("llama", seed=seed, tie_word_embeddings=False)
        grow(causal_lm, new)
        models.append(PolicyModel.from_hf(causal_lm, pad_vocab_to=64))
        models[-1].new_tokens = new
        if seed == 1:
            LoRA(r=4).apply(models[-1], seed=0)
            train_rows(models[-1], new)
            move_off_zero(models[-1])
    trainer, frozen = models
    assert not adapter_alone(trainer)
    load_into(frozen, sent(File(), tmp_path, trainer))
    assert torch.allclose(logprobs(frozen), logprobs(trainer), atol=2e-5, rtol=0)
    rows = dict(copied(trainer))["lm_head.weight"]
    assert torch.equal(frozen.head.weight[: len(rows)], rows) and len(rows) == VOCAB_SIZE + 2
    train_rows(frozen, new)  # a worker whose new rows are parameters of their own
    with torch.no_grad():
        frozen.head.new_rows.zero_()
        frozen.head.weight.zero_()
    load_into(frozen, InMemory(copied(trainer)))
    assert torch.allclose(logprobs(frozen), logprobs(trainer), atol=2e-5, rtol=0)


@pytest.mark.parametrize("adapter", [None, LoRA(r=4)], ids=["full", "lora"])
def test_in_bfloat16_the_worker_has_what_the_trainer_computes_with(adapter, tiny_model: Path, tmp_path):
    """The trainer keeps float32 masters, FSDP casts them; a frozen worker has bfloat16 alone."""
    config = ModelConfig(path=str(tiny_model), dtype="bfloat16", adapter=adapter)
    with open_mesh("cpu") as mesh:
        trainer = load_model(config, mesh, seed=0)
        worker = load_model(config, mesh, seed=1, frozen=adapter is None)
        with torch.no_grad():
            for _, parameter in trainer.trainable_parameters():
                parameter.mul_(1.01).add_(0.001)
        load_into(worker, sent(SharedMemory(), tmp_path, trainer, adapter_only=adapter is not None))
        assert torch.equal(logprobs(worker), logprobs(trainer))


def test_a_buffer_is_not_rounded_on_its_way(tmp_path):
    """What chooses the experts is float32 in a bfloat16 model. 0.1 + 0.001 i is no bfloat16 number."""
    bias = 0.1 + 0.001 * torch.arange(4.0)
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    causal_lm = tiny_model("glm4_moe", n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=8, **experts)
    causal_lm.model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    causal_lm.save_pretrained(tmp_path / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    with open_mesh("cpu") as mesh:
        config = ModelConfig(path=str(tmp_path / "model"), dtype="bfloat16")
        trainer, worker = (load_model(config, mesh, seed=0, frozen=frozen) for frozen in (False, True))
        sent = dict(copied(trainer))
        assert torch.equal(sent[name], bias) and sent["model.norm.weight"].dtype == torch.bfloat16
        load_into(worker, InMemory(list(sent.items())))
    assert torch.equal(worker.state_dict()[name], bias)


def test_the_folder_of_a_version_is_a_model_that_transformers_loads(tmp_path):
    trainer = plain("qwen3_moe", seed=1)
    base = tmp_path / "base"
    describe(trainer, base, base_path="unused")
    sender = File().sender(tmp_path)
    folder = File().receiver().receive(send(sender, 1, copied(trainer), folder=base)).folder()
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = BLOCK.token_ids[:9].unsqueeze(0)
    assert torch.equal(loaded(ids).logits, tiny_model("qwen3_moe", seed=1)(ids).logits)
    sender.close()


def test_the_folder_of_an_adapter_is_one_that_peft_loads(tmp_path):
    from peft import PeftModel

    trainer, lora = adapted("llama", LoRA(r=4, use_dora=True), pad_vocab_to=128), tmp_path / "base"
    move_off_zero(trainer)
    describe(trainer, lora, base_path="the/base")
    sender = File().sender(tmp_path)
    parcel = send(sender, 1, copied(trainer, adapter_only=True), adapter_only=True, folder=lora)
    loaded: Any = PeftModel.from_pretrained(tiny_model("llama"), str(File().receiver().receive(parcel).folder()))
    ids = BLOCK.token_ids[:9]
    theirs = loaded(ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert torch.allclose(theirs, logprobs(trainer)[1:9], atol=1e-5, rtol=0)
    assert (loaded.peft_config["default"].base_model_name_or_path, parcel["adapter_only"]) == ("the/base", True)
    sender.close()


def without(tensors: Any, name: str) -> Any:
    return [each for each in tensors if each[0] != name]


def changed(tensors: Any, name: str, change: Any) -> Any:
    return [(each, change(tensor) if each == name else tensor) for each, tensor in tensors]


A = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
OTHER_A = "model.layers.1.self_attn.q_proj.lora_A.default.weight"


def test_what_does_not_fit_an_adapter_is_refused_by_name():
    trainer, worker = (adapted("llama", LoRA(r=4), seed=seed) for seed in (1, 2))
    move_off_zero(trainer)
    tensors = copied(trainer, adapter_only=True)
    by_name = dict(tensors)
    swapped = [(n, by_name[{A: OTHER_A, OTHER_A: A}.get(n, n)]) for n, _ in tensors]
    flipped = changed(tensors, A, lambda tensor: torch.where(torch.arange(32) == 5, -tensor, tensor))
    digest = digest_of(tensors)
    for wrong, words in (
        (without(tensors, A), f"{A} did not come"),
        ([*tensors, ("model.extra", torch.zeros(2))], "model.extra is not this model's"),
        ([*tensors, tensors[3]], f"{tensors[3][0]} came twice"),
        (changed(tensors, A, lambda tensor: tensor.t()), rf"{A} is F32 \[32, 4\], the model's is F32 \[4, 32\]"),
        (changed(tensors, A, lambda tensor: tensor.bfloat16()), rf"{A} is BF16"),
        (swapped, f"what came is not what was sent: digest [0-9a-f]+, not {digest}"),
        (flipped, f"what came is not what was sent: digest [0-9a-f]+, not {digest}"),
    ):
        with pytest.raises(SyncFailed, match=f"version 7.*{words}"):
            load_into(worker, InMemory(wrong, adapter_only=True, digest=digest))
    load_into(worker, InMemory(tensors, adapter_only=True))
    assert torch.equal(logprobs(worker), logprobs(trainer))


def test_what_does_not_fit_a_whole_model_is_refused_by_name():
    trainer, worker = plain("qwen3_moe", 1), plain("qwen3_moe", 2)
    tensors = copied(trainer)
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(SyncFailed, match=f"{expert} did not come"):
        load_into(worker, InMemory(without(tensors, expert)))
    with pytest.raises(SyncFailed, match=r"lm_head.weight is F32 \[95, 32\], the model's is F32 \[96, 32\]"):
        load_into(worker, InMemory(changed(tensors, "lm_head.weight", lambda tensor: tensor[:95])))
    with pytest.raises(SyncFailed, match="is not this model's; are engine and policy of one recipe"):
        load_into(worker, InMemory(copied(plain("llama", 1))))
    load_into(worker, InMemory(tensors))
    assert torch.equal(logprobs(worker), logprobs(trainer))


class Deaf(torch.nn.Parameter):
    """Takes no new values: what an engine does whose copy of a weight is elsewhere."""

    def copy_(self, *_: Any) -> Any:
        return self

    def detach(self) -> Any:
        return self


def test_a_weight_that_does_not_take_its_values_shows_when_the_model_is_read_back():
    trainer, worker = plain("llama", 1), plain("llama", 2)
    norm: Any = worker.backbone.norm
    norm.weight = Deaf(norm.weight.data)
    with pytest.raises(SyncFailed, match=r"read back, does not hold model.norm.weight: digest"):
        load_into(worker, InMemory(copied(trainer)))
