"""From a trained model to a plain folder that transformers, PEFT and vLLM load, proved by reading it back.

Merged or fully trained models become a Hugging Face folder, adapters a PEFT folder; both carry the tokenizer, the chat
template that training used, and a generation config that stops where training taught the model to stop. The folder
appears under its name only after its logits, scores or embeddings were compared with the model's. Must not know
recipes or runs.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.errors import RunFailed
from burnish.model.adapters.lora import LoRA, without_known_warnings
from burnish.model.adapters.weights import adapter_tensors
from burnish.model.config import ModelConfig
from burnish.model.export_embedding import (
    backbone_tensors,
    compare_embeddings,
    embedding_head,
    ending_tokenizer,
    write_modules,
)
from burnish.model.export_scores import (
    classifier_config,
    classifier_head,
    classifier_tensors,
    compare_heads,
    compare_scores,
    open_classifier,
    padded_tokenizer,
    score_weight,
    write_heads,
)
from burnish.model.heads.attach import sequence_classifier
from burnish.model.load import load_causal_lm, locate, quiet
from burnish.model.policy_model import one_document

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from burnish.model.heads.pooling import Pooled
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
    """Largest absolute difference of a logit or score."""
    largest_logit: float
    """What to compare it with."""
    what: str = "logit"
    """Which of the two."""

    def __str__(self) -> str:
        largest = f"{self.largest_logit:.1f}" if self.largest_logit > 1 else f"{self.largest_logit:.1e}"
        return f"re-read: {self.what}s differ by at most {self.max_difference:.1e} (largest {self.what} {largest})"


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
        merge: fold the adapter into the weights; a model without an adapter, or with new tokens, is always written
            whole.
        base_path: what the adapter is an adapter of: hub id or folder.
        chat_template: the template that training rendered with; by default the tokenizer's own.

    Raises:
        RunFailed: the folder, read back by transformers or PEFT, does not give the model's logits or scores.
    """
    to = Path(to)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # An adapter of a model with more tokens than its base has would load on nothing.
    whole = merge or model.adapter is None or model.new_tokens is not None
    base = None if whole else (base_path, base_revision)
    if classifier_head(model) is not None:
        exported = _export_classifier(model, tokenizer, partial, base, chat_template)
    elif (head := embedding_head(model)) is not None:
        exported = _export_embedding(model, head, tokenizer, partial, chat_template)
    else:
        exported = _export_causal(model, tokenizer, partial, base, chat_template)
    _replace(partial, to)
    return replace(exported, path=to)


def _export_causal(
    model: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    to: Path,
    base: tuple[str, str] | None,
    chat_template: str | None,
) -> Exported:
    """A causal language model's folder, with the scores of other heads beside it where there are any."""
    if base is None:
        write_model(model, to)
    else:
        _write_adapter(model, to, *base)
    _write_tokenizer(tokenizer, to, chat_template)
    _write_generation_config(model, tokenizer, to, chat_template)
    reread = _reread_model(model, to) if base is None else _reread_adapter(model, to, *base)
    exported = _proved(model, to, "logit", compare(model, reread))
    if model.heads:
        write_heads(model, to)
        _proved(model, to, "score", compare_heads(model, reread, to))
    return exported


