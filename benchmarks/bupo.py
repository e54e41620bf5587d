"""What a first phase on layer 1 does: the tiny lab, a short and a long phase beside GRPO, several seeds; and what both
lenses say of models that nobody trained.

    python benchmarks/bupo.py --seeds 3

Arms differ in `layer` and `s_inter` alone; seeds, problems and the number of responses are matched, and weight decay is
on. `layer: last` is GRPO. Every few steps the policy is looked into on responses that the starting policy wrote, the
same ones throughout. The untrained models have writes whose length grows, stays or shrinks with depth. Results go to
`book/data/bupo.json`.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from recording import chosen_arms, opened, record_arms, rounded, save

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "book" / "data" / "bupo.json"
SETTINGS = ("rollout.prompts=8", "rollout.group_size=8", "update.minibatches=2", "optimizer.warmup=4",
            "optimizer.weight_decay=0.01", "evaluation.problems=32", "evaluation.samples=8",
            "logging.tensorboard=false", "logging.samples=0", "ledger.rows=0")  # fmt: skip
ARMS = {
    "grpo": "methods.bupo={preset: tiny, layer: last}",
    "short": "methods.bupo={preset: tiny, layer: 1, s_inter: 4}",
    "long": "methods.bupo={preset: tiny, layer: 1, s_inter: 20}",
}
STEPS, EVERY, SHORT, LONG = 40, 4, 4, 20
MODULES = ("methods.grpo", "methods.bupo", "evaluate.layer_profile")
COLUMNS = ("reward", "token_entropy", "layer_entropy", "mean_tokens", "kl_old_new", "clip_low", "clip_high")
KEPT = ("pass@1", "pass@8", "distinct_correct", "token_entropy", "mean_tokens")
GROWTH = {"grows": 1.8, "stays": 1.0, "shrinks": 0.5}
"""Factor from the length of one layer's writes to the next one's."""
DEPTH, WIDTH, VOCABULARY = 8, 64, 128


def one_run(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Every step's figures, looks inside, what was frozen, and evaluations before and after."""
    import torch

    torch.set_num_threads(1)
    from rlvr_lab.train.config import load_config
    from rlvr_lab.train.loop import Trainer

    settings = [f"seed={seed}", f"steps={steps}", *SETTINGS, ARMS[arm]]
    with tempfile.TemporaryDirectory(prefix=f"bupo_{arm}_{seed}_") as folder:
        trainer = Trainer(load_config("bupo/tiny", settings), Path(folder) / "run")
        start = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
        probe, begin = _probe(trainer, seed), trainer.evaluate(0)
        looks, rows, frozen = {"0": _look(trainer, probe)}, [], {}
        for step in range(steps):
            rows.append(trainer.step(step))
            if (step + 1) % EVERY == 0:
                looks[str(step + 1)] = _look(trainer, probe)
            if step + 1 in (SHORT, LONG):
                frozen[str(step + 1)] = _moved(trainer.policy.model, start)
        result = trainer.evaluate(steps)
        trainer.log.close()
    assert begin is not None
    assert result is not None
    columns = {name: [rounded(row.get(name, float("nan"))) for row in rows] for name in COLUMNS}
    return {"steps": columns, "looks": looks, "moved": frozen, "begin": _summary(begin), "end": _summary(result)}


def _probe(trainer: Any, seed: int) -> Any:
    """Responses of the starting policy to held-out problems: four to each of twelve."""
    import torch

    from rlvr_lab.rollout.engine import Sampling, TransformersEngine

    problems = trainer.problems.evaluation[:12]
    prompts = [trainer.problems.task.prompt_ids(p, trainer.policy.tokenizer) for p in problems]
    generator = torch.Generator().manual_seed(1000 + seed)
    return TransformersEngine(trainer.policy).sample(prompts, 4, Sampling(1.0, 32), generator)


def _look(trainer: Any, rollout: Any) -> list[dict[str, float | None]]:
    from rlvr_lab.evaluate.layer_profile import entropy_profile

    return [
        {name: rounded(value) for name, value in asdict(row).items()}
        for row in entropy_profile(trainer.policy.model, rollout)
    ]


def _moved(model: Any, start: Any) -> dict[str, list[int]]:
    """Of each part of the model: how many parameter tensors have changed at all, of how many."""
    import torch

    found: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        words = name.split(".")
        part = f"layer {int(words[2]) + 1}" if "layers" in words else words[-2]
        counts = found.setdefault(part, [0, 0])
        counts[0] += int(not torch.equal(p.detach(), start[name]))
        counts[1] += 1
    return found


def _summary(result: Any) -> dict[str, float | None]:
    summary = result.summary((1, 8))
    return {name: rounded(summary[name]) for name in KEPT}


def untrained(growth: float, seed: int) -> list[dict[str, float | None]]:
    """The profile of a random model whose writes have a root mean square of 0.5 in layer 1, times `growth` a layer.

    Streams start with entries of size 1, and the unembedding gives logits of the size of the stream's entries.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rlvr_lab.policy.access import record

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen3Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                             num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
                             max_position_embeddings=64, initializer_range=0.1)  # fmt: skip
        model = Qwen3ForCausalLM(config).eval()
        with torch.no_grad():
            model.model.embed_tokens.weight.normal_(0.0, 1.0)
            model.lm_head.weight.normal_(0.0, WIDTH**-0.5)
        ids = torch.randint(VOCABULARY, (8, 32))
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers, 1):
            for name, weight in (("attention_write", layer.self_attn.o_proj), ("ffn_write", layer.mlp.down_proj)):
                with record(model, (name,), [number]) as seen:
                    model(ids, use_cache=False)
                size = getattr(seen, name)[number].square().mean().sqrt()
                weight.weight.mul_(0.5 * growth ** (number - 1) / size)
    return _untrained_profile(model, ids)


def _untrained_profile(model: Any, ids: Any) -> list[dict[str, float | None]]:
    import torch

    from rlvr_lab.evaluate.layer_profile import entropy_profile
    from rlvr_lab.testing.minibatch import record as rollout_of

    prompt, response = ids[:, :8], ids[:, 8:]
    mask = torch.ones_like(response, dtype=torch.bool)
    known = torch.ones_like(prompt, dtype=torch.bool)
    rollout = rollout_of(mask, torch.zeros(mask.shape), prompt_ids=prompt, prompt_mask=known, response_ids=response)
    return [{k: rounded(v) for k, v in asdict(row).items()} for row in entropy_profile(model, rollout)]


def main(
    arms: Annotated[list[str] | None, typer.Option(help="Arms to run; all by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = STEPS,
    out: Annotated[Path, typer.Option(help="File to add the results to.")] = DATA,
) -> None:
    """Run arms; see the head of this file."""
    import torch

    torch.set_num_threads(1)
    chosen = chosen_arms(arms, ARMS)
    record = opened(out, {"arms": {}, "untrained": {}}, "bupo.py", "bupo/tiny", SETTINGS, steps, MODULES)
    for name, growth in GROWTH.items():
        record["untrained"][name] = {str(seed): untrained(growth, seed) for seed in range(5)}
    save(out, record)
    for seed in range(seeds):
        record_arms(record, ARMS, chosen, seed, out, lambda arm, seed: one_run(arm, seed, steps))


if __name__ == "__main__":
    typer.run(main)
