"""Replays pear.json: phase entropies, penalty, shaped reward, and the group advantage of that reward."""

from __future__ import annotations

import torch

from ...core.advantages import Std, group_advantage
from ...methods import pear
from ..golden import Case, Replay, Rule


def _reward(case: Case) -> Replay:
    entropy, p = case.tensor("entropy"), case.params
    mask = torch.arange(entropy.shape[1])[None] < case.ids("lengths")[:, None]
    boundary = torch.tensor([-1 if index is None else int(index) for index in case.inputs["think_end_index"]])
    thinking, answer = pear.thinking_and_answer(entropy, mask, boundary, boundary)
    docked = pear.penalty(thinking, answer, p["alpha"])
    reward = pear.shaped_reward(docked, case.mask("correct"), p["s"], p["r_fmt"])
    std: Std = "sample" if p["adv_std_ddof"] else "population"
    return Replay(
        {
            "H_think": thinking,
            "H_answer": answer,
            "penalty": docked,
            "reward": reward,
            "group_advantage": group_advantage(reward, case.ids("group"), std, p["adv_eps"]),
        }
    )


RULES = [Rule("pear", {"entropy", "lengths", "think_end_index", "correct", "group"}, {"penalty", "reward"}, _reward,
              params={"alpha", "s", "r_fmt"})]  # fmt: skip
