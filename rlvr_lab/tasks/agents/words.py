"""The vocabulary that the three environments share in the tiny lab: 192 words, one id each.

The first six stand where Countdown's 128 words have them. The last ids are reserved: no text contains them.
"""

from __future__ import annotations

SIZE = 192
ENTITIES = tuple(f"E{n}" for n in range(40))
RELATIONS = ("boss", "friend", "teacher", "neighbour")
ATTRIBUTE = "age"
COLOURS = ("red", "blue", "green", "white", "black", "grey", "brown", "pink")
METALS = ("iron", "copper")
NUMBERS = tuple(str(n) for n in range(80))
WORDS = (
    "<pad>", "<bos>", "<eos>", "<unk>", "<think>", "</think>",
    "<search>", "</search>", "<calc>", "</calc>", "<act>", "</act>", "<answer>", "</answer>", "<result>", "</result>",
    "?", "+", "-", "*", "/", "=", "x", "query", "maze", "solve",
    "none", "error", "invalid", "timeout", "or", "yes", "no", "right", "wrong", "higher", "lower",
    "go", "left", "take", "open", "wait", "look", "key", "door", "taken", "nothing",
    *METALS, *COLOURS, *RELATIONS, ATTRIBUTE,
)  # fmt: skip
_USED = (*WORDS, *ENTITIES, *NUMBERS)
VOCABULARY = (*_USED, *(f"<reserved_{i}>" for i in range(SIZE - len(_USED))))
ID = {word: i for i, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Ids of blank-separated words; `<unk>` for a word that is none of the 192."""
    return [ID.get(word, ID["<unk>"]) for word in text.split()]
