"""The embedded model's tokenizer: CLIP's byte-level BPE over few words, each of them one token.

Rebuild the saved files by `python -m ray_sd.embedded.tokenizer`.
"""

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

MODEL_MAX_LENGTH = 24  # the longest caption takes 15; the rest is room for a learnt word of several vectors
WORD_END = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
HERE = Path(__file__).parent


def build_tokenizer() -> CLIPTokenizer:
    """Ids in CLIP's order: bytes, bytes that end a word, merges, start of text, end of text (which also pads)."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = learn_merges(read_words())
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(left + right for left, right in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    # transformers annotates strings; the tokenizer below it takes pairs only
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MODEL_MAX_LENGTH)


def read_words() -> list[str]:
    """The names of all picturable sprites, those held out among them, and spare words of plain English."""
    return [*(HERE / "names.txt").read_text().split(), *(HERE / "spare_words.txt").read_text().split()]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges, learnt until every word is one token; the same words give the same merges.

    The trainer of `tokenizers` breaks ties by a hash map's order, so it gives other merges each time.
    """
    clip = CLIPTokenizer().backend_tokenizer
    pieces = {piece for word in words for piece, _ in clip.pre_tokenizer.pre_tokenize_str(word.lower())}
    parts = [[*piece[:-1], piece[-1] + WORD_END] for piece in sorted(pieces)]
    merges = []
    while counts := Counter(pair for part in parts for pair in pairwise(part)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        parts = [join(part, best) for part in parts]
    return merges


def join(part: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word with every occurrence of the pair made one piece."""
    joined: list[str] = []
    for piece in part:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "emoji" / "tokenizer"
    build_tokenizer().save_pretrained(folder)
