"""Sampling with vLLM: another program than the trainer, kept in step by weight syncs that are checked.

What vLLM gives and what it does not:

- `behaviour_logprob` is the log-prob of the distribution that vLLM sampled from, at the sampling temperature (its
  `processed_logprobs`); there is no top-p or top-k, so it is the sampler's own policy and not a truncation of it.
- It gives no token entropies, and its log-probs are another program's: `old_logprob` and `token_entropy` come from the
  trainer (`update.recompute_old_logprob`, which the settings demand), and `methods.truncated_importance_sampling`
  corrects for what is left of the difference.
- Every response has a seed of its own, drawn from the caller's generator. The same seeds give the same responses
  whatever else is in flight, as far as the platform's arithmetic does not depend on the batch: on the CPU in float32 it
  was seen to hold, on GPUs it holds with vLLM's batch-invariant kernels only.

Under `Sampling.temper` every token has a temperature of its own (`vllm_temper`), which the rollout records; a server
cannot tell, and is refused.

A sync is not believed: afterwards a few responses are sampled and scored by the trainer too, and a mean difference
above `rollout.vllm.sync_tolerance` stops the run. One small step changes log-probs by less than any such bound, so the
first sync is also proven to reach the output head, where it was seen to fail: with the head doubled, sampling at
twice the temperature must give the same log-probs. (Not for tied embeddings, which the head's change would change
too; their head is sent under its own name as well, without which it stays as it was.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..core.paths import Path as ResponsePath
from ..core.paths import Piece, Start
from ..core.rollout import Rollout, pad
from ..errors import UserError
from ..policy.forward import scored
from ..policy.load import Policy
from ..policy.shard import is_sharded
from .engine import Sampling
from .scoring import fill_entropy
from .streams import keyed_seeds, prompt_seeds
from .vllm_backend import Backend, Request, Sample, SyncReport
from .vllm_settings import NO_TEMPER, VllmSection

PROBE_TOKENS = 16

Scorer = Callable[[Rollout], Tensor]
"""The trainer's log-probs [B, T] of a rollout."""


