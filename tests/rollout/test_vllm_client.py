"""The client of a vLLM server against a small HTTP server that answers as vLLM 0.32 does, or as something else."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from rlvr_lab.cli import app
from rlvr_lab.errors import UserError
from rlvr_lab.policy.load import Policy
from rlvr_lab.rollout import vllm_server
from rlvr_lab.rollout.vllm_backend import Request
from rlvr_lab.rollout.vllm_server import ServerVllm, check_port, write_shards
from rlvr_lab.rollout.vllm_settings import VllmSection


class FakeVllm(ThreadingHTTPServer):
    """Records requests; `answers` maps a path to (status, body), a list of them is used up one by one."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, Any]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.answers: dict[str, Any] = {
            "/version": (200, {"version": "0.32.0"}),
            "/v1/models": (200, {"data": [{"id": "policy", "max_model_len": 128}]}),
            "/collective_rpc": (200, {"results": [None]}),
            "/reset_prefix_cache": (200, {"success": True}),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null"))

    def answer(self, body: Any) -> None:
        self.server.requests.append((self.path, body))
        if self.path == "/collective_rpc":
            for file in Path(body["kwargs"]["weights_path"]).glob("*.safetensors"):
                self.server.weights |= load_file(file)
        found = self.server.answers.get(self.path, (404, {"detail": "Not Found"}))
        if callable(found):
            found = found(body)
        elif isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        status, content = found
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    monkeypatch.setattr(vllm_server, "PAUSE", 0.001)
    server = FakeVllm()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def client(policy: Policy, url: str, folder: Path, **settings: Any) -> ServerVllm:
    return ServerVllm(policy, VllmSection(server=url, sync_folder=folder, **settings))


def choice(index: int, ids: list[int], reason: str = "stop") -> dict[str, Any]:
    return {
        "index": index,
        "text": "",
        "finish_reason": reason,
        "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.1 * i for i in ids]},
    }


REQUEST = Request([1, 40, 41], 2, 0.7, 9, 1234, (2,))


def test_completions(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/v1/completions"] = lambda body: (
        200,
        {"choices": [choice(1, [5, 6], "length"), choice(0, [body["seed"], 2])]},
    )
    it = client(tiny_s, fake.url, tmp_path)
    assert it.longest == 128
    (first,) = it.generate([REQUEST])
    assert [s.ids for s in first] == [[1234, 2], [5, 6]]  # in order of their index
    assert [s.finished for s in first] == [True, False]
    assert first[1].logprob == pytest.approx([-0.5, -0.6])
    path, body = fake.requests[-1]
    assert path == "/v1/completions"
    assert (body["prompt"], body["n"], body["temperature"], body["max_tokens"]) == ([1, 40, 41], 2, 0.7, 9)
    assert body["stop_token_ids"] == [2]
    # what the model's generation_config.json might set otherwise
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)


