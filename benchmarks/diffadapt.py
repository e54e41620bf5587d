"""DiffAdapt on the tiny lab with retries: entropy against difficulty, the probe and its controls, adaptive decoding.

    python benchmarks/diffadapt.py --seeds 3

Arms are two models: base R, pre-trained on reasoning traces, and R after GRPO. Difficulty is the chance of a random
chain of legal steps, which asks no model. For each model and seed: training problems are labelled from 10 samples at
temperature 1 and a probe is fitted; on held-out problems there are labels from two independent sets of samples, the
calls of the probe and of its controls, and outcomes of 4 responses under each strategy. Random numbers are the same
under all strategies. Results, per problem, go to `book/data/diffadapt.json`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "diffadapt.json"
MAX_TOKENS, SAMPLES, FIRST, ANSWERS, ROWS = 96, 10, 5, 4, 256
TRAINING, HELD_OUT = 500, 200
RECIPE = "grpo/tiny_retries"
SETTINGS = ("rollout.prompts=8", "rollout.group_size=8", "update.minibatches=4", "update.micro_batch_rows=16",
            "optimizer.lr=4.0e-4", "optimizer.warmup=2", "logging.tensorboard=false", "logging.samples=0",
            "ledger.rows=0")  # fmt: skip
ARMS = {"base": "tiny/R", "grpo": "tiny/R after GRPO"}
MODULES = (
    "inference.difficulty",
    "inference.probe",
    "inference.strategies",
    "tasks.countdown_difficulty",
)


def policy_of(arm: str, seed: int, steps: int) -> Any:
    """The arm's model; GRPO's is trained here, on problems outside the held-out tenth."""
    from rlvr_lab.policy.load import load_policy
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    if arm == "base":
        return load_policy("tiny/R", device="cpu")
    with tempfile.TemporaryDirectory(prefix=f"diffadapt_{seed}_") as folder:
        trainer = Trainer(load_config(RECIPE, [f"seed={seed}", f"steps={steps}", *SETTINGS]), Path(folder) / "run")
        for step in range(steps):
            trainer.step(step)
        trainer.log.close()
        return trainer.policy


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Everything about one model and one draw of problems."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.inference.lm import as_policy, as_questions, prompt_ids
    from rlvr_lab.tasks import countdown
    from rlvr_lab.tasks.countdown_difficulty import chance

    trained = policy_of(arm, seed, steps)
    policy = as_policy(trained.model, trained.tokenizer)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    pools = [countdown.problems(n, 100 + seed, ev) for n, ev in ((TRAINING, False), (HELD_OUT, True))]
    parts = []
    for problems in pools:
        questions = as_questions([(p.prompt, p) for p in problems])
        prompts = prompt_ids(policy, [q.text for q in questions], MAX_TOKENS)
        found = sampled(policy, questions, prompts, generator)
        about = {"chance": [rounded(chance(p, rng)) for p in problems], "operands": [len(p.numbers) for p in problems]}
        parts.append({"questions": questions, "prompts": prompts, "figures": found, "about": about})
    again = sampled(policy, parts[1]["questions"], parts[1]["prompts"], generator)
    called, labels, at = probes(policy, parts, again, generator)
    training, held_out = ({**part["about"], **part["figures"]} for part in parts)
    held_out |= labels | {"called": called}
    held_out |= outcomes(policy, parts[1]["questions"], parts[1]["prompts"], generator)
    right = [held_out["label"][i] == name for i, name in enumerate(called["final"])]
    end = {"probe_accuracy": sum(right) / len(right), "correct": float(np.mean(held_out["correct"]))}
    return {"thresholds": at, "training": training, "held_out": held_out, "end": end}


def sampled(policy: Any, questions: Sequence[Any], prompts: Sequence[Any], generator: Any) -> dict[str, list[Any]]:
    """Share correct, mean tokens, and mean, sum and first entropies of each problem's samples at temperature 1."""
    import numpy as np

    from rlvr_lab.inference.difficulty import measure, sample_entropies
    from rlvr_lab.inference.lm import sample

    groups = sample(policy, prompts, SAMPLES, MAX_TOKENS, generator, ROWS)
    rate, entropy = measure(groups, questions, verify)
    three = np.array([[sample_entropies(r.entropy, FIRST) for r in group] for group in groups]).mean(1)
    return {
        "rate": rate,
        "entropy": [rounded(h) for h in entropy],
        "summed": [rounded(h) for h in three[:, 1].tolist()],
        "first": [rounded(h) for h in three[:, 2].tolist()],
        "tokens": [sum(map(len, group)) / SAMPLES for group in groups],
    }


