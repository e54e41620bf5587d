"""Tier B on a local Ray cluster: verl 0.9.1's trainer step, TransferQueue, FSDP2 workers and AdamW, on CPU with gloo.

Two ranks hold the shipped policy tiny/S. What runs is verl's own `_step_once`: balance, old log-probs, our advantage,
our minibatches, the actor update. What does not run for want of a GPU: the rollout server (the responses were sampled
by our engine and stand in the queue as verl's agent loop would leave them), the weight sync to it, CUDA, NCCL, packed
sequences (flash attention), bf16. The reference is a plain loop over the same minibatches in this process.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
assert "verl" not in sys.modules, "verl fixes its platform when it is imported: collect this file first"
os.environ["VERL_PLATFORM"] = "cpu"
os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_cpu,rlvr_lab.integrations.verl_tier_b"

import pytest  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
import transfer_queue as tq  # noqa: E402
import verl  # noqa: E402  (first: it loads verl_cpu and our trainer as every worker does)
import verl_cpu  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import open_dict  # noqa: E402
from torch import Tensor  # noqa: E402
from transfer_queue import KVBatchMeta  # noqa: E402
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup  # noqa: E402
from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils.tensordict_utils import list_of_dict_to_tensordict  # noqa: E402

from rlvr_lab.core.rollout import Rollout  # noqa: E402
from rlvr_lab.errors import UserError  # noqa: E402
from rlvr_lab.integrations.verl_support import pipeline_of, supported  # noqa: E402
from rlvr_lab.integrations.verl_tier_b import load_state, save_state  # noqa: E402
from rlvr_lab.policy.load import load_policy, resolve  # noqa: E402
from rlvr_lab.rollout.engine import Sampling, TransformersEngine  # noqa: E402
from rlvr_lab.rollout.grading import grade  # noqa: E402
from rlvr_lab.tasks import countdown  # noqa: E402
from rlvr_lab.tasks.registry import task  # noqa: E402
from rlvr_lab.testing.minibatch import minibatch_loss  # noqa: E402

RANKS, PROMPTS, GROUP, LIMIT = 2, 4, 4, 24
LR, EPS, CLIP = 0.05, 1.0, 1.0  # a large eps makes AdamW's step smooth in the gradient, so that rounding stays small
POLICY = "actor_rollout_ref.actor.policy_loss"


@lru_cache
def settings() -> Any:
    """verl's configuration for two CPU ranks, composed once."""
    overrides = [
        f"{POLICY}._target_=rlvr_lab.integrations.verl.RlvrPolicyLossConfig",
        f"{POLICY}.loss_mode=rlvr_tier_b",
        f"+{POLICY}.methods={{}}",
        "algorithm.adv_estimator=rlvr_tier_b",
        "trainer.v1.trainer_mode=rlvr",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=2",
        f"actor_rollout_ref.model.path={resolve('tiny/S')}",
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.model.enable_gradient_checkpointing=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32}",
        f"actor_rollout_ref.actor.optim.lr={LR}",
        "actor_rollout_ref.actor.optim.weight_decay=0.0",
        f"actor_rollout_ref.actor.optim.override_optimizer_config={{eps:{EPS}}}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        f"actor_rollout_ref.rollout.n={GROUP}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.rollout.name=vllm",
        f"data.train_batch_size={PROMPTS}",
        f"data.max_response_length={LIMIT}",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    config.transfer_queue.backend.SimpleStorage.num_data_storage_units = 1
    return config


def config_for(methods: dict[str, dict[str, Any]]) -> Any:
    config = deepcopy(settings())
    with open_dict(config):
        config.actor_rollout_ref.actor.policy_loss.methods = methods
    return config


