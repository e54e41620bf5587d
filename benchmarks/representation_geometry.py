"""How the spectrum of last-token states moves: through pre-training, and from one base through SFT and RL, by seed.

    python benchmarks/representation_geometry.py --seeds 5

Part 1 pre-trains a transformer of width 32 on sequences of a chain that walks over 1,024 hidden states by one of two
fixed permutations. A word owns several states, and only words are seen, so that what comes next is learned first from
how frequent words are, then from the last word, then from several. Arms differ in which word owns which states: `zipf`
by Zipf's law (256 words, width below vocabulary), `uniform` equally often, `wide` by Zipf's law among 32 words, so that
the width is no bottleneck, and `long` is `zipf` for nearly four times as many steps. Only the first three seeds run it.

Part 2 starts at the shipped base S. `sft` imitates goal-directed demonstrations, `own` the base's own right responses,
`grpo` is the recipe `grpo/tiny`, `random` the same with rewards that are drawn at random. States of the same probes are
measured along the way: `prompts` end where the response begins, `texts` anywhere in a response of the pre-training
mixture. Results go to `book/data/representation_geometry.json`.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "representation_geometry.json"
MODULES = ("evaluate.representation_geometry", "methods.grpo", "methods.spurious_rewards", "train.sft")

HIDDEN_STATES, STAY, LENGTH, BATCH, WIDTH, PROBES = 1024, 0.75, 24, 64, 32, 1000
CORPORA = {
    "zipf": {"words": 256, "exponent": 1.5},
    "uniform": {"words": 256, "exponent": 0.0},
    "wide": {"words": 32, "exponent": 1.5},
    "long": {"words": 256, "exponent": 1.5, "more": (480, 720, 960, 1200)},
}
PRETRAINED_SEEDS = 3
MARKS = (0, 5, 10, 20, 30, 45, 65, 90, 130, 180, 240, 320)

SETTINGS = ("rollout.prompts=8", "rollout.group_size=8", "update.minibatches=4", "update.micro_batch_rows=32",
            "evaluation.every=0", "logging.tensorboard=false", "logging.samples=0", "ledger.rows=0")  # fmt: skip
ARMS = {
    "sft": "64 steps of 32 demonstrations, all goal-directed",
    "own": "64 steps of 32 right responses of the base",
    "grpo": "methods={grpo: {preset: tiny}}",
    "random": "methods={grpo: {preset: tiny}, spurious_rewards: {preset: paper, rule: random, seed: %d}}",
}
TAUGHT, LR = 2048, 3e-4
FIGURES = ("rankme", "spectral_entropy", "rankme_singular", "rankme_uncentred", "participation_ratio")


def figures(model: Any, sequences: list[list[int]], ranks: tuple[int, int]) -> dict[str, float | None]:
    """What `geometry` says of the model's states, with alpha and the fit's R^2."""
    from rlvr_lab.evaluate.representation_geometry import geometry, last_token_states

    found = geometry(last_token_states(model, sequences, rows=250), ranks)
    told = {name: getattr(found, name) for name in FIGURES}
    told |= {"alpha": found.power_law.alpha, "r2_fit": found.power_law.r2_fit}
    return {name: rounded(value) for name, value in told.items()}


# -------------------------------------------------------------------------------------------------------- pre-training


def owners(words: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """The word of each hidden state: word i owns a share ~ i^-exponent of them, at least one."""
    weight = np.arange(1, words + 1) ** -exponent
    share = 1 + (HIDDEN_STATES - words) * weight / weight.sum()
    count = np.floor(share).astype(int)
    count[np.argsort(count - share)[: HIDDEN_STATES - count.sum()]] += 1
    return np.asarray(rng.permutation(np.repeat(np.arange(words), count)))


def sequences_of(own: np.ndarray, walks: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n sequences of words: each hidden state follows the last one's permutation, the first with probability STAY."""
    state, seen = rng.integers(0, HIDDEN_STATES, n), []
    for _ in range(LENGTH):
        seen.append(own[state])
        state = walks[(rng.random(n) > STAY).astype(int), state]
    return np.stack(seen, 1)