class VllmEngine:
    """Samples groups of responses from a vLLM; see `rollout.factory.Engine`.

    `prompts` are those on which a sync is checked before the first sample; without, the end token alone starts a
    response. `scorer` gives the trainer's log-probs, by default those of `policy.model`. Where that model is sharded,
    scoring is collective: every process must then sync together. `tempers`: `Sampling.temper` will be used. `backend`
    is for tests.
    Raises UserError where vLLM is missing or unsupported, cannot start, or cannot be reached.
    """

    turns = None
    """No environment: a response is one turn. See `rollout.episodes`."""

    def __init__(
        self,
        policy: Policy,
        settings: VllmSection | None = None,
        *,
        prompts: Sequence[Sequence[int]] = (),
        scorer: Scorer | None = None,
        tempers: bool = False,
        backend: Backend | None = None,
    ) -> None:
        self.policy, self.settings = policy, settings or VllmSection()
        self.scorer = scorer or (lambda rollout: scored(policy.model, rollout, len(rollout))[0])
        self.backend = backend or make_backend(policy, self.settings, tempers)
        self.stop_ids = tuple(dict.fromkeys((*policy.eos_ids, *self.settings.stop_token_ids)))
        self._probe_prompts: list[Sequence[int]] = list(prompts) or [(policy.eos_ids[0],)]
        self._probe_temperature = 1.0
        self._head_proven, self._head_key = False, ""

    # -- sampling -------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        generator: torch.Generator,
        *,
        problem_ids: Sequence[int] | None = None,
        version: int = 0,
        report: Callable[[int], None] = lambda rows: None,
        each: Sequence[Sampling] | None = None,
    ) -> Rollout:
        """`group_size` responses to each prompt as one rollout; rows of a prompt are adjacent and share a group id.

        `each` gives every prompt its own temperature and max_tokens in place of those of `sampling`.
        Raises ValueError for an empty prompt, UserError for one that does not fit, FloatingPointError for log-probs
        that are not finite.
        """
        own = list(each) if each is not None else [sampling] * len(prompts)
        seeds = prompt_seeds(generator, sampling.first, len(prompts))
        requests = [self._request(p, group_size, s, seed) for p, s, seed in zip(prompts, own, seeds, strict=True)]
        groups = self._generate(requests)
        report(sum(map(len, groups)))
        self._remember(prompts, sampling)
        problems = list(problem_ids) if problem_ids is not None else list(range(len(prompts)))
        return self._as_rollout(groups, prompts, problems, own, version)

    def extend(
        self,
        starts: Sequence[Start],
        sampling: Sampling,
        generator: torch.Generator,
        *,
        stops: Sequence[str] = (),
        report: Callable[[int], None] = lambda rows: None,
    ) -> list[Piece]:
        """Continue each start by one piece, which ends with the end token, a text of `stops` or the start's limit.

        Each start has a temperature and a limit of its own, and a seed by its `key`; contexts that begin alike are read
        once where `rollout.vllm.prefix_caching` is on. Raises as `sample` does, and ValueError for a start without
        room or an empty stop text.
        """
        if not all(stops):
            raise ValueError("an empty text would stop everything")
        keys = [sampling.first + i if s.key is None else s.key for i, s in enumerate(starts)]
        seeds = keyed_seeds(generator, keys)
        own = [_settings_of(start, sampling) for start in starts]
        requests = [
            self._request(start.ids, 1, settings, seed, stops)
            for start, settings, seed in zip(starts, own, seeds, strict=True)
        ]
        samples = [sample for (sample,) in self._generate(requests)]
        report(len(samples))
        self._remember([start.ids for start in starts], sampling)
        return [_piece(sample, settings.temperature) for sample, settings in zip(samples, own, strict=True)]

    def with_entropy(self, paths: Sequence[ResponsePath], rows: int = 64) -> None:
        """Fill in the entropies of paths that lack them, as all do that vLLM sampled, from the trainer's model.

        Raises UserError for a sharded one: its passes take all processes, each of which has paths of its own.
        """
        if is_sharded(self.policy.model):
            raise UserError(
                "entropies of paths under way cannot be scored by a sharded policy; set parallel.shard: none, or "
                "rollout.engine: transformers, which records them"
            )
        fill_entropy(self.policy, paths, rows)

    def _remember(self, contexts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """What the next sync is checked on."""
        if len(contexts):
            self._probe_prompts = list(contexts[: self.settings.probe_responses])
            self._probe_temperature = sampling.temperature or 1.0

    def _request(
        self, prompt: Sequence[int], n: int, sampling: Sampling, seed: int, stops: Sequence[str] = ()
    ) -> Request:
        if not len(prompt):
            raise ValueError("a prompt is empty: a causal model needs at least one token to start from")
        if len(prompt) + sampling.max_tokens > self.backend.longest:
            raise UserError(
                f"a prompt of {len(prompt)} tokens with rollout.max_tokens {sampling.max_tokens} is longer than the "
                f"{self.backend.longest} tokens vLLM was started for; lower rollout.max_tokens or raise "
                "rollout.vllm.max_model_len"
            )
        # the last seeds of a group must stay inside 63 bits
        temper = sampling.temper if sampling.temperature else None
        return Request(
            prompt, n, sampling.temperature, sampling.max_tokens, seed >> 1, self.stop_ids, temper, tuple(stops)
        )

    def _generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        groups = self.backend.generate(requests) if requests else []
        if not all(math.isfinite(value) for group in groups for sample in group for value in sample.logprob):
            raise FloatingPointError("vLLM's log-probs are not finite: the policy's weights are broken")
        return groups

    def _as_rollout(
        self,
        groups: Sequence[Sequence[Sample]],
        prompts: Sequence[Sequence[int]],
        problem_ids: Sequence[int],
        each: Sequence[Sampling],
        version: int = 0,
    ) -> Rollout:
        device = self.policy.device
        samples = [s for group in groups for s in group]
        counts = torch.tensor([len(group) for group in groups])
        group = torch.arange(len(groups)).repeat_interleave(counts)
        repeated = [prompts[i] for i in group.tolist()]
        ids = pad([s.ids for s in samples], self.policy.pad_id, torch.long).to(device)
        mask = pad([[1] * len(s.ids) for s in samples], 0, torch.bool).to(device)
        temperature = torch.tensor([s.temperature for s in each])[group].to(device)
        logprob = pad([s.logprob for s in samples], 0.0, torch.float32).to(device)
        own = [s.temperature or [base] * len(s.ids) for s, base in zip(samples, temperature.tolist(), strict=True)]
        tempered = any(s.temper is not None for s in each)
        return Rollout(
            prompt_id=torch.tensor(problem_ids)[group].to(device),
            group_id=group.to(device),
            finished=torch.tensor([s.finished for s in samples], device=device),
            policy_version=torch.full((len(samples),), version, device=device),
            prompt_ids=pad(repeated, self.policy.pad_id, torch.long, left=True).to(device),
            prompt_mask=pad([[1] * len(p) for p in repeated], 0, torch.bool, left=True).to(device),
            response_ids=ids,
            response_mask=mask,
            action_mask=mask.clone(),
            # a greedy choice is a point mass: log-prob 0, as the transformers engine records it
            behaviour_logprob=logprob * temperature.ne(0)[:, None],
            behaviour_temperature=pad(own, 0.0, torch.float32).to(device).where(mask, temperature[:, None]),
            policy_temperature=each[0].temperature if tempered else None,
        )

    # -- weights --------------------------------------------------------------------------------------------------

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> SyncReport:
        """Load the trainer's weights, whole and by their names in a checkpoint, and check what vLLM then says.

        Raises UserError where sampler and trainer disagree by more than the tolerance on average.
        """
        started = time.perf_counter()
        head: list[Tensor] = []
        self.backend.load(self._watching(weights, head))
        report = self._checked(version, started, "a weight sync")
        if head and not self._head_proven:
            self._prove_head(head[0])
        return report

    def sync_adapter(self, folder: Path, version: int) -> SyncReport:
        """Serve the LoRA adapter of a peft directory on top of the weights; checked like `sync`."""
        if not self.settings.lora_rank:
            raise UserError("an adapter cannot be served with rollout.vllm.lora_rank 0; set it to the adapter's rank")
        started = time.perf_counter()
        self.backend.load_adapter(folder, version)
        return self._checked(version, started, "loading a LoRA adapter")

    def _watching(self, weights: Iterable[tuple[str, Tensor]], head: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The weights, with a tied head under its own name too; keeps the head of a first sync for its proof.

        vLLM on a CPU multiplies by a packed copy of the head, made anew only when a tensor of the head's name comes.
        """
        own, shared = self._head_names()
        for key, value in weights:
            tensor = value.detach()
            yield key, tensor
            if shared is not None and own is not None and _names(shared, key):
                yield own, tensor
            if own is not None and shared is None and _names(own, key) and not self._head_proven:
                head[:] = [tensor]
                self._head_key = key

    def _head_names(self) -> tuple[str | None, str | None]:
        """Names of the output head and of the embedding it is tied to; None where there is no such thing. A head with
        a bias is named None as well: doubled weights would not double its logits.
        """
        model = self.policy.model
        module = model.get_output_embeddings()
        own = next((f"{n}.weight" for n, m in model.named_modules() if m is module), None)
        if not getattr(model.config, "tie_word_embeddings", False):
            return (None if getattr(module, "bias", None) is not None else own), None
        embedding = model.get_input_embeddings()
        return own, next(f"{n}.weight" for n, m in model.named_modules() if m is embedding)

    def _prove_head(self, head: Tensor) -> None:
        """Doubled logits at twice the temperature are the same distribution; a head that stayed shows itself."""
        self.backend.load([(self._head_key, head * 2)])
        mean, _, _ = self._compare(0, doubled=True)
        self.backend.load([(self._head_key, head)])
        if not mean <= self._limit():
            raise UserError(
                f"vLLM reports log-probs that do not follow a changed output head: off by {mean:.2g} nats on average. "
                f"{self._causes()}"
            )
        self._head_proven = True

    def _checked(self, version: int, started: float, what: str) -> SyncReport:
        mean, worst, tokens = self._compare(version)
        limit = self._limit()
        # not `mean > limit`: a nan must fail too
        if not mean <= limit:
            raise UserError(
                f"after {what} (version {version}) vLLM and the trainer differ by {mean:.2g} nats a token on average, "
                f"more than rollout.vllm.sync_tolerance {limit:g}. {self._causes()}"
            )
        return SyncReport(version, mean, worst, tokens, time.perf_counter() - started)

    def _limit(self) -> float:
        """The tolerance, for the coarser of the two programs' number formats."""
        kind = self.policy.device.type
        trainer = self.policy.model.dtype if not torch.is_autocast_enabled(kind) else torch.get_autocast_dtype(kind)
        return max(self.settings.tolerance(name) for name in (self.backend.dtype, str(trainer).removeprefix("torch.")))

    def _causes(self) -> str:
        server = "" if self.settings.server is None else "the server lacks --logprobs-mode processed_logprobs; "
        return (
            f"Likely causes: {server}the output head kept an old packed copy, which happens where embeddings are tied "
            "to it (tie_word_embeddings); weights were lost on the way or renamed; or a half-precision sampler "
            "(rollout.vllm.dtype) needs a wider tolerance"
        )

    def _compare(self, version: int, doubled: bool = False) -> tuple[float, float, int]:
        """Mean and largest |difference| of log-probs on probe responses, and their number of tokens."""
        wanted = self.settings.probe_responses
        prompts = self._probe_prompts
        prompts = (prompts * -(-wanted // len(prompts)))[:wanted]
        longest = max(map(len, prompts))
        base = Sampling(self._probe_temperature, max(1, min(PROBE_TOKENS, self.backend.longest - longest)))
        hot = Sampling(2 * base.temperature, base.max_tokens) if doubled else base
        seeds = prompt_seeds(torch.Generator().manual_seed(version), 0, wanted)
        groups = self._generate([self._request(p, 1, hot, seed) for p, seed in zip(prompts, seeds, strict=True)])
        rollout = self._as_rollout(groups, prompts, list(range(wanted)), [base] * wanted)
        difference = (self.scorer(rollout) - rollout.behaviour_logprob)[rollout.mask].abs()
        return float(difference.mean()), float(difference.max()), len(difference)

    # -- life -----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give GPU memory back while the trainer updates; without effect on CPUs and servers."""
        self.backend.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self.backend.wake()

    def close(self) -> None:
        """End the engine; a server that someone else started goes on."""
        self.backend.close()


def _settings_of(start: Start, sampling: Sampling) -> Sampling:
    if start.max_tokens < 1:
        raise ValueError(f"a start has {len(start.ids)} tokens of context and room for {start.max_tokens}")
    temperature = sampling.temperature if start.temperature is None else start.temperature
    return replace(sampling, temperature=temperature, max_tokens=start.max_tokens)


def _piece(sample: Sample, temperature: float) -> Piece:
    n = len(sample.ids)
    # a greedy choice is a point mass: log-prob 0, as the transformers engine records it
    logprob = sample.logprob if temperature else [0.0] * n
    own = sample.temperature or [temperature] * n
    return Piece(sample.ids, logprob, own, finished=sample.finished, stopped=sample.stopped)


def _names(name: str, key: str) -> bool:
    """Whether a parameter's name is the checkpoint's `key`; a wrapped model prefixes its names."""
    return name == key or name.endswith(f".{key}")


def make_backend(policy: Policy, settings: VllmSection, tempers: bool = False) -> Backend:
    """A running server where `server` names one, else vLLM in this process. Raises UserError for a server that would
    have to temper."""
    if settings.server is not None and tempers:
        raise UserError(NO_TEMPER)
    if settings.server is not None:
        from .vllm_server import ServerVllm

        return ServerVllm(policy, settings)
    from .vllm_colocated import ColocatedVllm

    return ColocatedVllm(policy, settings, tempers)
