"""`engine: {type: vllm}`: vLLM's own engine in a rollout worker's process, on GPUs, or on a CPU with its CPU build.

What a recipe says of it, and how it is started; `rollout/vllm_live.py` drives it. vLLM's interface changes from release
to release: it is imported here, there and in `rollout/vllm_extension.py` alone.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own: see scripts/install_vllm_cpu.
from __future__ import annotations

import dataclasses
import difflib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Interval
from pydantic import model_validator

from burnish.errors import UserError
from burnish.rollout.engine import Engine, EngineSetup

if TYPE_CHECKING:
    from burnish.model.policy_model import PolicyModel
    from burnish.rollout.vllm_live import LiveVLLM

WHERE = "workflow.rollout.engine"
INSTALL = "`pip install vllm`, without a GPU scripts/install_vllm_cpu DIR; or `engine: {type: embedded}`"
CPU_CACHE_GIB = 1.0
"""vLLM itself would take nine tenths of the machine's memory."""
CPU_BLOCK_TOKENS = 32
"""Prefixes are shared in whole blocks, and the default on a CPU is 128; of fewer than 32 its kernels are slower."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM has room for."""
LORA_LAYERS = ("embed_tokens", "lm_head")
"""An adapter of these travels merged."""

RESERVED = {
    *("model", "revision", "trust_remote_code", "tokenizer", "skip_tokenizer_init", "load_format", "seed"),
    *("max_model_len", "logprobs_mode", "async_scheduling", "worker_extension_cls", "generation_config"),
    *("disable_log_stats", "use_tqdm_on_load", "kv_cache_memory_bytes", "max_lora_rank", "max_loras"),
}
"""Arguments of vLLM that this file answers for."""


