"""vLLM in this process: no copies between processes, and the trainer's tensors are handed over as they are.

Written against vLLM 0.32 and run on a CPU; the CUDA branches (sleep, shared memory, several processes) have not been
run. Importing vLLM and starting it changes process-wide state: it starts a `torch.distributed` group of one process
where there is none (so `torch.distributed.is_initialized()` no longer tells whether a run is distributed), on a CPU it
pins threads and disables `torch.set_num_threads`, and it seeds the global generators, which are put back here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..policy.load import Policy, resolve
from .vllm_backend import Request, Sample
from .vllm_settings import VllmSection, check_version, installed_version

MOST_RESPONSES = 256  # in flight at once; vLLM queues the rest


class ColocatedVllm:
    """A `vllm.LLM` that serves the directory of a policy. `tempers`: requests may carry a temperature rule.

    Raises UserError where vLLM is missing or of an unsupported version, and where it cannot start.
    """

    def __init__(self, policy: Policy, settings: VllmSection, tempers: bool = False) -> None:
        check_version(installed_version(), "the installed vLLM")
        self.tempers = tempers
        own = str(policy.model.dtype).removeprefix("torch.")
        self.dtype = own if settings.dtype == "auto" else settings.dtype
        self.vllm = _import_vllm(settings)
        from vllm.platforms import current_platform

        on_cpu = bool(current_platform.is_cpu())
        self.sleeps = settings.sleep and not on_cpu and bool(current_platform.is_sleep_mode_available())
        self._asleep = False
        self._adapter: Any = None
        self._in_group = torch.distributed.is_initialized()
        with torch.random.fork_rng():
            self.llm = self._start(resolve(policy.source), settings, on_cpu)
        self._spare_group()
        self.longest = int(self.llm.llm_engine.model_config.max_model_len)

    def _start(self, path: str, settings: VllmSection, on_cpu: bool) -> Any:
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "seed": 0,
            "max_num_seqs": MOST_RESPONSES,
            # of the distribution that was sampled from: after temperature, and so the behaviour policy's
            "logprobs_mode": "processed_logprobs",
            # the model's own defaults may hold top_p or a repetition penalty; requests state everything themselves
            "generation_config": "vllm",
            "enforce_eager": settings.eager or on_cpu,
            "enable_prefix_caching": settings.prefix_caching,
            "enable_sleep_mode": self.sleeps,
            "disable_log_stats": True,
        }
        if settings.max_model_len is not None:
            options["max_model_len"] = settings.max_model_len
        if self.tempers:
            from .vllm_temper import EntropyTemper

            options["logits_processors"] = [EntropyTemper]
        if not on_cpu:
            options["gpu_memory_utilization"] = settings.gpu_memory
        if settings.lora_rank:
            options |= {"enable_lora": True, "max_lora_rank": settings.lora_ceiling, "max_loras": 1}
        if self._in_group and torch.distributed.get_world_size() > 1:
            # each process of the run has a sampler of its own, inside the process group that the trainer opened
            options["distributed_executor_backend"] = "external_launcher"
        try:
            return self.vllm.LLM(path, **options)
        except Exception as error:  # vLLM raises whatever its parts raise; all of it means the same to the user
            raise UserError(f"vLLM cannot serve '{path}': {_last_line(error)}; see rollout.vllm.*") from error

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """See `Backend`. Raises UserError for a rule where the engine was started without."""
        if any(r.temper is not None for r in requests):
            return self._generate_tempered(requests)
        prompts = [{"prompt_token_ids": list(r.prompt)} for r in requests]
        outputs = self._run(prompts, [self._settings(r) for r in requests])
        return [
            [_sample(o) for o in output.outputs] * (1 if request.temperature else request.n)
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _run(self, prompts: list[Any], settings: list[Any]) -> list[Any]:
        outputs: list[Any] = self.llm.generate(prompts, settings, use_tqdm=False, lora_request=self._adapter)
        return outputs

    def _generate_tempered(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """One request per response, so that each has a number by which its temperatures are found."""
        if not self.tempers:
            raise UserError(
                "this vLLM was started for sampling at one temperature; name the method that tempers in `methods`"
            )
        from .vllm_temper import request_arguments, take_factors

        single = [(i, replace(r, n=1, seed=r.seed + j)) for i, r in enumerate(requests) for j in range(r.n)]
        settings = [self._settings(r) for _, r in single]
        for number, ((_, request), own) in enumerate(zip(single, settings, strict=True)):
            if request.temper is not None and request.temperature:
                own.extra_args = request_arguments(request.temper, number)
        outputs = self._run([{"prompt_token_ids": list(r.prompt)} for _, r in single], settings)
        samples: list[list[Sample]] = [[] for _ in requests]
        for (i, request), output, factors in zip(single, outputs, take_factors(len(single)), strict=True):
            sample = _sample(output.outputs[0])
            if request.temper is not None and request.temperature:
                sample = replace(sample, temperature=_temperatures(request, sample, factors))
            samples[i].append(sample)
        return samples

    def _settings(self, request: Request) -> Any:
        return self.vllm.SamplingParams(
            n=request.n if request.temperature else 1,  # vLLM refuses several greedy responses, which are all the same
            temperature=request.temperature,
            max_tokens=request.max_tokens,
            seed=request.seed,
            stop_token_ids=list(request.stop_ids),
            logprobs=0,
            detokenize=bool(request.stops),
            stop=list(request.stops),
            # the tokens of a stop text belong to the response, as an end token does
            include_stop_str_in_output=bool(request.stops),
            skip_special_tokens=False,
        )

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Backend`. `apply_model` with `load_weights` fails on a CPU, whose linear layers are packed."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    def load_adapter(self, folder: Path, version: int) -> None:
        """See `Backend`."""
        from vllm.lora.request import LoRARequest

        # a new number for every version: vLLM keeps adapters by number
        self._adapter = LoRARequest(f"version-{version}", version + 1, str(folder))
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Weights to the CPU and the cache given up; without effect where the platform cannot."""
        if self.sleeps and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        """Undo `sleep`."""
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """End the engine; inside the trainer's process group it is only let go (see `_spare_group`)."""
        if not self._in_group:
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None

    def _spare_group(self) -> None:
        """vLLM's shutdown, which also runs when the engine is collected and at the end of the process, ends the default
        process group. Where that is the trainer's, it must not run."""
        finalizer = getattr(self.llm.llm_engine.engine_core, "_finalizer", None)
        if self._in_group and finalizer is not None:
            finalizer.detach()


def _import_vllm(settings: VllmSection) -> Any:
    # read when vLLM starts: the engine in this process, its log short, its cache as set
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_cache_gib)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    return vllm


def _sample(output: Any) -> Sample:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave a response up: finish_reason is {output.finish_reason!r}")
    ids = list(output.token_ids)
    logprob = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
    stopped = isinstance(output.stop_reason, str)
    return Sample(ids, logprob, output.finish_reason == "stop" and not stopped, stopped=stopped)


def _temperatures(request: Request, sample: Sample, factors: Mapping[int, float]) -> list[float]:
    if not all(place in factors for place in range(len(sample.ids))):
        raise RuntimeError("vLLM sampled in another process than this one: temperatures of its tokens are unknown")
    return [request.temperature * factors[place] for place in range(len(sample.ids))]


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
