"""The tiny lab's policies: ordinary transformers directories of 423 thousand parameters, shipped with the package.

Four bases, pre-trained from scratch on synthetic traces (`rlvr-lab pretrain` reproduces them):

- **S** writes a single attempt. Chapters on entropy, collapse, covariance, clipping and pass@k use it.
- **R** may retry after `no`, up to five attempts, and gives up at random. Chapters on length and retries use it.
- **I** writes rows of digits under rules (`tasks.instructions`) and minds only some of them.
- **A** acts in the environments of `tasks.agents`, with words and a context of its own (435 thousand parameters).

S and R learned a mixture of goal-directed and random attempts. That is the point: the base knows a good mode and a
broad mode, and reinforcement learning only has to re-weight them.

Embeddings are untied: with tied ones vLLM's weight update silently keeps the old output head on CPU.

The network is Qwen2's. It is written as a Llama with attention biases, the same function (the output projection's
bias, which Qwen2 lacks, is zero), because `AutoTokenizer` of transformers 5.16-5.19 opens every directory of model type
`qwen2` with Qwen2's own byte-level tokenizer, whatever tokenizer lies there. Its heads are 24 wide and are written 32
wide, because vLLM's CPU attention takes no width below 32: again the same function, with 37 thousand zeros added.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks import countdown, instructions_demos
from ..tasks.agents import demos, words

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

BASES: dict[str, Any] = {
    "S": countdown.SINGLE,
    "R": countdown.RETRIES,
    "I": instructions_demos.LAZY,
    "A": demos.HASTY,
}
EXPORTED_HEAD_WIDTH = 32
"""The narrowest attention head that vLLM 0.32.0 runs on a CPU."""


@dataclass(frozen=True)
class Lexicon:
    """The words of a policy, one id each, the special ones where `countdown` has them; and the longest context."""

    words: tuple[str, ...]
    positions: int


COUNTDOWN, AGENTS = Lexicon(countdown.VOCABULARY, 128), Lexicon(words.VOCABULARY, 256)
POSITIONS = COUNTDOWN.positions


def lexicon(base: str) -> Lexicon:
    """Words and context of a shipped base."""
    return AGENTS if base == "A" else COUNTDOWN


@dataclass(frozen=True)
class Shape:
    """Size of a policy's network: width, layers, attention heads, width of the feed-forward part."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int


SHAPES = {"tiny": Shape(96, 3, 4, 288), "28m": Shape(512, 8, 8, 1536), "92m": Shape(768, 12, 12, 2304)}
"""The shipped size, and sizes of 28 and 92 million parameters for the same task, which want a GPU."""


def shipped(base: str) -> Path:
    """Directory of a shipped base policy, `S`, `R`, `I` or `A`."""
    if base not in BASES:
        raise KeyError(f"no shipped base '{base}'; there are {', '.join(BASES)}")
    return Path(str(resources.files("rlvr_lab.policy") / "checkpoints" / base))


def build_config(shape: Shape = SHAPES["tiny"], lexicon: Lexicon = COUNTDOWN) -> Qwen2Config:
    """Qwen2 over a vocabulary of whole words, rotary base 10,000, untied embeddings."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=len(lexicon.words),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=lexicon.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=countdown.BOS,
        eos_token_id=countdown.EOS,
        pad_token_id=countdown.PAD,
        use_sliding_window=False,
    )


def build_model(seed: int, shape: Shape = SHAPES["tiny"], lexicon: Lexicon = COUNTDOWN) -> Qwen2ForCausalLM:
    """A freshly initialised policy. The global generator is used by transformers' initialiser and restored after."""
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(build_config(shape, lexicon))


def export(model: Qwen2ForCausalLM | LlamaForCausalLM, out: Path, lexicon: Lexicon = COUNTDOWN) -> None:
    """Write the policy to `out` as a Llama directory with its tokenizer; see the head of this module.

    Heads narrower than `EXPORTED_HEAD_WIDTH` are widened to it (`widen_heads`). A Llama may be given as well; one that
    this function wrote comes out unchanged. Raises ValueError for a model of another kind.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    settings = model.config.to_dict()
    keep = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    narrow = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    wide = max(narrow, EXPORTED_HEAD_WIDTH)
    rope = dict(settings["rope_parameters"])
    rope["rope_theta"] **= wide / narrow  # pair i turns at theta**(-2 i / width): the old pairs keep their frequencies
    config = LlamaConfig(
        **{name: settings[name] for name in keep}, rope_parameters=rope, head_dim=wide, attention_bias=True
    )
    with torch.random.fork_rng(devices=[]):
        llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(widen_heads(model.state_dict(), narrow, wide), strict=False)
    if unexpected or any(not name.endswith("o_proj.bias") for name in missing):
        raise ValueError(f"Qwen2 and Llama disagree on parameters: {missing} {unexpected}")
    for name, parameter in llama.named_parameters():
        if name in missing:
            torch.nn.init.zeros_(parameter)
    logging.disable_progress_bar()
    llama.save_pretrained(out)
    build_tokenizer(lexicon).save_pretrained(out)


def widen_heads(state: dict[str, Tensor], narrow: int, wide: int) -> dict[str, Tensor]:
    """State of the same function with attention heads of width `wide`; the rotary base is the caller's to change.

    Rows of `q_proj`, `k_proj`, `v_proj` and columns of `o_proj` go to the places that keep rotary pairs together
    (i with i + width / 2), zeros fill the rest. Attention divides scores by sqrt(width), so q is multiplied by
    sqrt(wide / narrow). Training leaves the zeros alone: the gradient of a padded row is linear in the
    values of its counterpart (q in k, v in o, and the reverse), which are zero too. It is not quite the training of the
    narrow heads: an optimizer whose step ignores the gradient's size, AdamW, moves the enlarged q relatively less.
    """
    import torch

    pairs = torch.arange(narrow // 2)
    places = torch.cat([pairs, wide // 2 + pairs])

    def widen(rows: Tensor) -> Tensor:
        heads = rows.reshape(-1, narrow, *rows.shape[1:])
        out = torch.zeros(heads.shape[0], wide, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        out[:, places] = heads
        return out.flatten(0, 1)

    widened = dict(state)
    for name, value in state.items():
        if ".q_proj." in name:
            widened[name] = widen(value) * (wide / narrow) ** 0.5
        elif ".k_proj." in name or ".v_proj." in name:
            widened[name] = widen(value)
        elif name.endswith(".o_proj.weight"):
            widened[name] = widen(value.T).T
    return widened


def build_tokenizer(lexicon: Lexicon = COUNTDOWN) -> PreTrainedTokenizerFast:
    """One id per blank-separated word; `decode` joins with blanks, so encode and decode are inverse."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(lexicon.words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=lexicon.positions,
        clean_up_tokenization_spaces=False,
    )
