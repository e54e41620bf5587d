"""Two-hop worlds: what the splits promise, what noise touches, strings, grading, and settings that make no world."""

import pytest

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.explicit_cot import (
    PRESETS,
    Chain,
    Encoder,
    Fact,
    TwoHopTask,
    WorldConfig,
    exact_match,
    find_chains,
    make_world,
    texts,
)

CONFIGS = [
    WorldConfig(seed=seed, chains_per_fact=2.0, ood_share=share, out_degree=degree)
    for seed, share, degree in [(0, 0.2, 6), (1, 0.5, 5), (2, 0.0, 5)]
]


@pytest.mark.parametrize("config", CONFIGS)
def test_splits(config):
    world = make_world(config)
    ood, facts, tails = set(world.ood_facts), world.facts, world.tails
    assert len(facts) == len(set(facts)) == len(tails) == config.entities * config.out_degree
    assert len(ood) == round(config.ood_share * len(facts))
    assert len(world.train) == round(2.0 * len(world.id_facts))
    assert world.train == world.clean
    assert not set(world.train) & set(world.test_iid)
    for chain in world.train + world.test_iid + world.test_ood:
        hops = Fact(chain.h, chain.r1, chain.b), Fact(chain.b, chain.r2, chain.t)
        assert tails[chain.h, chain.r1] == chain.b
        assert tails[chain.b, chain.r2] == chain.t
        assert {hop in ood for hop in hops} == {chain in set(world.test_ood)}
    chains = find_chains(world.id_facts, world.ood_facts)
    total = len(chains.id) + len(chains.ood) + len(chains.mixed)
    assert total == sum(config.out_degree for _ in facts)  # each tail has out_degree relations of its own
    assert world.test_ood == chains.ood


def test_chains_keep_revisited_entities():
    found = find_chains([Fact(0, 0, 0)], [Fact(1, 0, 1)])
    assert found.id == [Chain(0, 0, 0, 0, 0)]
    assert found.ood == [Chain(1, 0, 0, 1, 1)]
    assert found.mixed == []


def test_worlds_that_differ_in_one_setting_share_the_rest():
    base = make_world(WorldConfig(chains_per_fact=2.0))
    assert base == make_world(WorldConfig(chains_per_fact=2.0))
    more = make_world(WorldConfig(chains_per_fact=4.0))
    assert more.facts == base.facts
    assert more.clean[: len(base.clean)] == base.clean
    assert make_world(WorldConfig(chains_per_fact=2.0, seed=1)).facts != base.facts


def test_noise_touches_the_training_chains_alone_and_the_same_ones():
    quiet = make_world()
    noisy = {kind: make_world(WorldConfig(noise=kind, noise_share=0.3)) for kind in ("t", "b", "both")}
    for kind, world in noisy.items():
        assert (world.clean, world.test_iid, world.test_ood) == (quiet.clean, quiet.test_iid, quiet.test_ood)
        for shown, true in zip(world.train, world.clean, strict=True):
            assert shown[:3] == true[:3]
            assert kind != "t" or shown.b == true.b
            assert kind != "b" or shown.t == true.t
        share = sum(a != b for a, b in zip(world.train, world.clean, strict=True)) / len(world.train)
        assert abs(share - 0.3) < 0.06  # 1152 rows: four standard deviations
    pairs = zip(noisy["both"].train, noisy["t"].train, noisy["b"].train, strict=True)
    assert all(both.t == t.t and both.b == b.b for both, t, b in pairs)


def test_strings():
    chain = Chain(0, 3, 1, 9, 11)
    assert texts(chain, "cot") == ("<e_0><r_3><r_1>", "<e_0><r_3><r_1><e_9><e_11></a>")
    assert texts(chain, "no_cot")[1] == "<e_0><r_3><r_1><e_11></a>"
    assert texts(Fact(0, 3, 9), "cot") == texts(Fact(0, 3, 9), "no_cot") == ("<e_0><r_3>", "<e_0><r_3><e_9></a>")
    with pytest.raises(UserError, match="did you mean 'cot'"):
        texts(chain, "cto")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("<e_4><e_5></a>", True),
        ("<e_4> <e_5> </a>", True),
        ("<e_4><e_5>", True),
        ("<e_4><e_5></a><e_7>", True),
        ("<e_9><e_5></a>", False),
        ("<e_5></a>", False),
        ("", False),
    ],
)
def test_exact_match_forgives_the_end_alone(prediction, right):
    assert exact_match(prediction, "<e_4><e_5></a>") is right


def test_reward_on_the_answer_alone_and_on_the_whole():
    problem, config = Chain(1, 2, 3, 4, 5), WorldConfig()
    answer, whole = TwoHopTask(config), TwoHopTask(config, graded="whole")
    for text, by_answer, by_whole in [
        ("<e_4> <e_5> </a>", True, True),
        ("<e_9> <e_5> </a>", True, False),
        ("<e_5> </a>", True, False),
        ("<e_4> <e_9> </a>", False, False),
        ("<e_4> <e_5>", True, True),
    ]:
        assert answer.grade(problem, text, True).correct is by_answer
        assert whole.grade(problem, text, True).correct is by_whole
    for text in ("", "</a>", "<e_5> <r_1> </a>", "<unk>", "</a> <e_5>"):
        verdict = answer.grade(problem, text, True)
        assert not verdict.correct
        assert verdict.answer is None


def test_ids_are_those_of_the_words():
    encoder = Encoder(WorldConfig(entities=7, relations=6))
    prompt, response = encoder.example(Chain(6, 0, 5, 3, 2), "cot")
    assert [encoder.words[i] for i in prompt + response] == ["<e_6>", "<r_0>", "<r_5>", "<e_3>", "<e_2>", "</a>"]
    assert TwoHopTask(WorldConfig(entities=7, relations=6)).prompt_ids(Chain(6, 0, 5, 3, 2)) == prompt
    assert len(set(encoder.words)) == len(encoder.words) == 5 + 7 + 6


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"noise": "bridge", "noise_share": 0.1}, "noise 'bridge'"),
        ({"noise": "t"}, "set both or neither"),
        ({"noise_share": 0.2}, "set both or neither"),
        ({"out_degree": 9}, "out_degree 9 exceeds relations 8"),
        ({"entities": 0}, "entities must be at least 1"),
        ({"ood_share": 1.5}, "ood_share must lie"),
        ({"chains_per_fact": -1.0}, "chains_per_fact must not be negative"),
    ],
)
def test_impossible_worlds_name_the_setting(change, names):
    with pytest.raises(UserError, match=names):
        WorldConfig(**change)


def test_more_chains_than_there_are():
    with pytest.raises(UserError, match=r"chains_per_fact 9 needs .* set at most [34]\.\d\d"):
        make_world(WorldConfig(chains_per_fact=9.0))


def test_presets_differ_where_the_card_says():
    paper, released = PRESETS["paper"], PRESETS["released"]
    assert (paper.noise, released.noise, released.noise_share) == ("none", "t", 0.4)
    assert (paper.chains_per_fact, released.chains_per_fact) == (7.2, 0.001)
    assert paper.entities == released.entities == 2000
