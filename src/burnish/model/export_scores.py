"""Trained scores in folders that others read, and the proof that they say what the model says.

One scoring head alone becomes transformers' `...ForSequenceClassification`, whole or as a PEFT adapter of task SEQ_CLS
whose `config.json` says how many scores there are. Beside the language model's head there is no such class: the causal
model's folder then gets `heads.safetensors` (float32) and `heads.json`. Must not know recipes or runs.
"""

from __future__ import annotations

import copy
import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from burnish.model.heads.attach import classifier
from burnish.model.load import quiet
from burnish.model.policy_model import one_document
from burnish.model.shards import Whole, reader, whole_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.model.policy_model import PolicyModel

log = logging.getLogger(__name__)

PROBE_LENGTHS = (48, 31, 17, 11, 8, 5, 3, 2)
"""Tokens of the documents that are compared, one by one and as one batch."""
HEADS_FILE, HEADS_INDEX = "heads.safetensors", "heads.json"


def classifier_head(model: PolicyModel) -> str | None:
    """The head that a sequence classifier has as its `score`, where that is what the model's export is; else None."""
    if model.makes_tokens:
        return None
    return classifier(model.heads, {name: model.get_submodule(name) for name in model.heads})


def classifier_config(model: PolicyModel, pad_token_id: int) -> Any:
    """The base model's configuration with number, names and kind of the scores."""
    name = classifier_head(model)
    assert name is not None
    head, config = model.heads[name], copy.deepcopy(model.hf_config)
    classes = head.classes()
    config.num_labels = head.num_outputs(config)
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {label: index for index, label in enumerate(classes)}
    config.problem_type = "single_label_classification" if classes else "regression"
    config.get_text_config().pad_token_id = pad_token_id
    return config


def classifier_tensors(model: PolicyModel) -> dict[str, Whole]:
    """All weights, adapters merged, under the names of the sequence classifier."""
    tensors = model.whole_tensors(merge=True)
    backbone = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] != model.head_name}
    return backbone | {"score.weight": score_weight(model)}


def score_weight(model: PolicyModel) -> Whole:
    """float32 [L, H] of the one scoring head, whatever its name."""
    ((name, weight),) = model.head_parameters().items()
    return Whole(partial(reader(model), weight), whole_shape(model, name, weight), weight.dtype)


def padded_tokenizer(tokenizer: PreTrainedTokenizerBase, last_ids: set[Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right with a token that no document ends with.

    transformers reads the score at the last token that is not the padding token, so where that is also the end of an
    answer (many tokenizers pad with `eos`) it would read the one before. Where documents may end with it, another
    special token pads: the one that begins documents, or any that the tokenizer has.

    Args:
        last_ids: tokens that a document may end with.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    special: Any = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    special += sorted(tokenizer.added_tokens_decoder)
    safe = [token for token in special if token is not None and token not in last_ids]
    if safe:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(safe[0])
    else:
        log.warning("every special token may end a document: score documents one by one, not in padded batches")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def open_classifier(
    folder: str, *, dtype: torch.dtype | None, base: dict[str, Any] | None = None, attention: str | None = None
) -> Any:
    """An exported classifier, read by transformers; with `base`, arguments that locate it, by PEFT on top of it.

    Args:
        attention: one of transformers' implementations; by default the one it would choose.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    with quiet():
        if base is None:
            model: Any = AutoModelForSequenceClassification.from_pretrained(folder, **options)
            return model.eval()
        from peft import PeftModel

        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(**base, config=config, **options)
        return PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def compare_scores(model: PolicyModel, other: Any, pad_token_id: int) -> tuple[float, float]:
    """(largest absolute difference, largest score) of the policy and a sequence classifier over a few documents, one by
    one and as one batch padded on the right.

    Args:
        other: on rank 0 alone; where it is None, the difference is 0.
    """
    (name,) = model.heads
    documents = _documents(model, {pad_token_id})
    ours = torch.stack([_scores(model, ids)[name][-1] for ids in documents])
    if other is None:
        return 0.0, ours.abs().max().item()
    batch = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in documents], batch_first=True)
    alone = torch.cat([other(input_ids=ids.unsqueeze(0), use_cache=False).logits for ids in documents])
    padded = other(input_ids=batch, attention_mask=mask, use_cache=False).logits
    difference = max((theirs.float() - ours).abs().max().item() for theirs in (alone, padded))
    return difference, ours.abs().max().item()


def write_heads(model: PolicyModel, to: Path) -> None:
    """`heads.safetensors` with `<name>.weight` [L, H], float32, to be multiplied with the last hidden state after the
    final norm; and `heads.json`: `{"quality": {"makes": "scores", "config": {"type": "scalar"}, "classes": []}}`. All
    ranks gather, rank 0 writes."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in model.head_tensors().items()}
    if model.mesh is not None and model.mesh.rank != 0:
        return
    save_file(tensors, to / HEADS_FILE)
    index = {
        name: {"makes": head.makes, "config": head.model_dump(mode="json"), "classes": list(head.classes())}
        for name, head in model.heads.items()
    }
    (to / HEADS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def compare_heads(model: PolicyModel, other: Any, folder: Path) -> tuple[float, float]:
    """(largest absolute difference, largest score) at every token of a few documents, of the policy and of the written
    heads on the hidden states of a plain causal LM.

    Args:
        other: on rank 0 alone; where it is None, the difference is 0.
    """
    from safetensors.torch import load_file

    written = load_file(folder / HEADS_FILE) if other is not None else {}
    difference = largest = 0.0
    for ids in _documents(model, set()):
        if other is None:
            _scores(model, ids)
            continue
        hidden_TH = other(input_ids=ids.unsqueeze(0), use_cache=False, output_hidden_states=True).hidden_states[-1][0]
        block = one_document(ids)
        for name, ours in _scores(model, ids).items():
            module: Any = model.heads[name].open(model.hf_config, name=name, seed=0)
            module.to(ids.device).load_state_dict(
                {n.partition(".")[2]: t for n, t in written.items() if n.startswith(f"{name}.")}
            )
            theirs = module(hidden_TH, block, torch.ones_like(block.loss_mask))
            difference = max(difference, (theirs - ours).abs().max().item())
            largest = max(largest, ours.abs().max().item())
    return difference, largest


def _scores(model: PolicyModel, ids: Tensor) -> dict[str, Tensor]:
    """Head name -> [T, L], at every token."""
    was_training = model.training
    model.eval()
    block = one_document(ids)
    with torch.compiler.set_stance("force_eager"):  # each length would be one more graph
        outputs = model(block, needs=frozenset({"scores"}), reads=torch.ones_like(block.loss_mask))
    model.train(was_training)
    return outputs.scores


def _documents(model: PolicyModel, without: set[int]) -> list[Tensor]:
    """Random tokens of `PROBE_LENGTHS`, none of them in `without`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([token for token in range(model.vocab_size) if token not in without])
    drawn = [ids[torch.randint(0, len(ids), (length,), generator=generator)] for length in PROBE_LENGTHS]
    return [document.to(model.head.weight.device) for document in drawn]
