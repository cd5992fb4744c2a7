"""What cannot be trained as asked is refused at load, with the place, the reason and the cure."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.errors import ModelError
from burnish.hub import reachable
from burnish.mesh import open_mesh
from burnish.model.config import ModelConfig
from burnish.model.load import load_causal_lm, load_config, load_model, require_packable
from burnish.model.policy_model import PolicyModel
from tests.tiny_models import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(path)
    return path


def refused(path: Any, **fields: Any) -> ModelError:
    with pytest.raises(ModelError) as caught, open_mesh("cpu") as mesh:
        load_model(ModelConfig(path=str(path), **fields), mesh, seed=0)
    return caught.value


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_every_weight_comes_from_the_folder(folder: Path) -> None:
    plain = tiny_model("llama").state_dict()
    with open_mesh("cpu") as mesh:
        model = load_model(ModelConfig(path=str(folder)), mesh, seed=0)
    loaded = dict(model.hf_tensors(merge=False))
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    assert load_config(ModelConfig(path=str(folder))).model_type == "llama"


def write_gguf(file: Path, plain: Any) -> None:
    """The weights of a tiny Llama as llama.cpp stores them: names of its own, query and key rows interleaved."""
    from gguf import GGUFWriter

    config = plain.config
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    renamed = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in plain.state_dict().items():
        for projection, count in heads.items():
            if projection in name:
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        for theirs, short in renamed.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_same_weights_without_its_marks(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", plain)
    with open_mesh("cpu") as mesh:
        model = load_model(ModelConfig(path=str(tmp_path / "tiny.gguf")), mesh, seed=0)
    loaded = dict(model.hf_tensors(merge=False))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.state_dict().items())
    assert not hasattr(model.hf_config, "quantization_config")
    model.causal_lm.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_missing_folder_names_its_neighbours(folder: Path) -> None:
    error = refused(folder.parent / "tiny-lama")
    assert (error.reason, error.where) == ("no such model", str(folder.parent / "tiny-lama"))
    assert error.cure == f"did you mean {folder}?"


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "model.gguf").reason == "no such model"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path).reason == "the folder has no config.json"


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    assert str(folder) in str(refused(folder))


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    change_config(folder, model_type="lamma")
    error = refused(folder)
    assert "lamma" in error.reason
    assert error.cure == "upgrade transformers, or name a model that this version knows"


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    change_config(folder, model_type="clip", architectures=["CLIPModel"])
    assert refused(folder).reason == "a clip model is not a causal language model"


def test_quantized_weights_are_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert refused(folder).reason == "the weights are quantized, and quantized weights cannot be trained"


def test_a_missing_weight_is_not_drawn_at_random(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    error = refused(folder)
    assert error.reason == (
        "the checkpoint does not hold this LlamaForCausalLM: model.layers.1.mlp.up_proj.weight is missing"
    )
    assert error.where == str(folder)


def test_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    assert "model.norm.weight is (31,), not (32,)" in refused(folder).reason


def test_a_weight_that_the_model_lacks_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, lambda tensors: tensors.update({"reward.weight": torch.ones(1, 32)}))
    with caplog.at_level(logging.WARNING, "burnish"):
        load_causal_lm(ModelConfig(path=str(folder)))
    assert "weights that LlamaForCausalLM does not have are not read: reward.weight" in caplog.text


def test_a_corrupt_weight_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    error = refused(folder)
    assert error.where == str(file)
    assert error.reason.startswith("a weight file is corrupt")


def test_no_weight_file_at_all_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(folder).reason


def test_remote_code_needs_a_commit() -> None:
    error = refused("some-org/some-model", trust_remote_code=True)
    assert error.where == "model.revision"
    assert "name the commit you have read" in error.cure


def test_an_unreachable_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reachable.cache_clear()
    started = time.monotonic()
    error = refused("nobody-here/nothing-there")
    reachable.cache_clear()
    assert time.monotonic() - started < 5
    assert error.where == "nobody-here/nothing-there"
    assert "the hub cannot be reached" in error.reason


def test_low_precision_on_a_cpu_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_mesh("cpu") as mesh, caplog.at_level(logging.WARNING, "burnish"):
        load_model(ModelConfig(path=str(folder), dtype="bfloat16"), mesh, seed=0)
    assert "bfloat16 on a CPU is 3 to 4 times slower than float32" in caplog.text


def test_models_that_leak_between_documents_may_not_be_packed() -> None:
    require_packable(PolicyModel.from_hf(tiny_model("llama")), 64)
    with pytest.raises(ModelError) as caught:
        require_packable(PolicyModel.from_hf(tiny_model("lfm2")), 64)
    assert caught.value.where == "data.packing"
    assert "packing: {type: none}" in caught.value.cure
