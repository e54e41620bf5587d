"""Memory of one GPU by part and by phase of a step. Every part carries its formula; sizes are bytes.

A step has four phases, and a part is held in some of them:

    rollout    responses are sampled                       caches, logits of the next token
    score      forward passes without gradient             old or reference log-probs, statistics
    update     forward and backward of one micro-batch     activations, logits
    optimizer  the optimizer's step                        its temporaries

The need is that of the greediest phase. The formulas follow the code of the package and of transformers (what
autograd keeps of `LlamaDecoderLayer`, `Qwen2DecoderLayer` and `Qwen3DecoderLayer` under scaled-dot-product attention);
benchmarks/plan_memory.py compares them with the allocations of real training steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..core.head import KEEP_BYTES
from ..policy.forward import LARGE
from .devices import GIB
from .job import Job

PHASES = ("rollout", "score", "update", "optimizer")
FLOAT, LONG, BOOL = 4, 8, 1
DRAWS = 6
"""Arrays [rows, V] alive at once when the next token is drawn: logits, log p, p, exponentials and their quotients."""
TILE = {"cpu": (2048, 2048), "cuda": (8192, 8192)}
"""Rows and columns of a logit tile in core.head."""
PLAIN_HEAD = 5
"""Arrays [b, T, V] alive at once around the softmax of a small vocabulary, in the backward pass."""
PLAIN_ENTROPY = 3
"""And as many more where the entropy has a gradient, or the ledger wants moments."""
CONTEXT, COLLECTIVES = GIB // 2, GIB
"""CUDA's own memory in every process, and NCCL's where there are several. Assumed, not computed."""
RESERVE = 0.05
"""Share of the GPU left to fragmentation of the allocator. Assumed."""


@dataclass(frozen=True)
class Part:
    """One use of memory: bytes in each phase that holds it, and how they were computed."""

    name: str
    formula: str
    bytes: dict[str, int]

    @property
    def largest(self) -> int:
        """Bytes in the phase that holds most of it."""
        return max(self.bytes.values(), default=0)


@dataclass(frozen=True)
class Memory:
    """All parts of one GPU, and what of them lies in main memory instead."""

    parts: tuple[Part, ...]
    host: tuple[Part, ...] = ()

    def phase(self, name: str) -> int:
        """Bytes of all parts in a phase."""
        return sum(part.bytes.get(name, 0) for part in self.parts)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.phase)

    @property
    def peak(self) -> int:
        """Bytes that the run needs."""
        return self.phase(self.peak_phase)

    def lacking(self, room: int) -> int:
        """Bytes by which the phases exceed `room`, summed over phases; 0 where the run fits."""
        return sum(max(0, self.phase(name) - room) for name in PHASES)

    @property
    def on_host(self) -> int:
        """Bytes of main memory, for offloaded parts."""
        return sum(part.largest for part in self.host)


def memory(job: Job) -> Memory:
    """Memory of one GPU of the job."""
    state = tuple(_state(job))
    temporary = [_rollout(job), _prefixes(job), _gathered(job), _score(job), *_update(job), _step_temporaries(job)]
    parts = [*(() if job.offload else state), *_copies(job), _record(job), *_engine(job), *temporary, *_fixed(job)]
    return Memory(tuple(p for p in parts if p is not None and p.largest), state if job.offload else ())


def _everywhere(name: str, formula: str, size: float) -> Part:
    return Part(name, formula, dict.fromkeys(PHASES, int(size)))


# -- what training keeps ----------------------------------------------------------------------------------------------


def _state(job: Job) -> Iterator[Part]:
    """Weights, gradients and what the optimizer keeps, two moments or one history: divided by the ranks where the
    policy is sharded."""
    total, trained, n, each = job.shape.parameters, job.trained, job.shards, job.trained_bytes
    over = f" / {n} ranks" if n > 1 else ""
    frozen = f" frozen + {trained:,} of adapters x {each} B" if job.lora_rank else ""
    size = total * job.stored + (trained * each if job.lora_rank else 0)
    yield _everywhere("weights", f"{total:,} x {job.stored} B{frozen}{over}", size / n)
    yield _everywhere("gradients", f"{trained:,} x {each} B{over}", trained * each / n)
    kept, name = job.kept_per_weight, "CLASSP's history" if job.optimizer == "classp" else "Adam moments"
    yield _everywhere(name, f"{kept} x {trained:,} x {each} B{over}", kept * trained * each / n)


def _copies(job: Job) -> Iterator[Part]:
    """Further copies of the weights: the reference (with LoRA the adapters are switched off instead), and the whole
    policy that samples where the trained one is divided."""
    total, n = job.shape.parameters, job.shards
    if job.reference and not job.lora_rank:
        over = f" / {n} ranks" if n > 1 else ""
        yield _everywhere("reference policy", f"{total:,} x {job.stored} B{over}", total * job.stored / n)
    if job.replica:
        formula = f"{total:,} x {job.computed} B, whole on every rank"
        yield _everywhere("replica that samples", formula, total * job.computed)


def _gathered(job: Job) -> Part | None:
    """FSDP2 holds the root group (embeddings, head) and two layers whole while they compute."""
    if not job.sharded:
        return None
    s = job.shape
    largest = max(s.embedding_parameters, s.layer_parameters)
    whole = s.embedding_parameters + 2 * s.layer_parameters
    weights = (whole + largest) * job.computed
    formula = (
        f"(embeddings + 2 layers + the largest of them once more on its way = {whole + largest:,}) x {job.computed} B; "
        f"in the backward pass also a layer's gradients, and their sum in float32"
    )
    gradients = s.layer_parameters * (job.computed + FLOAT)  # those of the head are counted with the head
    return Part("gathered by FSDP2", formula, {"score": weights, "update": weights + gradients})


# -- rollout ----------------------------------------------------------------------------------------------------------


def _record(job: Job) -> Part:
    """The graded rollout, whole on every rank: ids, masks, log-probs, statistics."""
    per_token = LONG + 2 * BOOL + FLOAT * (5 + job.reference + 3 * job.needs_current)
    per_prompt_token = LONG + BOOL
    each = per_token * job.max_tokens + per_prompt_token * job.prompt_tokens
    more = f" + {job.replayed:,} replayed" if job.replayed else ""
    rows = f"({job.responses:,}{more})" if more else f"{job.responses:,}"
    formula = f"{rows} responses x ({job.max_tokens} x {per_token} B + {job.prompt_tokens} prompt x 9 B)"
    return _everywhere("rollout record", formula, (job.responses + job.replayed) * each)


def _engine(job: Job) -> Iterator[Part]:
    """What a colocated vLLM takes as its own: a share of the GPU, given back in sleep; at least whole weights and the
    cache of one response."""
    if job.engine != "vllm" or job.device.kind != "cuda":
        return
    s = job.shape
    share = int(job.engine_share * job.device.memory)
    least = s.parameters * job.computed + job.longest * s.kv_bytes(job.computed)
    phases = ("rollout",) if job.engine_sleeps else PHASES
    note = "asleep while training" if job.engine_sleeps else "kept while training: rollout.vllm.sleep is off"
    formula = f"rollout.vllm.gpu_memory {job.engine_share:g} x {job.device.memory / GIB:.1f} GiB, {note}"
    if least > share:
        formula = f"weights {s.parameters:,} x {job.computed} B and one cache exceed rollout.vllm.gpu_memory"
    yield Part("vLLM: weights and cache", formula, dict.fromkeys(phases, max(share, least)))


def _rollout(job: Job) -> Part | None:
    """Cache of all rows in flight at their longest, one layer of it twice while it grows, and the draw."""
    if job.engine != "transformers":
        return None
    s, rows, tokens = job.shape, job.rows, job.prompt_tokens + job.max_tokens
    # rotary embeddings leave keys in the residual's type
    cache = rows * tokens * s.layers * s.kv_width * (job.computed + job.residual)
    # keys and values of one layer are written anew; GQA under a mask repeats them for every query head
    growing = rows * tokens * job.computed * (2 * s.query_width if job.padded else s.kv_width)
    drawing = DRAWS * rows * s.vocabulary * FLOAT
    tape = rows * job.max_tokens * (LONG + 2 * FLOAT)
    formula = (
        f"{rows} rows x {tokens} tokens x {s.layers} layers x {s.kv_width} x {job.computed + job.residual} B"
        f" + {DRAWS} x {rows} x V {s.vocabulary:,} x 4 B"
    )
    return Part("KV cache and draw", formula, {"rollout": cache + growing + drawing + tape})


def _prefixes(job: Job) -> Part | None:
    """Contexts of trees and episodes that are not read twice."""
    if not job.prefix_memory:
        return None
    return Part(
        "remembered prefixes", f"rollout.prefix_memory {job.prefix_memory >> 20} MiB", {"rollout": job.prefix_memory}
    )


# -- passes -----------------------------------------------------------------------------------------------------------


def layer_activations(job: Job, tokens: int) -> int:
    """Bytes that autograd keeps of one layer without checkpointing.

        2 norms (4 + 2w) H + q, k, v + attention's output w n_q D + log-sum-exp 4 n_q + 4 w F      per token

    with w bytes per number: a norm keeps its input in float32, the normed values and its output; the feed-forward part
    keeps gate, silu(gate), up and their product. Under a mask keys and values are repeated for all heads, and the mask
    is kept as numbers, once for every layer. Under autocast norms run in the residual's type, each of five products
    casts its own copy of their output, and the cast weights are kept. Adapters keep their input and r numbers each, and
    cast the input where they are wider than the weights.
    """
    s, w = job.shape, job.computed
    norms = 2 * s.hidden * (FLOAT + job.residual) + s.hidden * w * (5 if job.autocast else 2)
    if s.head_norms:
        norms += (FLOAT + w) * (s.query_width + s.kv_width)
    # a single head is repeated without a copy
    keys = s.query_width if job.mask_numbers and s.kv_heads > 1 else s.kv_width
    attention = w * (2 * s.query_width + 2 * keys) + FLOAT * s.heads
    adapters = 0
    if job.lora_rank:
        adapters = len(s.matrices) * job.lora_rank * job.trained_bytes
        if job.trained_bytes > w:
            adapters += job.trained_bytes * (5 * s.hidden + s.query_width + s.feed_forward)
            adapters -= w * (2 * s.hidden + s.query_width + s.feed_forward)
    weights = w * sum(a * b for a, b in s.matrices.values()) if job.autocast else 0
    return tokens * (norms + attention + 4 * w * s.feed_forward + adapters) + job.mask_numbers * w + weights


def _backward_of_layer(job: Job, tokens: int) -> int:
    """Gradients alive in the backward of a feed-forward part: of gate, up and product, of the residual, of a matrix."""
    s = job.shape
    return job.computed * (tokens * (3 * s.feed_forward + 2 * s.hidden) + s.hidden * s.feed_forward)


def _update(job: Job) -> Iterator[Part]:
    """Activations of one micro-batch of the longest rows, and the head with its backward, or that of a layer."""
    s, w = job.shape, job.computed
    tokens = job.pass_tokens
    one = layer_activations(job, tokens)
    final = tokens * s.hidden * (FLOAT + 2 * job.residual)
    if job.checkpointing:
        kept = s.layers * tokens * s.hidden * job.residual + final
        formula = f"{tokens:,} tokens x {s.layers} layers x H {s.hidden} x {job.residual} B, and one layer at a time"
        later = one + _backward_of_layer(job, tokens)
    else:
        kept = s.layers * one + final
        each = one // tokens
        mask = f", mask of {job.mask_numbers:,}" if job.mask_numbers else ""
        held = f"norms, q k v, attention, 4 x F {s.feed_forward}{mask}"
        formula = f"{tokens:,} tokens x {s.layers} layers x {each:,} B ({held})"
        later = _backward_of_layer(job, tokens)
    yield Part("activations", formula, {"update": kept + job.mask_numbers * BOOL})
    head, how = head_bytes(job)
    name = "logits and head" if head >= later else "backward of a layer"
    text = how if head >= later else f"{tokens:,} tokens x (3 F + 2 H) x {w} B" + (
        " + the layer computed again" if job.checkpointing else ""
    )  # fmt: skip
    yield Part(name, text, {"update": max(head, later)})


def head_bytes(job: Job) -> tuple[int, str]:
    """Memory of the vocabulary head in forward and backward over one micro-batch, and its formula."""
    s = job.shape
    tokens = job.pass_answers
    if s.vocabulary < LARGE:
        arrays = PLAIN_HEAD + (PLAIN_ENTROPY if job.entropy or job.ledger_rows else 0)
        size = arrays * tokens * s.vocabulary * FLOAT
        return size, f"{arrays} x {tokens:,} tokens x V {s.vocabulary:,} x 4 B (softmax over all logits)"
    rows, columns = TILE[job.device.kind]
    rows, columns = min(rows, tokens), min(columns, s.vocabulary)
    logits = tokens * s.vocabulary * FLOAT
    kept = min(logits, KEEP_BYTES)
    tiles = rows * columns * (FLOAT + job.operand) if logits > KEEP_BYTES else rows * columns * job.operand
    matrix = 0 if job.lora_rank else s.vocabulary * s.hidden * job.weight_bytes
    gradients = tokens * s.hidden * (FLOAT + job.operand) + matrix
    # weights of another type than the operands are cast by the tile, and 16-bit sums are made in float32
    casts = columns * s.hidden * ((job.operand if job.operand != job.weight_bytes else 0)
                                  + (FLOAT if job.weight_bytes < FLOAT else 0))  # fmt: skip
    gradients += casts
    text = (
        f"min({tokens:,} tokens x V {s.vocabulary:,} x 4 B, {KEEP_BYTES / GIB:g} GiB) kept"
        f" + tiles {rows} x {columns} + dH + dW {matrix / 2**20:,.0f} MiB"
    )
    return kept + tiles + gradients, text


def _score(job: Job) -> Part | None:
    """A forward pass without gradient: the widest point of one layer, or the head."""
    if not (job.recompute or job.reference or job.needs_current or job.ledger_rows):
        return None
    s, w = job.shape, job.computed
    own = job.pass_tokens if job.recompute or job.reference or job.needs_current else 0
    tokens = max(own, 2 * job.ledger_rows * job.longest)
    layer = tokens * w * (3 * s.feed_forward + 2 * s.hidden)
    answers = tokens * job.max_tokens // job.longest
    if s.vocabulary < LARGE:
        head = (PLAIN_HEAD - 1) * answers * s.vocabulary * FLOAT
    else:
        tile = TILE[job.device.kind]
        head = min(tile[0], answers) * min(tile[1], s.vocabulary) * FLOAT + answers * s.hidden * job.operand
    formula = f"{tokens:,} tokens x (3 F {s.feed_forward} + 2 H {s.hidden}) x {w} B, or the head's tiles"
    return Part("pass without gradient", formula, {"score": max(layer, head)})


def _step_temporaries(job: Job) -> Part:
    """AdamW over lists of tensors takes the square root of all second moments at once; CLASSP goes tensor by tensor,
    with a gate, a step and a divisor."""
    if job.optimizer == "classp":
        each = 2 * job.trained_bytes + BOOL
        size = job.largest_tensor * each // job.shards
        text = f"largest tensor {job.largest_tensor:,} x (2 x {job.trained_bytes} + 1) B"
        return Part("CLASSP's temporaries", text, {"optimizer": 0 if job.offload else size})
    size = job.trained * job.trained_bytes // job.shards
    return Part(
        "AdamW's temporaries", f"{job.trained:,} x {job.trained_bytes} B", {"optimizer": 0 if job.offload else size}
    )


def _fixed(job: Job) -> Iterator[Part]:
    if job.device.kind != "cuda":
        return
    yield _everywhere("CUDA context", "assumed", CONTEXT)
    if job.ranks > 1:
        yield _everywhere("NCCL buffers", "assumed", COLLECTIVES)


def total(parts: Iterable[Part], phase: str) -> int:
    """Bytes of some parts in a phase."""
    return sum(part.bytes.get(phase, 0) for part in parts)
