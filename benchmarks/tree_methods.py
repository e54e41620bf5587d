"""Tree methods on the tiny lab at equal **generated tokens**: CURE and ETTRL beside plain sampling and their controls.

    python benchmarks/tree_methods.py cure
    python benchmarks/tree_methods.py ettrl

Every run of a method ends with the step in which it has generated as many tokens as the others; shared prefixes count
once, discarded responses too. Steps, and so updates, differ: a tree has cheaper responses and makes more of them.
Entropy and accuracy are of fresh samples of bare questions at T = 1, because branches start where the policy was
uncertain. CURE's second stage goes on from the model that its first stage had at 60 % of the tokens. ETTRL trains on a
small set of questions without labels, and is measured on those and on others. `base` compares ways to spend the same
tokens on one question, before any training. Results go to `book/data/cure.json` and `book/data/ettrl.json`.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from recording import chosen_arms, opened, record_arms, rounded, save

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("evaluation.problems=48", "logging.tensorboard=false", "logging.samples=0", "ledger.rows=0",
            "optimizer.warmup=4")  # fmt: skip
ARMS: dict[str, dict[str, list[str]]] = {
    "cure": {
        "dapo": ["methods.cure.n2=0"],
        "cure": [],
        "cure_random": ["methods.cure.critical_token_type=random"],
        "cure_two_stages": [],
    },
    "ettrl": {
        "ttrl": ["methods.ettrl.forks=0", "rollout.group_size=16"],
        "ettrl": [],
        "random_forks": ["methods.ettrl.order=random"],
        "adv_res": ["methods.ettrl={preset: tiny, forks: 0, shape: res}", "rollout.group_size=16"],
        "shuffled_y": ["methods.ettrl={preset: tiny, forks: 0, shape: res, shuffled: true}", "rollout.group_size=16"],
        "random_reward": ["methods.ettrl.label=random"],
    },
}
MORE: dict[str, tuple[str, ...]] = {"cure": (), "ettrl": ("data.pool=48",)}
TOKENS = {"cure": 105_000, "ettrl": 80_000}
POINTS = {"cure": 2, "ettrl": 1}
"""Measurements on fresh samples, at equal distances, the last one at the end."""
MODULES = {name: ("core.trees", f"methods.{name}") for name in ARMS}
SWITCH = 0.6
"""Share of the tokens after which CURE's second stage begins."""
COLUMNS = ("generated_tokens", "token_entropy", "accuracy", "reward")


class Run:
    """One trainer, driven until it has generated enough tokens."""

    def __init__(self, method: str, settings: list[str], seed: int, folder: Path) -> None:
        from rlvr_lab.train.config import load_config
        from rlvr_lab.train.loop import Trainer

        config = load_config(f"{method}/tiny", [f"seed={seed}", "steps=1000", *SETTINGS, *MORE[method], *settings])
        self.method, self.trainer, self.step = method, Trainer(config, folder), 0
        self.rows: list[dict[str, float]] = []

    def until(self, tokens: float, spent: float) -> float:
        """Steps until `tokens` are generated, of which `spent` are already; returns how many there are then."""
        while spent < tokens:
            row = self.trainer.step(self.step)
            self.step += 1
            spent += row["generated_tokens"]
            self.rows.append(row)
        return spent

    def second_stage(self, folder: Path) -> Run:
        """A new run from this one's model, without branches."""
        self.trainer.log.close()
        where, policy = folder / "stage", self.trainer.policy
        policy.model.save_pretrained(where)
        policy.tokenizer.save_pretrained(where)
        settings = ["methods.cure.n2=0", f"model.path={where}", "optimizer.warmup=0"]
        return Run(self.method, settings, self.trainer.config.seed + 100, folder / "two")

    def fresh(self, which: Literal["held_out", "trained_on"] = "held_out", samples: int = 16) -> dict[str, Any]:
        """Figures of fresh samples of bare questions."""
        from rlvr_lab.evaluate.evaluation import evaluate
        from rlvr_lab.rollout.engine import Sampling

        problems = self.trainer.problems
        asked = problems.evaluation if which == "held_out" else problems.train
        found = evaluate(
            self.trainer.policy, problems.task, asked, samples=samples, sampling=Sampling(max_tokens=32), seed=1
        )
        figures = {"accuracy": found.pass_at(1), "pass@8": found.pass_at(8), "token_entropy": found.token_entropy,
                   "sequence_entropy": found.sequence_entropy, "mean_tokens": found.mean("mean_tokens"),
                   "distinct_correct": found.mean("distinct")}  # fmt: skip
        return {name: rounded(value) for name, value in figures.items()}


