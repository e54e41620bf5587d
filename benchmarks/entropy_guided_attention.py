"""Softmax-only language models with and without the entropy penalty, and attention entropy along a GRPO run.

    python benchmarks/entropy_guided_attention.py --seeds 5

Two experiments, written to `book/data/entropy_guided_attention.json`:

1. Language models: a character-level language of 48 made-up words with preferred successors and back references (`@`
   repeats a word of the line). Arms differ in the network or in the penalty alone; data, seeds and steps are matched.
2. Arm `grpo`: every few steps of GRPO on the tiny lab's base S, mean attention entropy of every head on one fixed text,
   40 prompts with responses of the base, beside token entropy on that text and on the step's own rollout.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "entropy_guided_attention.json"
LETTERS = "abcdefghijkl"
CHARS = LETTERS + " @\n"
LENGTH, BATCH, HELD_OUT = 48, 16, 128
BARE: dict[str, Any] = {"norm": False, "activation": "none"}
ONLY: dict[str, Any] = BARE | {"temperature": True, "scaled": True}
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {"model": {}},
    "norm_only": {"model": {"activation": "none"}},
    "bare": {"model": BARE},
    "softmax_only": {"model": ONLY},
    "penalty": {"model": ONLY, "penalty": {"coefficient": 0.01}},
    "strong": {"model": ONLY, "penalty": {"coefficient": 0.1}},
    "causal": {"model": ONLY, "penalty": {"coefficient": 0.1, "causal_max": True}},
    "no_dead_zone": {"model": ONLY, "penalty": {"coefficient": 0.1, "gamma": 0.0}},
}
"""1e-2 over the mean is about the paper's 1e-5 over the sum at 16 x 48 (7.7e-3); the others take ten times that."""
RUN = ("rollout.prompts=8", "update.minibatches=4", "evaluation.problems=0", "logging.tensorboard=false",
       "logging.samples=0", "ledger.rows=0")  # fmt: skip
GRPO = {"grpo": "methods={grpo: {preset: tiny}}"}
MODULES = ("methods.entropy_guided_attention", "methods.grpo", "policy.softmax_only")


def language(lines: int, seed: int) -> np.ndarray[Any, Any]:
    """Character ids [lines, LENGTH + 1] of the made-up language; the words are the same for every seed."""
    fixed, rng = np.random.default_rng(7), np.random.default_rng([11, seed])
    words: list[str] = []
    while len(words) < 48:
        word = "".join(fixed.choice(list(LETTERS), int(fixed.integers(2, 5))))
        words += [] if word in words else [word]
    successors = [fixed.choice(48, 3, replace=False) for _ in words]
    found = np.zeros((lines, LENGTH + 1), dtype=np.int64)
    for row in found:
        text, said = "\n", [int(rng.integers(48))]
        while len(text) <= LENGTH + 1:
            text += words[said[-1]] + " "
            if rng.random() < 0.25:
                text += "@" + words[said[int(rng.integers(len(said)))]] + " "
            said.append(int(rng.choice(successors[said[-1]])) if rng.random() < 0.85 else int(rng.integers(48)))
        row[:] = [CHARS.index(c) for c in text[: LENGTH + 1]]
    return found