def sampled() -> Rollout:
    """Responses of tiny/S to Countdown problems, from our engine, graded; one group all wrong, one all right."""
    policy = load_policy("tiny/S", device="cpu")
    problems = countdown.problems(PROMPTS, seed=5)
    prompts = [list(p.prompt_ids) for p in problems]
    generator = torch.Generator().manual_seed(0)
    rollout = TransformersEngine(policy).sample(
        prompts, GROUP, Sampling(temperature=1.0, max_tokens=LIMIT), generator, problem_ids=list(range(PROMPTS))
    )
    graded = grade(rollout, task("countdown"), problems, policy)
    reward = torch.tensor([0.0] * 4 + [1.0, 0.0, 0.0, 1.0] + [0.0, 1.0, 1.0, 1.0] + [1.0] * 4)
    return graded.with_(reward=reward)


def put(rollout: Rollout, reference: Tensor, name: str) -> KVBatchMeta:
    """Rows in TransferQueue, with the fields that verl's agent loop writes."""
    keys, fields, tags = [], [], []
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]]
        n = int(rollout.lengths[i])
        response = rollout.response_ids[i, :n]
        whole = torch.cat([prompt, response])
        scores = torch.zeros(n)
        scores[-1] = rollout.reward[i]
        uid = f"{name}-{int(rollout.group_id[i])}"
        keys.append(f"{uid}_{i}_0")
        fields.append(
            {
                "uid": uid,
                "prompts": prompt,
                "responses": response,
                "response_mask": torch.ones(n, dtype=torch.long),
                "loss_mask": torch.ones(n, dtype=torch.long),
                "input_ids": whole,
                "position_ids": torch.arange(len(whole)),
                "rm_scores": scores,
                "rollout_log_probs": rollout.behaviour_logprob[i, :n],
                "ref_log_prob": reference[i, :n],
                "multi_modal_inputs": {},
                "extra_fields": {"reward_extra_info": {"acc": float(rollout.reward[i])}},
            }
        )
        tags.append({"status": "success", "seq_len": len(whole), "prompt_len": len(prompt), "response_len": n})
    tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
    return KVBatchMeta(keys=keys, tags=tags, partition_id="train")


def without_rollout(config: Any, workers: Any, batch: KVBatchMeta, step: int) -> Any:
    """verl's trainer of mode `rlvr`, around workers that are there and a batch that waits in the queue."""

    class OnRecordedRows(get_trainer_cls("rlvr")):
        def on_sample_end(self) -> None: ...  # there is no rollout server to put to sleep

    trainer = OnRecordedRows(config)
    trainer.actor_rollout_wg, trainer.global_steps, trainer.ref_in_actor = workers, step, False
    trainer.replay_buffer = SimpleNamespace(sample=lambda **_: (batch, {}))
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    trainer.tokenizer = SimpleNamespace(eos_token_id=0)
    trainer.pipeline.bind(load_policy("tiny/S", device="cpu").encode)
    trainer.send_loss()
    return trainer


class Reference:
    """A plain loop: the policy in this process, one optimizer through all cases, as the workers have."""

    def __init__(self) -> None:
        self.model = load_policy("tiny/S", device="cpu").model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR, (0.9, 0.999), EPS, 0.0)

    def score(self, batch: Rollout) -> tuple[Tensor, Tensor]:
        ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
        seen = torch.cat([batch.prompt_mask, batch.response_mask], 1).long()
        position = (seen.cumsum(1) - 1).clamp_min(0)
        logits = self.model(input_ids=ids, attention_mask=seen, position_ids=position).logits
        logp = logits[:, batch.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
        return logp.gather(2, batch.response_ids[:, :, None]).squeeze(2), -(logp.exp() * logp).sum(2)

    def update(self, pipeline: Any, rollout: Rollout, advantage: Tensor, minibatches: int, seed: int) -> list[float]:
        generator, norms = torch.Generator().manual_seed(seed), []
        for rows in torch.randperm(len(rollout), generator=generator).tensor_split(minibatches):
            batch = rollout.rows(rows)
            self.optimizer.zero_grad()
            logprob, entropy = self.score(batch)
            part = advantage[rows][:, : logprob.shape[1]]
            minibatch_loss(pipeline, batch, logprob, part, entropy, generator).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)))
            self.optimizer.step()
        return norms


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, Reference, Rollout]]:
    names = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES")
    env = {name: os.environ[name] for name in names} | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=32, include_dashboard=False, runtime_env={"env_vars": env}, object_store_memory=200 << 20,
        log_to_driver=False,
    )  # fmt: skip
    config = config_for({"grpo": {"preset": "released"}})
    config.transfer_queue.enable = True
    tq.init(config.transfer_queue)
    pool = RayResourcePool([RANKS], use_gpu=False, max_colocate_count=1)
    worker = ray.remote(verl_cpu.worker_class())
    made = RayClassWithInitArgs(cls=worker, config=config.actor_rollout_ref, role="actor")
    workers = RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, device_name="cpu")
    workers.init_model()
    yield workers, Reference(), sampled()
    tq.close()
    ray.shutdown()


