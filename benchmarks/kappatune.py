"""Whether tensors of low condition number forget less: a small policy, a second task, and controls of equal shape.

    python benchmarks/kappatune.py --seeds 5

Every seed trains a base of its own on Countdown (task A) with AdamW, from scratch, and fine-tunes a part of its
matrices on rows of digits under rules (task B, `tasks.instructions`). GRPO starts from the shipped base S and is
rewarded for right answers. On the way the loss on traces of task A is taken again and again. Arms differ in which
matrices train: a quarter of them, as many of every shape in each arm, but for the published selection (`naive_*`) that
takes as many tensors of any shape, and for `all`. Results go to `book/data/kappatune.json`; who reads them compares at
equal loss on B.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import opened, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "kappatune.json"
SETTINGS = {
    "shape": [64, 4, 4, 192],
    "batch": 32,
    "base": {"steps": 300, "lr": 3e-3},
    "fine_tuning": {"steps": 64, "lr": 2e-3, "every": 8, "attention": 0.9},
    "held_out": 128,
    "count": 7,
}
GRPO = ("rollout.prompts=8", "rollout.group_size=6", "rollout.temperature=1.0", "update.minibatches=4",
        "update.micro_batch_rows=16", "evaluation.problems=0", "logging.tensorboard=false", "logging.samples=0",
        "ledger.rows=0", "optimizer.lr=3e-3",
        "optimizer.warmup=3")  # fmt: skip
GRPO_STEPS = 20
BLOCKS = {"leave_out": ("embed_tokens", "lm_head"), "top_p": None, "count": SETTINGS["count"]}
ARMS: dict[str, dict[str, Any] | None] = {
    "lowest": {"order": "lowest", "within": "shape"},
    "highest": {"order": "highest", "within": "shape"},
    "random": {"order": "random", "within": "shape"},
    "kind_lowest": {"order": "lowest", "within": "kind"},
    "kind_highest": {"order": "highest", "within": "kind"},
    "naive_lowest": {"order": "lowest", "within": "all"},
    "naive_highest": {"order": "highest", "within": "all"},
    "all": None,
}
GOAL_DIRECTED = 0.25
"""Share in the traces that base S learned last."""
GRPO_ARMS = ("lowest", "highest", "random")
MODULES = ("methods.kappatune", "core.condition", "methods.grpo")


def new_policy(seed: int) -> Any:
    """An untrained policy with the words of Countdown."""
    from rlvr_lab.policy import tiny
    from rlvr_lab.policy.load import Policy

    hidden, layers, heads, feed_forward = SETTINGS["shape"]
    model = tiny.build_model(seed, tiny.Shape(hidden, layers, heads, feed_forward))
    tokenizer = tiny.build_tokenizer()
    return Policy(model.eval(), tokenizer, (tokenizer.eos_token_id,), tokenizer.pad_token_id, f"seed {seed}")


def countdown_traces(n: int, seed: Sequence[int], goal_directed: float = 0.4) -> list[Any]:
    """Task A: prompts with a response each, of which a share is goal-directed, as base S learned them."""
    from dataclasses import replace

    import numpy as np

    from rlvr_lab.tasks import countdown

    style = replace(countdown.SINGLE, goal_directed=goal_directed)
    rows = countdown.traces(n, style, np.random.default_rng(list(seed)))
    return [(row[: countdown.PROMPT_TOKENS], row[countdown.PROMPT_TOKENS :]) for row in rows]


def digit_rows(n: int, seed: Sequence[int]) -> list[Any]:
    """Task B: rows of digits that keep the rules of the prompt."""
    from rlvr_lab.tasks import instructions, instructions_demos

    style = instructions_demos.Demonstrations(SETTINGS["fine_tuning"]["attention"])
    rows = instructions_demos.demonstrations(n, style, seed)
    return [(row[: instructions.PROMPT_TOKENS], row[instructions.PROMPT_TOKENS :]) for row in rows]


def descend(policy: Any, examples: Sequence[Any], lr: float, warmup: int, decay: bool) -> Iterator[int]:
    """AdamW over the examples, a batch per step, every example once; yields the number of steps made."""
    import torch

    from rlvr_lab.train.sft import passes, supervised
    from rlvr_lab.train.update import schedule

    trained = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = len(examples) // SETTINGS["batch"]
    for step, (ids, mask) in enumerate(passes(examples, SETTINGS["batch"])):
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, warmup, "cosine" if decay else "constant")
        supervised(policy, ids, mask)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step + 1


def losses(policy: Any, held_out: dict[str, Sequence[Any]]) -> dict[str, float]:
    """Loss in nats per response token on both tasks."""
    from rlvr_lab.train.sft import measure

    return {name: measure(policy, examples, 128)["nll"] for name, examples in held_out.items()}


def chosen(model: Any, arm: str, seed: int) -> list[Any]:
    """The matrices that train in an arm; none for `all`."""
    from rlvr_lab.methods.kappatune import KappaTuneConfig, choose, scan

    if ARMS[arm] is None:
        return []
    config = KappaTuneConfig(**BLOCKS, **ARMS[arm], seed=seed)
    return choose(scan(model.named_parameters(), config), config)


def fine_tune(base: Any, arm: str, seed: int, held_out: dict[str, Sequence[Any]]) -> dict[str, Any]:
    """Both losses on the way, of a copy of the base in which only the arm's matrices train."""
    from rlvr_lab.policy.freeze import train_only

    s = SETTINGS["fine_tuning"]
    policy = copy.deepcopy(base)
    tensors = chosen(policy.model, arm, seed)
    if tensors:
        train_only(policy.model, [one.name for one in tensors])
    path = [losses(policy, held_out)]
    for done in descend(policy, digit_rows(s["steps"] * SETTINGS["batch"], [seed, 2]), s["lr"], 12, decay=False):
        if done % s["every"] == 0:
            path.append(losses(policy, held_out))
    return _described(tensors, policy.model) | {key: [rounded(p[key]) for p in path] for key in ("a", "b")}