def test_stop_texts_are_asked_for_and_told_from_end_tokens(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    ends = [choice(0, [5]) | {"stop_reason": "</think>"}, choice(1, [2]) | {"stop_reason": None}]
    ends += [choice(2, [9]) | {"stop_reason": 9}, choice(3, [7], "length")]
    fake.answers["/v1/completions"] = (200, {"choices": ends})
    (samples,) = client(tiny_s, fake.url, tmp_path).generate([replace(REQUEST, n=4, stops=("</think>",))])
    assert [s.stopped for s in samples] == [True, False, False, False]
    assert [s.finished for s in samples] == [False, True, True, False]
    body = fake.requests[-1][1]
    assert body["stop"] == ["</think>"]
    assert body["include_stop_str_in_output"] is True
    assert body["skip_special_tokens"] is False  # a stop text may be a special token


def test_answers_stay_with_their_requests(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/v1/completions"] = lambda body: (200, {"choices": [choice(0, [body["seed"]])]})
    seeds = list(range(40))
    found = client(tiny_s, fake.url, tmp_path).generate([Request([1], 1, 1.0, 4, s, (2,)) for s in seeds])
    assert [samples[0].ids[0] for samples in found] == seeds


def test_greedy_responses_are_asked_for_once(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/v1/completions"] = (200, {"choices": [choice(0, [7, 2])]})
    (found,) = client(tiny_s, fake.url, tmp_path).generate([Request([1], 3, 0.0, 4, 0, (2,))])
    assert [s.ids for s in found] == [[7, 2]] * 3
    assert fake.requests[-1][1]["n"] == 1


def test_a_fault_inside_the_server_is_tried_again(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    busy = (503, {"error": "busy"})
    fake.answers["/v1/completions"] = [busy, busy, (200, {"choices": [choice(0, [7]), choice(1, [8])]})]
    it = client(tiny_s, fake.url, tmp_path)
    assert len(it.generate([REQUEST])[0]) == 2
    assert len([path for path, _ in fake.requests if path == "/v1/completions"]) == 3
    fake.answers["/v1/completions"] = busy
    with pytest.raises(UserError, match=r"after 4 attempts.*503.*busy"):
        it.generate([REQUEST])


def test_a_refused_request_is_not_tried_again(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/v1/completions"] = (400, {"error": {"message": "prompt too long"}})
    it = client(tiny_s, fake.url, tmp_path)
    before = len(fake.requests)
    with pytest.raises(UserError, match=r"refused sampling: 400.*prompt too long"):
        it.generate([REQUEST])
    assert len(fake.requests) == before + 1


def test_a_server_without_token_ids_is_refused(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/v1/completions"] = (200, {"choices": [choice(0, [7]) | {"token_ids": None}]})
    with pytest.raises(UserError, match="without token ids"):
        client(tiny_s, fake.url, tmp_path).generate([REQUEST])


def test_an_unreachable_server(tiny_s: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "PAUSE", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=r"cannot be used after 2 attempts.*refused.*rollout\.vllm\.server"):
        client(tiny_s, url, tmp_path, server_retries=1)


def test_a_silent_server(tiny_s: Policy, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no answer within rollout\.vllm\.server_timeout 0\.1 s"):
            client(tiny_s, url, tmp_path, server_timeout=0.1, server_retries=0)


@pytest.mark.parametrize("content", [b"<html>hello</html>", b"[1]", b"{}"])
def test_another_program_on_the_port(tiny_s: Policy, fake: FakeVllm, tmp_path: Path, content: bytes) -> None:
    fake.answers["/version"] = (200, content)
    with pytest.raises(UserError, match="not a vLLM server"):
        client(tiny_s, fake.url, tmp_path)


def test_an_unsupported_server(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    fake.answers["/version"] = (200, {"version": "0.11.2"})
    with pytest.raises(UserError, match=r"is vLLM 0\.11\.2.*vllm>=0\.32,<0\.33"):
        client(tiny_s, fake.url, tmp_path)


def test_weights_travel_through_the_folder(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    it = client(tiny_s, fake.url, tmp_path)
    it.load(iter([("a", torch.arange(3.0)), ("b", torch.ones(2, 2))]))
    assert torch.equal(fake.weights["a"], torch.arange(3.0))
    assert [path for path, _ in fake.requests[-2:]] == ["/collective_rpc", "/reset_prefix_cache"]
    assert fake.requests[-2][1]["method"] == "reload_weights"
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_server_outside_development_mode(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    del fake.answers["/collective_rpc"]
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        client(tiny_s, fake.url, tmp_path).load([("a", torch.ones(1))])
    assert list(tmp_path.iterdir()) == []


def test_a_sync_folder_that_cannot_be_written(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"rollout\.vllm\.sync_folder"):
        client(tiny_s, fake.url, tmp_path / "file").load([("a", torch.ones(1))])


def test_adapters(tiny_s: Policy, fake: FakeVllm, tmp_path: Path) -> None:
    it = client(tiny_s, fake.url, tmp_path)
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        it.load_adapter(tmp_path, 3)
    fake.answers["/v1/load_lora_adapter"] = (200, b"")
    it.load_adapter(tmp_path, 3)
    assert it.model == "version-3"
    assert fake.requests[-1][1] == {"lora_name": "version-3", "lora_path": str(tmp_path)}


def test_other_processes_help_to_gather_and_send_nothing(
    tiny_s: Policy, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = client(tiny_s, fake.url, tmp_path)
    monkeypatch.setattr(vllm_server, "_rank", lambda: 1)
    gathered: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            gathered.append(name)  # a step that all processes make together
            yield name, torch.ones(1)

    it.load(gather())
    assert gathered == ["a", "b", "c"]
    assert not any(path == "/collective_rpc" for path, _ in fake.requests)


def test_shards_hold_everything_once(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.full((10,), float(i)) for i in range(7)}
    write_shards(tmp_path / "x", weights.items(), shard_bytes=80)
    files = sorted((tmp_path / "x").iterdir())
    assert len(files) == 4
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(file)
        assert not part.keys() & found.keys()
        found |= part
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*choose another port"):
            check_port(port)
    check_port(port)


def test_the_command_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    monkeypatch.setattr(vllm_server, "installed_version", lambda: "0.32.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = runner.invoke(app, ["serve", "tiny/S", "--port", str(taken.getsockname()[1])])
    assert found.exit_code != 0
    assert "choose another port" in found.output
    found = runner.invoke(app, ["serve", "tiny/S", "--dtype", "float8"])
    assert found.exit_code != 0
    assert "dtype" in found.output
    command = vllm_server._command("M", 80, "0.0.0.0", VllmSection(lora_rank=9, max_model_len=64))
    assert command[command.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert command[command.index("--max-lora-rank") + 1] == "16"
    assert vllm_server._environment(VllmSection())["VLLM_SERVER_DEV_MODE"] == "1"
