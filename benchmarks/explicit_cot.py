"""What training on the bridge buys: two-hop facts with and without it, several seeds.

    python benchmarks/explicit_cot.py --seeds 3

Arms share the world of their seed, steps, batches and the initial weights. `cot` and `no_cot` are the comparison, and
are looked into afterwards: lens ranks and causal tracing. `*_1` have one training chain per fact instead of four,
`t20`, `b20`, `both20` noise in 20 % of the training chains. `rl_*` train for 110 steps, `rl_early_*` for 80, and
go on with GRPO on one half of the OOD questions, rewarded for the answer alone; the other half is held out, and `hits`
are right answers among samples of each question, before and after. Results go to `book/data/explicit_cot.json`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "explicit_cot.json"
WORLD = {"entities": 60, "relations": 8, "out_degree": 6, "ood_share": 0.2, "iid_test_share": 0.05}
ARMS: dict[str, dict[str, Any]] = {
    "cot": {"form": "cot"},
    "no_cot": {"form": "no_cot"},
    "rl_cot": {"form": "cot", "steps": 110, "rl_steps": 40},
    "rl_no_cot": {"form": "no_cot", "steps": 110, "rl_steps": 40},
    "t20": {"form": "cot", "noise": "t", "noise_share": 0.2},
    "b20": {"form": "cot", "noise": "b", "noise_share": 0.2},
    "both20": {"form": "cot", "noise": "both", "noise_share": 0.2},
    "cot_1": {"form": "cot", "chains_per_fact": 1.0},
    "no_cot_1": {"form": "no_cot", "chains_per_fact": 1.0},
    "rl_early_cot": {"form": "cot", "steps": 80, "rl_steps": 40},
    "rl_early_no_cot": {"form": "no_cot", "steps": 80, "rl_steps": 40},
}
MODULES = ("tasks.explicit_cot", "evaluate.explicit_cot", "train.explicit_cot", "methods.grpo")
EVERY, MOST, SAMPLES = 25, 200, 64
GROUPS = ("id_atomic", "ood_atomic", "train_inferred", "test_inferred_iid", "test_inferred_ood")


def one_run(arm: str, seed: int) -> dict[str, Any]:
    """Train, measure, and look inside or go on with reinforcement learning."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.tasks.explicit_cot import WorldConfig, make_world
    from rlvr_lab.train.explicit_cot import PRESETS, train

    settings = dict(ARMS[arm])
    form, rl_steps = settings.pop("form"), settings.pop("rl_steps", 0)
    tiny = PRESETS["tiny"]
    training = replace(tiny, steps=settings.pop("steps", tiny.steps), seed=seed)
    world = make_world(WorldConfig(**WORLD, **settings, seed=seed))
    policy, history = train(world, form, training, measure_at=range(EVERY, training.steps, EVERY), most=MOST)
    columns = {name: [rounded(row[name]) for row in history] for name in ("step", "loss", *GROUPS)}
    answers = {f"{name}.answer": rounded(history[-1][f"{name}.answer"]) for name in GROUPS}
    found = {
        "sizes": {"facts": len(world.facts), "train": len(world.train), "iid": len(world.test_iid),
                  "ood": len(world.test_ood)},
        "steps": columns,
        "end": {name: columns[name][-1] for name in GROUPS} | answers,
    }  # fmt: skip
    if rl_steps:
        return found | {"rl": reinforced(policy, world, form, rl_steps, seed)}
    return found | ({"inside": looked_into(policy, world, form, seed)} if arm in ("cot", "no_cot") else {})


# -- inside -------------------------------------------------------------------------------------------------------


def looked_into(policy: Any, world: Any, form: str, seed: int) -> dict[str, Any]:
    """Lens ranks of bridge and answer, and traces of both stages, on OOD and on training chains."""
    from rlvr_lab.evaluate import explicit_cot as inside

    out: dict[str, Any] = {}
    for name, chains in (("ood", world.test_ood), ("train", world.clean[:100])):
        out[name] = part = {"lens": lens(policy, chains, world, form)}
        for stage in (1, 2) if form == "cot" else (1,):
            trace = inside.trace(policy.model, chains, world, form, stage, seed)
            part[f"stage{stage}"] = {
                "samples": len(trace.chains),
                "changed": {site: [rounded(x) for x in trace.changed(site)] for site in trace.after},
                "mrr": {site: [rounded(x) for x in trace.mrr(site)] for site in trace.after},
            }
    return out


