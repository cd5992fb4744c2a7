"""What vLLM's workers do for a weight sync: mixed by vLLM into its own worker class, in each of its processes."""

# pyright: reportMissingImports=false
# vLLM has an environment of its own: see scripts/install_vllm_cpu.
from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.errors import BurnishError

if TYPE_CHECKING:
    from torch import Tensor


class PolicyWeights:
    """Methods for `LLMEngine.collective_rpc`; `self` is vLLM's worker."""

    model_runner: Any
    vllm_config: Any

    def take_policy(self, tensors: Iterable[tuple[str, Tensor]] | None, folder: str | None) -> str:
        """Puts a whole model, under Hugging Face names, in the place of the weights, and returns what is wrong with it,
        or nothing. To raise it would end vLLM's other processes.

        Args:
            tensors: read once. Else `folder` holds them.
        """
        try:
            missing = self._load(tensors if tensors is not None else _files(Path(folder or "")))
        except BurnishError:  # of the transport, in this very process
            raise
        # vLLM's loaders know neither which names nor which shapes they are given, and fail as they stumble.
        except (ValueError, KeyError, AssertionError, RuntimeError, AttributeError, IndexError, OSError) as error:
            return f"vLLM cannot put them into its model: {type(error).__name__}: {error}"
        few = ", ".join(sorted(missing)[:3])
        return f"nothing came, or too little, for vLLM's {few} ({len(missing)} in all)" if missing else ""

    def lost_layers(self, adapter: int) -> list[str]:
        """Layers of an adapter that was added, which this model does not have under their names. vLLM itself compares
        only the last part of a name, and passes over what it does not find: it would sample from the base.

        Args:
            adapter: vLLM's number of it.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        # A matrix that is part of a fused one stands there under the fused one's name. Fused experts have two entries.
        names = (name.removesuffix(".base_layer") for name in manager.get_adapter(adapter).loras)
        return sorted(set(names) - set(manager.modules))

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM's own names of what did not come, or in part."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload

        model = self.model_runner.get_model()
        # It warns of layers that have no weights at all; what did not come is found here.
        logging.getLogger(reload.layerwise.__name__).setLevel(logging.ERROR)
        missing = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            reload.initialize_layerwise_reload(model)
            try:
                loaded = model.load_weights(tensors)
                missing = _half_loaded(model) | (missing - loaded if loaded is not None else set())
            except BaseException:
                _forget(model)
                raise
            finally:
                reload.finalize_layerwise_reload(model, self.vllm_config.model_config)
            _prepack_shared(model)
        self.model_runner.reset_encoder_cache()
        return missing


def _forget(model: Any) -> None:
    """Drops weights that were no good and wait to be loaded: the next ones find the layers as they were."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0


def _half_loaded(model: Any) -> set[str]:
    """Layers that are one matrix here and several in files, of which not all came. Only rows of padding may lack."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if info.load_numel_total is not None and 0 < info.load_numel < info.load_numel_total:
            found |= {name} if not isinstance(layer, VocabParallelEmbedding) else set()
    return found


def _prepack_shared(model: Any) -> None:
    """On a CPU vLLM multiplies with a copy of each matrix in its kernel's layout, and makes new ones as layers are
    reloaded, but not of an embedding that is also the head: log-probabilities were then off by 0.3 to 0.5."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _files(folder: Path) -> Iterable[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()