def pretraining(arm: str, seed: int) -> dict[str, Any]:
    """Loss and figures at the steps of `MARKS`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlvr_lab.evaluate.representation_geometry import small_ranks

    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 0])
    own = owners(CORPORA[arm]["words"], CORPORA[arm]["exponent"], rng)
    walks = np.stack([rng.permutation(HIDDEN_STATES) for _ in range(2)])
    probe = sequences_of(own, walks, PROBES // 2, np.random.default_rng([seed, 1])).tolist()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=CORPORA[arm]["words"], hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    losses, found = [float("nan")], []
    marks = (*MARKS, *CORPORA[arm].get("more", ()))
    for step in range(marks[-1] + 1):
        if step in marks:
            found.append({"step": step, "loss": rounded(np.mean(losses[-20:]))})
            found[-1] |= figures(model, probe, small_ranks(WIDTH))
        ids = torch.from_numpy(sequences_of(own, walks, BATCH, rng))
        losses.append(_learn(model, optimizer, ids, step, marks[-1] + 1))
    points = {name: [point[name] for point in found] for name in found[0]}
    return {"points": points, "end": found[-1]}


def _learn(model: Any, optimizer: Any, ids: Any, step: int, total: int) -> float:
    import torch

    logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 2.5 * (1 - step / total))
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# ------------------------------------------------------------------------------------------------------- post-training


def probes() -> dict[str, list[list[int]]]:
    """The same for every arm and seed: prompts, and texts cut anywhere in a response."""
    from rlvr_lab.tasks.countdown import PROMPT_TOKENS, SINGLE, traces

    rng = np.random.default_rng(2509)
    texts = list(traces(2 * PROBES, SINGLE, rng))
    cut = [text[: int(rng.integers(PROMPT_TOKENS + 1, len(text)))] for text in texts[PROBES:]]
    return {"prompts": [text[:PROMPT_TOKENS] for text in texts[:PROBES]], "texts": cut}


def measured(policy: Any, step: int) -> dict[str, Any]:
    """Figures of both probes, and accuracy and entropies of 8 responses to each of 48 held-out problems."""
    from rlvr_lab.evaluate.evaluation import evaluate
    from rlvr_lab.evaluate.representation_geometry import small_ranks
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.tasks import countdown
    from rlvr_lab.tasks.registry import CountdownTask

    told: dict[str, Any] = {"step": step}
    for name, sequences in probes().items():
        told[name] = figures(policy.model, sequences, small_ranks(policy.model.config.hidden_size))
    problems = countdown.problems(48, 1, evaluation=True)
    result = evaluate(policy, CountdownTask(), problems, samples=8, sampling=Sampling(max_tokens=32))
    summary = result.summary((1, 8))
    names = ("pass@1", "pass@8", "token_entropy", "answer_entropy", "distinct_correct")
    return told | {name: rounded(summary[name]) for name in names}


def rl(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Figures after each half of a training run."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    method = ARMS[arm] % seed if "%" in ARMS[arm] else ARMS[arm]
    settings = [f"seed={seed}", f"steps={steps}", *SETTINGS, method]
    with tempfile.TemporaryDirectory(prefix=f"geometry_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config("grpo/tiny", settings), Path(folder) / "run")
        points = []
        for step in range(steps):
            trainer.step(step)
            if (step + 1) % (steps // 2) == 0:
                points.append(measured(trainer.policy, step + 1))
        trainer.log.close()
    return {"points": points, "end": points[-1]}


def supervised(arm: str, seed: int) -> dict[str, Any]:
    """Figures after each half of a fine-tuning."""
    import torch

    from rlvr_lab.policy.load import load_policy
    from rlvr_lab.train.sft import SFTSettings, fine_tune

    torch.set_num_threads(1)
    policy = load_policy("tiny/S", device="cpu")
    examples = demonstrations(seed) if arm == "sft" else right_responses(policy, seed)
    settings = SFTSettings("plain", epochs=1, lr=LR, seed=seed)
    steps, done, points = len(examples) // settings.batch, 0, []

    def report(more: int) -> None:
        nonlocal done
        done += more
        if done and done % (steps // 2) == 0:
            points.append(measured(policy, done))

    fine_tune(policy, examples, settings, report=report)
    return {"points": points, "end": points[-1]}


def demonstrations(seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of traces that know where they are going."""
    from dataclasses import replace

    from rlvr_lab.tasks.countdown import PROMPT_TOKENS, SINGLE, traces

    style = replace(SINGLE, goal_directed=1.0)
    return [(t[:PROMPT_TOKENS], t[PROMPT_TOKENS:]) for t in traces(TAUGHT, style, np.random.default_rng([seed, 7]))]


def right_responses(policy: Any, seed: int) -> list[tuple[list[int], list[int]]]:
    """As many right responses of the policy, one of each problem."""
    import torch

    from rlvr_lab.rollout.engine import Sampling, TransformersEngine
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.tasks import countdown
    from rlvr_lab.tasks.registry import CountdownTask

    problems = countdown.problems(3000, 1000 + seed, evaluation=False)
    prompts, generator = [list(p.prompt_ids) for p in problems], torch.Generator().manual_seed(seed)
    engine, kept = TransformersEngine(policy), []
    while len(kept) < TAUGHT:
        rollout = engine.sample(prompts, 4, Sampling(max_tokens=32), generator)
        rollout = grade(rollout, CountdownTask(), problems, policy)
        for i in rollout.correct.nonzero().flatten().tolist():
            response = rollout.response_ids[i, : int(rollout.lengths[i])].tolist()
            kept.append((prompts[i // 4], response))
    order = np.random.default_rng([seed, 9]).permutation(len(kept))[:TAUGHT]
    return [kept[i] for i in order]


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 5,
    steps: Annotated[int, typer.Option(help="Training steps of GRPO.")] = 48,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    from rlvr_lab.policy.load import load_policy

    known, runs = CORPORA | ARMS, dict.fromkeys(CORPORA, pretraining) | {"sft": supervised, "own": supervised}
    chosen = chosen_arms(arms, known)
    record = opened(
        out, {"base": None, "arms": {}}, "representation_geometry.py", "grpo/tiny", SETTINGS, steps, MODULES
    )
    if record["base"] is None:
        record["base"] = measured(load_policy("tiny/S", device="cpu"), 0)
    for seed in range(seeds):
        now = [arm for arm in chosen if arm in ARMS or seed < PRETRAINED_SEEDS]
        record_arms(record, known, now, seed, out, lambda arm, n: runs.get(arm, partial(rl, steps=steps))(arm, n))


if __name__ == "__main__":
    typer.run(main)
