"""From a trained model to a plain folder that transformers, PEFT and vLLM load, proved by reading it back.

Merged or fully trained models become a Hugging Face folder, adapters a PEFT folder; both carry the tokenizer, the chat
template that training used, and a generation config that stops where training taught the model to stop. The folder
appears under its name only after its logits were compared with the model's. Must not know recipes or runs.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.errors import RunFailed
from burnish.model.adapters.lora import LoRA, adapter_tensors
from burnish.model.config import ModelConfig
from burnish.model.load import load_causal_lm, quiet
from burnish.model.policy_model import one_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.model.policy_model import PolicyModel

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference of a logit, relative to the largest logit, by the dtype of the weights. Merging rounds every
weight once: 2**-24 of it in float32, 2**-9 in bfloat16."""
PROBE_LENGTHS = (48, 17, 5)
"""Tokens of the rows that are compared."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how far its logits are from those of the model that was trained."""

    path: Path
    max_difference: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    """What to compare it with."""

    def __str__(self) -> str:
        return f"re-read: logits differ by at most {self.max_difference:.1e} (largest logit {self.largest_logit:.1f})"


def export(
    model: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    to: Path,
    *,
    merge: bool,
    base_path: str,
    base_revision: str = "main",
    chat_template: str | None = None,
) -> Exported:
    """Writes `model` to the folder `to`, replacing what is there.

    Args:
        merge: fold the adapter into the weights; a model without an adapter is always written whole.
        base_path: what the adapter is an adapter of: hub id or folder.
        chat_template: the template that training rendered with; by default the tokenizer's own.

    Raises:
        RunFailed: the folder, read back by transformers or PEFT, does not give the model's logits.
    """
    to = Path(to)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    whole = merge or model.adapter is None
    if whole:
        write_model(model, partial)
    else:
        _write_adapter(model, partial, base_path, base_revision)
    _write_tokenizer(tokenizer, partial, chat_template)
    _write_generation_config(model, tokenizer, partial, chat_template)
    reread = _reread_model(model, partial) if whole else _reread_adapter(model, partial, base_path, base_revision)
    difference, largest = compare(model, reread)
    dtype = _dtype(model)
    if not difference <= TOLERANCE[dtype] * largest:
        raise RunFailed(
            f"{partial}: the export does not give the trained model's logits: they differ by {difference:.2g}, "
            f"the largest being {largest:.2g}; the folder was left there to be looked at"
        )
    _replace(partial, to)
    return Exported(to, difference, largest)


@torch.no_grad()
def compare(model: PolicyModel, other: Any) -> tuple[float, float]:
    """(largest absolute difference, largest logit) of the policy and a plain causal LM over a few rows of tokens."""
    generator = torch.Generator().manual_seed(0)
    was_training = model.training
    model.eval()
    difference = largest = 0.0
    for length in PROBE_LENGTHS:  # uncompiled: each length would be one more graph
        ids = torch.randint(0, model.vocab_size, (length,), generator=generator).to(model.head.weight.device)
        with torch.compiler.set_stance("force_eager"):
            ours = model.logits(one_document(ids)).float()
        theirs = other(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()
        difference = max(difference, _largest(ours - theirs))
        largest = max(largest, _largest(ours))
    model.train(was_training)
    return difference, largest


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def write_model(model: PolicyModel, to: Path) -> None:
    """Weights and config.json, adapters merged.

    An empty model of the same class does the writing: it has the sizes of the file, no adapter and no padding, and
    transformers' own `save_pretrained` undoes what its loader did to the names.
    """
    dtype = _dtype(model)
    config = copy.deepcopy(model.hf_config)
    with torch.device("meta"):
        shell = type(model.causal_lm)._from_config(config, dtype=dtype, attn_implementation="eager")
    conversions = getattr(model.causal_lm, "_weight_conversions", None)
    if conversions is not None:
        shell._weight_conversions = conversions
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.hf_tensors(merge=True)
    }
    if model.is_tied:  # one tensor twice; cut rows are two views, which safetensors would take for two tensors
        del state[f"{model.head_name}.weight"]
    with quiet():
        shell.save_pretrained(to, state_dict=state)


