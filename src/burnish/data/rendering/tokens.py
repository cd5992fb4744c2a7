"""Characters to tokens: ids and the mask of a text whose trained characters are known.

Every text is tokenised once, whole, exactly as a server tokenises it: special tokens where their text stands, none
added. A token is trained if all its characters are; one that straddles the edge of a span is masked and counted.

Two ways from characters to tokens, and the same answer (tested). Byte-level BPE without lossy normalisation (GPT-2,
Llama 3, Qwen, SmolLM): a token's bytes are known from the vocabulary, so one cumulative sum gives every token's place
and `encode_batch_fast`, which computes no offsets and is 1.2x faster, is enough; each text's bytes must add up.
Otherwise: `Encoding.char_to_token` at the edges of the spans.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


class Tokens(NamedTuple):
    """One text: int32 [T], bool [T], and how many tokens are masked only because they straddle."""

    ids: np.ndarray
    trained: np.ndarray
    boundary: int


class SpanTokenizer:
    """Tokenises texts with their trained spans (sorted, disjoint, in characters). Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        # A tokenizer.json may carry limits from another use; cut or padded ids would not be this text's.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._nfc = type(self._backend.normalizer).__name__ == "NFC"
        self._bytes = self._token_bytes()

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Tokens]:
        """Tokens of each text."""
        if not texts:
            return []
        if self._bytes is None:
            encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
            return [_by_edges(*each) for each in zip(encodings, texts, spans, strict=True)]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return self._by_bytes(encodings, texts, spans, self._bytes)

    def at(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[Tokens]:
        """Tokens of each text, of which those that hold the characters at `places` are trained."""
        result = []
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        for encoding, own in zip(encodings, places, strict=True):
            ids = np.fromiter(encoding.ids, np.int32, len(encoding))
            trained = np.zeros(len(ids), bool)
            trained[[token for place in own if (token := encoding.char_to_token(place)) is not None]] = True
            result.append(Tokens(ids, trained, 0))
        return result

    def _by_bytes(
        self, encodings: list[Encoding], texts: Sequence[str], spans: Sequence[Sequence[Span]], table: np.ndarray
    ) -> list[Tokens]:
        """All texts at once, as if they were one: numpy's cost a call is paid once, not once a text."""
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        last = np.cumsum(counts)
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, int(last[-1]))
        ends = np.concatenate([[0], np.cumsum(table[ids], dtype=np.int64)])  # [T + 1]: token t is ends[t]..ends[t + 1]
        bases = ends[last - counts]
        sizes = ends[last] - bases
        edges: list[int] = []
        exact = []
        for text, own, size, base in zip(texts, spans, sizes.tolist(), bases.tolist(), strict=True):
            ascii_only = text.isascii()
            fits = size == (len(text) if ascii_only else len(text.encode()))
            exact.append(fits and (ascii_only or not self._nfc or unicodedata.is_normalized("NFC", text)))
            if exact[-1]:
                edges += _byte_edges(text, own, base, ascii_only)
        begin, end = np.array(edges[::2], np.int64), np.array(edges[1::2], np.int64)
        first = np.searchsorted(ends[:-1], begin, "left")  # the first token that starts inside
        stop = np.searchsorted(ends[1:], end, "right")  # one past the last token that ends inside
        early = (ends[first] > begin) & (begin < end)  # the token before `first` reaches into the span
        late = (ends[stop] < end) & (stop >= first)  # the token `stop` starts inside and ends outside
        trained, straddles = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        for low, high, reaches_in, reaches_out in zip(*map(np.ndarray.tolist, (first, stop, early, late)), strict=True):
            trained[low:high] = True
            straddles[low - 1] |= reaches_in
            if reaches_out:
                straddles[high] = True
        any_straddles = bool(straddles.any())
        result = []
        for text, own, low, high, is_exact in zip(
            texts, spans, (last - counts).tolist(), last.tolist(), exact, strict=True
        ):
            if not is_exact:
                result.append(_by_edges(self._backend.encode(text, add_special_tokens=False), text, own))
                continue
            boundary = int(straddles[low:high].sum()) if any_straddles else 0
            result.append(Tokens(ids[low:high], trained[low:high], boundary))
        return result

    def _token_bytes(self) -> np.ndarray | None:
        """int32 [V]: bytes of each token's text; None where a vocabulary cannot tell."""
        backend = self._backend
        if type(backend.decoder).__name__ != "ByteLevel" or not (self._nfc or backend.normalizer is None):
            return None
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        table = np.zeros(max(vocabulary.values()) + 1, np.int32)
        for token, token_id in vocabulary.items():
            table[token_id] = len(token)  # byte-level: one character of the vocabulary is one byte of the text
        added = backend.get_added_tokens_decoder()
        for token_id, token in added.items():
            table[token_id] = len(token.content.encode())
        # Added tokens may swallow the white space beside them (Phi-3's `<|end|>`), or a space may be put in front.
        sample = "one " + "".join(f"{token.content} two\n" for token in added.values())
        ids = backend.encode(sample, add_special_tokens=False).ids
        return table if int(table[ids].sum()) == len(sample.encode()) else None


def _byte_edges(text: str, spans: Sequence[Span], base: int, ascii_only: bool) -> list[int]:
    """Characters to bytes, counted from `base`: where the first character takes two bytes, `[(1, 3)]` is `[2, 4]`."""
    edges = [base + edge for span in spans for edge in span]
    if ascii_only:
        return edges
    at = size = 0
    for i, edge in enumerate(edge for span in spans for edge in span):
        size += len(text[at:edge].encode())
        at = edge
        edges[i] = base + size
    return edges


def _by_edges(encoding: Encoding, text: str, spans: Sequence[Span]) -> Tokens:
    """From `char_to_token` at the edges: building `Encoding.offsets` costs 37 us for 160 tokens, this about 1."""
    trained, straddles = np.zeros(len(encoding), bool), np.zeros(len(encoding), bool)
    for start, end in spans:
        covered = [encoding.char_to_token(i) for i in (start, end - 1)] if start < end else [None, None]
        low = covered[0] if covered[0] is not None else _next(encoding, range(start, end))
        high = covered[1] if covered[1] is not None else _next(encoding, range(end - 1, start - 1, -1))
        if low is None or high is None:
            continue
        while high + 1 < len(encoding) and _place(encoding, high + 1) == _place(encoding, high):
            high += 1  # one character of several tokens: bytes of an emoji
        if _place(encoding, high)[1] > end:
            straddles[high] = True
            high -= 1
        # Tokenizers that trim offsets give ` word` the place of `word`: white space of no token belongs to the next.
        trimmed = start > 0 and text[start - 1].isspace() and encoding.char_to_token(start - 1) is None
        if _place(encoding, low)[0] < start or trimmed:
            straddles[low] = True
            low += 1
        trained[low : high + 1] = True
    ids = np.fromiter(encoding.ids, np.int32, len(encoding))
    return Tokens(ids, trained, int((straddles & ~trained).sum()))


def _place(encoding: Encoding, token: int) -> Span:
    place = encoding.token_to_chars(token)
    return place or (-1, -1)


def _next(encoding: Encoding, places: range) -> int | None:
    return next((token for i in places if (token := encoding.char_to_token(i)) is not None), None)
