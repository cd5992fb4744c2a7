"""Talking to a model: one conversation, in this process, through transformers.

Loads what `burnish export` and every run write (a model folder or a PEFT adapter), with the chat template that lies
beside the weights.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any

from burnish.errors import ModelError, RunFailed
from burnish.model.adapters.lora import without_known_warnings
from burnish.model.config import ModelConfig
from burnish.model.load import locate

START_SECONDS = 120.0
"""Longest wait for one token before generation is given up."""


def exported_folder(path: str) -> str:
    """The folder to load for `path`: a run's export, or the path itself (a model folder or a hub id).

    Raises:
        ModelError: a run folder without an export.
    """
    folder = Path(path)
    if not (folder / "recipe.json").exists():
        return path
    if not (folder / "model").exists():
        raise ModelError("this run has no export yet", where=path, cure=f"burnish export {path} --to {path}/model")
    return str(folder / "model")


def refuse_silent(folder: Path) -> None:
    """Raises ModelError for the export of a reward or embedding model: it loads as a language model whose head is
    random, or an embedding that was trained for something else."""
    config, adapter = folder / "config.json", folder / "adapter_config.json"
    written = json.loads((adapter if adapter.exists() else config).read_text()) if config.exists() else {}
    kind = written.get("task_type") or (written.get("architectures") or [""])[0]
    if kind == "SEQ_CLS" or kind.endswith("ForSequenceClassification"):
        raise ModelError(
            f"this model ({kind}) scores answers and writes none",
            where=str(folder),
            cure="ask a language model; a reward model is asked from Python, see docs/reward.md",
        )
    if (folder / "modules.json").exists():  # sentence-transformers' mark
        raise ModelError(
            f"this model ({kind}) makes vectors of texts and writes none",
            where=str(folder),
            cure="ask a language model; this one is read by sentence-transformers",
        )


def load_chat(path: str) -> tuple[Any, Any]:
    """(tokenizer, model) of a run, a model folder or a hub id, ready to answer.

    Raises:
        ModelError: nothing loadable at `path`, or a tokenizer without a chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = exported_folder(path)
    if not Path(folder).is_dir():
        locate(ModelConfig(path=folder))  # a mistyped name is refused at once, not after a minute of asking the hub
    refuse_silent(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with without_known_warnings():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(reason, where=path, cure="give a model folder, a run or a hub id") from error
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template", where=path, cure="add chat_template.jinja to the folder")
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def stream_answer(path: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """The answer to one user message, piece by piece as it is generated; greedy where temperature is 0.

    Raises:
        ModelError: see `load_chat`.
        RunFailed: no token came within `START_SECONDS`.
    """
    import torch
    from transformers import TextIteratorStreamer

    tokenizer, model = load_chat(path)
    torch.manual_seed(seed)
    messages = [{"role": "user", "content": prompt}]
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=START_SECONDS)
    arguments = {**inputs, **sampling, "max_new_tokens": max_new_tokens, "streamer": streamer}
    failed: list[Exception] = []

    def generate() -> None:
        try:
            model.generate(**arguments)
        except Exception as error:  # raised below; left in this thread, nobody would end the wait for tokens
            failed.append(error)
            streamer.end()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker = Thread(target=generate, daemon=True)
        worker.start()
        yield from _until_silent(streamer)
        worker.join()
    if failed:
        raise failed[0]


def _until_silent(pieces: Iterator[str]) -> Iterator[str]:
    try:
        yield from pieces
    except Empty as error:
        raise RunFailed(f"no token within {START_SECONDS:.0f} s: the model is too slow on this machine") from error
