"""Ranks with ties, patching on a model whose circuit is known, and the training that the chapter runs."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlvr_lab.errors import UserError
from rlvr_lab.evaluate import explicit_cot as inside
from rlvr_lab.policy.access import patched, record
from rlvr_lab.tasks import explicit_cot as two_hop
from rlvr_lab.testing.golden import replay_file
from rlvr_lab.train.explicit_cot import PRESETS, TwoHopTraining, new_policy, train

SMALL = two_hop.WorldConfig(entities=12, relations=4, out_degree=3, ood_share=0.25, chains_per_fact=1.0)


@pytest.fixture(scope="module")
def small():
    world = two_hop.make_world(SMALL)
    return world, new_policy(world, TwoHopTraining(seed=1))


def test_golden():
    results = replay_file(Path(__file__).parents[1] / "golden" / "explicit_cot.json")
    assert [r.problem for r in results] == [None] * 5


def test_rank_puts_ties_in_the_order_of_ids():
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    assert [int(inside.rank(scores, i)) for i in range(5)] == [3, 0, 1, 4, 2]
    assert [int(inside.rank(scores, i, [4, 2, 0])) for i in (4, 2, 0)] == [0, 1, 2]


def test_rank_equals_a_stable_sort():
    scores = torch.randint(0, 4, (50, 9), generator=torch.Generator().manual_seed(0)).float()
    for token in range(9):
        slow = [sorted(range(9), key=lambda i, row=row: -row[i]).index(token) for row in scores.tolist()]
        assert inside.rank(scores, token).tolist() == slow


def test_a_cosine_ignores_the_length_of_embeddings():
    hidden, words = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    assert int(inside.lens_rank(hidden, words, 0)) == 1
    assert int(inside.lens_rank(hidden, words, 0, "cos")) == 0


def test_undefined_ranks_are_refused_and_undefined_shares_are_nan():
    with pytest.raises(ValueError, match="nan"):
        inside.rank(torch.tensor([math.nan, 1.0]), 1)
    with pytest.raises(ValueError, match="candidates"):
        inside.rank(torch.tensor([0.0, 1.0]), 1, [0])
    with pytest.raises(ValueError, match="2 ranks before"):
        inside.patching_effect(torch.zeros(2), torch.zeros(3))
    assert math.isnan(inside.patching_effect(torch.tensor([1, 2]), torch.tensor([0, 0])).changed)
    assert math.isnan(float(inside.mrr(torch.zeros(0))))
    assert math.isnan(inside.accuracy(None, [], two_hop.Encoder(SMALL), "cot").exact)


def test_the_last_layer_of_the_lens_is_the_policy(small):
    world, policy = small
    encoder = two_hop.Encoder(SMALL)
    ids, gold = inside.encoded(world.train[:8], encoder, "cot")
    ranks = inside.lens_ranks(policy.model, ids, gold[:, 0])
    logits = policy.model(input_ids=ids).logits
    assert ranks.shape == (4, 8, 3)
    assert torch.equal(ranks[-1], inside.rank(logits, gold[:, :1]))


@pytest.mark.parametrize("site", ["h", "r1", "r2", "b"])
def test_an_exchange_changes_one_word_and_the_answer(small, site):
    world, _ = small
    generator, tails = torch.Generator().manual_seed(0), world.tails
    seen = 0
    for chain in world.clean:
        new = inside.exchanged(chain, site, world, generator)
        if new is None:
            continue
        seen += 1
        assert [name for name in two_hop.Chain._fields if getattr(new, name) != getattr(chain, name)] == [site]
        bridge = new.b if site == "b" else tails.get((new.h, new.r1))
        assert tails.get((bridge, new.r2)) != chain.t
    assert seen > len(world.clean) / 2


def test_where_no_exchange_can_change_the_answer_there_is_none():
    world = SimpleNamespace(config=two_hop.WorldConfig(2, 1, 1, 0, 0, 0), tails={(0, 0): 0, (1, 0): 0})
    chain = two_hop.Chain(0, 0, 0, 0, 0)
    assert inside.exchanged(chain, "h", world, torch.Generator()) is None


def test_a_patch_of_the_embedding_is_the_exchanged_run_and_one_of_itself_is_nothing(small):
    _world, policy = small
    clean, other = torch.tensor([[5, 17, 18]]), torch.tensor([[6, 17, 18]])
    with record(policy.model) as seen:
        changed = policy.model(input_ids=other).logits
        state = {layer: value.clone() for layer, value in seen.residual.items()}
        plain = policy.model(input_ids=clean).logits
    with patched(policy.model, 1, 0, state[0][:, 0]):
        assert torch.allclose(policy.model(input_ids=clean).logits, changed, atol=1e-6)
    # a state behind the place that reads it no longer reaches the last word: after the last block nothing does
    ranks = list(inside._patched_ranks(policy.model, clean, clean, 0, torch.tensor([7])))
    assert all(torch.equal(r, inside.rank(plain[:, -1], torch.tensor([7]))) for r in ranks)


def test_stages_and_sites_that_do_not_exist(small):
    world, policy = small
    with pytest.raises(UserError, match=r"stage 2 .* 'no_cot'"):
        inside.trace(policy.model, [], world, "no_cot", 2)
    with pytest.raises(UserError, match="site 't'"):
        inside.exchanged(world.train[0], "t", world, torch.Generator())
    empty = inside.trace(policy.model, [], world, "cot", 2)
    assert all(math.isnan(share) for site in inside.SITES[2] for share in empty.changed(site))


@pytest.mark.parametrize(
    ("change", "names"),
    [({"steps": 0}, "steps"), ({"lr": -1.0}, "lr"), ({"optimizer": "sgd"}, "adamw, muon"), ({"batch": 0}, "batch")],
)
def test_impossible_trainings_name_the_setting(change, names):
    with pytest.raises(UserError, match=names):
        TwoHopTraining(**change)


def test_a_training_repeats_itself_and_the_optimizers_divide_the_weights(small):
    world, _ = small
    settings = TwoHopTraining(steps=3, batch=16)
    runs = [train(world, "cot", settings, measure_at=(1,)) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    assert [row["step"] for row in runs[0][1]] == [1.0, 3.0]
    same = zip(runs[0][0].model.parameters(), runs[1][0].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    paper = TwoHopTraining(steps=2, batch=16, optimizer="adamw", lr=1e-4, weight_decay=0.1)
    policy, history = train(world, "no_cot", paper)
    assert len(history) == 1
    assert PRESETS["paper"].optimizer == "adamw"
    before = new_policy(world, paper).model.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in policy.model.state_dict().items())


@pytest.mark.slow
def test_a_trained_model_has_the_two_stages():
    """What holds of any causal model that is right for this reason, not of one seed: stage 2 reads b."""
    world = two_hop.make_world(two_hop.WorldConfig(entities=20, relations=5, out_degree=4, chains_per_fact=2.0))
    policy, history = train(world, "cot", TwoHopTraining(batch=64))
    assert history[-1]["test_inferred_iid"] > 0.5
    found = inside.trace(policy.model, world.test_iid + world.clean[:60], world, "cot", 2)
    assert found.changed("b")[0] > 0.9  # the embedding of b is all that says b
    first = inside.trace(policy.model, world.clean[:60], world, "cot", 1)
    assert first.changed("h")[0] > 0.9
    assert first.changed("r2")[0] < 0.2
