"""A tokenizer of one's choice, and how any Hugging Face tokenizer is opened."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from burnish.data.tokenizers.base import TextTokenizer
from burnish.errors import ModelError
from burnish.hub import reachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pretrained(TextTokenizer):
    """Another tokenizer than the model's own, for example one with a chat template."""

    type: Literal["pretrained"] = "pretrained"
    path: str
    """A hub id, a folder with tokenizer files, or a `.gguf` file."""
    revision: str = "main"
    """Commit hash, branch or tag on the hub."""
    trust_remote_code: bool = False
    """Run Python code that ships with the tokenizer; only from the commit that `revision` names."""

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError("trust_remote_code needs `revision` to be the commit hash (40 hex digits) you have read")
        return self

    def open(self, model_path: str | None, revision: str = "main") -> PreTrainedTokenizerBase:
        return open_tokenizer(self.path, self.revision, trust_remote_code=self.trust_remote_code)


def open_tokenizer(path: str, revision: str = "main", *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer at `path`: a folder, a `.gguf` file or a hub id; without a network, the hub's local cache.

    Raises:
        ModelError: there is none, or it is not a fast one, which alone knows the characters of each token.
    """
    from transformers import AutoTokenizer

    local = os.path.expanduser(path)
    options: dict[str, Any]
    if os.path.isfile(local):
        folder, name = os.path.split(local)
        place, options = folder or ".", {"gguf_file": name, "local_files_only": True}
    elif os.path.isdir(local):
        place, options = local, {"trust_remote_code": trust_remote_code, "local_files_only": True}
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) or path.endswith(".gguf"):
        raise ModelError("no such file or folder", path, f"paths are relative to the current folder, {os.getcwd()}")
    else:
        options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": not reachable()}
        place = path
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:  # broken files make the Rust part raise bare Exceptions, missing keys KeyErrors
        raise _cannot_open(path, place, error, offline=place == path and options["local_files_only"]) from error
    if not tokenizer.is_fast:
        cure = "use one with a tokenizer.json: `data.tokenizer: {type: pretrained, path: ...}`"
        raise ModelError("the tokenizer is not a fast one, so its tokens cannot be matched to characters", path, cure)
    return tokenizer


def _cannot_open(path: str, place: str, error: Exception, *, offline: bool) -> ModelError:
    if offline and not os.path.exists(place):
        reason = "no such folder, not in the hub's local cache, and the hub cannot be reached"
        return ModelError(reason, path, "check the name and the network, or give a folder with tokenizer files")
    said = str(error).strip().split("\n")[0] or type(error).__name__
    cure = "a folder needs tokenizer.json and tokenizer_config.json, or name a tokenizer elsewhere with "
    return ModelError(f"no tokenizer can be loaded: {said}", path, cure + "`data.tokenizer: {type: pretrained, ...}`")
