"""Where tokenizers are found, and what is refused."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from burnish.data.tokenizers.model import ModelTokenizer
from burnish.data.tokenizers.pretrained import Pretrained
from burnish.errors import ModelError
from burnish.hub import reachable
from tests import tiny_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_run.write_tokenizer(path)
    return path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub's address answers nothing."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    reachable.cache_clear()
    yield
    reachable.cache_clear()


def refused(path: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        ModelTokenizer().open(path)
    assert caught.value.where == path
    return caught.value


def test_the_models_own(folder: Path):
    tokenizer = ModelTokenizer().open(str(folder))
    encoded = tokenizer("red cat", return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == "red cat"
    assert encoded["offset_mapping"][-1][1] == len("red cat")
    assert tokenizer.chat_template == tiny_run.CHATML


def test_another_than_the_models(folder: Path, tmp_path: Path):
    tokenizer = Pretrained(path=str(folder)).open(str(tmp_path / "a-model-without-tokenizer"))
    assert len(tokenizer) == 320


def test_a_gguf_file(tmp_path: Path):
    import gguf

    path = tmp_path / "tiny.gguf"
    alphabet = ["<|endoftext|>", "a", "b", "ab", "\u0120", "\u0120a"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(alphabet)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 5)
    writer.add_token_merges(["a b", "\u0120 a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = ModelTokenizer().open(str(path))
    assert tokenizer.is_fast
    assert tokenizer.tokenize("ab a", add_special_tokens=False) == ["ab", "\u0120a"]


def test_missing_files_are_refused(tmp_path: Path):
    for path in (str(tmp_path / "none"), "./models/mine", "models/a/b", "model.gguf", "~/nothing-here"):
        error = refused(path)
        assert error.reason == "no such file or folder"
        assert "relative to the current folder" in error.cure


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    error = refused(str(tmp_path))
    assert error.reason.startswith("no tokenizer can be loaded: ")
    assert "tokenizer.json" in error.cure
    assert "{type: pretrained" in error.cure


@pytest.mark.parametrize("text", ["", '{"version"', '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, folder: Path, text: str):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "tokenizer.json").write_text(text)
    assert refused(str(broken)).reason.startswith("no tokenizer can be loaded: ")


def test_a_slow_tokenizer_is_refused(tmp_path: Path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    error = refused(str(tmp_path))
    assert error.reason.startswith("the tokenizer is not a fast one")
    assert "tokenizer.json" in error.cure


def test_an_unreachable_hub_is_refused_at_once(no_hub: None):
    started = time.monotonic()
    error = refused("nobody/no-such-model")
    assert error.reason == "no such folder, not in the hub's local cache, and the hub cannot be reached"
    assert "network" in error.cure
    # The hub's client alone would retry for 23 s a file.
    assert time.monotonic() - started < 10


def test_remote_code_needs_a_commit():
    with pytest.raises(ValidationError, match="needs `revision` to be the commit hash"):
        Pretrained(path="a/b", trust_remote_code=True)
    with pytest.raises(ValidationError, match="needs `revision` to be the commit hash"):
        Pretrained(path="a/b", trust_remote_code=True, revision="v1.0")
    assert Pretrained(path="a/b", trust_remote_code=True, revision=COMMIT).revision == COMMIT
