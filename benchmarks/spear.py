"""SPEAR beside its controls on questions of three hops, several seeds: success, entropy and tool calls over the steps.

    python benchmarks/spear.py --seeds 3

All arms start from base A with the same problems, responses per step and optimizer; they differ in methods alone. Both
curricula end after 30 % of the run. Success, entropy and calls of a step are those of all its responses: the step's own
metrics are of what the filters left, which differs between arms. After the last step, episodes of held-out questions
are played. Entropies in nats.
Results go to `book/data/spear.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "spear.json"
SETTINGS = ("evaluation.problems=32", "logging.tensorboard=false", "logging.samples=0", "logging.view=quiet",
            "ledger.rows=0")  # fmt: skip
RAMP = 0.3
"""Share of the run after which both curricula end."""
SPEAR = "methods={grpo: {preset: tiny}, spear: {preset: tiny, buffer: 32, decay: RAMP, %s}}"
NO_CLIP = "ratio: 0.0, replay_ratio: 0.0"
ARMS = {
    "grpo": "methods={grpo: {preset: tiny}}",
    "dr_bot": SPEAR % f"schedule: never, tool_reward: none, {NO_CLIP}",
    "sil": SPEAR % f"weight_decay: 1.0, warmup: 0, tool_reward: none, {NO_CLIP}",
    "spear": SPEAR % "warmup: RAMP",
    "gamma_one": SPEAR % "warmup: 0",
    "no_clip": SPEAR % f"warmup: RAMP, {NO_CLIP}",
    "double_rate": (SPEAR % f"schedule: never, tool_reward: none, {NO_CLIP}", "optimizer.lr=1.2e-3"),
}
"""`double_rate` is Dr.BoT with twice the rate of all others: what replay adds may be nothing but gradient."""
MODULES = ("methods.grpo", "methods.spear", "methods._self_imitation", "core.replay", "tasks.agents.triples")
COLUMNS = ("success", "unfiltered_entropy", "unfiltered_calls", "replayed_rows", "spear.gamma", "spear.buffer",
           "spear.baseline", "spear.replay_age", "spear.replay_clip_fraction", "seconds")  # fmt: skip
SAMPLES = 8


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Every step's figures, and those of held-out questions afterwards."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    chosen = ARMS[arm]
    own = [text.replace("RAMP", str(round(RAMP * steps))) for text in ([chosen] if isinstance(chosen, str) else chosen)]
    config = load_config("spear/tiny", [f"seed={seed}", f"steps={max(steps, 1)}", *SETTINGS, *own])
    with tempfile.TemporaryDirectory(prefix=f"spear_{arm}_{seed}_") as folder:
        trainer = Trainer(config, Path(folder) / "run")
        seen = watched(trainer)
        rows = [trainer.step(step) | seen for step in range(steps)]
        trainer.log.close()
        curves = {name: [rounded(row.get(name)) for row in rows] for name in COLUMNS if rows and name in rows[-1]}
        return {"steps": curves, "end": played(trainer)}


def watched(trainer: Any) -> dict[str, float]:
    """Figures of the last step's responses before any filter, kept up to date."""
    from rlvr_lab.core.reduce import masked_mean
    from rlvr_lab.core.rows import tool_calls

    seen: dict[str, float] = {}
    inner = trainer.pipeline.filter

    def filtered(rollout: Any) -> Any:
        seen["success"] = float(rollout.correct.float().mean())
        seen["unfiltered_entropy"] = float(masked_mean(rollout.statistics["token_entropy"], rollout.mask))
        seen["unfiltered_calls"] = float(tool_calls(rollout).float().mean())
        return inner(rollout)

    trainer.pipeline.filter = filtered
    return seen


def played(trainer: Any) -> dict[str, float | None]:
    """Figures of `SAMPLES` episodes of each held-out question, the same draws in every arm."""
    import torch

    from rlvr_lab.rollout.engine import Sampling
    from rlvr_lab.rollout.episodes import EpisodeEngine
    from rlvr_lab.rollout.grading import grade
    from rlvr_lab.train.metrics import turn_metrics

    task, problems, policy = trainer.problems.task, list(trainer.problems.evaluation), trainer.policy
    prompts = [task.prompt_ids(problem, policy.tokenizer) for problem in problems]
    sampling = Sampling(max_tokens=trainer.config.rollout.max_tokens, rows=512)
    generator = torch.Generator().manual_seed(1000 + trainer.config.seed)
    rollout = EpisodeEngine(trainer.engine, task, problems).sample(prompts, SAMPLES, sampling, generator)
    graded = grade(rollout, task, problems, policy)
    assert graded.correct is not None
    rates = graded.correct.float().view(-1, SAMPLES).mean(1)
    return {
        "episodes": float(len(graded)),
        "success": rounded(float(rates.mean())),
        "mixed_groups": rounded(float(((rates > 0) & (rates < 1)).float().mean())),
        "token_entropy": rounded(float(graded.statistics["token_entropy"][graded.mask].mean())),
        "tool_calls": rounded(turn_metrics(graded)["tool_calls"]),
    }


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 18,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
    load_note: Annotated[str, typer.Option(help="What else ran on the machine.")] = "nothing else running",
) -> None:
    """Run arms; see the head of this file."""
    chosen = chosen_arms(arms, ARMS)
    record = opened(out, {"base": {}, "arms": {}}, "spear.py", "spear/tiny", SETTINGS, steps, MODULES)
    record |= {"load_note": load_note, "ramp": round(RAMP * steps)}
    for seed in range(seeds):
        if str(seed) not in record["base"]:
            record["base"][str(seed)] = one_run("grpo", seed, 0)["end"]
        record_arms(record, ARMS, chosen, seed, out, lambda arm, seed: one_run(arm, seed, steps))


if __name__ == "__main__":
    typer.run(main)