def record(name: str, change: float, largest: float, norms: list[float]) -> None:
    """Add a case to the file RLVR_LAB_RECORD, which the book shows (book/data/from_one_gpu_to_a_cluster.json)."""
    if not (place := os.environ.get("RLVR_LAB_RECORD")):
        return
    path = Path(place)
    found = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    found |= {"date": f"{datetime.date.today()}", "verl": verl.__version__, "torch": torch.__version__}
    found |= {"ray": ray.__version__, "python": platform.python_version(), "machine": platform.machine()}
    found |= {"ranks": RANKS, "backend": "gloo", "engine": "fsdp2", "policy": "tiny/S", "responses": PROMPTS * GROUP}
    found |= {"optimizer": {"name": "AdamW", "lr": LR, "eps": EPS, "clip": CLIP}}
    found["script"] = f"RLVR_LAB_RECORD=FILE nox -s verl ({Path(__file__).name})"
    found["cases"][name] = {"largest_change": change, "largest_difference": largest, "grad_norms": norms}
    path.write_text(json.dumps(found, indent=1) + "\n")


CASES: dict[str, dict[str, dict[str, Any]]] = {slug: {slug: {"preset": "released"}} for slug in supported("b")}
# as released these select one token, take no part at these sizes, or need answers that verl does not record
CASES |= {
    "clip_cov": {"clip_cov": {"preset": "tiny", "ratio": 0.2}},
    "kl_cov": {"kl_cov": {"preset": "tiny", "ratio": 0.2}},
    "overlong": {"overlong": {"preset": "paper", "max_length": LIMIT, "buffer": 16}},
    "spurious_rewards": {"spurious_rewards": {"rule": "random"}},
    "entropy_bonus": {"entropy_bonus": {"preset": "paper", "coefficient": 0.5}},
    "adaptive_entropy": {"adaptive_entropy": {"preset": "trl", "initial": 0.3, "target": 0.2}},
    "kl_reference": {"kl_reference": {"preset": "paper", "beta": 0.5}},
    "epo": {"epo": {"preset": "tiny", "coefficient": 0.5}},
    "riskpo": {"riskpo": {"preset": "tiny", "bundle_size": 2}},
    "light_if": {"light_if": {"preset": "tiny"}},  # as released its term has coefficient 0
    "hapo": {"hapo": {"preset": "tiny"}},  # the released one tempers the sampler, which is refused
    # the released one reads distributions, which is refused; the filter drops half of these rows
    "ares": {"ares": {"preset": "paper", "filter": "none"}},
    "composition": {"gspo": {"preset": "released"}, "kl_reference": {"beta": 0.3}, "dynamic_sampling": {}},
}


