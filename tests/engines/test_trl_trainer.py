"""RlvrGRPOTrainer in TRL 1.16 itself, end to end on a CPU with the shipped tiny policy."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_two_ranks
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlvr_lab.core.rollout import Rollout
from rlvr_lab.errors import UserError
from rlvr_lab.integrations.exchange import unsupported
from rlvr_lab.integrations.trl import OWNED, RlvrGRPOTrainer
from rlvr_lab.methods import build, compose, trainable
from rlvr_lab.methods.base import Method
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.tasks import countdown
from rlvr_lab.train.clock import Clock
from rlvr_lab.train.seeds import torch_generator
from rlvr_lab.train.update import Updater

TOLERANCE = 1e-6
LENGTH = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "overlong": {"max_length": LENGTH, "buffer": 12, "mask_truncated": True},
    "dynamic_sampling": {"metric": "reward", "max_batches": 3},
    "hapo": {"tau": 0.0},  # its tempered sampler is refused
    "epo": {"coefficient": 0.1},
    "riskpo": {"bundle_size": 2},
}


def policy() -> Policy:
    return load_policy("tiny/S", device="cpu")


def dataset(rows: int = 16) -> Dataset:
    problems = list(countdown.problems(rows, 0))
    return Dataset.from_dict({"prompt": [list(p.prompt_ids) for p in problems], "problem_id": list(range(rows))})


def texts(rows: int = 16) -> Dataset:
    """Prompts as text, which the tokenizer turns into the same ids."""
    decode, ids = policy().tokenizer.decode, dataset(rows)
    return Dataset.from_dict({"prompt": [decode(row) for row in ids["prompt"]], "problem_id": ids["problem_id"]})


def varied(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs within almost every group. Its answers differ less."""
    varied.answers = [str(sum(ids) % 3) for ids in completion_ids]  # type: ignore[attr-defined]
    return [(sum(ids) % 7) / 6 for ids in completion_ids]


