"""From a trained model to a plain folder that transformers, PEFT and vLLM load, proved by reading it back.

Merged or fully trained models become a Hugging Face folder, adapters a PEFT folder; both carry the tokenizer, the chat
template that training used, and a generation config that stops where training taught the model to stop. The folder
appears under its name only after its logits, scores or embeddings were compared with the model's. Must not know
recipes or runs.
"""

from __future__ import annotations

import copy
import logging
import math
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
from burnish.model.export_weights import (
    computing_dtype,
    differing,
    free_bytes,
    is_first,
    read_folder,
    save_tensors,
    save_weights,
)
from burnish.model.heads.attach import sequence_classifier
from burnish.model.load import load_causal_lm, locate
from burnish.model.policy_model import one_document
from burnish.model.weight_files import WeightFiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from burnish.model.heads.pooling import Pooled
    from burnish.model.policy_model import PolicyModel
    from burnish.model.shards import Whole

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
        if self.what == "weight":
            return "re-read: every weight is bit for bit the trained one; the model has no room beside its own shards"
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
    """Writes `model` to the folder `to`, replacing what is there. Every rank calls it and returns the same; rank 0
    writes, and no rank holds more than one tensor beside its own shard.

    What was written is then read back by rank 0 as a whole model, and compared with what all ranks compute. Of several
    ranks, where that has no room there, each tensor is read back and compared instead.

    Args:
        merge: fold the adapter into the weights; a model without an adapter, or with new tokens, is always written
            whole.
        base_path: what the adapter is an adapter of: hub id or folder.
        chat_template: the template that training rendered with; by default the tokenizer's own.

    Raises:
        RunFailed: the folder, read back by transformers or PEFT, does not give the model's logits or scores; or rank 0
            could not write it, and raised an OSError.
    """
    to = Path(to)
    partial = to.with_name(f".{to.name}.partial")
    if is_first(model):
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
    if is_first(model):
        _replace(partial, to)
    if model.mesh is not None:
        model.mesh.barrier()
    return replace(exported, path=to)


def _export_causal(
    model: PolicyModel,
    tokenizer: PreTrainedTokenizerBase,
    to: Path,
    base: tuple[str, str] | None,
    chat_template: str | None,
) -> Exported:
    """A causal language model's folder, with the scores of other heads beside it where there are any."""
    first, kind = is_first(model), None
    if base is None:
        kind = type(model.causal_lm)
        config, tensors = _causal_weights(model)
        save_weights(model, kind, config, tensors, to)
    else:
        tensors = _write_adapter(model, to, *base)
    if first:
        _write_tokenizer(tokenizer, to, chat_template)
        _write_generation_config(model, tokenizer, to, chat_template)
    if model.heads:
        write_heads(model, to)
    if not _has_room(model):
        return prove_weights(model, tensors, to, kind)
    reread = None
    if first:
        reread = _reread_model(model, to) if base is None else _reread_adapter(model, to, *base)
    exported = _proved(model, to, "logit", compare(model, reread))
    if model.heads:
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
    first, kind = is_first(model), None
    if base is None:
        kind, tensors = sequence_classifier(model.hf_config), classifier_tensors(model)
        save_weights(model, kind, config, tensors, to)
    else:
        tensors = _write_adapter(model, to, *base)
        assert model.adapter is not None
        located = locate(ModelConfig(path=base[0], revision=base[1])) | model.adapter.load_arguments(_dtype_name(model))
    if first:
        if base is not None:
            config.save_pretrained(str(to))
        _write_tokenizer(tokenizer, to, chat_template)
    if not _has_room(model):
        return prove_weights(model, tensors, to, kind)
    reread = None
    if first:  # eager attention: transformers' SDPA path leaves out the soft cap of Gemma 2
        reread = open_classifier(str(to), dtype=computing_dtype(model), base=located, attention="eager")
        reread.to(model.head.weight.device)
    return _proved(model, to, "score", compare_scores(model, reread, config.get_text_config().pad_token_id))


def _export_embedding(
    model: PolicyModel, head: Pooled, tokenizer: PreTrainedTokenizerBase, to: Path, chat_template: str | None
) -> Exported:
    """The base model's folder, which sentence-transformers reads too. An adapter is merged: it has no form for one."""
    kind, tensors = type(model.backbone), backbone_tensors(model)
    save_weights(model, kind, copy.deepcopy(model.hf_config), tensors, to)
    write_modules(model, head, to)
    if is_first(model):
        _write_tokenizer(ending_tokenizer(tokenizer), to, chat_template)
    if not _has_room(model):
        return prove_weights(model, tensors, to, kind)
    return _proved(model, to, "embedding", compare_embeddings(model, tokenizer, to, computing_dtype(model)))


