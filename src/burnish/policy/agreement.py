"""Whether a second model speaks the policy's tokens: proved from configurations, tokenizers and manifests, before any
weight is read. A teacher with other ids would teach nonsense, and the loss would fall all the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from burnish.errors import DataError, ModelError
from burnish.policy.fingerprint import weights_fingerprint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from burnish.losses.base import Loss
    from burnish.model.config import ModelConfig
    from burnish.types import NewTokens


@dataclass(frozen=True, slots=True)
class Student:
    """What the policy is made from, and the tokens that it speaks."""

    config: ModelConfig
    hf_config: Any
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    max_length: int
    """Tokens of the longest document."""
    new_tokens: NewTokens | None = None

    @property
    def vocab_size(self) -> int:
        """Ids of its distribution."""
        rows = self.hf_config.get_text_config().vocab_size
        return rows if self.new_tokens is None else max(rows, self.new_tokens.first + len(self.new_tokens.sources))

    @property
    def only_the_adapter_trains(self) -> bool:
        """Whether the same weights with the adapter off are the model before its first step: rows of new tokens are
        trained beside an adapter."""
        return self.config.adapter is not None and self.new_tokens is None

    def facts(self) -> dict[str, Any]:
        """JSON: what a second model's answers about its documents depend on, besides that model."""
        template = self.chat_template or ""
        return {
            "tokenizer": fingerprint(self.tokenizer),
            "chat_template": hashlib.sha256(template.encode()).hexdigest(),
            "vocab_size": self.vocab_size,
        }


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of every token with its id, added ones included, and of the codes of items where it has some."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([vocabulary, tokenizer.init_kwargs.get("items")]).encode()).hexdigest()


def second_config(student: Student, path: str | None, revision: str) -> ModelConfig:
    """How a second model is loaded: as the policy is, but for what trains or changes it. `path` None: the policy's own
    model, as it is before the first step."""
    own = student.config
    shared = own.model_dump(include={"dtype", "attention", "compile", "pad_vocab_to", "projection_chunk"})
    which = own.model_dump(include={"path", "config", "revision", "trust_remote_code"})
    return type(own).model_validate(shared | (which if path is None else {"path": path, "revision": revision}))


def agree(student: Student, path: str, revision: str, *, top_k: int = 0, losses: Sequence[Loss] = ()) -> str:
    """A line about the model at `path` if it speaks the student's tokens.

    It does where every token of the student's tokenizer has the same id in its own, and each of the student's ids is
    one of its rows. What it has beyond, tokens or padding, is then outside of its distribution.

    Args:
        top_k: how many of its tokens are asked for.
        losses: those that compare hidden states need the student's, or a head's outputs, to be as wide as its own.

    Raises:
        ModelError: it is not there, does not, or has too few positions or another width.
    """
    from transformers import AutoTokenizer

    from burnish.model.load import load_config, locate
    from burnish.model.positions import require_positions

    config = second_config(student, path, revision)
    hf_config = load_config(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**locate(config))
    except (OSError, ValueError) as error:
        raise ModelError(
            "its tokenizer cannot be read, and without it nobody knows what its ids stand for",
            where=path,
            cure="put its tokenizer files beside its weights",
        ) from error
    _require_same_tokens(student.tokenizer, tokenizer, path)
    require_positions(config, hf_config, student.max_length)
    text = hf_config.get_text_config()
    if text.vocab_size < student.vocab_size:
        raise ModelError(
            f"it has {text.vocab_size:,} ids, the student has {student.vocab_size:,}: of the last ones it says nothing",
            where=path,
            cure="name a model with at least as many embedding rows as the student's",
        )
    singles = [single for loss in losses for single in loss.singles()]
    for single in singles:
        if "teacher_hidden" in single.asks:
            _require_width(student, single, text.hidden_size, path)
    if top_k > student.vocab_size:
        raise ModelError(f"top_k of {top_k:,} is more than the {student.vocab_size:,} ids there are", path, "lower it")
    beyond = text.vocab_size - student.vocab_size
    left_out = f"; its {beyond:,} ids beyond the student's are left out of its distribution" if beyond else ""
    return f"{path}: {hf_config.model_type}, the same {len(student.tokenizer):,} tokens{left_out}"