def lens(policy: Any, chains: Sequence[Any], world: Any, form: str) -> dict[str, Any]:
    """MRR [L + 1, positions] of the bridge and the answer over the prompt, with CoT the bridge included."""
    import torch

    from rlvr_lab.evaluate import explicit_cot as inside
    from rlvr_lab.tasks.explicit_cot import Encoder

    prompts, gold = inside.encoded(chains, Encoder(world.config), "cot")
    ids = torch.cat([prompts, gold[:, :1]], 1) if form == "cot" else prompts
    ranks = [inside.lens_ranks(policy.model, ids, gold[:, i]) for i in (0, 1)]
    return {
        name: [[rounded(float(x)) for x in row] for row in inside.mrr(part.transpose(1, 2))]
        for name, part in zip(("b", "t"), ranks, strict=True)
    }


# -- reinforcement learning -----------------------------------------------------------------------------------------


def reinforced(policy: Any, world: Any, form: str, steps: int, seed: int) -> dict[str, Any]:
    """GRPO on half of the OOD questions, reward 1 for the right answer, whatever stands before it."""
    import torch

    from rlvr_lab.methods import build, compose
    from rlvr_lab.rollout.engine import Sampling, TransformersEngine
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.tasks.explicit_cot import TwoHopTask
    from rlvr_lab.train.clock import Clock
    from rlvr_lab.train.seeds import torch_generator
    from rlvr_lab.train.update import Updater

    device = torch.device("cpu")
    task, engine, clock = TwoHopTask(world.config, form), TransformersEngine(policy), Clock(device)
    order = torch.randperm(len(world.test_ood), generator=torch_generator(seed, "halves", 0, device)).tolist()
    half = len(order) // 2
    halves = {
        "practised": [world.test_ood[i] for i in order[:half]],
        "held_out": [world.test_ood[i] for i in order[half:]],
    }
    before = {name: sampled(policy, task, chains, seed) for name, chains in halves.items()}
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=3e-4, weight_decay=0.0)
    updater = Updater(policy.model, optimizer, compose([build("grpo", {"preset": "tiny"})]), minibatches=2,
                      micro_batch_rows=128)  # fmt: skip
    reward = []
    for step in range(steps):
        generator = torch_generator(seed, "rl", step, device)
        chosen = torch.randperm(half, generator=generator)[:16].tolist()
        chains = [halves["practised"][i] for i in chosen]
        rollout = engine.sample([task.prompt_ids(c) for c in chains], 8, Sampling(max_tokens=4), generator)
        right = grade(rollout, task, chains, policy).correct
        assert right is not None
        updater.run(rollout.with_(correct=right, reward=right.float()), generator, clock, step)
        reward.append(rounded(float(right.float().mean())))
    after = {name: sampled(policy, task, chains, seed + 1000) for name, chains in halves.items()}
    return {"reward": reward, "before": before, "after": after}


def sampled(policy: Any, task: Any, chains: Sequence[Any], seed: int) -> dict[str, Any]:
    """Greedy accuracy, and how many of `SAMPLES` sampled responses to each question have the right answer."""
    import torch

    from rlvr_lab.evaluate.explicit_cot import accuracy
    from rlvr_lab.rollout.engine import Sampling, TransformersEngine
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.tasks.explicit_cot import Encoder

    greedy = accuracy(policy.model, chains, Encoder(task.config), task.form)
    generator = torch.Generator().manual_seed(seed)
    prompts = [task.prompt_ids(chain) for chain in chains]
    engine = TransformersEngine(policy)
    rollout = grade(engine.sample(prompts, SAMPLES, Sampling(max_tokens=4), generator), task, chains, policy)
    assert rollout.correct is not None
    assert not math.isnan(greedy.exact)
    hits = rollout.correct.view(len(chains), SAMPLES).sum(1).tolist()
    return {"exact": rounded(greedy.exact), "answer": rounded(greedy.answer), "hits": hits, "samples": SAMPLES}


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    from rlvr_lab.train.explicit_cot import PRESETS

    chosen = chosen_arms(arms, ARMS)
    settings = [f"{name}={value}" for name, value in (WORLD | {"batch": PRESETS["tiny"].batch}).items()]
    record = opened(out, {"arms": {}}, "explicit_cot.py", "", settings, PRESETS["tiny"].steps, MODULES)
    for seed in range(seeds):
        record_arms(record, ARMS, chosen, seed, out, one_run)


if __name__ == "__main__":
    typer.run(main)