@pytest.mark.parametrize("name", CASES)
def test_an_actor_update_on_two_ranks_is_the_plain_one(name: str, cluster: tuple[Any, Reference, Rollout]) -> None:
    workers, reference, recorded = cluster
    step = 1 + list(CASES).index(name)
    noise = torch.randn(recorded.behaviour_logprob.shape, generator=torch.Generator().manual_seed(step))
    batch = put(recorded, recorded.behaviour_logprob + 0.3 * noise, name)
    config = config_for(CASES[name])
    # on-policy, the sign of KL-Cov's penalty is that of rounding: take the sampler's log-probs, which are older, as old
    config.algorithm.rollout_correction.bypass_mode = bypass = name == "kl_cov"
    trainer = without_rollout(config, workers, batch, step)
    before = {k: v.detach().clone() for k, v in reference.model.named_parameters()}
    metrics: dict[str, Any] = {}
    state = trainer.pipeline.state_dict()
    trainer._step_once(metrics, {}, PROMPTS)

    rollout, advantage = trainer._graded
    ours = pipeline_of(CASES[name])
    ours.bind(load_policy("tiny/S", device="cpu").encode)
    ours.load_state_dict(state)
    with torch.no_grad():
        old, entropy = reference.score(rollout)
    kept = 8 if "dynamic_sampling" in CASES[name] else 16
    assert len(rollout) == kept
    ours.filter(rollout)  # where a filter looks at the rollout to set the method's state
    torch.testing.assert_close(ours.advantage(rollout), advantage)
    seed = 42 * 1_000_003 + step
    norms = reference.update(ours, rollout, advantage, 2, seed)
    change = largest = 0.0
    first, second = workers.parameters()
    for key, mine in reference.model.named_parameters():
        assert torch.equal(first[key], second[key])
        change = max(change, float((mine - before[key]).abs().max()))
        largest = max(largest, float((mine - first[key]).abs().max()))
    record(name, change, largest, norms)
    assert metrics["actor/grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-4)
    expected = rollout.behaviour_logprob if bypass else old
    # all cases share one policy, so that rounding adds up over them
    torch.testing.assert_close(rollout.old_logprob[rollout.mask], expected[rollout.mask], rtol=1e-5, atol=2e-5)
    assert ("token_entropy" in rollout.statistics) != bypass
    scored = rollout.statistics.get("token_entropy", entropy)
    torch.testing.assert_close(scored[rollout.mask], entropy[rollout.mask], rtol=1e-5, atol=2e-5)
    assert change > 1e-5
    assert largest < 1e-4 * change + 3e-7, (largest, change)


def test_state_of_the_methods_survives_a_checkpoint(tmp_path: Path) -> None:
    methods = {"adaptive_entropy": {"preset": "trl", "initial": 0.3}, "spurious_rewards": {"rule": "random"}}
    one, other = pipeline_of(methods), pipeline_of(methods)
    one.observe({"behaviour_logprob": -5.0, "token_entropy": 5.0})
    one.methods[-1].generator.manual_seed(7)
    save_state(tmp_path / "state.json", one)
    load_state(tmp_path / "state.json", other)
    assert other.state_dict()["adaptive_entropy"] == one.state_dict()["adaptive_entropy"]
    assert torch.equal(other.methods[-1].generator.get_state(), one.methods[-1].generator.get_state())
    with pytest.raises(UserError, match="checkpoint holds methods"):
        load_state(tmp_path / "state.json", pipeline_of({"grpo": {}}))
    with pytest.raises(UserError, match="cannot read"):
        load_state(tmp_path / "missing.json", one)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("algorithm", "use_kl_in_reward", True, "use methods kl_reference"),
        ("actor", "entropy_coeff", 0.01, "use methods entropy_bonus"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(section: str, key: str, value: Any, message: str) -> None:
    config = config_for({"grpo": {"preset": "released"}})
    (config.algorithm if section == "algorithm" else config.actor_rollout_ref.actor)[key] = value
    with pytest.raises(UserError, match=message):
        get_trainer_cls("rlvr")(config)


def test_a_trainer_without_methods_is_refused() -> None:
    with pytest.raises(UserError, match="methods is empty"):
        get_trainer_cls("rlvr")(config_for({}))