def _require_width(student: Student, loss: Loss, width: int, path: str) -> None:
    """Raises ModelError where what `loss` sets against hidden states of `width` entries has another number of them."""
    own, parts = student.hf_config.get_text_config().hidden_size, student.config.head.parts()
    if not loss.heads() and own != width:
        raise ModelError(
            f"its hidden states have {width} entries, the student's {own}",
            where=path,
            cure=f"add a head of {width} outputs to the model, and name it with the loss's `head:`",
        )
    for name in loss.heads():
        outputs = parts[name].num_outputs(student.hf_config)
        if outputs != width:
            raise ModelError(
                f"the head `{name}` has {outputs} outputs, and the hidden states of {path} have {width} entries",
                where="model.head",
                cure=f"set its size to {width}",
            )


def _require_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, path: str) -> None:
    vocabulary = theirs.get_vocab()
    other = {token: i for token, i in ours.get_vocab().items() if vocabulary.get(token) != i}
    if not other:
        return
    token, i = min(other.items(), key=lambda pair: pair[1])
    has = f"id {vocabulary[token]} there" if token in vocabulary else "not there"
    raise ModelError(
        f"it has another tokenizer: {len(other):,} of {len(ours):,} tokens have another id there or are unknown, the "
        f"first is {token!r}, {i} here and {has}",
        where=path,
        cure="name a model of the same family, whose tokenizer has the same ids; or train on what the other one "
        "writes, with `workflow: {type: sft}`",
    )


def teacher_facts(student: Student, path: str, revision: str, top_k: int) -> dict[str, Any]:
    """JSON: what a teacher's cache is of."""
    described = {"path": path, "revision": revision, "weights": weights_fingerprint(path)}
    return {**student.facts(), "top_k": top_k, "teacher": described}


_NAMES = {
    "tokenizer": "another tokenizer",
    "chat_template": "another chat template",
    "vocab_size": "another vocabulary size",
    "top_k": "another top_k",
}


def agree_cache(student: Student, folder: Path, top_k: int, path: str | None, revision: str) -> str:
    """A line about a teacher's cache if it is of this student's tokens, and by the teacher at `path`, if one is named.

    Raises:
        DataError: it is not there, corrupt, or was written for another tokenizer, template, vocabulary, `top_k` or
            teacher, or for other weights of that teacher.
    """
    from burnish.policy.answers import read_manifest

    cure = "write it for this recipe: `burnish cache-teacher RECIPE`"
    facts = read_manifest(folder, cure)
    found, wanted = facts["of"], {**student.facts(), "top_k": top_k}
    if "teacher" not in found:
        raise DataError("holds what a reference said, not a teacher", str(folder), cure)
    wrong = [f"{what} ({_short(found[key])}, not {_short(wanted[key])})" for key, what in _NAMES.items()
             if found[key] != wanted[key]]  # fmt: skip
    teacher = found["teacher"]
    if path is not None and teacher["path"] != path:
        wrong.append(f"another teacher ({teacher['path']}, not {path})")
    elif path is not None and teacher["revision"] != revision:
        wrong.append(f"another revision of the teacher ({teacher['revision']}, not {revision})")
    elif path is not None and weights_fingerprint(path) not in (None, teacher["weights"]):
        wrong.append(f"other weights than {path} holds now")
    if wrong:
        raise DataError(f"the cache was written for {' and '.join(wrong)}", str(folder), cure)
    return f"{folder}: the {top_k} likeliest tokens of {teacher['path']} for {facts['num_documents']:,} documents"


def _short(value: Any) -> str:
    return value[:8] if isinstance(value, str) else str(value)