def correct(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


class Tape(TrainerCallback):
    """Gradients of every optimizer step, and the rollout they came from."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.trainer: Any = None
        self.rollouts: list[Rollout] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(flat(model))
        if not self.rollouts or self.rollouts[-1] is not self.trainer._rollout:
            self.rollouts.append(self.trainer._rollout)


def flat(model: Any) -> Tensor:
    rows = [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
    return torch.cat([r.flatten() for r in rows])


def settings(out: Path, **changes: Any) -> GRPOConfig:
    plain: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_generations": 4,
        "max_completion_length": LENGTH,
        "max_steps": 2,
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "seed": 3,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    fixed = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    return GRPOConfig(str(out), **(plain | fixed | changes))


class OffPolicy(RlvrGRPOTrainer):
    """Ratios are away from 1 from the first step, on both sides of the clip range."""

    def _graded(self, inputs: Any) -> Rollout:
        rollout = super()._graded(inputs)
        assert rollout.old_logprob is not None
        shift = (rollout.response_ids % 5 - 2) * 0.15
        return rollout.with_(old_logprob=(rollout.old_logprob + shift).masked_fill(~rollout.response_mask, 0.0))


def train(out: Path, methods: Any, tape: Tape | None = None, off_policy: bool = False, **changes: Any) -> Any:
    """A trained RlvrGRPOTrainer with plain SGD, so that a step is its gradient."""
    torch.manual_seed(0)
    start = policy()
    resume = changes.pop("resume", None)
    extra = {name: changes.pop(name) for name in ("rollout_func", "lr_factor", "skip_dead_rows") if name in changes}
    sgd = torch.optim.SGD(start.model.parameters(), lr=changes.get("learning_rate", 1.0))
    trainer = (OffPolicy if off_policy else RlvrGRPOTrainer)(
        start.model,
        [varied, correct],
        settings(out, **changes),
        dataset(),
        processing_class=start.tokenizer,
        optimizers=(sgd, None),
        methods=methods,
        **extra,
    )
    if tape is not None:
        tape.trainer = trainer
        trainer.add_callback(tape)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Recorder(torch.optim.SGD):
    """SGD that keeps the gradients it was given."""

    def __init__(self, model: Any, lr: float) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.model, self.gradients = model, []

    def step(self, closure: Any = None) -> None:
        self.gradients.append(flat(self.model))
        super().step(closure)


def composition(slug: str) -> list[Method]:
    return [build(slug, SETTINGS.get(slug, {}))]


def ours(rollout: Rollout, methods: list[Method], minibatches: int, start: Policy, seed: int) -> list[Tensor]:
    """Gradients of our own Updater on the same rollout, and losses as their last entry."""
    optimizer = Recorder(start.model, 1.0)
    pipeline = compose(methods)
    updater = Updater(
        start.model, optimizer, pipeline, minibatches=minibatches, micro_batch_rows=3, grad_clip=float("inf")
    )
    generator = torch_generator(seed, "minibatches", 0, torch.device("cpu"))
    metrics = updater.run(rollout, generator, Clock(torch.device("cpu")))
    return [*optimizer.gradients, torch.tensor(metrics["loss"])]


CARRIED = [slug for slug in trainable() if unsupported(compose(composition(slug))) is None]


def test_every_registered_method_is_carried_or_listed() -> None:
    """The list of exceptions is in the documentation of `unsupported`; a new one has to be entered here."""
    left_out = ["agentic_aepo", "arbitrary_entropy", "bupo", "cure", "empo", "ettrl", "kappatune"]
    left_out += ["lp_reg", "siren", "spear", "tp_grpo", "ucas"]
    assert sorted(set(trainable()) - set(CARRIED)) == left_out


@pytest.mark.parametrize(
    ("slug", "reason"),
    [
        ("arbitrary_entropy", "it samples in its own way"),
        ("hapo", r"it sets the temperature of every token.*methods\.hapo\.tau: 0"),
        ("lp_reg", "does not keep the whole distribution"),
        ("siren", "does not keep the whole distribution"),
        ("ucas", "it needs 'token_certainty'"),
        ("empo", "it needs 'cluster_id'"),
        ("tp_grpo", "it needs 'thought_label'"),
        ("cure", "it samples in its own way"),
        ("ettrl", "it samples in its own way"),
        ("agentic_aepo", "it samples in its own way"),
        ("spear", "it learns from responses of earlier steps"),
        ("bupo", "it trains the policy of one layer"),
    ],
)
def test_what_is_not_carried_is_refused_with_the_reason(slug: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"TRL cannot carry '{slug}': .*{reason}"):
        train(tmp_path, {slug: {}})


@pytest.mark.parametrize("slug", CARRIED)
def test_loss_and_gradient_are_our_updaters(slug: str, tmp_path: Path) -> None:
    """Two optimizer steps on one rollout, the second off-policy; two micro-batches each in TRL, others in ours."""
    tape = Tape()
    trainer = train(tmp_path, composition(slug), tape, off_policy=True)
    (rollout,) = tape.rollouts
    metrics = trainer.state.log_history
    expected = ours(rollout, composition(slug), 2, policy(), 3)
    assert len(tape.gradients) == len(expected) - 1 == 2
    for theirs, mine in zip(tape.gradients, expected, strict=False):
        assert mine.abs().max() > 1e-4
        torch.testing.assert_close(theirs, mine, rtol=0, atol=TOLERANCE)
    logged = sum(row["loss"] for row in metrics if "loss" in row) / 2
    # TRL rounds what it logs. Its entropies are 0 where ours are some 1e-12, and HAPO weighs by their logarithms: these
    # tokens are certain, so that they have a loss and no gradient
    assert logged == pytest.approx(float(expected[-1]), abs=5e-4 if slug == "hapo" else 2e-5)
    assert 0 < float(rollout.finished.float().mean()) < 1
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("slug", ["clip_cov", "gspo"])
def test_gradient_does_not_depend_on_the_batch_size(slug: str, tmp_path: Path) -> None:
    """Optimizer steps of eight responses, as one micro-batch, two, four and eight."""
    tapes = []
    for rows in (8, 4, 2, 1):
        tapes.append(Tape())
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        train(tmp_path / str(rows), composition(slug), tapes[-1], True, steps_per_generation=16 // rows, **changes)
    for other in tapes[1:]:
        assert torch.equal(tapes[0].rollouts[0].response_ids, other.rollouts[0].response_ids)
        for a, b in zip(tapes[0].gradients, other.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def test_trls_own_quantile_depends_on_the_batch_size(tmp_path: Path) -> None:
    """The control of the test above: with TRL's own entropy mask the same comparison fails."""

    def gradient(rows: int) -> Tensor:
        torch.manual_seed(0)
        start, tape = policy(), Tape()
        config = settings(
            tmp_path / str(rows),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=8 // rows,
            steps_per_generation=8 // rows,
            max_steps=1,
            top_entropy_quantile=0.2,
            shuffle_dataset=False,
        )
        trainer = GRPOTrainer(start.model, varied, config, texts(), processing_class=start.tokenizer)
        tape.trainer = trainer
        trainer._rollout = None
        trainer.add_callback(tape)
        trainer.train()
        return tape.gradients[0]

    torch.testing.assert_close(gradient(8), gradient(8), rtol=0, atol=TOLERANCE)
    assert (gradient(8) - gradient(2)).abs().max() > 1e-3


def test_two_ranks_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gloo processes end where one does: filter with refill, minibatch choices, reference, tool tokens."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl_two_ranks.main(tmp_path / "one", 4)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, *launch, trl_two_ranks.__file__, str(tmp_path / "two"), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    torch.testing.assert_close(two.pop("metrics"), one.pop("metrics"), rtol=1e-3, atol=0)
    start = {name: p.detach() for name, p in policy().model.named_parameters()}
    assert max(float((one[name] - p).abs().max()) for name, p in start.items()) > 3e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=TOLERANCE)


