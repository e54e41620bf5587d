"""Runs on instructions: the tiny recipe, resumed as if it had not stopped, and IFEval rows with a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import TINY_RUN, byte_level_qwen2

from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

SETTINGS = [*TINY_RUN, "rollout.max_tokens=24", "logging.samples=0", "ledger.rows=0", "steps=3", "checkpoint.every=1"]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [[], ["methods.light_if.weighting=permuted"]], ids=["tea", "permuted"])
def test_the_tiny_recipe_resumes_as_if_it_had_not_stopped(tmp_path: Path, change: list[str]) -> None:
    config = load_config("light_if/tiny", [*SETTINGS, *change])
    history = Trainer(config, tmp_path / "straight").run().history
    assert all(row["light_if.mean_weight"] > 0 for row in history)
    stops = iter([False, True])
    Trainer(config, tmp_path / "again", stop=lambda: next(stops, False)).run()
    Trainer(config, tmp_path / "again", resume=True).run()
    assert weights(tmp_path / "again") == weights(tmp_path / "straight")


def test_stages_of_prompts_survive_a_stop(tmp_path: Path) -> None:
    from rlvr_lab.methods.light_if import digest
    from rlvr_lab.tasks import instructions

    pool = instructions.problems(12, 0)
    rates = [0.0, 0.25, 0.5, 0.75] * 3
    split = tmp_path / "difficulty.json"
    split.write_text(json.dumps({"pool": digest([p.prompt_ids for p in pool]), "rates": rates}))
    change = [f"methods.light_if.split={split}", "methods.light_if.prompts=2", "methods.light_if.stage_steps=2"]
    config = load_config("light_if/tiny", [*SETTINGS, *change])
    Trainer(config, tmp_path / "straight").run()
    stops = iter([False, True])
    Trainer(config, tmp_path / "again", stop=lambda: next(stops, False)).run()
    resumed = Trainer(config, tmp_path / "again", resume=True)
    chosen = resumed.collect(2).prompt_id.unique().tolist()
    assert all(rates[i] < 0.5 for i in chosen)
    resumed.run()
    assert weights(tmp_path / "again") == weights(tmp_path / "straight")


def test_points_can_be_switched_off_and_sizes_chosen(tmp_path: Path) -> None:
    change = ["data.settings.dense=false", "data.settings.sizes=[4]"]
    trainer = Trainer(load_config("light_if/tiny", [*SETTINGS, *change]), tmp_path / "run")
    rollout = trainer.collect(0)
    assert set(rollout.reward_components) == {"correct"}
    assert {len(problem.rules) for problem in trainer.problems.train} == {4}


def test_ifeval_rows_are_rolled_out_and_graded_with_a_model_directory(tmp_path: Path) -> None:
    ids = ["punctuation:no_comma", "length_constraints:number_words"]
    kwargs = [{}, {"num_words": 3, "relation": "at least"}]
    rows = [{"prompt": f"Write {i}.", "instruction_id_list": ids, "kwargs": kwargs} for i in range(4)]
    rows.insert(1, {"prompt": "Broken", "instruction_id_list": ["punctuation:no_dot"], "kwargs": [{}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    change = [f"model.path={byte_level_qwen2(tmp_path / 'model')}", "data.task=ifeval",
              f"data.file={tmp_path / 'rows.jsonl'}", "steps=1"]  # fmt: skip
    trainer = Trainer(load_config("light_if/tiny", [*SETTINGS, *change]), tmp_path / "run")
    assert len(trainer.problems.train) == 4
    assert set(trainer.collect(0).reward_components) == {"correct", "dense"}
    assert len(trainer.run().history) == 1