def verify(text: str, problem: Any) -> bool:
    """Whether a response solves a Countdown problem."""
    from rlvr_lab.tasks import countdown

    return countdown.verify(problem, text).correct


def probes(
    policy: Any, parts: Sequence[dict[str, Any]], again: dict[str, list[Any]], generator: Any
) -> tuple[dict[str, list[str]], dict[str, Any], dict[str, float]]:
    """Calls on held-out problems by the probe and its controls, both sets of labels, and the thresholds.

    Thresholds are fixed on training problems. Controls read: the embeddings of the last token, which all prompts share;
    the mean embedding of the prompt; the state after each block; the prompt's length; the number of operands.
    """
    from dataclasses import asdict

    from rlvr_lab.inference.difficulty import proxy_labels, tercile_thresholds
    from rlvr_lab.inference.probe import fit_probe

    at = tercile_thresholds(parts[0]["figures"]["rate"], parts[0]["figures"]["entropy"])
    train, label, second = (
        proxy_labels(figures["rate"], figures["entropy"], at)
        for figures in (parts[0]["figures"], parts[1]["figures"], again)
    )
    called = {}
    for name, reading in readings(policy).items():
        probe = fit_probe(reading(parts[0]), train, generator)
        called[name] = probe.predict(reading(parts[1]))
    return called, {"label": label, "second_label": second, "training_label": train}, asdict(at)


def readings(policy: Any) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What each probe reads of a part's prompts [N, d]."""
    import torch

    from rlvr_lab.inference.lm import prompt_states

    embedding = policy.model.get_input_embeddings().weight.detach()
    layers = policy.model.config.num_hidden_layers
    states = {f"block {i}": lambda part, i=i: prompt_states(policy, part["prompts"], i) for i in range(1, layers)}
    return states | {
        "final": lambda part: prompt_states(policy, part["prompts"]),
        "last embedding": lambda part: prompt_states(policy, part["prompts"], 0),
        "mean embedding": lambda part: torch.stack([embedding[torch.tensor(p)].mean(0) for p in part["prompts"]]),
        "prompt length": lambda part: torch.tensor([[float(len(p))] for p in part["prompts"]]),
        "operands": lambda part: torch.tensor([[float(n)] for n in part["about"]["operands"]]),
    }


def outcomes(policy: Any, questions: Sequence[Any], prompts: Sequence[Any], generator: Any) -> dict[str, Any]:
    """Correctness and tokens [problems, 3, responses] under each strategy, easy, normal, hard; and under budgets alone.

    `budget_*`: the normal strategy's responses cut at each class's budget, so that temperature is equal.
    """
    from rlvr_lab.inference.difficulty import CLASSES
    from rlvr_lab.inference.lm import respond
    from rlvr_lab.inference.strategies import PLAIN

    repeated, asked = ([x for x in items for _ in range(ANSWERS)] for items in (prompts, questions))
    table = {}
    for name in CLASSES:
        strategy = PLAIN[name]
        limit = strategy.max_tokens(MAX_TOKENS)
        table[name] = respond(policy, repeated, max_tokens=limit, temperature=strategy.temperature, rows=ROWS,
                              generator=generator.clone_state())  # fmt: skip

    def by_problem(values: list[list[int]]) -> list[list[list[int]]]:
        n = len(questions)
        return [[column[i * ANSWERS : (i + 1) * ANSWERS] for column in values] for i in range(n)]

    budgets = [PLAIN[name].max_tokens(MAX_TOKENS) for name in CLASSES]
    right = {name: [int(verify(r.text, q.answer)) for r, q in zip(table[name], asked, strict=True)] for name in CLASSES}
    normal = list(zip(right["normal"], map(len, table["normal"]), strict=True))
    return {
        "correct": by_problem([right[name] for name in CLASSES]),
        "answer_tokens": by_problem([list(map(len, table[name])) for name in CLASSES]),
        "budget_correct": by_problem([[int(c and n <= most) for c, n in normal] for most in budgets]),
        "budget_tokens": by_problem([[min(n, most) for _, n in normal] for most in budgets]),
    }


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Models to measure; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="GRPO steps of the trained model.")] = 30,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Measure models; see the head of this file."""
    chosen = chosen_arms(arms, ARMS)
    record = opened(out, {"arms": {}}, "diffadapt.py", RECIPE, SETTINGS, steps, MODULES)
    record |= {"max_tokens": MAX_TOKENS, "samples": SAMPLES, "first": FIRST, "answers": ANSWERS}
    for seed in range(seeds):
        record_arms(record, ARMS, chosen, seed, out, lambda arm, seed: one_run(arm, seed, steps))


if __name__ == "__main__":
    typer.run(main)