def test_methods_are_asked_for_refusals_metrics_and_notices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unreachable = {"adaptive_entropy": {"preset": "trl", "target": 99.0}}
    with pytest.raises(UserError, match=r"adaptive_entropy\.target is 99\.0 nats"):
        train(tmp_path, unreachable, max_steps=2)
    methods = {"adaptive_entropy": {"preset": "trl", "target": 0.9}, "epo": {"phase": "paper", "horizon": 9}}
    trainer = train(tmp_path, methods, max_steps=2)
    logged = [row for row in trainer.state.log_history if "adaptive_entropy.coefficient" in row]
    assert logged[0]["adaptive_entropy.coefficient"] == 0.0  # closed at first
    # two optimizer steps are the minibatches of one rollout
    assert "methods.epo.horizon is 9, but the run has 1 steps" in caplog.text


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Four optimizer steps, or two, a checkpoint, and two more: same parameters, same state of the methods."""
    methods = {"adaptive_entropy": {"preset": "trl", "target": 0.9}, "clip_higher": {}}
    changes = {"max_steps": 4, "learning_rate": 0.2, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, methods, **changes)
    resumed = train(tmp_path, methods, resume=str(tmp_path / "checkpoint-2"), **changes)
    assert whole.pipeline.state_dict() == resumed.pipeline.state_dict()
    assert resumed.pipeline.state_dict() != compose([build(s, dict(v)) for s, v in methods.items()]).state_dict()
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE, msg=name)
    (tmp_path / "checkpoint-2" / "rlvr_methods.json").unlink()
    with pytest.raises(UserError, match="holds no state of methods"):
        train(tmp_path, methods, resume=str(tmp_path / "checkpoint-2"), **changes)


def test_evaluation_reports_rewards_and_no_loss(tmp_path: Path) -> None:
    start = policy()
    trainer = RlvrGRPOTrainer(
        start.model, varied, settings(tmp_path), texts(), texts(), processing_class=start.tokenizer, methods=["grpo"]
    )
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_reward"] <= 1
    assert math.isnan(metrics["eval_loss"])


class Branches(Method):
    slug = "branches"

    def sample(self) -> None: ...


class Difficult(Method):
    slug = "difficult"
    requires = ("difficulty",)


@pytest.mark.parametrize(
    ("methods", "changes", "message"),
    [
        ([Branches()], {}, r"'branches'.*hook 'sample'.*use rlvr-lab train"),
        ([Difficult()], {}, r"'difficult'.*needs 'difficulty'"),
        (["grpoo"], {}, r"did you mean 'grpo'"),
        (["grpo"], {"epsilon_high": 0.28}, r"epsilon_high is 0\.28.*use clip_higher"),
        (["grpo"], {"steps_per_generation": 3}, r"steps_per_generation is 3, which is no multiple"),
    ],
)
def test_what_does_not_fit_is_refused_at_construction(
    methods: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    start = policy()
    config = settings(tmp_path, **({"num_generations": 3, "per_device_train_batch_size": 3} | changes))
    with pytest.raises(UserError, match=message):
        RlvrGRPOTrainer(start.model, varied, config, dataset(), processing_class=start.tokenizer, methods=methods)


def test_missing_verdicts_are_named(tmp_path: Path) -> None:
    start = policy()
    with pytest.raises(UserError, match="call one reward function `correct`"):
        RlvrGRPOTrainer(
            start.model,
            varied,
            settings(tmp_path),
            dataset(),
            processing_class=start.tokenizer,
            methods=["dynamic_sampling"],
        )


def test_every_owned_setting_names_its_remedy() -> None:
    assert all(remedy for remedy in OWNED.values())
    assert {"loss_type", "epsilon", "beta", "top_entropy_quantile"} <= set(OWNED)
