"""Folders that vLLM reads: what its model is made from, and an adapter on its way into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.rollout.engine import EngineSetup
    from burnish.types import NewTokens


def located(setup: EngineSetup, folder: Path) -> dict[str, Any]:
    """vLLM's arguments for model and tokenizer. A model that no Hugging Face folder describes, fresh or grown by new
    tokens, is described in `folder`; so is every one's tokenizer, which vLLM reads only beside a `config.json`."""
    from burnish.model.load import load_config, locate

    model, new = setup.model, setup.new_tokens
    config = _described(load_config(model), new)
    config.save_pretrained(str(folder))
    arguments: dict[str, Any] = {"model": str(folder), "trust_remote_code": model.trust_remote_code}
    if model.path is not None and new is None and not model.path.endswith(".gguf"):
        place = locate(model)
        arguments |= {"model": place["pretrained_model_name_or_path"], "revision": place.get("revision")}
    if not (Path(setup.tokenizer_path) / "tokenizer_config.json").is_file():
        return arguments | {"skip_tokenizer_init": True}
    shutil.copytree(setup.tokenizer_path, folder, dirs_exist_ok=True)
    return arguments | {"tokenizer": str(folder)}


def _described(config: Any, new: NewTokens | None) -> Any:
    from transformers import AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is not None:  # else it is of the model's own code, and named in its file
        config.architectures = [kind.__name__]
    if new is not None:
        text = config.get_text_config()
        text.vocab_size = max(text.vocab_size, new.first + len(new.sources))
    if hasattr(config, "quantization_config"):  # a GGUF file's: what arrives is expanded
        del config.quantization_config
    return config


def write_adapter(lora: Any, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """A PEFT folder, as far as vLLM reads one.

    Args:
        lora: the recipe's adapter.
        tensors: under the names that the policy's model has for them.
    """
    from safetensors.torch import save_file

    from burnish.model.adapters.weights import peft_name

    named = {peft_name(name): tensor.contiguous() for name, tensor in tensors}
    layers = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in named})
    facts = {"r": lora.r, "lora_alpha": lora.lora_alpha, "use_rslora": lora.use_rslora, "target_modules": layers}
    folder.mkdir(exist_ok=True)
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **facts}))