class VLLM(Engine):
    """vLLM (Kwon et al., arXiv:2309.06180), 0.32 or newer. Fields have its names and mean what they mean there."""

    type: Literal["vllm"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float32 on a CPU, else the policy's."""
    max_num_seqs: Annotated[int, Ge(1)] = 64
    """Requests that are sampled at once."""
    enforce_eager: bool | Literal["auto"] = "auto"
    """Neither compile nor capture CUDA graphs: starts in seconds, and is slower. `auto`: on a CPU."""
    gpu_memory_utilization: Annotated[float, Interval(gt=0, le=1)] = 0.9
    """Share of a GPU for weights and cache. Less where the policy trains on the same one."""
    kv_cache_gib: Annotated[float, Gt(0)] | Literal["auto"] = "auto"
    """Size of the cache of keys and values. `auto`: what `gpu_memory_utilization` leaves; 1 on a CPU."""
    tensor_parallel_size: Annotated[int, Ge(1)] = 1
    """GPUs of one engine, in processes that vLLM starts. Weights then come by way of a folder."""
    enable_lora: bool | Literal["auto"] = "auto"
    """Where an adapter is all that trains, apply it beside the frozen weights, and send nothing else. `auto`: if vLLM
    can. Else weights come merged."""
    enable_sleep_mode: bool = False
    """Where engine and policy take turns on one GPU: give the memory back while the policy trains."""
    engine_args: dict[str, Any] = {}
    """Any further argument of vLLM's `EngineArgs`, by its name there."""

    @model_validator(mode="after")
    def _own_fields(self) -> Self:
        taken = sorted(set(self.engine_args) & (RESERVED | set(type(self).model_fields)))
        if taken:
            raise ValueError(f"engine_args: {', '.join(taken)}: a field of the engine, or known from the run")
        return self

    @property
    def capacity(self) -> int:
        """Requests at once."""
        return self.max_num_seqs

    def takes_adapter(self, setup: EngineSetup) -> bool:
        """Whether vLLM applies the policy's adapter itself: LoRA of its linear layers."""
        lora: Any = setup.model.adapter
        if lora is None or self.enable_lora is False or setup.new_tokens is not None:
            return False
        targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
        plain = lora.type == "lora" and not (lora.use_dora or lora.modules_to_save)
        inner = not any(layer in target for target in targets for layer in LORA_LAYERS)
        return plain and inner and lora.r <= LORA_RANKS[-1] and not (setup.model.path or "").endswith(".gguf")

    def refuse(self, setup: EngineSetup) -> Iterable[str]:
        """See `Engine`."""
        if self.enable_lora is True and not self.takes_adapter(setup):
            yield "enable_lora: vLLM applies LoRA of linear layers alone, without DoRA and new tokens; leave it out"
        if setup.model.head.type != "lm":
            yield "vLLM samples from a language model's own head"

    def lacking(self) -> UserError | None:
        if find_spec("vllm") is None:
            return UserError("vLLM is not installed in this environment", where=WHERE, cure=INSTALL)
        return None

    @property
    def needs_own_process(self) -> bool:
        return True

    def computes_in(self, dtype: str) -> str:
        return dtype if self.dtype == "auto" else self.dtype

    def device_bytes(self, weights: int, keys: int, device: int, *, shares_model: bool) -> int:
        """Its share of a GPU, whatever the model needs of it, unless the cache's size is said."""
        if self.kv_cache_gib != "auto":
            return weights + int(self.kv_cache_gib * 2**30)
        return int(self.gpu_memory_utilization * device) if device else weights + int(CPU_CACHE_GIB * 2**30)

    def open(self, setup: EngineSetup, model: PolicyModel | None = None) -> LiveVLLM:
        """Loads it. Weights are those of the policy's files where an adapter is added to them, else none."""
        if model is not None:
            raise UserError(
                "vLLM takes threads, memory and process groups for its own, and cannot live where the policy trains",
                where=WHERE,
                cure="workers: {type: processes} or {type: ray}",
            )
        refused = next(iter(self.refuse(setup)), None)
        if refused is not None:
            raise UserError(refused, where=WHERE)
        # Sampling and updates take turns in this very process, unless the model is cut; reports go nowhere.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of most of what is asked of it below
        warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError as error:
            raise UserError(f"vLLM cannot be imported: {error}", where=WHERE, cure=INSTALL) from error
        if find_spec("vllm.model_executor.model_loader.reload") is None:
            raise UserError("this vLLM cannot take new weights", where=WHERE, cure="pip install 'vllm>=0.32'")
        from burnish.rollout.vllm_live import LiveVLLM
        from burnish.rollout.weights_place import claim_memory

        folder, release = claim_memory(Path(tempfile.gettempdir()))  # which removes what killed workers left there
        try:
            arguments = self._arguments(setup, folder)
            _require_known(arguments, {field.name for field in dataclasses.fields(EngineArgs)})
            engine = self._start(LLMEngine, EngineArgs(**arguments))
            return LiveVLLM(engine, setup, folder, self.takes_adapter(setup), on_close=release)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            release()
            raise

    def _start(self, kind: Any, arguments: Any) -> Any:
        try:
            return kind.from_engine_args(arguments)
        except (ValueError, NotImplementedError) as error:  # what it says of a configuration; all else may pass
            # vLLM's reasons are several lines, of which the last says what to change.
            raise UserError(
                f"vLLM does not start: {type(error).__name__}: {' '.join(str(error).split())}",
                where=WHERE,
                cure="change what it names; `engine: {type: embedded}` samples from any policy",
            ) from error

    def _arguments(self, setup: EngineSetup, folder: Path) -> dict[str, Any]:
        """For `EngineArgs`."""
        from vllm.platforms import current_platform

        from burnish.rollout.vllm_files import located

        cpu: bool = current_platform.is_cpu()
        lora: Any = setup.model.adapter if self.takes_adapter(setup) else None
        dtype = setup.model.dtype if not cpu else "float32"
        cache = CPU_CACHE_GIB if cpu and self.kv_cache_gib == "auto" else self.kv_cache_gib
        arguments = {
            **located(setup, folder),
            # What no file decides comes with the first sync: until then nobody may sample.
            "load_format": "dummy" if lora is None else "auto",
            "generation_config": "vllm",  # the run says how tokens are drawn, not a file of the model
            "dtype": dtype if self.dtype == "auto" else self.dtype,
            "seed": setup.seed,
            "max_model_len": setup.max_length,
            "logprobs_mode": "processed_logprobs",
            "async_scheduling": False,  # a step ahead would be under older weights than it is said to be
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": cpu if self.enforce_eager == "auto" else self.enforce_eager,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enable_sleep_mode": self.enable_sleep_mode,
            "worker_extension_cls": "burnish.rollout.vllm_extension.PolicyWeights",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if cache != "auto":
            arguments["kv_cache_memory_bytes"] = int(cache * 2**30)
        if cpu:
            arguments["block_size"] = CPU_BLOCK_TOKENS
        if lora is not None:
            rank = next(rank for rank in LORA_RANKS if rank >= lora.r)
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        return arguments | self.engine_args


def _require_known(arguments: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(arguments) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise UserError(
            f"this vLLM has no argument '{unknown[0]}'",
            where=f"{WHERE}.engine_args",
            cure=f"did you mean `{near[0]}`?" if near else "see EngineArgs in vLLM's documentation",
        )
