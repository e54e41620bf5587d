"""The mathematics in the widgets' JavaScript, run under node and compared with Python."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from under_node import needs_node, node, widgets


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(logits / temperature - np.max(logits / temperature))
    return weights / weights.sum()


def entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


@needs_node
def test_softmax_and_entropy(tmp_path: Path) -> None:
    logits = [1.5, 0.2, -3.0, 900.0]  # 900 overflows exp() without the shift by the maximum
    temperatures = [0.1, 1.0, 300.0]
    calls = [f"w.softmax({logits}, {t})" for t in temperatures]
    got = node("temperature_explorer", [*calls, *[f"w.entropy({c})" for c in calls], "w.entropy([1, 0])"], tmp_path)
    for t, p, h in zip(temperatures, got[:3], got[3:6], strict=True):
        expected = softmax(np.array(logits), t)
        np.testing.assert_allclose(p, expected, rtol=1e-12, atol=1e-300)
        assert h == pytest.approx(entropy(expected), abs=1e-12)
    assert math.copysign(1.0, got[6]) == 1.0  # "-0.000 nats" would be printed otherwise
    assert got[6] == 0


@needs_node
@pytest.mark.parametrize("rewards", [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0.5, 1, 0.25]])
def test_grpo_step_is_the_gradient_of_the_surrogate(rewards: list[float], tmp_path: Path) -> None:
    """Compared with a numerical derivative of E_p[A] at fixed advantages, which is what one on-policy step ascends."""
    logits, rate, small = np.array([0.3, -0.2, 0.9, 0.0]), 0.7, 1e-6
    p, r = softmax(logits), np.array(rewards)
    mean = p @ r
    advantage = (r - mean) / math.sqrt(p @ (r - mean) ** 2)
    bumps = small * np.eye(4)
    gradient = [(softmax(logits + b) @ advantage - softmax(logits - b) @ advantage) / (2 * small) for b in bumps]
    (got,) = node("policy_gradient_bandit", [f"w.grpoStep({logits.tolist()}, {rewards}, {rate})"], tmp_path)
    np.testing.assert_allclose(got, logits + rate * np.array(gradient), atol=1e-8)


@needs_node
def test_dead_group_moves_nothing(tmp_path: Path) -> None:
    logits = [0.3, -0.2, 0.9, 0.0]
    got = node("policy_gradient_bandit", [f"w.grpoStep({logits}, [1, 1, 1, 1], 2)"], tmp_path)
    assert got == [logits]


@needs_node
def test_rich_get_richer_is_what_the_bandit_shows(tmp_path: Path) -> None:
    """The widget's point: two equally correct answers, the smaller one loses its share while the reward rises."""
    steps = "let z = [0.5, 0, 0.5, 0]; for (let i = 0; i < 200; i += 1) z = w.grpoStep(z, [1, 1, 0, 0], 0.5); return z;"
    shares = [
        f"w.secondCorrectShare(w.softmax({z}), [1, 1, 0, 0])" for z in ("[0.5, 0, 0.5, 0]", f"(() => {{{steps}}})()")
    ]
    before, after, none = node(
        "policy_gradient_bandit", [*shares, "w.secondCorrectShare([0.5, 0.5], [1, 0])"], tmp_path
    )
    assert after < 0.8 * before
    assert none is None


