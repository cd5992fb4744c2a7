"""vLLM's engine, driven step by step.

It has continuous batching and shared prefixes. A new version reaches what is in flight: its prefixes are computed
again, so each token has the log-probability that the new weights give it. It must not know recipes.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own: see scripts/install_vllm_cpu.
from __future__ import annotations

import dataclasses
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish.errors import RunFailed, SyncFailed, UserError
from burnish.rollout.engine import EngineSetup, Receipt
from burnish.rollout.vllm_files import write_adapter
from burnish.rollout.weights import Listing
from burnish.rollouts import Completion

if TYPE_CHECKING:
    from torch import Tensor

    from burnish.rollout.engine import Weights
    from burnish.rollouts import Request

WHERE = "workflow.rollout.engine"


class LiveVLLM:
    """See `LiveEngine`.

    Args:
        engine: vLLM's `LLMEngine`, in this process.
        folder: for files of its own; removed with it.
        lora: whether adapters come alone.
        on_close: gives up the claim to the folder.
    """

    def __init__(
        self, engine: Any, setup: EngineSetup, folder: Path, lora: bool, *, on_close: Callable[[], None]
    ) -> None:
        self.version = -1
        self._engine, self._setup, self._folder, self._lora = engine, setup, folder, lora
        self._on_close = on_close
        self._adapter: Any = None
        """vLLM's `LoRARequest`, once an adapter came."""
        self._forms: dict[str, Any] = {}
        """Dtype and shape of all that a version is made of."""
        self._has_cache = True
        """Whether its keys and values have memory: after a sleep not before the new weights are there."""
        self._waiting: deque[Request] = deque()
        self._in_flight: dict[str, Completion] = {}
        """What each has so far."""
        self._facts = {"prompt_tokens": 0.0, "prompt_tokens_shared": 0.0, "sampled_tokens": 0.0, "busy_seconds": 0.0}
        self._vocab_size = engine.vllm_config.model_config.get_vocab_size()
        given = engine.vllm_config.model_config.logprobs_mode
        assert given == "processed_logprobs", f"log-probabilities would be {given}"
        beyond = [token for token in setup.stop_token_ids if token >= self._vocab_size]
        if beyond:
            raise self._other_vocabulary(max(beyond))

    @property
    def num_unfinished(self) -> int:
        """Requests queued or in flight."""
        return len(self._waiting) + len(self._in_flight)

    def submit(self, requests: Sequence[Request]) -> None:
        """See `LiveEngine`. Raises UserError: a token that vLLM's model does not have."""
        for request in requests:
            if max(request.prompt_ids) >= self._vocab_size:
                raise self._other_vocabulary(max(request.prompt_ids))
        self._waiting.extend(requests)

    def step(self) -> list[Completion]:
        """See `LiveEngine`."""
        if not self.num_unfinished:
            return []
        if self.version < 0:
            raise RunFailed("vLLM holds no version of the policy to sample from")
        started = time.perf_counter()
        self._wake_cache()
        done = [completion for completion in map(self._begin, self._waiting) if completion is not None]
        self._waiting.clear()
        try:
            outputs = self._engine.step() if self._in_flight else []
        except torch.OutOfMemoryError as error:
            raise RunFailed(
                f"vLLM is out of memory ({error}); lower {WHERE}.max_num_seqs or gpu_memory_utilization"
            ) from error
        done += [completion for completion in map(self._heard, outputs) if completion is not None]
        self._facts["busy_seconds"] += time.perf_counter() - started
        return done

    def _begin(self, request: Request) -> Completion | None:
        """Hands a request to vLLM; one that has no room for a token is complete."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params, room = request.params, self._setup.max_length - len(request.prompt_ids)
        if room < 1:
            return Completion(request.request_id, [], [], [], "length")
        drawn = SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=request.seed,
            max_tokens=min(params.max_new_tokens, room),
            stop=params.stop,
            include_stop_str_in_output=True,
            stop_token_ids=[*self._setup.stop_token_ids, *params.stop_token_ids],
            ignore_eos=True,  # the run names all tokens that end a turn
            logprobs=0,  # of the token that was drawn
            flat_logprobs=True,
            detokenize=bool(params.stop),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"type": "token", "prompt_token_ids": request.prompt_ids}
        self._engine.add_request(request.request_id, prompt, drawn, lora_request=self._adapter)
        self._in_flight[request.request_id] = Completion(request.request_id, [], [], [], "length")
        return None

    def _heard(self, output: Any) -> Completion | None:
        """Notes the tokens that a step drew for a request; the whole completion, if they were its last."""
        said, so_far = output.outputs[0], self._in_flight[output.request_id]
        count, flat = len(said.token_ids), said.logprobs
        if count:
            # Beside the drawn token's there may be the likeliest one's; the drawn one is first.
            drawn = flat.start_indices[-count:]
            assert [flat.token_ids[at] for at in drawn] == list(said.token_ids), output.request_id
            so_far.token_ids.extend(said.token_ids)
            so_far.logprobs.extend(flat.logprobs[at] for at in drawn)
            so_far.versions.extend([self.version] * count)
            self._facts["sampled_tokens"] += count
        if not output.finished:
            return None
        del self._in_flight[output.request_id]
        if said.finish_reason not in ("stop", "length"):
            raise RunFailed(f"vLLM ended request {output.request_id} for another reason: {said.finish_reason}")
        self._facts["prompt_tokens"] += len(output.prompt_token_ids)
        self._facts["prompt_tokens_shared"] += output.num_cached_tokens or 0
        return dataclasses.replace(so_far, finish_reason=said.finish_reason)

    def abort(self) -> None:
        """Forgets all requests."""
        self._waiting.clear()
        self._engine.abort_request(list(self._in_flight))
        self._in_flight.clear()

    def update_weights(self, weights: Weights) -> Receipt:
        """See `LiveEngine`. What vLLM makes of weights cannot be read back: matrices are fused and laid out anew. The
        digest is of what it was given; every weight that it has came, or every layer of the adapter is one that it has;
        the run's probes compare the rest."""
        started, where = time.perf_counter(), f"weights of version {weights.version}"
        self.version, came = -1, Listing()

        def arriving() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights.tensors():
                if name in came.entries:
                    raise SyncFailed(f"{where}: {name} came twice")
                came.add(name, tensor)
                yield name, tensor

        def prove() -> None:
            self._require_same(came, weights.digest, where)

        if weights.adapter_only:
            self._take_adapter(arriving(), prove, where)
        else:
            self._take_model(weights, arriving(), where)
            prove()
        self._wake_cache()
        # Also of what is in flight: its keys and values are computed again.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._forms = {name: entry[:2] for name, entry in came.entries.items()}
        self.version = weights.version
        return Receipt(weights.version, came.digest, came.num_bytes, time.perf_counter() - started)

    def _require_same(self, came: Listing, digest: str, where: str) -> None:
        """Raises SyncFailed where it is not what was sent, or has other tensors than the version before."""
        if came.digest != digest:
            raise SyncFailed(f"{where}: what came is not what was sent: digest {came.digest}, not {digest}")
        forms = {name: entry[:2] for name, entry in came.entries.items()}
        if self._forms and forms != self._forms:
            odd = next(name for name in forms | self._forms if forms.get(name) != self._forms.get(name))
            raise SyncFailed(f"{where}: {odd} is not what it was in the version before: {forms.get(odd, 'nothing')}")

    def _take_model(self, weights: Weights, arriving: Iterator[tuple[str, Tensor]], where: str) -> None:
        if self._lora:
            raise SyncFailed(f"{where}: merged weights came, and vLLM was started to be sent the adapter alone")
        cut = self._engine.vllm_config.parallel_config.world_size > 1
        if cut:  # tensors do not travel to vLLM's processes
            for _ in arriving:
                pass
        source = (None, str(weights.folder())) if cut else (arriving, None)
        wrong = next((said for said in self._engine.collective_rpc("take_policy", args=source) if said), "")
        if wrong:
            raise SyncFailed(f"{where}: {wrong}")

    def _take_adapter(self, arriving: Iterator[tuple[str, Tensor]], prove: Callable[[], None], where: str) -> None:
        """Replaces the one adapter, under the name that requests in flight have for it."""
        from vllm.lora.request import LoRARequest

        if not self._lora:
            raise SyncFailed(f"{where}: an adapter came alone, and vLLM was started to be sent merged weights")
        folder = self._folder / "adapter"
        write_adapter(self._setup.model.adapter, arriving, folder)
        prove()
        replacing = LoRARequest("policy", 1, str(folder), load_inplace=True)
        try:
            self._engine.add_lora(replacing)
        except (ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:  # as it stumbles
            raise SyncFailed(f"{where}: vLLM cannot apply the adapter: {type(error).__name__}: {error}") from error
        # Of vLLM's processes each may have only some of the layers.
        lost = sorted(set.intersection(*map(set, self._engine.collective_rpc("lost_layers", args=(1,)))))
        if lost:
            few = ", ".join(lost[:3])
            raise SyncFailed(f"{where}: vLLM has no such layers to apply the adapter to: {few} ({len(lost)} in all)")
        self._adapter = LoRARequest("policy", 1, str(folder))

    def sleep(self) -> None:
        """Weights go to the host's memory and the cache away, with `enable_sleep_mode` on a GPU. Without it, and on a
        CPU, whose memory the policy does not wait for, nothing is given back."""
        assert not self.num_unfinished, "asleep with requests in flight"
        self._wake_cache()  # it sleeps as a whole, and nothing was sampled since it woke
        if self._engine.vllm_config.model_config.enable_sleep_mode:
            self._engine.sleep(level=1)
            self._has_cache = False

    def wake(self) -> None:
        """Weights come back, to be replaced. The cache comes back behind the new ones, or when something is sampled:
        beside it there might be no room for the tensors that arrive."""
        if not self._has_cache:
            self._engine.wake_up(tags=["weights"])

    def _wake_cache(self) -> None:
        if not self._has_cache:
            self._engine.wake_up(tags=["kv_cache"])
            self._has_cache = True

    def facts(self) -> dict[str, float]:
        """See `LiveEngine`."""
        return dict(self._facts)

    def close(self) -> None:
        """Ends vLLM's processes, where it has some."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._on_close()

    def _other_vocabulary(self, token: int) -> UserError:
        return UserError(
            f"vLLM's model has {self._vocab_size} tokens, and {token} is none of them: the policy has others",
            where=WHERE,
            cure="let both read the same model and tokenizer; tokens that were added belong into `data.tokenizer`",
        )
