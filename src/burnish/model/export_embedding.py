"""Trained vectors in a folder that others read, and the proof that they are the model's.

The folder is transformers' base model (`AutoModel`), with the files by which sentence-transformers knows how to go on:
`modules.json`, `1_Pooling`, and, where there is one, a linear map in `Dense` and a `Normalize`. They are written in the
form that its versions 2 to 6 read. The tokenizer there ends a text as training did. Must not know recipes or runs.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from burnish.model.heads.pooling import Pooled
from burnish.model.load import quiet
from burnish.model.policy_model import one_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.model.policy_model import PolicyModel
    from burnish.model.shards import Whole

PROBE_TEXTS = ("a", "two words", "In which year was it, and why?", "words " * 40)
"""What is tokenised and embedded, one by one and as one batch."""


def embedding_head(model: PolicyModel) -> Pooled | None:
    """The head that pools, where that is all that the model has; else None."""
    if len(model.heads) != 1 or model.makes_tokens:
        return None
    head = model.get_submodule(next(iter(model.heads)))
    return head if isinstance(head, Pooled) else None


def backbone_tensors(model: PolicyModel) -> dict[str, Whole]:
    """All weights of the backbone, adapters merged, under the names of the base model."""
    prefix = f"{model.base_name}."
    return {n.removeprefix(prefix): t for n, t in model.whole_tensors(merge=True).items() if n.startswith(prefix)}


def ending_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, made to write what documents were trained with: its text between the token that begins documents,
    where it writes one, and the one that ends them. It pads on the right, where positions begin at 0."""
    tokenizer = copy.deepcopy(tokenizer)
    begins = _begins(tokenizer)
    tokenizer.add_bos_token = bool(begins)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_eos_token = True  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def write_modules(model: PolicyModel, head: Pooled, to: Path) -> None:
    """What sentence-transformers reads beside the base model. All ranks gather, rank 0 writes."""
    from safetensors.torch import save_file

    tensors = list(model.head_tensors().values())
    if model.mesh is not None and model.mesh.rank != 0:
        return
    hidden_size, config = model.hf_config.get_text_config().hidden_size, head.config
    modes = {"cls_token": False, "max_tokens": False, "mean_sqrt_len_tokens": False, "weightedmean_tokens": False}
    modes |= {"mean_tokens": config.pooling == "mean", "lasttoken": config.pooling == "last"}
    folders = ["", "1_Pooling"]
    pooling = {f"pooling_mode_{name}": chosen for name, chosen in modes.items()}
    _write(to / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden_size, **pooling})
    if head.weight is not None:
        folders.append("2_Dense")
        (tensor,) = tensors
        identity = "torch.nn.modules.linear.Identity"
        sizes = {"in_features": hidden_size, "out_features": tensor.shape[0], "bias": False}
        _write(to / "2_Dense" / "config.json", sizes | {"activation_function": identity})
        save_file({"linear.weight": tensor.contiguous()}, to / "2_Dense" / "model.safetensors")
    if config.normalize:
        folders.append(f"{len(folders)}_Normalize")  # has no file, and so no folder
    kinds = [name.partition("_")[2] or "Transformer" for name in folders]
    modules = [
        {"idx": index, "name": str(index), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for index, (folder, kind) in enumerate(zip(folders, kinds, strict=True))
    ]
    _write(to / "modules.json", modules)
    _write(to / "sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": False})
    similarity = "cosine" if config.normalize else "dot"
    _write(to / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": similarity})


@torch.no_grad()
def compare_embeddings(
    model: PolicyModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> tuple[float, float]:
    """(largest absolute difference, largest entry) of the vectors of a few texts: the model's, over what documents were
    trained with, and those that the folder's own files give by transformers, one by one and as one padded batch. Rank 0
    alone reads the folder; the difference is 0 on the others."""
    from transformers import AutoTokenizer

    device = model.head.weight.device
    begins = _begins(tokenizer)
    texts = tokenizer(list(PROBE_TEXTS), add_special_tokens=False).input_ids
    trained = [[*begins, *ids, tokenizer.eos_token_id] for ids in texts]
    ours = torch.stack([_embedding(model, torch.tensor(ids, device=device)) for ids in trained])

    if model.mesh is not None and model.mesh.rank != 0:
        return 0.0, ours.abs().max().item()
    reread, backbone = AutoTokenizer.from_pretrained(folder), _open_backbone(folder, dtype).to(device)
    difference = 0.0
    for batch in [[text] for text in PROBE_TEXTS], [list(PROBE_TEXTS)]:
        theirs = []
        for rows in batch:
            inputs = reread(rows, padding=True, return_tensors="pt").to(device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            theirs.append(_by_files(folder, states.float(), mask))
        difference = max(difference, (torch.cat(theirs) - ours).abs().max().item())
    return difference, ours.abs().max().item()


def _by_files(folder: Path, states_BTH: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, E] as `modules.json` says, without sentence-transformers."""
    from safetensors.torch import load_file

    made = states_BTH
    for module in json.loads((folder / "modules.json").read_text())[1:]:
        path, kind = folder / module["path"], module["type"].rpartition(".")[2]
        if kind == "Pooling" and json.loads((path / "config.json").read_text())["pooling_mode_mean_tokens"]:
            made = (states_BTH * mask_BT.unsqueeze(2)).sum(1) / mask_BT.sum(1, keepdim=True)
        elif kind == "Pooling":
            made = states_BTH[torch.arange(len(states_BTH), device=mask_BT.device), mask_BT.sum(1) - 1]
        elif kind == "Dense":
            made = made @ load_file(path / "model.safetensors")["linear.weight"].to(made).T
        else:
            made = normalize(made, dim=1)
    return made


def _open_backbone(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    # Eager attention: transformers' SDPA path leaves out the soft cap of Gemma 2.
    with quiet():
        return AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def _embedding(model: PolicyModel, ids: Tensor) -> Tensor:
    """[E] of one document."""
    was_training = model.training
    model.eval()
    block = one_document(ids)
    with torch.compiler.set_stance("force_eager"):  # each length would be one more graph
        outputs = model(block, needs=frozenset({"embeddings"}), reads=block.loss_mask)
    model.train(was_training)
    assert outputs.embeddings is not None
    return outputs.embeddings[0].float()


def _begins(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a text begins with, where the tokenizer writes one."""
    first = tokenizer("").input_ids[:1]
    return [token for token in first if token == tokenizer.bos_token_id]


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