def _export_classifier(
    model: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    to: Path,
    base: tuple[str, str] | None,
    chat_template: str | None,
) -> Exported:
    """A sequence classifier's folder, or an adapter's whose `config.json` says what to build the classifier from."""
    ends: set[Any] = {tokenizer.eos_token_id, end_of_turn_id(tokenizer, chat_template)}  # pyright: ignore[reportUnhashable]
    if tokenizer.eos_token_id is not None:  # a text ends with it in training, and the score is read there
        tokenizer = ending_tokenizer(tokenizer)
    tokenizer = padded_tokenizer(tokenizer, ends)
    config, located = classifier_config(model, tokenizer.pad_token_id), None  # pyright: ignore[reportArgumentType]
    if base is None:
        save_weights(model, sequence_classifier(model.hf_config), config, classifier_tensors(model), to)
    else:
        _write_adapter(model, to, *base)
        config.save_pretrained(str(to))
        assert model.adapter is not None
        located = locate(ModelConfig(path=base[0], revision=base[1])) | model.adapter.load_arguments(_dtype_name(model))
    _write_tokenizer(tokenizer, to, chat_template)
    # Eager attention: transformers' SDPA path leaves out the soft cap of Gemma 2.
    reread = open_classifier(str(to), dtype=_dtype(model), base=located, attention="eager")
    reread.to(model.head.weight.device)
    return _proved(model, to, "score", compare_scores(model, reread, config.get_text_config().pad_token_id))


def _export_embedding(
    model: PolicyModel, head: Pooled, tokenizer: PreTrainedTokenizerBase, to: Path, chat_template: str | None
) -> Exported:
    """The base model's folder, which sentence-transformers reads too. An adapter is merged: it has no form for one."""
    save_weights(model, type(model.backbone), copy.deepcopy(model.hf_config), backbone_tensors(model), to)
    write_modules(model, head, to)
    _write_tokenizer(ending_tokenizer(tokenizer), to, chat_template)
    return _proved(model, to, "embedding", compare_embeddings(model, tokenizer, to, _dtype(model)))


def _proved(model: PolicyModel, folder: Path, what: str, compared: tuple[float, float]) -> Exported:
    difference, largest = compared
    if not difference <= TOLERANCE[_dtype(model)] * largest:
        raise RunFailed(
            f"{folder}: the export does not give the trained model's {what}s: they differ by {difference:.2g}, "
            f"the largest being {largest:.2g}; the folder was left there to be looked at"
        )
    return Exported(folder, difference, largest, what)


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
    """Weights and config.json, adapters merged."""
    state, config = dict(model.hf_tensors(merge=True)), copy.deepcopy(model.hf_config)
    if model.is_tied:  # one tensor twice; cut rows are two views, which safetensors would take for two tensors
        del state[f"{model.head_name}.weight"]
    else:  # also where an adapter changed one side of a tied pair
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    save_weights(model, type(model.causal_lm), config, state, to)


def save_weights(model: PolicyModel, kind: Any, config: Any, tensors: Mapping[str, Tensor], to: Path) -> None:
    """`tensors` as the folder of a transformers class.

    An empty model of that class does the writing: it has the sizes of the file, no adapter and no padding, and
    transformers' own `save_pretrained` undoes what its loader did to the names.
    """
    dtype = _dtype(model)
    with torch.device("meta"):
        shell = kind._from_config(config, dtype=dtype, attn_implementation="eager")
    conversions = getattr(model.causal_lm, "_weight_conversions", None)
    if conversions is not None:
        shell._weight_conversions = conversions
    state = {n: (t.to(dtype) if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    with quiet():
        shell.save_pretrained(to, state_dict=state)


def _write_adapter(model: PolicyModel, to: Path, base_path: str, base_revision: str) -> None:
    from safetensors.torch import save_file

    assert isinstance(model.adapter, LoRA)
    config = model.adapter.peft_config(model)
    config.base_model_name_or_path = str(Path(base_path).resolve()) if Path(base_path).exists() else base_path
    config.revision = base_revision
    config.inference_mode = True
    tensors = adapter_tensors(model)
    if classifier_head(model) is not None:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [*(config.modules_to_save or ()), "score"]
        tensors["base_model.model.score.weight"] = score_weight(model)
    config.save_pretrained(str(to))
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
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

    name = _dtype_name(model)
    config = ModelConfig(path=base_path, revision=base_revision, dtype=name, adapter=model.adapter)  # pyright: ignore[reportArgumentType]
    base = load_causal_lm(config, attention="eager").to(model.head.weight.device)
    with without_known_warnings():
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
