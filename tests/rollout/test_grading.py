from __future__ import annotations

import torch

from rlvr_lab.core.rollout import Rollout, pad
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout.grading import grade, response_texts
from rlvr_lab.tasks import countdown
from rlvr_lab.tasks.countdown import Problem
from rlvr_lab.tasks.registry import CountdownTask

PROBLEMS = [Problem((2, 3, 4), 10), Problem((2, 3, 5), 25)]
RESPONSES = [
    (1, "( 2 + 3 ) * 5", "</think> ( 2 + 3 ) * 5 <eos>", True),
    (1, "commuted", "</think> 5 * ( 3 + 2 ) <eos>", True),
    (1, "wrong value", "</think> ( 5 + 3 ) * 2 <eos>", True),
    (0, "unfinished", "</think> ( 3 * 2 ) + 4", False),
    (0, "right", "</think> ( 3 * 2 ) + 4 <eos>", True),
    (0, "no answer", "yes yes <eos>", True),
]


def written(policy: Policy) -> Rollout:
    """The responses above as a rollout."""
    ids = [[countdown.ID[w] for w in text.split()] for _, _, text, _ in RESPONSES]
    tokens = pad(ids, policy.pad_id, torch.long)
    mask = pad([[1] * len(row) for row in ids], 0, torch.bool)
    rows = torch.tensor([row[0] for row in RESPONSES])
    prompts = torch.tensor([PROBLEMS[i].prompt_ids for i in rows.tolist()])
    return Rollout(
        prompt_id=rows,
        group_id=rows,
        finished=torch.tensor([row[3] for row in RESPONSES]),
        policy_version=torch.zeros_like(rows),
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        response_ids=tokens,
        response_mask=mask,
        action_mask=mask,
        behaviour_logprob=torch.zeros(tokens.shape),
        behaviour_temperature=torch.ones(tokens.shape),
    )


def test_each_response_meets_the_verifier_of_its_own_problem(tiny_s: Policy) -> None:
    graded = grade(written(tiny_s), CountdownTask(), PROBLEMS, tiny_s)
    assert graded.correct is not None
    assert graded.correct.tolist() == [True, True, False, False, True, False]
    assert graded.reward_components["correct"].tolist() == [1, 1, 0, 0, 1, 0]
    assert graded.reward is None  # the pipeline adds the components up
    assert graded.answer is not None
    assert graded.answer[0] == graded.answer[1]
    assert graded.answer[3] is None
    assert graded.answer[5] is None


def test_texts_end_where_the_response_ends(tiny_s: Policy) -> None:
    assert response_texts(written(tiny_s), tiny_s) == [row[2] for row in RESPONSES]


def test_components_of_others_are_kept(tiny_s: Policy) -> None:
    rollout = written(tiny_s).with_(reward_components={"length": torch.arange(6.0)})
    graded = grade(rollout, CountdownTask(), PROBLEMS, tiny_s)
    assert set(graded.reward_components) == {"length", "correct"}