def one_run(method: str, arm: str, seed: int, tokens: int) -> dict[str, Any]:
    """Every step's figures, and fresh samples on the way and at the end."""
    import torch

    torch.set_num_threads(1)
    began = time.process_time()
    settings = ARMS[method][arm]
    with tempfile.TemporaryDirectory(prefix=f"{method}_{arm}_{seed}_") as name:
        folder = Path(name)
        run = Run(method, settings, seed, folder / "one")
        rows, points, spent = [run.rows], [], 0.0
        stops = [tokens * (i + 1) / POINTS[method] for i in range(POINTS[method])]
        if arm == "cure_two_stages":
            stops[:-1] = [SWITCH * tokens]
        for stop in stops:
            if points and arm == "cure_two_stages":
                run = run.second_stage(folder)
                rows.append(run.rows)
            spent = run.until(stop, spent)
            points.append({"tokens": spent, **run.fresh()})
        end = dict(points[-1])
        if method == "ettrl":
            end |= {f"trained_{k}": v for k, v in run.fresh("trained_on").items()}
        run.trainer.log.close()
    joined = [row for part in rows for row in part]
    names = sorted({name for row in joined for name in row if name.startswith(f"{method}.") or name in COLUMNS})
    steps = {name: [rounded(row.get(name)) for row in joined] for name in names}
    return {"steps": steps, "points": points, "end": end, "cpu_seconds": round(time.process_time() - began)}


# ------------------------------------------------------------------------------------- before any training


def base_figures(seed: int, budget: int = 240, questions: int = 96, room: int = 32) -> dict[str, Any]:
    """The same tokens on one question, spent on independent responses, on forks at the most uncertain tokens, or on
    forks anywhere; and the fixed trees of ETTRL, whose cost differs from the paper's ratio where forks are early."""
    import torch

    from rlvr_lab.core.trees import TreeDraws, grow, plant
    from rlvr_lab.policy.load import load_policy
    from rlvr_lab.rollout.engine import Sampling, TransformersEngine
    from rlvr_lab.tasks import countdown

    torch.set_num_threads(1)
    engine = TransformersEngine(load_policy("tiny/S", device="cpu"))
    problems = countdown.problems(questions, 1000 + seed)
    prompts = [list(problem.prompt_ids) for problem in problems]
    sampling, found = Sampling(max_tokens=room), {}
    for way in ("independent", "entropy", "random"):
        generator = torch.Generator().manual_seed(seed)
        roots = plant(engine, prompts, 3, sampling, generator)
        choose = forks_in_turn(way, roots, room, TreeDraws(generator))
        paths = grow(engine, roots, choose, sampling, generator, budget)
        found[way] = counted(paths, problems, engine.policy)
        if way != "independent":
            found[f"tree_{way}"] = tree_figures(engine, prompts, problems, way, seed)
    return found


def untrained(method: str, seed: int) -> dict[str, Any]:
    """What every arm of a seed starts from."""
    with tempfile.TemporaryDirectory(prefix=f"{method}_base_{seed}_") as name:
        run = Run(method, [], seed, Path(name) / "base")
        found: dict[str, Any] = {"fresh": run.fresh()}
        if method == "ettrl":
            found |= {"trained_on": run.fresh("trained_on"), "ways": base_figures(seed)}
        run.trainer.log.close()
    return found


