"""What the entropy of an answer says about a chain: trajectories under two scorers, controls, and early stopping.

    python benchmarks/reasoning_utility.py --seeds 3

Chains are base S's samples for held-out Countdown problems; a step is one equation, the verdict is left out, the answer
stands behind `</think>`. Two scorers that never saw S: base R as it is shipped, which learned from right and wrong
chains alike, and `solver`, R continued on chains that reach their target, cut after a random number of steps, a seed of
its own each time. Answers: `own`, the one that the chain itself gives, and `gold`, a right one: the chain's own where
that is right, else one found by search. Controls: steps shuffled, steps of other problems, and in right chains one
result corrupted, which the answer (an expression of the problem's numbers) does not contain, or one sign, which it has.

Early stopping: base R, which was never asked before its time, and `solver`, which was trained to answer at any time,
write up to five attempts, with every place to stop, so that rules and controls are read off one chart.
Results go to `book/data/reasoning_utility.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from recording import opened, rounded, save

from rlvr_lab.evaluate import reasoning_utility as ru
from rlvr_lab.inference.early_stopping import EarlyStopping
from rlvr_lab.policy.load import load_policy
from rlvr_lab.rollout.engine import Sampling, TransformersEngine
from rlvr_lab.tasks import countdown as cd

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "reasoning_utility.json"
MODULES = ("evaluate.reasoning_utility", "inference.early_stopping", "policy.reader", "tasks.countdown")
CUE = [cd.END_THINK]
STEP_END = r"(= \d+|yes|no)$"
PARTS = {"chains", "signs", "stopping.solver", "stopping.base"}
VERDICTS = (cd.ID["yes"], cd.ID["no"])


# -- chains and answers -----------------------------------------------------------------------------------------------


def solution(problem: cd.Problem) -> list[int]:
    """Ids of a right answer in the form that traces have, by depth-first search."""

    def search(values: list[tuple[int, list[str]]]) -> list[str] | None:
        if len(values) == 1:
            return values[0][1] if values[0][0] == problem.target else None
        for (i, (a, left)), (j, (b, right)) in permutations(enumerate(values), 2):
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            for sign, result in _legal(a, b):
                text = [*_bracketed(left), sign, *_bracketed(right)]
                if found := search([*rest, (result, text)]):
                    return found
        return None

    found = search([(n, [str(n)]) for n in problem.numbers])
    assert found is not None
    return [cd.ID[word] for word in found]


def _legal(a: int, b: int) -> Iterator[tuple[str, int]]:
    if a >= b:
        candidates = {"+": a + b, "-": a - b, "*": a * b if b > 1 else 0, "/": a // b if b > 1 and not a % b else 0}
        yield from ((sign, r) for sign, r in candidates.items() if 0 < r <= cd.MAX_VALUE)


def _bracketed(words: list[str]) -> list[str]:
    return words if len(words) == 1 else ["(", *words, ")"]


def cut(ids: Sequence[int]) -> tuple[list[list[int]], list[int]] | None:
    """Equations and answer of a response of one attempt; None for one of another form."""
    if ids.count(cd.END_THINK) != 1 or ids[-1] != cd.EOS:
        return None
    close = ids.index(cd.END_THINK)
    if close % 5 != 1 or ids[close - 1] not in VERDICTS:
        return None
    return [list(ids[i : i + 5]) for i in range(0, close - 1, 5)], list(ids[close + 1 : -1])


def sampled(problems: Sequence[cd.Problem], seed: int, samples: int = 2) -> list[dict[str, Any]]:
    """Chains of base S for each problem, with the answer of each, whether it is right, and a right answer."""
    policy = load_policy("tiny/S", device="cpu")
    generator = torch.Generator().manual_seed(seed)
    rollout = TransformersEngine(policy).sample(
        [list(p.prompt_ids) for p in problems], samples, Sampling(max_tokens=32), generator
    )
    found = []
    for i, (row, length) in enumerate(zip(rollout.response_ids.tolist(), rollout.lengths.tolist(), strict=True)):
        parts, problem = cut(row[:length]), problems[i // samples]
        if parts and parts[0] and parts[1]:
            right = cd.verify(problem, policy.decode(row[: length - 1])).correct
            gold = parts[1] if right else solution(problem)
            found.append({"problem": i // samples, "prompt": list(problem.prompt_ids), "steps": parts[0],
                          "own": parts[1], "gold": gold, "correct": right, "tokens": length})  # fmt: skip
    return found


# -- scorers ----------------------------------------------------------------------------------------------------------


def train_solver(seed: int, steps: int, rate: float = 1e-3, batch: int = 32) -> Any:
    """Base R continued on right chains that are cut after 0 to K equations and then answered."""
    model = load_policy("tiny/R", device="cpu").model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng = np.random.default_rng([seed, 20395])
    rows = iter(_cut_traces(steps * batch, rng))
    for step in range(steps):
        drawn = [next(rows) for _ in range(batch)]
        width = max(len(ids) for ids, _ in drawn)
        tokens = torch.tensor([ids + [cd.PAD] * (width - len(ids)) for ids, _ in drawn])
        learned = torch.tensor([[start <= t < len(ids) for t in range(width)] for ids, start in drawn])[:, 1:]
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits[learned], tokens[:, 1:][learned])
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"solver {seed}, step {step}: {loss.item():.3f} nats", flush=True)
    return model.eval()


def _cut_traces(count: int, rng: np.random.Generator) -> Iterator[tuple[list[int], int]]:
    """Ids of a trace, and where its answer begins."""
    for ids in cd.traces(count, replace(cd.SINGLE, goal_directed=1.0), rng):
        close = ids.index(cd.END_THINK)
        kept = cd.PROMPT_TOKENS + 5 * int(rng.integers(0, (close - cd.PROMPT_TOKENS) // 5 + 1))
        yield ids[:kept] + ids[close:], kept + 1


def figures(found: ru.Trajectory) -> dict[str, list[float | None]]:
    """Entropy, negative log-likelihood, and the first answer token's entropy, after 0..K steps."""
    lists = {"H": found.entropy, "nll": found.nll, "first": found.first_entropy}
    return {name: [rounded(value) for value in values] for name, values in lists.items()}