def one_model(arm: str, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
    """Train one network; held-out loss and head entropies at points of the run, and thresholds at the end."""
    import torch

    from rlvr_lab.methods.entropy_guided_attention import AttentionEntropyConfig, AttentionEntropyPenalty
    from rlvr_lab.policy.softmax_only import SoftmaxOnlyConfig, SoftmaxOnlyLM

    torch.set_num_threads(1)
    setting = ARMS[arm]
    config = SoftmaxOnlyConfig(len(CHARS), LENGTH, **setting["model"])
    model = SoftmaxOnlyLM(config, seed)
    penalty = AttentionEntropyPenalty(
        config.layers, config.heads, AttentionEntropyConfig(**setting.get("penalty", {"coefficient": 0.0}))
    )
    text = torch.from_numpy(language(BATCH * steps, seed)).view(steps, BATCH, -1)
    test = torch.from_numpy(language(HELD_OUT, 1_000_000))
    optimizer = torch.optim.AdamW([*model.parameters(), *penalty.parameters()], lr=learning_rate, weight_decay=0.0)
    points = [measure(model, test) | {"step": 0}]
    for step, batch in enumerate(text):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        logits, matrices = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) + penalty(matrices)
        if not bool(loss.isfinite()):
            points.append({"step": step + 1, "loss": None, "entropy": None})
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % (steps // 5) == 0:
            points.append(measure(model, test) | {"step": step + 1})
    scales = {name: [rounded(float(x)) for x in p.detach().flatten()] for name, p in model.named_parameters()
              if name.endswith(("alpha", "beta"))}  # fmt: skip
    temperature = [[rounded(float(t)) for t in block.attention.temperature.detach()] for block in model.blocks]
    theta = [[rounded(float(x)) for x in row] for row in penalty.thresholds.detach()]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    last = {"temperature": temperature, "theta": theta, "scales": scales, "parameters": parameters}
    return {"points": points, "last": last, "end": points[-1]}


def measure(model: Any, test: Any) -> dict[str, Any]:
    """Held-out loss per character, and the mean row entropy of every head [L, H], in nats."""
    import torch

    from rlvr_lab.methods.entropy_guided_attention import head_entropies

    with torch.no_grad():
        logits, matrices = model(test[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), test[:, 1:].flatten())
        entropy = head_entropies(matrices)
    return {"loss": rounded(float(loss)), "entropy": [[rounded(float(x)) for x in row] for row in entropy]}


def one_grpo(seed: int, steps: int, every: int) -> dict[str, Any]:
    """GRPO on base S; see the head of this file."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.rollout.engine import Sampling, TransformersEngine
    from rlvr_lab.tasks import countdown
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    with tempfile.TemporaryDirectory(prefix=f"attention_{seed}_") as folder:
        trainer = Trainer(
            load_config("grpo/tiny", [f"seed={seed}", f"steps={steps}", *RUN, *GRPO.values()]), Path(folder) / "run"
        )
        problems = countdown.problems(40, 5)
        prompts = [list(problem.prompt_ids) for problem in problems]
        engine = TransformersEngine(trainer.policy)
        text = engine.sample(prompts, 1, Sampling(max_tokens=32), torch.Generator().manual_seed(5))
        points = [attention_and_token_entropy(trainer.policy.model, text) | {"step": 0}]
        rows = []
        for step in range(steps):
            rows.append(trainer.step(step))
            if (step + 1) % every == 0:
                points.append(attention_and_token_entropy(trainer.policy.model, text) | {"step": step + 1})
        trainer.log.close()
    columns = {name: [rounded(row[name]) for row in rows] for name in ("token_entropy", "accuracy")}
    return {"points": points, "steps": columns, "end": points[-1]}


def attention_and_token_entropy(model: Any, text: Any) -> dict[str, Any]:
    """On one fixed text: mean row entropy of every head [L, H] over the rows that write a response token, the same as a
    share of what each row can reach, and the mean token entropy of the choices made there."""
    import torch

    from rlvr_lab.core.entropy import pooled_token_entropy
    from rlvr_lab.methods.entropy_guided_attention import attention_entropy
    from rlvr_lab.policy.access import attention_matrices
    from rlvr_lab.policy.forward import scored

    ids = torch.cat([text.prompt_ids, text.response_ids], 1)
    assert bool(text.prompt_mask.all())  # prompts of base S are of one length
    writes = torch.zeros_like(ids, dtype=torch.bool)  # the row before a token chose it
    writes[:, text.prompt_ids.shape[1] - 1 : -1] = text.response_mask
    with torch.no_grad():
        rows = torch.stack([attention_entropy(a) for a in attention_matrices(model, input_ids=ids)])
        reach = torch.arange(1, ids.shape[1] + 1).log()
        each = {"entropy": rows, "share": rows / reach.clamp_min(math.log(2))}
        means = {name: (x * writes[:, None]).sum((1, 3)) / writes.sum() for name, x in each.items()}
    _, token = scored(model, text, 64)
    found = {name: [[rounded(float(x)) for x in row] for row in value] for name, value in means.items()}
    return found | {"token_entropy": rounded(float(pooled_token_entropy(token, text.mask)))}


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of the language models.")] = 5,
    steps: Annotated[int, typer.Option(help="Training steps of a language model.")] = 250,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 3e-3,
    grpo_seeds: Annotated[int, typer.Option(help="Seeds of the GRPO run.")] = 3,
    grpo_steps: Annotated[int, typer.Option(help="Steps of the GRPO run.")] = 48,
    every: Annotated[int, typer.Option(help="Steps between two looks at attention.")] = 4,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run both experiments; see the head of this file."""
    from rlvr_lab.policy.softmax_only import SoftmaxOnlyConfig

    chosen = chosen_arms(arms, ARMS)
    record = opened(out, {"arms": {}}, "entropy_guided_attention.py", "grpo/tiny", RUN, steps, MODULES)
    record |= {"language": {"length": LENGTH, "batch": BATCH, "held_out": HELD_OUT, "characters": len(CHARS)}}
    record |= {"learning_rate": learning_rate, "model": asdict(SoftmaxOnlyConfig(len(CHARS), LENGTH))}
    for seed in range(seeds):
        record_arms(record, ARMS, chosen, seed, out, lambda arm, seed: one_model(arm, seed, steps, learning_rate))
    for seed in range(grpo_seeds):
        record_arms(record, GRPO, list(GRPO), seed, out, lambda _, seed: one_grpo(seed, grpo_steps, every))


if __name__ == "__main__":
    typer.run(main)
