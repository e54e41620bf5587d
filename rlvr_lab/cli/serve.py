"""`rlvr-lab serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import user_errors


def serve(
    model: Annotated[str, typer.Argument(help="Model directory, `tiny/S`, `tiny/R`, or a hub name.")],
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 for other machines of the cluster.")] = "127.0.0.1",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt with its response.", min=1)] = None,
    lora_rank: Annotated[int, typer.Option(help="Largest LoRA rank to serve; 0 serves none.", min=0)] = 0,
    log: Annotated[Path, typer.Option(help="Where vLLM writes its log.")] = Path("vllm.log"),
) -> None:
    """Start a vLLM server from which training can sample (`rollout.vllm.server`).

    Examples:

        rlvr-lab serve tiny/S --port 8000

        rlvr-lab train grpo/tiny rollout.engine=vllm update.recompute_old_logprob=true \\
            rollout.vllm.server=http://127.0.0.1:8000 rollout.vllm.sync_folder=/tmp/weights

    Log-probs are those of the sampling distribution, and new weights are taken through `rollout.vllm.sync_folder`. That
    needs vLLM's development mode, which lets whoever reaches the port replace the model: keep it inside the cluster.
    Ctrl-C ends the server.
    """
    with user_errors():
        from ..policy.load import resolve
        from ..rollout.vllm_server import serve as run
        from ..rollout.vllm_settings import parse_section

        tree = {"dtype": dtype, "max_model_len": max_model_len, "lora_rank": lora_rank}
        with run(resolve(model), port, parse_section(tree), log, host) as server:
            typer.echo(f"serving {model} on http://{host}:{port}, log in {log}; Ctrl-C ends it")
            server.wait()