def _write_adapter(model: PolicyModel, to: Path, base_path: str, base_revision: str) -> None:
    from safetensors.torch import save_file

    assert isinstance(model.adapter, LoRA)
    config = model.adapter.peft_config(model)
    config.base_model_name_or_path = str(Path(base_path).resolve()) if Path(base_path).exists() else base_path
    config.revision = base_revision
    config.inference_mode = True
    config.save_pretrained(str(to))
    save_file(adapter_tensors(model), to / "adapter_model.safetensors", metadata={"format": "pt"})
    if base_path.endswith(".gguf"):
        log.warning("PEFT cannot find the base of this adapter by itself, a GGUF file; `--merge` writes a whole model")


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, to: Path, chat_template: str | None) -> None:
    tokenizer.save_pretrained(to)
    if chat_template is not None:
        (to / "chat_template.jinja").write_bytes(chat_template.encode())


def _write_generation_config(
    model: PolicyModel, tokenizer: PreTrainedTokenizerBase, to: Path, chat_template: str | None
) -> None:
    """The base model's, with every token that ends an answer among `eos_token_id`."""
    config = copy.deepcopy(model.causal_lm.generation_config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    candidates = [*known, tokenizer.eos_token_id, end_of_turn_id(tokenizer, chat_template)]
    config.eos_token_id = list(dict.fromkeys(token for token in candidates if token is not None)) or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    # Saving is strict where loading is not: hub models that set a temperature without `do_sample` would be refused.
    sampling = (config.temperature, config.top_p, config.top_k)
    if any(value is not None for value in sampling):
        config.do_sample = True
    config.save_pretrained(str(to))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> int | None:
    """The special token that the chat template writes right after an assistant's answer; None without a template.

    >>> end_of_turn_id(smollm2_tokenizer, None)      # "<|im_end|>"
    2
    """
    if not (chat_template or tokenizer.chat_template):
        return None
    answer = "forty-two"
    conversation = [{"role": "user", "content": "six by seven?"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(conversation, chat_template=chat_template, tokenize=False)
    _, found, rest = str(text).rpartition(answer)
    if not found or not rest:
        return None
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)  # pyright: ignore[reportGeneralTypeIssues]


def _reread_model(model: PolicyModel, folder: Path) -> Any:
    # Eager attention: transformers' SDPA path leaves out the soft cap of Gemma 2.
    config = ModelConfig(path=str(folder), dtype=_dtype_name(model))  # pyright: ignore[reportArgumentType]
    return load_causal_lm(config, attention="eager").to(model.head.weight.device)


def _reread_adapter(model: PolicyModel, folder: Path, base_path: str, base_revision: str) -> Any:
    from peft import PeftModel

    config = ModelConfig(path=base_path, revision=base_revision, dtype=_dtype_name(model))  # pyright: ignore[reportArgumentType]
    base = load_causal_lm(config, attention="eager").to(model.head.weight.device)
    return PeftModel.from_pretrained(base, str(folder)).eval()


def _dtype(model: PolicyModel) -> torch.dtype:
    """What the model computes in; float32 masters of trained parameters are rounded to it, as they are in training."""
    return model.hf_config.dtype or torch.float32


def _dtype_name(model: PolicyModel) -> str:
    return str(_dtype(model)).removeprefix("torch.")


def _replace(partial: Path, to: Path) -> None:
    """Puts `partial` in the place of `to`; at no moment is there half of either under that name."""
    old = to.with_name(f".{to.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if to.exists():
        os.replace(to, old)
    os.replace(partial, to)
    shutil.rmtree(old, ignore_errors=True)
