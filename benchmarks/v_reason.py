"""Steering entropy through the value cache beside plain temperature: the tiny lab's base R, several seeds.

    python benchmarks/v_reason.py --seeds 3

No weight changes. A seed has problems and random numbers of its own, the same for every arm. The controlled positions
are all of the prompt but the first, or, in arms ending in `/numbers`, the numbers of the problem. Rates are far above
the card's, because the gradient is small on this model. `temperature/T` arms have no
controller; `matched/ARM` arms do so at the temperature at which their mean token entropy, found by bisection, is that
of the arm. `cost` compares CPU time and peak memory of decoding with and without controller, on a random model of 33
million parameters. Results go to `book/data/v_reason.json`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import opened, record_arms, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "v_reason.json"
PROBLEMS, TOKENS = 96, 64
STRONG = {"every": 1, "inner_steps": 4}
RATE = 100.0
ARMS: dict[str, dict[str, Any]] = {
    "card": {},
    "exploit": STRONG | {"rule": "exploit", "lr": RATE},
    "mean_revert": STRONG | {"rule": "mean_revert", "lr": RATE},
    "trend": STRONG | {"rule": "trend", "lr": RATE},
    "random": STRONG | {"rule": "random", "lr": RATE},
    "mean_revert/no_macro": STRONG | {"rule": "mean_revert", "lr": RATE, "patience": None},
    "trend/no_macro": STRONG | {"rule": "trend", "lr": RATE, "patience": None},
    "random/no_macro": STRONG | {"rule": "random", "lr": RATE, "patience": None},
    "exploit/weak": STRONG | {"rule": "exploit", "lr": RATE / 4},
    "exploit/double": STRONG | {"rule": "exploit", "lr": RATE * 2},
    "exploit/numbers": STRONG | {"rule": "exploit", "lr": RATE * 5},
    **{f"temperature/{t}": {"temperature": t} for t in (0.2, 0.4, 0.6, 0.8, 1.0, 1.25)},
    **{f"matched/{arm}": {"as": arm} for arm in ("exploit", "mean_revert", "exploit/numbers")},
}
MODULES = ("policy.value_cache", "inference.entropy_switch", "inference.v_reason", "inference.temperature_match")


def numbers(text: str) -> str:
    """The evidence of a Countdown prompt: what stands between its first word and `to`."""
    return text.removeprefix("<bos> ").split(" to ")[0]


class Lab:
    """Base R with the problems of one seed."""

    def __init__(self, seed: int) -> None:
        from rlvr_lab.policy.load import load_policy
        from rlvr_lab.tasks import countdown

        self.policy, self.seed = load_policy("tiny/R", device="cpu"), seed
        self.problems = countdown.problems(PROBLEMS, 100 + seed)
        self.texts = [problem.prompt for problem in self.problems]

    def method(self, **settings: Any) -> Any:
        from rlvr_lab.inference.v_reason import VReason

        return VReason(self.policy.model, self.policy.tokenizer, max_tokens=TOKENS, rows=PROBLEMS, **settings)

    def generator(self) -> Any:
        import torch

        return torch.Generator().manual_seed(self.seed)

    def figures(self, responses: Sequence[Any], final: Sequence[float]) -> dict[str, Any]:
        """Figures over the problems, and each problem's outcome for paired intervals."""
        from rlvr_lab.inference.temperature_match import pooled_entropy
        from rlvr_lab.tasks import countdown

        pairs = zip(self.problems, responses, strict=True)
        correct = [int(countdown.verify(problem, r.text, r.finished).correct) for problem, r in pairs]
        tokens = [len(r) for r in responses]
        end = {
            "accuracy": rounded(sum(correct) / len(correct)),
            "tokens": rounded(sum(tokens) / len(tokens)),
            "entropy": rounded(pooled_entropy([r.entropy for r in responses])),
            "final_entropy": rounded(sum(final) / len(final)),
            "truncated": rounded(sum(not r.finished for r in responses) / len(responses)),
        }
        return {"correct": correct, "tokens": tokens, "end": end}

    def controlled(self, settings: dict[str, Any], arm: str) -> dict[str, Any]:
        """One run of the controller, with the entropies before its steps and the signs it chose."""
        from rlvr_lab.inference.temperature_match import pooled_entropy

        method = self.method(**settings, evidence=numbers if arm.endswith("/numbers") else None)
        traces = method.traces(self.texts, self.generator())
        found = self.figures([method.response(t) for t in traces], [t.final_entropy for t in traces])
        signs = [a for t in traces for a in t.alpha]
        late = [x for t in traces for x in t.exploit]
        found["end"] |= {
            "entropy_before": rounded(pooled_entropy([t.entropy for t in traces])),
            "raised": rounded(sum(a > 0 for a in signs) / len(signs)),
            "exploit_share": rounded(sum(late) / len(late)),
        }
        longest = sorted(traces, key=lambda t: -len(t.ids))[PROBLEMS // 2]
        found["example"] = {
            "words": self.policy.decode(longest.ids).split(" "),
            "before": [rounded(x) for x in longest.entropy],
            "after": [rounded(x) for x in longest.drawn_entropy],
            "ema": [rounded(x) for x in longest.ema],
            "alpha": longest.alpha,
        }
        return found

    def plain(self, temperature: float | None, like: float | None) -> dict[str, Any]:
        """Plain sampling at a temperature, or at the one with the mean entropy `like`."""
        from rlvr_lab.inference.temperature_match import final_entropy

        method = self.method()
        if like is None:
            responses = method.plain(self.texts, self.generator(), temperature)
        else:
            temperature, responses = method.temperature_matched(self.texts, self.generator(), like)
        found = self.figures(responses, [final_entropy(r.entropy) for r in responses])
        found["end"]["temperature"] = rounded(temperature)
        return found


def one_run(record: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """Every problem's outcome, and figures over them."""
    import torch

    torch.set_num_threads(1)
    lab, settings = Lab(seed), ARMS[arm]
    if arm.startswith("temperature/"):
        return lab.plain(settings["temperature"], None)
    if arm.startswith("matched/"):
        return lab.plain(None, record["arms"][settings["as"]]["seeds"][str(seed)]["end"]["entropy"])
    return lab.controlled(settings, arm)


def cost(seed: int = 0, rows: int = 2, prompt: int = 256, tokens: int = 16) -> dict[str, Any]:
    """CPU seconds and peak bytes of tensors while decoding, without a controller and with two strengths of one."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(1, 8192, (rows, prompt), generator=torch.Generator().manual_seed(seed))
    arms = {"plain": None, "k4_n1": (4, 1), "k1_n4": (1, 4)}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "shape": {"rows": rows, "prompt": prompt, "tokens": tokens, "parameters": weights // 4},
        "weights_bytes": weights,
        "arms": {name: decode_cost(model, ids, tokens, steps) for name, steps in arms.items()},
    }  # fmt: skip


def decode_cost(model: Any, ids: Any, tokens: int, steps: tuple[int, int] | None) -> dict[str, Any]:
    """Greedy decoding after the prompt, which is not counted: CPU seconds, the least of three runs, and the peak of
    live tensor bytes, the cache of the prompt included, weights not."""
    from torch.profiler import ProfilerActivity, profile

    seconds = []
    for _ in range(3):
        cache = prefilled(model, ids)
        begin = time.process_time()
        decode(model, cache, ids, tokens, steps)
        seconds.append(time.process_time() - begin)
    cache = prefilled(model, ids)
    live = peak = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        decode(model, cache, ids, 5, steps)
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return {"seconds": rounded(min(seconds)), "peak_bytes": peak}


def prefilled(model: Any, ids: Any) -> Any:
    """A cache of all prompt tokens but the last."""
    import torch

    from rlvr_lab.policy.value_cache import ControlledCache

    cache = ControlledCache(model)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode(model: Any, cache: Any, ids: Any, tokens: int, steps: tuple[int, int] | None) -> None:
    """`tokens` tokens after the prompt, with `steps` = (every, inner steps) of a controller or none."""
    import torch

    from rlvr_lab.inference.entropy_switch import Settings, steer
    from rlvr_lab.policy.value_cache import tail_of

    token = ids[:, -1:]
    with torch.no_grad(), tail_of(model, cache) as tail:
        for step in range(tokens):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            if steps and step == 0:
                delta = cache.control([list(range(1, ids.shape[1]))] * len(ids))
                optimizer = Settings().optimizer_of(delta)
            if steps and step % steps[0] == 0:
                logits, _ = steer(tail.logits, delta, torch.ones(len(ids)), optimizer, steps[1])
            token = logits.argmax(-1, keepdim=True)


def main(
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run all arms; see the head of this file."""
    settings = [f"problems={PROBLEMS}", f"max_tokens={TOKENS}"]
    record = opened(out, {"arms": {}}, "v_reason.py", "tiny/R", settings, 0, MODULES)
    for seed in range(seeds):
        record_arms(record, ARMS, list(ARMS), seed, out, lambda arm, seed: one_run(record, arm, seed))
    if "cost" not in record:
        record["cost"] = cost()
        save(out, record)
        print(record["cost"])


if __name__ == "__main__":
    typer.run(main)
