"""From the `model:` block of a recipe to a model ready to train: a hub id, a Hugging Face folder or a `.gguf` file.

Whatever cannot be trained as asked is refused here, with the reason: a weight that is missing would be drawn at random
and trained as if it were the model's own, and nobody would notice until the evaluation. Must not know data or losses.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.errors import ModelError
from burnish.model.fresh import draw, fresh_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from burnish.mesh import Mesh
    from burnish.model.config import ModelConfig
    from burnish.model.policy_model import PolicyModel
    from burnish.types import NewTokens

log = logging.getLogger(__name__)


def locate(config: ModelConfig) -> dict[str, Any]:
    """Where the model is, as arguments of every `from_pretrained` of transformers.

    Raises:
        ModelError: nothing is there, the hub does not know it, or the hub does not answer and no copy is cached.
    """
    assert config.path is not None, "a fresh model is nowhere"
    if config.path.endswith(".gguf"):
        file = Path(config.path).expanduser()
        if not file.is_file():
            raise _missing(config.path)
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                "the folder has no config.json", where=config.path, cure="name a Hugging Face model folder"
            )
        return {"pretrained_model_name_or_path": str(folder), "trust_remote_code": config.trust_remote_code}
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.path):
        raise _missing(config.path)
    if config.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", config.revision):
        raise ModelError(
            "trust_remote_code runs whatever the repository holds at the moment of loading",
            where="model.revision",
            cure="name the commit you have read: `revision: <40 hex digits>`",
        )
    return {
        "pretrained_model_name_or_path": config.path,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": not _reachable_or_cached(config),
    }


def load_config(config: ModelConfig) -> Any:
    """The model's Hugging Face configuration, without its weights.

    Raises:
        ModelError: there is none, or it is not that of a causal language model known to transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _refusals(config):
        hf_config = fresh_config(config) if config.path is None else AutoConfig.from_pretrained(**locate(config))
    remote = "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})
    if type(hf_config) not in AutoModelForCausalLM._model_mapping and not (remote and config.trust_remote_code):
        raise ModelError(
            f"a {hf_config.model_type} model is not a causal language model",
            where=config.name,
            cure="name a decoder-only language model",
        )
    if getattr(hf_config, "quantization_config", None) is not None and not config.name.endswith(".gguf"):
        raise ModelError(
            "the weights are quantized, and quantized weights cannot be trained",
            where=config.name,
            cure="name the repository of the unquantized weights",
        )
    return hf_config


def load_model(
    config: ModelConfig, mesh: Mesh, *, seed: int, frozen: bool = False, new_tokens: NewTokens | None = None
) -> PolicyModel:
    """The model on this rank's device: adapter, recomputation, compilation and sharding applied as the recipe says.

    With several ranks the weights are deferred until it is cut, and each rank reads its own shard (see `deferred.py`).
    A `.gguf` file, pickled weights, four-bit weights and a fresh model are first made whole on every rank.

    Args:
        seed: adapters and a fresh model are drawn from it; weights that exist are read.
        frozen: nothing of it trains; a second model, without adapter.
        new_tokens: what the vocabulary is to have beside the model's own tokens.

    Raises:
        ModelError: see `load_config`; also weights that are missing, corrupt or of another shape, attention that cannot
            be replaced, logits that are not reproduced, adapter targets that do not exist, heads that do not fit, and
            layers that cannot be cut as `mesh` says.
    """
    import torch

    from burnish.model.context_parallel import verify_cut, whole_rows
    from burnish.model.deferred import is_deferred
    from burnish.model.heads.attach import open_heads
    from burnish.model.parallel import prepare
    from burnish.model.policy_model import PolicyModel, verify_head
    from burnish.model.vocabulary import grow

    if config.dtype != "float32" and mesh.device.type == "cpu":
        log.warning("%s on a CPU is 3 to 4 times slower than float32; use `model.dtype: float32` here", config.dtype)
    if config.head.type != "lm":
        open_heads(config.head, load_config(config), seed=seed)  # refuses what does not fit, before weights are read
    causal_lm = load_causal_lm(config, seed=seed, deferred=mesh.world_size > 1)
    if new_tokens is not None:
        grow(causal_lm, new_tokens)
    causal_lm = causal_lm.to(mesh.device)
    model = PolicyModel.from_hf(
        causal_lm,
        attention=config.attention,
        projection_chunk=config.projection_chunk,
        pad_vocab_to=config.pad_vocab_to,
    )
    model.new_tokens = new_tokens
    deferred = is_deferred(model.head.weight)
    if not deferred:
        verify_head(model)
    if frozen:
        model.requires_grad_(False)
    prepare(model, config, mesh, seed=seed, new_tokens=None if frozen else new_tokens)
    if deferred:  # there is nothing to compute with before; every rank takes part
        with torch.compiler.set_stance("force_eager"), whole_rows(model):
            verify_head(model)
    verify_cut(model)
    return model