def prove_weights(model: PolicyModel, tensors: Mapping[str, Whole], folder: Path, kind: Any) -> Exported:
    """Reads every tensor of a written folder back and compares it, bit for bit, with the model's: one at a time, by all
    ranks together.

    Args:
        tensors: what was written.
        kind: the transformers class whose loader finds them there; None: they are an adapter's, under their own names.

    Raises:
        RunFailed: one is another, or is not there.
    """
    written = None
    if is_first(model):
        adapter = str(folder / "adapter_model.safetensors")
        written = read_folder(folder, kind) if kind is not None else WeightFiles([adapter]).tensors
    wrong = differing(model, tensors, written)
    if wrong:
        raise RunFailed(
            f"{folder}: the export does not hold the trained model's {wrong[0]}; it was left to be looked at"
        )
    return Exported(folder, 0.0, 0.0, "weight")


def _has_room(model: PolicyModel) -> bool:
    """Whether rank 0 can hold a whole model, and half as much again, beside its shard. One rank has held it before."""
    if model.mesh is None or model.mesh.world_size == 1:
        return True
    sizes = [math.prod(tensor.shape) for tensor in model.whole_tensors(merge=False).values()]
    needed = 1.5 * sum(sizes) * computing_dtype(model).itemsize
    return model.mesh.from_first(needed <= free_bytes(model.mesh.device))


def _proved(model: PolicyModel, folder: Path, what: str, compared: tuple[float, float]) -> Exported:
    difference, largest = compared if model.mesh is None else model.mesh.from_first(compared)
    if not difference <= TOLERANCE[computing_dtype(model)] * largest:
        raise RunFailed(
            f"{folder}: the export does not give the trained model's {what}s: they differ by {difference:.2g}, "
            f"the largest being {largest:.2g}; the folder was left there to be looked at"
        )
    return Exported(folder, difference, largest, what)


@torch.no_grad()
def compare(model: PolicyModel, other: Any) -> tuple[float, float]:
    """(largest absolute difference, largest logit) of the policy and a plain causal LM over a few rows of tokens.

    Args:
        other: on rank 0 alone; where it is None, the difference is 0.
    """
    generator = torch.Generator().manual_seed(0)
    was_training = model.training
    model.eval()
    difference = largest = 0.0
    for length in PROBE_LENGTHS:  # uncompiled: each length would be one more graph
        ids = torch.randint(0, model.vocab_size, (length,), generator=generator).to(model.head.weight.device)
        with torch.compiler.set_stance("force_eager"):
            ours = model.logits(one_document(ids)).float()
        theirs = other(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float() if other is not None else ours
        difference = max(difference, _largest(ours - theirs))
        largest = max(largest, _largest(ours))
    model.train(was_training)
    return difference, largest


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def write_model(model: PolicyModel, to: Path) -> None:
    """Weights and config.json, adapters merged."""
    save_weights(model, type(model.causal_lm), *_causal_weights(model), to)


def _causal_weights(model: PolicyModel) -> tuple[Any, dict[str, Whole]]:
    tensors, config = model.whole_tensors(merge=True), copy.deepcopy(model.hf_config)
    if model.is_tied:
        del tensors[f"{model.head_name}.weight"]
    else:  # also where an adapter changed one side of a tied pair
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config, tensors


def _write_adapter(model: PolicyModel, to: Path, base_path: str, base_revision: str) -> dict[str, Whole]:
    """Writes PEFT's two files; returns what is in the larger."""
    assert isinstance(model.adapter, LoRA)
    config = model.adapter.saved_config(model, base_path, base_revision)
    tensors = adapter_tensors(model)
    if classifier_head(model) is not None:
        config.task_type = "SEQ_CLS"
        config.modules_to_save = [*(config.modules_to_save or ()), "score"]
        tensors["base_model.model.score.weight"] = score_weight(model)
    if is_first(model):
        config.save_pretrained(str(to))
    save_tensors(tensors, to / "adapter_model.safetensors", model.mesh)
    if base_path.endswith(".gguf"):
        log.warning("PEFT cannot find the base of this adapter by itself, a GGUF file; `--merge` writes a whole model")
    return tensors


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


def _dtype_name(model: PolicyModel) -> str:
    return str(computing_dtype(model)).removeprefix("torch.")


def _replace(partial: Path, to: Path) -> None:
    """Puts `partial` in the place of `to`; at no moment is there half of either under that name."""
    old = to.with_name(f".{to.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if to.exists():
        os.replace(to, old)
    os.replace(partial, to)
    shutil.rmtree(old, ignore_errors=True)