def trajectories(chains: Sequence[dict[str, Any]], solver: Any, seed: int) -> list[dict[str, Any]]:
    """Every chain under both scorers and with both answers, and the controls under the solver."""
    base = load_policy("tiny/R", device="cpu")
    scorers = {"base": ru.Scorer(base.model, base.tokenizer, cue=CUE),
               "solver": ru.Scorer(solver, base.tokenizer, cue=CUE)}  # fmt: skip
    rng = np.random.default_rng([seed, 1])
    rows = []
    for chain in chains:
        prompt, steps = chain["prompt"], chain["steps"]
        row = {"problem": chain["problem"], "correct": int(chain["correct"]), "tokens": chain["tokens"]}
        for name, scorer in scorers.items():
            for answer in ("own", "gold"):
                row[f"{name}.{answer}"] = figures(scorer(prompt, steps, chain[answer]))
        pool = [s for other in chains if other["problem"] != chain["problem"] for s in other["steps"]]
        controls = {"shuffled": ru.shuffled_steps(steps, rng), "irrelevant": ru.irrelevant_steps(steps, pool, rng)}
        for name, changed in controls.items():
            row[name] = figures(scorers["solver"](prompt, changed, chain["own"]))
        if chain["correct"]:
            row["corrupted"] = [figures(scorers["solver"](prompt, changed, chain["gold"]))
                                for changed in corrupted(steps, rng)]  # fmt: skip
        rows.append(row)
    return rows


def corrupted(steps: list[list[int]], rng: np.random.Generator) -> Iterator[list[list[int]]]:
    """The chain with the result of step 1, 2, ... replaced by another number up to the largest that chains have."""
    for k, step in enumerate(steps):
        wrong = cd.NUMBER_OFFSET + int(rng.integers(1, cd.MAX_VALUE + 1))
        wrong += wrong == step[4]
        yield [*steps[:k], [*step[:4], wrong], *steps[k + 1 :]]


def corrupted_signs(chains: Sequence[dict[str, Any]], solver: Any, seed: int) -> list[list[dict[str, Any]]]:
    """Of every right chain, the solver's figures with the sign of step 1, 2, ... replaced by another."""
    scorer = ru.Scorer(solver, load_policy("tiny/R", device="cpu").tokenizer, cue=CUE)
    rng = np.random.default_rng([seed, 2])
    found = []
    for chain in chains:
        if chain["correct"]:
            steps, figured = chain["steps"], []
            for k, step in enumerate(steps):
                wrong = int(rng.choice([cd.ID[sign] for sign in cd.SIGNS if cd.ID[sign] != step[1]]))
                changed = [*steps[:k], [step[0], wrong, *step[2:]], *steps[k + 1 :]]
                figured.append(figures(scorer(chain["prompt"], changed, chain["gold"])))
            found.append(figured)
    return found


# -- early stopping ---------------------------------------------------------------------------------------------------


def chart(model: Any, problems: Sequence[cd.Problem], seed: int) -> list[dict[str, Any]]:
    """Of every problem: H after each step, and tokens and correctness of the response if it is stopped there; last
    those of the response that is not stopped."""
    tokenizer = load_policy("tiny/R", device="cpu").tokenizer
    method = EarlyStopping(
        model,
        tokenizer,
        threshold=0.0,
        cue="</think>",
        close="</think>",
        step_end=STEP_END,
        max_tokens=96,
    )
    asked = [(problem.prompt, problem) for problem in problems]
    chains = method.chart(
        asked, verify=lambda text, problem: cd.verify(problem, text).correct,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return [
        {"H": [rounded(h) for h in chain.entropy], "tokens": [len(r) for r in chain.responses],
         "thought": list(chain.thought), "extra": list(chain.extra),
         "correct": [int(c) for c in chain.correct or ()]}
        for chain in chains
    ]  # fmt: skip


def main(
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps of the solver.")] = 150,
    problems: Annotated[int, typer.Option(help="Problems per seed for the trajectories, two chains each.")] = 100,
    stopped: Annotated[int, typer.Option(help="Problems per seed and model for early stopping.")] = 40,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Record all parts that the file lacks; see the head of this file."""
    torch.set_num_threads(1)
    settings = [f"problems={problems}", f"stopped={stopped}", "temperature=1", "adamw, rate=1e-3, batch=32"]
    record = opened(out, {"seeds": {}}, "reasoning_utility.py", "tiny/S, tiny/R", settings, steps, MODULES)
    for seed in range(seeds):
        own = record["seeds"].setdefault(str(seed), {})
        if own.keys() >= PARTS:
            continue
        held_out = cd.problems(max(problems, stopped), seed, evaluation=True)
        models = {"solver": train_solver(seed, steps), "base": load_policy("tiny/R", device="cpu").model}
        for name, part in (("chains", trajectories), ("signs", corrupted_signs)):
            if name not in own:
                own[name] = part(sampled(held_out[:problems], seed), models["solver"], seed)
                save(out, record)
                print(f"{name}, seed {seed}: {len(own[name])}", flush=True)
        for name, model in models.items():
            if f"stopping.{name}" not in own:
                own[f"stopping.{name}"] = chart(model, held_out[:stopped], seed)
                save(out, record)
                print(f"early stopping of {name}, seed {seed}: done", flush=True)


if __name__ == "__main__":
    typer.run(main)
