"""How much of a perfect judge's hints a tiny solver uses, over ten rounds.

    python benchmarks/feedback_friction.py --seeds 3

The solver is base A, which was shown dialogues of three tries, fine-tuned on `DEMONSTRATIONS` dialogues of ten: a
writer who knows roughly where the solution lies, heeds every hint, and with probability `SLIP` guesses blindly. From
it two policies are trained by `grpo/feedback_tiny`: `single`, rewarded for its first answer, and `multi`, for solving
within ten tries. All three answer the same held-out equations for ten rounds in every way of `ASKED`; each way is a
control for the one before it. Kept are accuracy by round, friction, repeated and distinct wrong answers, and the
token entropy of the first answer in nats. Results go to `book/data/feedback_friction.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "feedback_friction.json"
SETTINGS = ("evaluation.problems=64", "logging.tensorboard=false", "logging.samples=0", "logging.view=quiet",
            "ledger.rows=0", "update.minibatches=2")  # fmt: skip
MODULES = ("evaluate.feedback_friction", "tasks.agents.feedback", "methods.grpo", "train.sft")
ROUNDS, PROBLEMS, STEPS = 10, 256, 40
DEMONSTRATIONS, SLIP, EPOCHS, LR = 3000, 0.3, 2, 1.5e-3
ARMS = {
    "solver": {"what": f"base A, fine-tuned on {DEMONSTRATIONS} dialogues of {ROUNDS} tries", "turns": None},
    "single": {"what": f"solver after {STEPS} steps of GRPO on its first answer", "turns": 1},
    "multi": {"what": f"solver after {STEPS} steps of GRPO on solving within {ROUNDS} tries", "turns": ROUNDS},
}
ASKED: dict[str, dict[str, Any]] = {
    "side": {"hint": "side", "feedback": "own"},
    "binary": {"hint": "none", "feedback": "own"},
    "shuffled": {"hint": "side", "feedback": "shuffled"},
    "anew": {"hint": "side", "feedback": "none"},
    "side_ramp": {"hint": "side", "feedback": "own", "ramp": True},
    "anew_ramp": {"hint": "side", "feedback": "none", "ramp": True},
    "side_reject": {"hint": "side", "feedback": "own", "draws": 10},
    "anew_reject": {"hint": "side", "feedback": "none", "draws": 10},
}
"""`side`: the judge says on which side the solution lies; `binary`: only that it was wrong; `shuffled`: hints of other
equations; `anew`: no dialogue, every attempt begins at the question."""


def taught(policy: Any, seed: int) -> None:
    """Fine-tune the policy on dialogues of `ROUNDS` tries."""
    from rlvr_lab.tasks.agents import demos
    from rlvr_lab.tasks.agents.base import held_out
    from rlvr_lab.tasks.agents.feedback import FeedbackTask, draw
    from rlvr_lab.tasks.agents.words import encode
    from rlvr_lab.train.sft import SFTSettings, fine_tune

    rng, environment = Random(f"dialogues {seed}"), FeedbackTask(max_turns=ROUNDS)
    examples = []
    while len(examples) < DEMONSTRATIONS:
        problem = draw(rng)
        if not held_out(problem.key):
            writer = demos.Guesser(problem, rng, SLIP)
            ids = encode(demos.demonstration(environment, problem, writer, rng, 0.0)[0])
            start = ids.index(demos.ASKED) + 1
            examples.append((ids[:start], ids[start:]))
    fine_tune(policy, examples, SFTSettings("plain", epochs=EPOCHS, batch=32, rows=32, lr=LR, seed=seed))


def measured(policy: Any, seed: int) -> dict[str, Any]:
    """What came of every way of asking."""
    import torch

    from rlvr_lab.evaluate.feedback_friction import Asking, ask_again
    from rlvr_lab.rollout.engine import Sampling, TransformersEngine
    from rlvr_lab.tasks.agents.feedback import FeedbackTask

    engine, found = TransformersEngine(policy), {}
    for name, way in ASKED.items():
        environment = FeedbackTask(hint=way["hint"], max_turns=ROUNDS)
        problems = environment.problems(PROBLEMS, 0, True)
        asking = Asking(ROUNDS, **{key: value for key, value in way.items() if key != "hint"})
        generator = torch.Generator().manual_seed(1000 + seed)
        rounds = ask_again(engine, environment, problems, asking, generator)
        found[name] = {
            "accuracy": [rounded(value) for value in rounds.accuracy],
            "friction": rounded(rounds.friction()),
            "repeat_rate": rounded(rounds.repeat_rate),
            "distinct_wrong": rounded(rounds.distinct_wrong),
        }
    prompts = [environment.prompt_ids(problem, policy.tokenizer) for problem in problems]
    first = engine.sample(prompts, 4, Sampling(1.0, environment.turn_tokens), torch.Generator().manual_seed(seed))
    entropy = float(first.statistics["token_entropy"][first.mask].mean())
    return {"problems": len(problems), "first_token_entropy": rounded(entropy), "ways": found}


def one_run(arm: str, seed: int, solvers: Path) -> dict[str, Any]:
    """The figures of one policy; the solver is made once per seed and kept in `solvers`."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.policy.load import load_policy
    from rlvr_lab.train.checkpoint import save_policy
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    base = solvers / f"seed_{seed}"
    if not base.exists():
        policy = load_policy("tiny/A", device="cpu")
        taught(policy, seed)
        save_policy(base, policy)
    turns = ARMS[arm]["turns"]
    if turns is None:
        return {"end": measured(load_policy(str(base), device="cpu"), seed)}
    room = f"rollout.max_tokens={12 * int(str(turns))}"
    changes = [
        f"seed={seed}",
        f"steps={STEPS}",
        f"model.path={base}",
        f"data.settings.max_turns={turns}",
        room,
        *SETTINGS,
    ]
    with tempfile.TemporaryDirectory(prefix=f"friction_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config("grpo/feedback_tiny", changes), Path(folder) / "run")
        rows = [trainer.step(step) for step in range(STEPS)]
        trainer.log.close()
        return {"accuracy": [rounded(row.get("accuracy")) for row in rows], "end": measured(trainer.policy, seed)}


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Runs per arm.")] = 3,
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm; may be given several times.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = DATA,
) -> None:
    """Record the rounds; see the head of this file. Arms and seeds already there are kept."""
    record = opened(out, {"arms": {}}, f"feedback_friction.py --seeds {seeds}", "grpo/feedback_tiny", SETTINGS, STEPS,
                    MODULES)  # fmt: skip
    record |= {"what": __doc__, "asked": ASKED, "rounds": ROUNDS}
    chosen = chosen_arms(arm, ARMS)
    with tempfile.TemporaryDirectory(prefix="solvers_") as folder:
        for seed in range(seeds):
            record_arms(record, ARMS, chosen, seed, out, lambda name, s: one_run(name, s, Path(folder)))
    save(out, record)


if __name__ == "__main__":
    typer.run(main)