def forks_in_turn(way: str, roots: Any, room: int, draws: Any) -> Any:
    """In round r every root is forked twice at its r-th position; an independent response is a fork at the question."""
    from rlvr_lab.core.trees import Fork, ranking

    positions = {
        (root.group, root.number): ranking(root.entropy, "entropy" if way == "entropy" else "random", draws.of(root))
        for root in roots
    }

    def choose(paths: Any, turn: int) -> list[Any]:
        forks = []
        for root in roots:
            ranked = positions[root.group, root.number]
            if way == "independent":
                forks += [Fork(root, 0, room)] * 2
            elif turn < len(ranked):
                forks += [Fork(root, ranked[turn], room - ranked[turn])] * 2
        return forks

    return choose


def tree_figures(engine: Any, prompts: Any, problems: Any, way: str, seed: int) -> dict[str, Any]:
    """The tree of `ettrl/tiny`: 3 roots, 2 forks, 2 ends."""
    import torch

    from rlvr_lab.core.trees import token_counts
    from rlvr_lab.methods.ettrl import ETTRL, ETTRLConfig
    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.tasks.registry import CountdownTask

    method = ETTRL(ETTRLConfig(trees=3, order="entropy" if way == "entropy" else "random"))
    generator = torch.Generator().manual_seed(seed)
    rollout = method.sample(engine, prompts, 15, Sampling(max_tokens=32), generator)
    rollout = grade(rollout, CountdownTask(), problems, engine.policy)
    counts, kept, lengths = token_counts(rollout), rollout.prefix_length, rollout.lengths
    assert kept is not None
    assert rollout.parent_id is not None
    branch = rollout.parent_id >= 0
    root_length = torch.tensor(
        [
            int(lengths[(rollout.group_id == g) & (rollout.path_id == p)][0])
            for g, p in zip(rollout.group_id[branch].tolist(), rollout.parent_id[branch].tolist(), strict=True)
        ]
    )
    return {
        "token_ratio": rounded(counts.ratio),
        "generated_tokens": counts.generated,
        "fork_place": rounded(float((kept[branch] / root_length).mean())),
    }


def counted(paths: Any, problems: Any, policy: Any) -> dict[str, float | None]:
    """Answers and votes per question, and what they cost."""
    from rlvr_lab.core.paths import to_rollout
    from rlvr_lab.core.trees import token_counts
    from rlvr_lab.methods.ettrl import ETTRL
    from rlvr_lab.rollout.clusters import with_clusters
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.tasks.clusters import make_clusterer
    from rlvr_lab.tasks.registry import CountdownTask

    task = CountdownTask()
    rollout = grade(to_rollout(paths, pad_id=policy.pad_id, version=0), task, problems, policy)
    method = ETTRL()
    method.reward(with_clusters(rollout, task, problems, policy, make_clusterer()))
    figures = method.metrics()
    assert rollout.correct is not None
    return {
        "responses": len(rollout) / len(problems),
        "generated_tokens": token_counts(rollout).generated / len(problems),
        "accuracy": rounded(float(rollout.correct.float().mean())),
        **{name: rounded(figures[name]) for name in ("distinct_answers", "distinct_answers_per_kilotoken",
                                                     "label_accuracy", "majority_ratio", "vote_entropy")},
    }  # fmt: skip


def main(
    method: Annotated[str, typer.Argument(help="cure or ettrl.")],
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    tokens: Annotated[int, typer.Option(help="Generated tokens of a run; 0 takes the method's own.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File to add the results to.")] = None,
) -> None:
    """Run arms; see the head of this file."""
    known, budget = ARMS[method], tokens or TOKENS[method]
    chosen, where = chosen_arms(arms, known), out or ROOT / "book" / "data" / f"{method}.json"
    settings = [*SETTINGS, *MORE[method]]
    record = opened(where, {"base": {}, "arms": {}}, f"tree_methods.py {method}", f"{method}/tiny", settings, 0,
                    MODULES[method]) | {"tokens": budget, "switch": SWITCH}  # fmt: skip
    for seed in range(seeds):
        if str(seed) not in record["base"]:
            record["base"][str(seed)] = untrained(method, seed)
            save(where, record)
        record_arms(record, known, chosen, seed, where, lambda arm, seed: one_run(method, arm, seed, budget))


if __name__ == "__main__":
    typer.run(main)
