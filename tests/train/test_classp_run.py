"""CLASSP as a run's optimizer: its settings and their refusals, checkpoints, resuming, and what the log says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from builders import TINY_RUN
from sample_methods import WordBonus

from rlvr_lab.core.classp import Classp
from rlvr_lab.errors import UserError
from rlvr_lab.integrations.exchange import refuse_optimizer
from rlvr_lab.methods import compose
from rlvr_lab.policy.load import Policy, load_policy
from rlvr_lab.train import loop
from rlvr_lab.train.checkpoint import TrainerState, restore, save
from rlvr_lab.train.config import OptimizerSection, TrainConfig, load_config, parse_config
from rlvr_lab.train.loop import Trainer
from rlvr_lab.train.setup import make_optimizer

CLASSP = ("optimizer.name=classp", "optimizer.betas=[0.9, 0.95]")


def config(*settings: str) -> TrainConfig:
    return load_config("grpo/tiny", [*TINY_RUN, *CLASSP, *settings])


@pytest.fixture(autouse=True)
def live_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has a gradient, however good or bad the policy is."""
    monkeypatch.setattr(loop, "compose", lambda methods: compose([*methods, WordBonus()]))


def test_the_default_stays_adamw_and_the_settings_reach_the_optimizer() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    usual = make_optimizer(model, OptimizerSection())
    assert isinstance(usual, torch.optim.AdamW)
    own = config("optimizer.lr=0.01", "optimizer.weight_decay=0.1", "optimizer.classp={threshold: 1e-4, power: 2}")
    made = make_optimizer(model, own.optimizer)
    assert isinstance(made, Classp)
    (group,) = made.param_groups
    assert [id(p) for p in group["params"]] == [id(model.weight)]
    found = {name: group[name] for name in ("lr", "threshold", "power", "eps", "scaling", "rule", "weight_decay")}
    assert found == {"lr": 0.01, "threshold": 1e-4, "power": 2.0, "eps": 1e-5, "scaling": True, "rule": "paper",
                     "weight_decay": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optimizer.name=clasp"], "setting 'optimizer.name': .*'adamw' or 'classp'"),
        (["optimizer.betas=[0.9, 0.98]"], r"optimizer\.betas is of adamw and does nothing with optimizer\.name=classp;"
                                          r" set optimizer\.name=adamw, or set it back to \[0\.9, 0\.95\]"),
        (["optimizer.eps=1e-6"], r"optimizer\.eps is of adamw .* set it back to 1e-08"),
        (["optimizer.name=adamw", "optimizer.classp.threshold=1e-4"],
         r"optimizer\.classp is of classp and does nothing with optimizer\.name=adamw; set optimizer\.name=classp$"),
        (["optimizer.classp.treshold=1"], r"unknown setting 'optimizer\.classp\.treshold'; did you mean"),
        (["optimizer.classp.threshold=-1"], r"setting 'optimizer\.classp\.threshold': .*greater than or equal to 0"),
        (["optimizer.classp.power=0"], r"setting 'optimizer\.classp\.power': .*greater than 0"),
        (["optimizer.classp.threshold=0.5"],
         r"optimizer\.classp\.threshold is 0\.5, and no squared gradient exceeds optimizer\.grad_clip squared, 0\.09"),
        (["optimizer.classp={threshold: 1, rule: released}"], r"threshold is 1, and the released gate never opens"),
        (["model.dtype=bfloat16"], r"sums of gradients stop growing in bfloat16; set model\.dtype=float32"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_apply_is_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config(*settings)
    assert "\n" not in str(caught.value)


def test_adapters_on_a_16_bit_base_are_float32_and_may_be_summed() -> None:
    assert config("model.dtype=bfloat16", "model.lora.rank=4").optimizer.name == "classp"


def test_a_configuration_survives_its_own_file_and_an_older_one_means_adamw() -> None:
    own = config("optimizer.classp.threshold=1e-6")
    assert parse_config(own.model_dump(mode="json")) == own
    older = load_config("grpo/tiny").model_dump(mode="json")
    for key in ("name", "classp"):
        del older["optimizer"][key]
    assert parse_config(older) == load_config("grpo/tiny")


def test_the_engines_that_bring_an_optimizer_refuse_it() -> None:
    refuse_optimizer("adamw", "TRL")
    with pytest.raises(UserError, match=r"optimizer\.name classp is of our own loop, and verl brings AdamW"):
        refuse_optimizer("classp", "verl")


def with_history(policy: Policy) -> Classp:
    """A step that opens the gate of the odd parameters only: the others have a history of zeros."""
    optimizer = Classp(policy.model.parameters(), 1e-3, threshold=1e-4)
    for i, p in enumerate(policy.model.parameters()):
        p.grad = torch.full_like(p, 0.02 * (i % 2))
    optimizer.step()
    return optimizer


def test_the_history_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    policy = load_policy("tiny/S", device="cpu")
    optimizer = with_history(policy)
    where = save(tmp_path, policy, optimizer, TrainerState(1, {}), 2)
    other = load_policy("tiny/S", device="cpu")
    fresh = Classp(other.model.parameters(), 7e-4, threshold=1e-3)
    restore(where, other, fresh)
    assert len(fresh.state) == len(optimizer.state) > 1
    pairs = list(zip(policy.model.parameters(), other.model.parameters(), strict=True))
    for one, two in pairs:
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["history"], fresh.state[two]["history"])
    assert max(float(fresh.state[p]["history"].max()) for _, p in pairs) == pytest.approx(0.02)
    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["threshold"]) == (7e-4, 1e-3)


