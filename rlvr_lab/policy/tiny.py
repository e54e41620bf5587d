"""The tiny lab's policies: 386 thousand parameters, ordinary transformers directories, shipped with the package.

Two bases, pre-trained from scratch on synthetic traces (`rlvr-lab pretrain` reproduces them):

- **S** writes a single attempt. Chapters on entropy, collapse, covariance, clipping and pass@k use it.
- **R** may retry after `no`, up to five attempts, and gives up at random. Chapters on length and retries use it.

Both learned a mixture of goal-directed and random attempts. That is the point: the base knows a good mode and a broad
mode, and reinforcement learning only has to re-weight them.

Embeddings are untied: with tied ones vLLM's weight update silently keeps the old output head on CPU.

The network is Qwen2's. It is written as a Llama with attention biases, the same function (the output projection's
bias, which Qwen2 lacks, is zero), because `AutoTokenizer` of transformers 5.16-5.19 opens every directory of model type
`qwen2` with Qwen2's own byte-level tokenizer, whatever tokenizer lies there.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..tasks import countdown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

BASES = {"S": countdown.SINGLE, "R": countdown.RETRIES}
HIDDEN, LAYERS, HEADS, FEED_FORWARD, POSITIONS = 96, 3, 4, 288, 128


def shipped(base: str) -> Path:
    """Directory of a shipped base policy, `S` or `R`."""
    if base not in BASES:
        raise KeyError(f"no shipped base '{base}'; there are {', '.join(BASES)}")
    return Path(str(resources.files("rlvr_lab.policy") / "checkpoints" / base))


def build_config() -> Qwen2Config:
    """Qwen2, 3 layers of width 96 over the 128-word vocabulary, rotary base 10,000, untied embeddings."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=len(countdown.VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=countdown.BOS,
        eos_token_id=countdown.EOS,
        pad_token_id=countdown.PAD,
        use_sliding_window=False,
    )


def build_model(seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised policy. The global generator is used by transformers' initialiser and restored after."""
    import torch
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(build_config())


def export(model: Qwen2ForCausalLM, out: Path) -> None:
    """Write the policy to `out` as a Llama directory with its tokenizer; see the head of this module."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    settings = model.config.to_dict()
    keep = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = LlamaConfig(**{name: settings[name] for name in keep}, attention_bias=True)
    with torch.random.fork_rng(devices=[]):
        llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(not name.endswith("o_proj.bias") for name in missing):
        raise ValueError(f"Qwen2 and Llama disagree on parameters: {missing} {unexpected}")
    for name, parameter in llama.named_parameters():
        if name in missing:
            torch.nn.init.zeros_(parameter)
    logging.disable_progress_bar()
    llama.save_pretrained(out)
    build_tokenizer().save_pretrained(out)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id per blank-separated word; `decode` joins with blanks, so encode and decode are inverse."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel(vocab=dict(countdown.ID), unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