def load_causal_lm(config: ModelConfig, *, attention: str | None = None, seed: int = 0, deferred: bool = False) -> Any:
    """The plain transformers model, every weight read from the checkpoint, in `config.dtype`, on the CPU.

    Args:
        attention: one of transformers' implementations (`eager`, `sdpa`); by default the one it would choose.
        seed: the weights of a fresh model are drawn from it.
        deferred: read no weight now, where the files allow it: see `deferred.py`.

    Raises:
        ModelError: weights are missing, corrupt or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from burnish.model.materialise import open_deferred
    from burnish.model.weight_files import find_weight_files

    hf_config = load_config(config)
    if config.path is None:
        return draw(hf_config, dtype=config.dtype, attention=attention, seed=seed)
    located = locate(config)
    further = config.adapter.load_arguments(config.dtype) if config.adapter is not None else {}
    with _refusals(config), quiet():
        # bitsandbytes rounds whole weights, so what needs arguments is never deferred.
        files = find_weight_files(located) if deferred and not further else None
        if files is not None:
            loaded = open_deferred(hf_config, located, files, dtype=config.dtype, attention=attention)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **located,
                config=hf_config,
                dtype=getattr(torch, config.dtype),
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with names and shapes
                **further,
            )
    causal_lm, found = loaded
    _refuse_other_weights(config, causal_lm, found)
    if getattr(causal_lm, "is_quantized", False):
        _drop_quantizer_marks(causal_lm)
    return causal_lm


def _refuse_other_weights(config: ModelConfig, causal_lm: Any, found: Mapping[str, Any]) -> None:
    """Raises ModelError unless the files hold every weight of the model; says which of theirs are not read.

    Args:
        found: transformers' loading info.
    """
    wrong = [f"{name} is {tuple(has)}, not {tuple(needs)}" for name, has, needs in sorted(found["mismatched_keys"])]
    wrong += [f"{name} is missing" for name in sorted(found["missing_keys"])]
    wrong += list(found["error_msgs"])
    if wrong:
        raise ModelError(
            f"the checkpoint does not hold this {type(causal_lm).__name__}: {_few(wrong)}",
            where=config.name,
            cure="fetch the model again; a weight that is not in the file would be trained from random values",
        )
    if found["unexpected_keys"]:
        unread = _few(sorted(found["unexpected_keys"]))
        log.warning("%s: weights that %s does not have are not read: %s", config.path, type(causal_lm).__name__, unread)


def require_packable(model: PolicyModel, longest: int) -> None:
    """Raises ModelError where documents of one packed row, of up to `longest` tokens, would see each other."""
    import torch

    from burnish.model.leak import packing_leaks

    with torch.compiler.set_stance("force_eager"):  # the probe's two row lengths would be two more graphs
        reason = packing_leaks(model, longest)
    if reason is not None:
        cure = "one document a row: `packing: {type: none}`; pairs and queries need another model"
        raise ModelError(reason, where="data.packing", cure=cure)


def require_embeddings(rows: int, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Raises ModelError where the tokenizer writes ids that the model has no embedding for.

    An added token that the chat template does not mention may have none: the tokenizer of Gemma 3's text models ends
    with an image token, id 262144, and their embedding with row 262143.
    """
    added: dict[str, int] = tokenizer.get_added_vocab()  # pyright: ignore[reportCallIssue, reportOptionalCall]
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    written = [i for token, i in beyond.items() if token not in added or token in (chat_template or "")]
    if written:
        raise ModelError(
            f"the tokenizer has ids up to {max(written)}, the model's embedding has {rows} rows",
            where=tokenizer.name_or_path,
            cure="use the model's own tokenizer: `data.tokenizer: {type: model}`",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back transformers' progress bars and loading reports: what matters in them is raised or logged by us."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def _drop_quantizer_marks(causal_lm: Any) -> None:
    """Exports hold full precision, and the marks of four bits would be written into them: a GGUF file was expanded at
    load, weights that bitsandbytes rounded are expanded at the export."""
    for module in causal_lm.modules():
        # In evaluation on a CPU with bfloat16 instructions, bitsandbytes would lay the weights out anew, in place, and
        # round the products to bfloat16.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    del causal_lm.config.quantization_config, causal_lm.hf_quantizer, causal_lm.quantization_method
    causal_lm.is_quantized = False


@contextmanager
def _refusals(config: ModelConfig) -> Iterator[None]:
    """Turns what transformers and safetensors raise on a bad model into a ModelError that names the place."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"a weight file is corrupt: {error}", where=_corrupt_file(config), cure="fetch the file again"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(first_line, where=config.name, cure=_cure(first_line)) from error


def _cure(reason: str) -> str:
    if "does not recognize this architecture" in reason:
        return "upgrade transformers, or name a model that this version knows"
    if "trust_remote_code" in reason or "custom code" in reason:
        return "read that code, then set `trust_remote_code: true` and `revision:` to its commit"
    return "name a hub id, a Hugging Face model folder or a .gguf file"


def _corrupt_file(config: ModelConfig) -> str:
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(config.name).expanduser().glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return str(file)
    return config.name


def _missing(path: str) -> ModelError:
    parent = Path(path).expanduser().parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=3)
    where_to_look = f"did you mean {' or '.join(str(parent / name) for name in near)}?" if near else ""
    return ModelError("no such model", where=path, cure=where_to_look or "name a hub id, a folder or a .gguf file")


def _reachable_or_cached(config: ModelConfig) -> bool:
    """Whether the hub answers. False: it does not, and a cached copy is used.

    Raises:
        ModelError: it does not answer and nothing is cached.
    """
    from huggingface_hub import try_to_load_from_cache

    from burnish.hub import reachable

    if reachable():
        return True
    if not isinstance(try_to_load_from_cache(config.name, "config.json", revision=config.revision), str):
        raise ModelError(
            "no such folder, not in the hub's local cache, and the hub cannot be reached",
            where=config.name,
            cure="name a local folder or a .gguf file, or connect; a model fetched once is found without the hub",
        )
    return False


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