def _described(tensors: Sequence[Any], model: Any) -> dict[str, Any]:
    from statistics import geometric_mean

    if not tensors:
        return {"tensors": [], "parameters": sum(p.numel() for p in model.parameters())}
    return {
        "tensors": [one.name.removeprefix("model.layers.").removesuffix(".weight") for one in tensors],
        "parameters": sum(one.size for one in tensors),
        "matched": rounded(geometric_mean(one.matched for one in tensors)),
    }


def reinforce(arm: str, seed: int) -> dict[str, Any]:
    """Accuracy and token entropy of every step of a GRPO run of base S, and the loss on its traces before and after."""
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    methods = "methods={grpo: {preset: tiny}}"
    if ARMS[arm] is not None:
        own = ARMS[arm] | {"preset": "tiny", "count": SETTINGS["count"], "top_p": "null", "seed": seed}
        methods = f"methods={{grpo: {{preset: tiny}}, kappatune: {{{', '.join(f'{k}: {v}' for k, v in own.items())}}}}}"
    with tempfile.TemporaryDirectory(prefix=f"kappatune_{arm}_{seed}_") as folder:
        settings = [f"seed={seed}", f"steps={GRPO_STEPS}", methods, *GRPO]
        trainer = Trainer(load_config("grpo/tiny", settings), Path(folder) / "run")
        held_out = {"a": countdown_traces(SETTINGS["held_out"], [seed, 1], GOAL_DIRECTED)}
        rows, a = [], [losses(trainer.policy, held_out)["a"]]
        for step in range(GRPO_STEPS):
            rows.append(trainer.step(step))
            a.append(losses(trainer.policy, held_out)["a"])
        trainer.log.close()
    columns = {name: [rounded(row[name]) for row in rows] for name in ("accuracy", "token_entropy")}
    return columns | {"a": [rounded(value) for value in a]}


def shapes_of(untrained: Any, base: Any) -> list[dict[str, Any]]:
    """Kappa of every matrix before and after pre-training, beside the median of its shape."""
    from rlvr_lab.methods.kappatune import KappaTuneConfig, scan

    before, after = (scan(p.model.named_parameters(), KappaTuneConfig()) for p in (untrained, base))
    return [
        {
            "name": one.name.removeprefix("model.").removesuffix(".weight"),
            "shape": list(one.shape),
            "by_chance": rounded(one.by_chance),
            "untrained": rounded(zero.kappa),
            "trained": rounded(one.kappa),
        }
        for zero, one in zip(before, after, strict=True)
    ]


def one_seed(seed: int) -> dict[str, Any]:
    """A base and all of its arms."""
    import torch

    torch.set_num_threads(1)
    n = SETTINGS["held_out"]
    held_out = {"a": countdown_traces(n, [seed, 1]), "b": digit_rows(n, [seed, 3])}
    untrained, base = new_policy(seed), new_policy(seed)
    examples = countdown_traces(SETTINGS["base"]["steps"] * SETTINGS["batch"], [seed, 0])
    for _ in descend(base, examples, SETTINGS["base"]["lr"], 50, decay=True):
        pass
    return {
        "kappa": shapes_of(untrained, base),
        "sft": {arm: fine_tune(base, arm, seed, held_out) for arm in ARMS},
        "grpo": {arm: reinforce(arm, seed) for arm in GRPO_ARMS},
    }


def main(
    seeds: Annotated[int, typer.Option(help="Number of seeds, each with a base of its own.")] = 5,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run what the file lacks; see the head of this file."""
    record = opened(out, {"seeds": {}}, "kappatune.py", "grpo/tiny", GRPO, GRPO_STEPS, MODULES)
    record["fine_tuning"] = SETTINGS
    record["arms"] = {name: arm or {} for name, arm in ARMS.items()}
    for seed in range(seeds):
        if str(seed) not in record["seeds"]:
            record["seeds"][str(seed)] = found = one_seed(seed)
            save(out, record)
            print(seed, {arm: (run["b"][-1], run["a"][-1]) for arm, run in found["sft"].items()}, flush=True)


if __name__ == "__main__":
    typer.run(main)