def test_the_state_of_the_other_optimizer_is_refused(tmp_path: Path) -> None:
    policy = load_policy("tiny/S", device="cpu")
    where = save(tmp_path, policy, with_history(policy), TrainerState(1, {}), 2)
    with pytest.raises(UserError, match=r"written for another model or optimizer: it lacks 'optimizer\.state\."):
        restore(where, policy, torch.optim.AdamW(policy.model.parameters()))


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, rule: str) -> None:
    settings = ["steps=4", "optimizer.lr=0.01", "optimizer.warmup=0", "optimizer.weight_decay=0.1"]
    settings += [f"optimizer.classp={{threshold: 1e-7, rule: {rule}}}"]
    straight = Trainer(config(*settings), tmp_path / "straight")
    straight.run()
    left = iter([False, True])
    assert len(Trainer(config(*settings), tmp_path / "stopped", stop=lambda: next(left)).run().history) < 4
    resumed = Trainer(config(*settings), tmp_path / "stopped", resume=True)
    resumed.run()
    assert isinstance(straight.optimizer, Classp)
    for (name, a), b in zip(straight.policy.model.named_parameters(), resumed.policy.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(straight.optimizer.state[a]["history"], resumed.optimizer.state[b]["history"]), name
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    shares = [row["moved_share"] for row in rows]
    assert all(share == 1.0 for share in shares) if rule == "released" else all(0 < share < 1 for share in shares)


def test_a_run_cannot_change_its_optimizer(tmp_path: Path) -> None:
    Trainer(config("steps=2"), tmp_path / "run", stop=lambda: True).run()
    with pytest.raises(UserError, match="--resume cannot change 'optimizer'"):
        Trainer(config("steps=2", "optimizer.name=adamw"), tmp_path / "run", resume=True)


def test_what_is_behind_a_closed_gate_stays_where_it_was(tmp_path: Path) -> None:
    """And a run of AdamW has no gate to speak of."""
    settings = ["steps=1", "optimizer.warmup=0", "optimizer.lr=0.01"]
    run = Trainer(config(*settings, "optimizer.classp.threshold=1e-5", "update.minibatches=1"), tmp_path / "classp")
    share = run.run().history[0]["moved_share"]
    start = load_policy("tiny/S", device="cpu").model
    pairs = list(zip(run.policy.model.parameters(), start.parameters(), strict=True))
    moved = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert 0 < share < 0.5
    assert math.isclose(moved, share, rel_tol=0.02)
    usual = Trainer(load_config("grpo/tiny", [*TINY_RUN, "steps=1"]), tmp_path / "adamw").run().history[0]
    assert "moved_share" not in usual
