"""vLLM in the trainer's process, one engine per rank, on CPU and CUDA."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from popo_lightning.core.bounds import above, between
from popo_lightning.core.errors import SettingError, reason
from popo_lightning.core.groups import Response
from popo_lightning.core.ranks import lost_rank
from popo_lightning.engines.base import (
    Ask,
    EngineContext,
    NamedTensors,
    RolloutEngine,
    Sampling,
    asks,
    end_token_ids,
    responses_of,
)
from popo_lightning.engines.vllm.batch import sequences_at_once
from popo_lightning.engines.vllm.classes import ClassesBefore
from popo_lightning.engines.vllm.peak import PeakBesideSleep
from popo_lightning.engines.vllm.process import (
    check_platform,
    external_launcher,
    not_installed,
    ranks_in_environment,
    set_environment,
    state_put_back,
    torch_threads,
)
from popo_lightning.engines.vllm.reload import name_loaders, repack, stale_layers
from popo_lightning.engines.vllm.requests import engine_input, request_number, sampling_parameters
from popo_lightning.model.loading import family, passes_states
from popo_lightning.model.prompts import Prompt

# Errors of a weight loader that cannot run a second time. Memory and ranks raise RuntimeError, which is not here.
LOADER_ERRORS = (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
MEMORY_WORDS = ("memory", "kv cache", "blocks")  # words in vLLM's errors about too little memory

Memory = Literal["weights", "kv_cache"]  # vLLM's names of what sleeps and wakes


class VLLMEngine(RolloutEngine):
    """Colocated vLLM, on the trainer's own device.

    Args:
        gpu_memory_utilization: Fraction of the GPU's memory that vLLM may use while it samples; ignored on a CPU.
        cpu_cache_gib: Size of the key-value cache on a CPU, in GiB, allocated at the start.
        enforce_eager: Skip CUDA graphs and compilation: a faster start, slower generation on a GPU. null is true on a
            CPU and false on a GPU.
        sleep_level: What sleep frees on a GPU while the trainer works. 0 frees nothing. 1 frees the key-value cache and
            the weights (kept in host memory). 2 drops the weights, which the next sync restores. null is 2 on a GPU; on
            a CPU nothing sleeps.
        prefix_caching: Share the key-value cache of equal prompt beginnings, as the responses of a group have.
        max_num_seqs: Maximum number of responses decoded at once. null is vLLM's own number (256, or 1024 on GPUs of 70
            GiB and more but A100), on a GPU raised to the responses of an iteration and rank, up to 1024.
    """

    spreads_temperature = True

    def __init__(
        self,
        gpu_memory_utilization: float = 0.6,
        cpu_cache_gib: float = 1.0,
        enforce_eager: bool | None = None,
        sleep_level: int | None = None,
        prefix_caching: bool = True,
        max_num_seqs: int | None = None,
    ) -> None:
        if sleep_level not in (None, 0, 1, 2):
            raise SettingError(f"data.engine.sleep_level is {sleep_level}; use 0, 1, 2 or null")
        if max_num_seqs is not None and max_num_seqs < 1:
            raise SettingError(f"data.engine.max_num_seqs is {max_num_seqs}; use at least 1, or null")
        share = between("data.engine.gpu_memory_utilization", gpu_memory_utilization, 0, 1, ", such as 0.6")
        self.gpu_memory_utilization = share
        self.cpu_cache_gib = above("data.engine.cpu_cache_gib", cpu_cache_gib, 0, "1.0")
        self.enforce_eager = enforce_eager
        self.sleep_level = sleep_level
        self.prefix_caching = prefix_caching
        self.max_num_seqs = max_num_seqs
        self._level = 0  # sleep level, once started
        self._asleep: set[Memory] = set()
        self._peak = PeakBesideSleep()

    def check(self, device: torch.device) -> None:
        """See :class:`RolloutEngine`: trainer and vLLM share one device."""
        check_platform(device)

    def start(self, context: EngineContext) -> None:
        """Loads the model; raises SettingError if vLLM is not installed or refuses to start."""
        self._context = context
        set_environment()
        try:
            from vllm import LLM
        except ImportError as error:
            raise not_installed(error) from error
        on_gpu = context.device.type == "cuda"
        self._eager = not on_gpu if self.enforce_eager is None else self.enforce_eager
        self._level = 0 if not on_gpu else 2 if self.sleep_level is None else self.sleep_level
        classes = ClassesBefore()
        with ranks_in_environment(context), state_put_back(context.device):
            try:
                self._llm = LLM(**self._arguments(context))
            except Exception as error:  # a model's code may raise anything
                classes.put_back()
                raise self._refused(error) from error
            self._threads = torch.get_num_threads() if on_gpu else None  # those that vLLM compiled for: one
        self._llm.apply_model(lambda model: classes.put_back(model.modules()))
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._stop_token_ids = end_token_ids(context.folder, self._tokenizer)

    def _refused(self, error: Exception) -> Exception:
        """The error for a failed start: too little free memory, too little room in the cache, or a model that fails.

        A rank that has lost the others keeps its error.
        """
        if isinstance(error, RuntimeError) and lost_rank(error):
            return error
        if any(word in str(error).lower() for word in MEMORY_WORDS):
            name = "gpu_memory_utilization" if self._context.device.type == "cuda" else "cpu_cache_gib"
            return SettingError(f"vLLM does not start with data.engine.{name} {getattr(self, name):g}: {reason(error)}")
        return self._unfit(f"with which vLLM does not start ({type(error).__name__}: {reason(error)})")

    def _unfit(self, why: str) -> SettingError:
        """The error for a model that vLLM cannot sample from for a trainer."""
        folder = self._context.folder
        return SettingError(
            f"model.path is '{folder}', a {family(folder)}, {why}; choose another model, or set data.engine to "
            "popo_lightning.engines.transformers.TransformersEngine"
        )

    def _arguments(self, context: EngineContext) -> dict[str, Any]:
        """Arguments of vllm.LLM."""
        arguments: dict[str, Any] = {
            "model": str(context.folder),
            "dtype": str(context.dtype).removeprefix("torch."),
            "max_model_len": context.max_tokens,
            "seed": context.rank,
            "enforce_eager": self._eager,
            "enable_prefix_caching": self.prefix_caching,
            # log-probs of the distribution that is sampled from: after temperature and forbidden tokens
            "logprobs_mode": "processed_logprobs",
            # defaults of the model's own generation config (top_p, top_k, penalties) must not leak in
            "generation_config": "vllm",
            "trust_remote_code": False,
            "use_tqdm_on_load": False,
        }
        if context.images_per_prompt:
            arguments["limit_mm_per_prompt"] = {"image": context.images_per_prompt, "video": 0}
        if context.image_pixels is not None:
            least, most = context.image_pixels
            arguments["mm_processor_kwargs"] = {"size": {"shortest_edge": least, "longest_edge": most}}
        if context.device.type == "cuda":
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization
            arguments["enable_sleep_mode"] = self._level > 0
        else:
            arguments["kv_cache_memory_bytes"] = int(self.cpu_cache_gib * 2**30)
            # A prompt cut in two gives an unwanted token, whose draw vLLM takes back from the prompt's generator. A
            # CPU's generators cannot go back ("CPU Generator does not use offset"), so prompts stay whole.
            arguments["enable_chunked_prefill"] = False
            # without chunked prefill, vLLM keeps no prefixes of layers that pass a state on
            arguments["enable_prefix_caching"] &= not passes_states(context.folder)
        if (sequences := sequences_at_once(self.max_num_seqs, context)) is not None:
            arguments["max_num_seqs"] = sequences
        if external_launcher(context):
            arguments["distributed_executor_backend"] = "external_launcher"
        return arguments

    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        """See :class:`RolloutEngine`."""
        found = dict(ready for step in self.stream(prompts, n, sampling, seed) for ready in step)
        return [found[place] for place in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, seed: int
    ) -> Iterator[list[tuple[int, list[Response]]]]:
        """See :class:`RolloutEngine`. All prompts go to vLLM at once; vLLM batches them itself."""
        self._wake("weights")
        self._wake("kv_cache")
        copies = n if sampling.temperature == 0 else 1  # vLLM refuses to write the same greedy response n times
        asked = asks(len(prompts), n // copies, sampling, seed)
        inputs: Any = [engine_input(prompts[each.place]) for each in asked]
        engine = self._llm.llm_engine
        with self._apart():
            context, ends = self._context, self._stop_token_ids
            wanted = sampling_parameters(prompts, asked, sampling, ends, context.forbidden_token_ids)
            ids = self._llm.enqueue(inputs, wanted, use_tqdm=False)
        waiting = {request_number(request): each for request, each in zip(ids, asked, strict=True)}
        found: dict[int, list[tuple[Ask, Any]]] = {place: [] for place in range(len(prompts))}
        try:
            while engine.has_unfinished_requests():
                with self._apart(), torch_threads(self._threads):
                    done = [output for output in engine.step() if output.finished]
                for output in done:
                    each = waiting.pop(request_number(output.request_id))
                    found[each.place].append((each, output))
                whole = [place for place, of in found.items() if sum(each.n for each, _ in of) * copies == n]
                yield [(place, self._responses(prompts[place], found.pop(place), sampling) * copies) for place in whole]
        finally:
            if waiting:  # interrupted: the remaining requests are not needed
                engine.abort_request(list(waiting))

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Isolates one step, so that the caller's work in between has its own random state and compiles as usual.

        With enforce_eager vLLM's samplers are not compiled either, which takes 16 s and a C++ compiler on a CPU.
        """
        isolated = isolate_rng(include_cuda=self._context.device.type == "cuda")
        with isolated, torch.compiler.set_stance("force_eager") if self._eager else nullcontext():
            yield

    def _responses(self, prompt: Prompt, finished: list[tuple[Ask, Any]], sampling: Sampling) -> list[Response]:
        """Responses of a prompt's finished requests, in the order of their seeds."""
        finished.sort(key=lambda pair: pair[0].seed)
        read = finished[0][1].prompt_token_ids
        if prompt.images and read != prompt.ids.tolist():
            raise RuntimeError(
                f"vLLM reads an image prompt as {len(read)} tokens and the policy as "
                f"{len(prompt.ids)}: their processors differ, so log-probs would be of different prompts"
            )
        outputs = [one for _, output in finished for one in output.outputs]
        sampled = [(one.token_ids, one.logprobs.logprobs, one.finish_reason) for one in outputs]
        own = [each.temperature for each, _ in finished] if sampling.temperature_spread else None
        return responses_of(self._tokenizer, sampled, sampling.stop, own)

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """Reloads the weights in place and resets every cache."""
        # reload_weights, not load_weights: on a CPU vLLM repacks linear layers after loading
        saved = {"weights_iterator": iter(self._context.as_saved(weights))}
        with self._apart():
            self._llm.apply_model(lambda model: name_loaders(model.modules()))
            try:
                stale = stale_layers(
                    lambda: self._llm.collective_rpc("reload_weights", kwargs=saved),
                    lambda: self._llm.apply_model(lambda model: list(model.modules()))[0],
                )
            except LOADER_ERRORS as error:
                raise self._unfit(
                    f"whose weights vLLM loads once and not again ({type(error).__name__}: {reason(error)})"
                ) from error
            if stale:
                raise self._unfit(
                    f"of which vLLM reloads no weights into {', '.join(stale)}, which would stay the first policy's"
                )
            if self._context.device.type == "cpu":
                self._llm.apply_model(repack)
        self.forget_prompts()
        self.version, self.holds_weights = version, True

    def forget_prompts(self) -> None:
        """Resets the caches of prefixes and of image features: vLLM's worker drops its own, its scheduler does not."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache; responses would mix two policies")
        if self._context.images_per_prompt:
            self._llm.llm_engine.reset_encoder_cache()

    def sleep(self) -> None:
        """Frees GPU memory according to sleep_level; does nothing on a CPU."""
        if self._level and "weights" not in self._asleep:
            with self._peak.changes(self._context.device):
                self._llm.sleep(level=self._level)
            self._asleep = {"weights", "kv_cache"}
            self.holds_weights = self._level < 2

    def wake(self) -> None:
        """Takes back the memory of the weights; after level 2 they are only correct once update_weights has run.

        The key-value cache wakes when generation begins, since a sync may need the room until then.
        """
        self._wake("weights")

    def _wake(self, memory: Memory) -> None:
        if memory in self._asleep:
            torch.cuda.empty_cache()  # vLLM asks the driver for memory, not torch, which keeps some in reserve
            with self._peak.changes(self._context.device):
                self._llm.wake_up(tags=[memory])
            self._asleep.remove(memory)

    def take_peak_bytes(self, device: torch.device) -> int:
        """See :class:`RolloutEngine`: what is asleep does not count, though torch counts it."""
        return self._peak.take(device)

    def stop(self) -> None:
        """Drops the engine and its caches."""
        if hasattr(self, "_llm"):
            del self._llm
            gc.collect()