@needs_node
def test_pass_at_k_equals_the_binomial_formula(tmp_path: Path) -> None:
    cases = [(n, c, k) for n in (1, 8, 64) for c in {0, 1, n // 2, n} for k in {1, max(1, n // 3), n}]
    got = node("pass_at_k", [f"w.passAtK({n}, {c}, {k})" for n, c, k in cases], tmp_path)
    expected = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c, k in cases]
    np.testing.assert_allclose(got, expected, atol=1e-12)


@needs_node
def test_crossing(tmp_path: Path) -> None:
    samples, base, trained = 64, [4, 4, 4, 4], [40, 40, 0, 0]  # the trained policy gave up two problems
    got = node(
        "pass_at_k",
        [f"w.crossing({samples}, {base}, {trained}, 64)", f"w.crossing({samples}, {base}, {base}, 64)"],
        tmp_path,
    )

    def mean(counts: list[int], k: int) -> float:
        return float(np.mean([1 - math.comb(samples - c, k) / math.comb(samples, k) for c in counts]))

    expected = next(k for k in range(1, 65) if mean(base, k) >= mean(trained, k))
    assert expected > 1
    assert got == [expected, None]  # equal policies never cross


@needs_node
def test_clip_force_is_the_sign_of_the_clipping_bias(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.methods.spurious_rewards import clipping_bias, largest_ratio

    cases = [(p, d, e) for p in (0.05, 0.6, 0.84) for d in (-1.5, -0.1, 0.0, 0.25, 1.5) for e in (0.1, 0.2)]
    calls = [f"[w.moved({p}, {d}), w.push(w.moved({p}, {d}) / {p}, {e}), w.edges({p}, {e})]" for p, d, e in cases]
    signs = set()
    for (p, d, e), (now, push, edges) in zip(cases, node("clip_force", calls, tmp_path), strict=True):
        assert now == pytest.approx(softmax(np.array([math.log(p) + d, math.log(1 - p)]))[0])
        assert push == clipping_bias(torch.tensor(now / p, dtype=torch.float64), 1.0, 1 - e, 1 + e)
        assert (edges[1] >= 1) == bool(largest_ratio(torch.tensor(p, dtype=torch.float64).log()) <= 1 + e)
        assert edges[0] == pytest.approx(p * (1 - e))
        signs.add(push)
    assert signs == {-1, 0, 1}


@needs_node
def test_surrogate_forces_are_the_gradients_of_the_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.core import losses

    tokens = 5
    cases = [(r, q, a) for r in (0.1, 0.9, 1.0, 1.001, 1.25, 4.0, 7.0) for q in (0.9995, 1.0, 1.004) for a in (1, -1)]
    silent = 0
    calls = [f"w.forces({r}, {q}, {a}, {tokens})" for r, q, a in cases]
    for (r, q, a), got in zip(cases, node("surrogate_force", calls, tmp_path), strict=True):
        log_ratio = torch.tensor([[r] + [q] * (tokens - 1)], dtype=torch.float64).log().requires_grad_()
        old, advantage = torch.zeros_like(log_ratio), torch.full_like(log_ratio, a)
        mask = torch.ones_like(log_ratio, dtype=torch.bool)
        surrogates = [
            losses.clipped_surrogate(log_ratio, old, advantage, 0.8, 1.2),
            losses.clipped_surrogate(log_ratio, old, advantage, 0.8, 1.28),
            losses.clipped_surrogate(log_ratio, old, advantage, 0.8, 1.2, dual_clip=3.0),
            losses.cispo_surrogate(log_ratio, old, advantage, 0.0, 6.0),
            losses.policy_gradient(log_ratio, advantage),
            losses.sapo_surrogate(log_ratio, old, advantage),
            losses.gmpo_surrogate(log_ratio, old, advantage, mask, 0.4, 0.4),
            losses.gspo_surrogate(log_ratio, old, advantage, mask, 1 - 3e-4, 1 + 4e-4),
        ]
        expected = [-float(torch.autograd.grad(s.loss.sum(), log_ratio)[0][0, 0]) for s in surrogates]
        assert got == pytest.approx(expected)
        silent += expected.count(0.0)
    assert silent > 10


def test_text_form_is_stable() -> None:
    first, second = (widgets.PassAtK(samples=8, base=[1, 2], trained=[8, 0]) for _ in range(2))
    assert repr(first) == repr(second) == "PassAtK(samples=8, base=[1, 2], trained=[8, 0], k=1)"


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match="same problems"):
        widgets.PassAtK(samples=8, base=[1], trained=[1, 2])
    with pytest.raises(ValueError, match=r"0\.\.8"):
        widgets.PassAtK(samples=8, base=[9], trained=[1])
    with pytest.raises(ValueError, match="equal length"):
        widgets.PolicyGradientBandit(rewards=[1, 0], logits=[0.0])


@needs_node
def test_the_memory_calculator_has_the_planners_formulas(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from dataclasses import replace

    from rlvr_lab.core.head import KEEP_BYTES
    from rlvr_lab.plan.devices import device
    from rlvr_lab.plan.job import job_of
    from rlvr_lab.plan.memory import PLAIN_HEAD, memory
    from rlvr_lab.plan.shapes import shape_of
    from rlvr_lab.train.config import load_config

    shape = shape_of("Qwen/Qwen2.5-1.5B")
    sizes = {
        "parameters": shape.parameters, "embedding": shape.embedding_parameters, "layer": shape.layer_parameters,
        "vocabulary": shape.vocabulary, "hidden": shape.hidden, "feedForward": shape.feed_forward,
        "layers": shape.layers, "heads": shape.heads, "queryWidth": shape.query_width, "kvWidth": shape.kv_width,
    }  # fmt: skip
    cases = [(tokens, again) for tokens in (1024, 65536) for again in (False, True)]
    calls = [f"w.parts({json.dumps(sizes)}, 8, {t}, {json.dumps(again)}, true)" for t, again in cases]
    plain = f"w.parts({json.dumps(sizes)}, 1, 4096, false, false)"
    *tiled, full = node("memory_calculator", [*calls, plain], tmp_path)
    config = load_config(None, ["model.path=Qwen/Qwen2.5-1.5B", "model.precision=bfloat16", "parallel.shard=fsdp2"])
    assert 1024 * shape.vocabulary * 4 < KEEP_BYTES < 65536 * shape.vocabulary * 4  # both ways of the tiled head
    for (tokens, again), got in zip(cases, tiled, strict=True):
        job = replace(
            job_of(config, device("H100"), 8, shape=shape),
            prompt_tokens=0, max_tokens=tokens // 8, micro_rows=8, checkpointing=again, packed_tokens=None,
        )  # fmt: skip
        expected = {part.name: part.bytes.get("update", 0) for part in memory(job).parts}
        head = expected.get("logits and head", expected.get("backward of a layer"))
        names = ("weights", "gradients", "Adam moments", "gathered by FSDP2", "activations")
        assert list(got.values()) == pytest.approx([*(expected[name] for name in names), head], rel=1e-6)
    assert full["head"] == PLAIN_HEAD * 4096 * shape.vocabulary * 4
    assert full["gathered"] == 0


@needs_node
def test_sharding_divides_what_it_says_it_divides(tmp_path: Path) -> None:
    shape = "{parameters: 1e9, layers: 10, hidden: 100}"
    calls = [f"w.perGpu({shape}, {n}, {s})" for n in (1, 4) for s in (0, 1, 2)]
    sends = [f"w.sent({shape}, {n}, {s}, 3, 50)" for n in (1, 4) for s in (0, 1, 2)]
    got = node("sharding_explorer", calls + sends, tmp_path)
    whole = [4e9, 4e9, 8e9, 2e9]
    assert got[0] == got[3] == whole  # data parallel divides nothing
    assert got[1] == got[2] == whole  # one GPU holds everything, however it is called
    assert got[4] == [1e9, 1e9, 2e9, 0.4e9]  # two layers of ten in bfloat16
    assert got[5] == [1e9, 1e9, 2e9, 0.5e9]
    assert got[6:9] == [0, 0, 0]
    ring = 3 / 4
    assert got[9:] == pytest.approx([2 * ring * 4e9, 3 * ring * 8e9, 3 * 10 * 4 * 2 * ring * 2 * 50 * 100])


@needs_node
def test_rare_token_forces_are_the_gradients_of_the_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.methods import lp_reg

    rest, outcomes = [0.5, 0.3, 0.188, 0.003, 0.003, 0.006], set()
    cases = [(p, r, k) for p in (0.005, 0.04) for r in (0.05, 0.3, 0.7, 0.9, 1.0) for k in (0.0, 0.02, 0.1)]
    calls = [f"(f => [f, w.forces({r}, f.mass, f.kept, 0.7)])(w.filtered({p}, {rest}, {k}))" for p, r, k in cases]
    for (p, r, kappa), (found, forces) in zip(cases, node("rare_token", calls, tmp_path), strict=True):
        policy = torch.tensor([p, *[(1 - p) * share for share in rest]], dtype=torch.float64).log()
        proxy, keep = lp_reg.proxy_log_p(policy, kappa)
        now = (policy[0] + math.log(r)).reshape(1, 1).requires_grad_()
        held = bool(keep[0]) and float(now.detach()) < float(proxy[0])
        value = lp_reg.k3_to_proxy(now, proxy[:1].reshape(1, 1) if held else now.detach())
        pull = -float(torch.autograd.grad(value.sum(), now)[0])
        assert found["kept"] == bool(keep[0])
        assert found["mass"] == pytest.approx(float(policy.exp()[keep].sum()))
        assert forces["pull"] == pytest.approx(pull, abs=1e-9)
        assert forces["push"] == pytest.approx(0.7 * r)
        assert forces["clipped"] == (0 if r < 0.8 else pytest.approx(0.7 * r))
        outcomes.add((held, forces["beyond"]))
    assert outcomes == {(False, False), (True, False), (True, True)}


@needs_node
def test_tempered_imitation_drifts_as_the_library_says(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.core.dynamics import exact_change
    from rlvr_lab.methods.arbitrary_entropy import entropy_drift

    logits = [0.2, 1.4, -0.7, 0.0]
    z = torch.tensor(logits, dtype=torch.float64)
    p = softmax(np.array(logits))
    right = 0.2 + 0.6 * p / p.max()
    calls = [f"w.drift({logits}, {t}, [1, 1, 1, 1])" for t in (0.7, 1.0, 1.8)]
    calls += [f"w.success(w.softmax({logits}), 0.6)", f"w.balance({logits}, [1, 1, 1, 1])"]
    calls += [f"w.drift({logits}, 1, {right.tolist()})", f"w.balance({logits}, {right.tolist()})"]
    *drifts, success, one, imitated, higher = node("tempered_imitation", calls, tmp_path)
    assert drifts == pytest.approx([float(entropy_drift(z, t)[0]) for t in (0.7, 1.0, 1.8)], abs=1e-12)
    assert success == pytest.approx(right)
    assert one == pytest.approx(1.0)
    step = torch.tensor(p * right - p * (p * right).sum())
    assert imitated == pytest.approx(float(exact_change(z, 1e-6 * step)) / 1e-6, abs=1e-5)
    assert imitated < 0 < higher - 1  # successes are the sure actions: at T = 1 entropy falls


@needs_node
def test_entropy_corridor_pushes_against_the_gradient_of_the_penalty(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.methods.epo import corridor_hinge

    entropies, history, low, high, weight = [0.0, 0.1, 0.3, 0.5, 2.0], 0.4, 0.5, 1.2, 3.0
    calls = [f"w.push({h}, {history}, {low}, {high}, {weight})" for h in entropies]
    calls += [f"w.shares({entropies}, {history}, {low}, {high})", f"w.corridor({history}, {low}, {high}, 0.4)"]
    *pushes, shares, edges = node("entropy_corridor", calls, tmp_path)
    h = torch.tensor(entropies, dtype=torch.float64, requires_grad=True)
    gain = h - weight * corridor_hinge(h, history, low, high)
    assert pushes == pytest.approx(torch.autograd.grad(gain.sum(), h)[0].tolist())
    assert shares == pytest.approx([0.4, 0.2, 0.4])
    assert edges == {"lower": pytest.approx(0.2), "upper": pytest.approx(0.48), "vacuous": True}


@needs_node
def test_bound_search_counts_as_bapo_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.methods import bapo

    P, R, A = [0.9, 0.05, 0.6, 0.3, 0.02, 0.8], [1.0, 2.4, 0.5, 0.7, 1.3, 1.1], [1.0, 1.0, -0.5, -0.5, 1.0, -0.5]
    tokens = [{"p": p, "r": r, "a": a} for p, r, a in zip(P, R, A, strict=True)]
    text = "[" + ",".join(f"{{p: {t['p']}, r: {t['r']}, a: {t['a']}}}" for t in tokens) + "]"
    bounds = [(0.6, 1.2), (0.6, 2.0), (0.9, 3.0)]
    calls = [f"w.{name}({text}, {lo}, {hi})" for lo, hi in bounds for name in ("positiveShare", "gradientShare")]
    got = node("bound_search", calls, tmp_path)
    ratio, advantage, weight = (torch.tensor([x], dtype=torch.float64) for x in (R, A, P))
    everything = torch.ones(1, len(P), dtype=torch.bool)
    expected = []
    for lo, hi in bounds:
        expected.append(bapo.positive_share(ratio, advantage, weight, lo, hi))
        expected.append(bapo.gradient_share(ratio, advantage, everything, lo, hi))
    assert got == pytest.approx(expected)
    assert len(set(got)) == len(got)


@needs_node
@pytest.mark.parametrize("sign", ["signed", "released"])
def test_entropy_signal_treats_a_token_as_hapo_does(sign: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.methods import hapo

    H = torch.tensor([[1e-9, 1e-4, 0.03, 0.6, 1.2]], dtype=torch.float64)
    scale = hapo.entropy_scale(H, torch.ones_like(H, dtype=torch.bool), 0.8)
    assert scale is not None
    told = f"{{pivot: {scale.pivot}, highest: {scale.highest * scale.spread}, lowest: {scale.lowest * scale.spread}}}"
    h = scale.apply(H, sign)
    calls = [f"w.signal({x}, {told}, {str(sign == 'released').lower()})" for x in H[0].tolist()]
    assert node("entropy_signal", calls, tmp_path) == pytest.approx(h[0].tolist())
    ratios = [0.7, 0.95, 1.0, 1.2, 1.0]
    settings = "{low: 0.2, high: 0.28, tau: 0.1}"
    calls = [f"w.treatment({x}, {r}, {settings})" for x, r in zip(h[0].tolist(), ratios, strict=True)]
    below, above = hapo.adaptive_ranges(h, 0.2, 0.28)
    factor = hapo.redistribution(h, torch.tensor([ratios], dtype=torch.float64), 0.2, 0.28)
    for i, one in enumerate(node("entropy_signal", calls, tmp_path)):
        assert one["temperature"] == pytest.approx(float(hapo.adaptive_temperature(h, 1.0, 0.1)[0, i]))
        assert (one["lower"], one["upper"]) == pytest.approx((1 - float(below[0, i]), 1 + float(above[0, i])))
        assert one["factor"] == pytest.approx(float(factor[0, i]))


@needs_node
def test_nucleus_head_is_that_of_the_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from rlvr_lab.core.entropy import nucleus_entropy

    p = [0.45, 0.25, 0.2, 0.07, 0.03]
    logits = torch.tensor(p, dtype=torch.float64).log()
    cases = [(mass, crossing) for mass in (0.3, 0.5, 0.8, 0.95) for crossing in (True, False)]
    got = node("nucleus_head", [f"w.headEntropy({p}, {m}, {str(c).lower()})" for m, c in cases], tmp_path)
    expected = [float(nucleus_entropy(logits, m, None, c)) for m, c in cases]
    assert got == pytest.approx(expected, abs=1e-9)
    assert node(
        "nucleus_head", ["w.headSize([0.9, 0.1], 0.8, false)", "w.headSize([0.9, 0.1], 0.8, true)"], tmp_path
    ) == [0, 1]


def test_settings_of_the_clip_and_entropy_widgets_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        widgets.BoundSearch([0.5], [1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="both sides"):
        widgets.EntropySignal((-1.0, 0.0, -3.0), math.log(9))
    with pytest.raises(ValueError, match="mass"):
        widgets.NucleusHead({"a": 1.0}, mass=0.0)
