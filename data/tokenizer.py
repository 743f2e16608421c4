"""Text to token ids and back: SentencePiece models (trained here or given) and Hugging Face
`tokenizer.json`.

A model trained here is lossless: no Unicode normalisation, white space kept, bytes for what the
vocabulary lacks, so `decode(encode(text)) == text`. The one exception is SentencePiece's own:
U+2581, its mark for a space, reads back as a space. Ids follow Llama's model: 0 `<unk>`, 1 `<s>`
(never produced), 2 `</s>`, which ends every document (EOD).

Training is deterministic. SentencePiece's parallel sums depend on the number of threads, so that is
a constant here; its sampling depends on a generator, so sentences are thinned here instead: when
the sample is full, every second sentence is dropped and from then on only every second one taken.
That keeps memory bounded, and the sample even over the corpus. SentencePiece drops sentences longer
than its limit without a word, so text is cut below that limit first.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from data.cache import write_atomic
from data.words import WordEncoder, is_separable
from errors import DataError, UsageError

TRAINED_KINDS = ("bpe", "unigram")
EOD_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")

_SENTENCE_CHARS = 2048
_SENTENCE_BYTES = 4 * _SENTENCE_CHARS  # a UTF-8 character has at most four bytes
_SAMPLE_CHARS = 64 << 20
_TRAINER_THREADS = 16  # a constant: the unigram model's floating-point sums depend on it


class Tokenizer(Protocol):
    """What the rest of the code needs of a tokenizer.

    Attributes:
        path: file that it was loaded from; copied beside prepared data and into exports.
        vocab_size: ids are in [0, vocab_size).
        eod_id: id that ends a document; text never encodes to it in a SentencePiece model.
    """

    path: Path
    vocab_size: int
    eod_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOD."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; EOD is its `</s>` unless `eod` names another piece."""

    def __init__(self, path: Path, eod: str | None = None) -> None:
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            separable = is_separable(self._model)
        except (OSError, RuntimeError, UnicodeDecodeError) as error:  # the last one: a piece that is no UTF-8
            raise DataError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size = self._model.vocab_size()
        eod_id = self._model.eos_id() if eod is None else self._model.piece_to_id(eod)
        if eod_id < 0 or (eod is not None and self._model.id_to_piece(eod_id) != eod):
            raise DataError(
                f"{path} has no piece {eod or '</s> (eos_id)'} to end documents with; name another one with --eod-token"
            )
        self.eod_id = eod_id
        self._encoder = WordEncoder(self._model) if separable else self._model

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._encoder.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        return self._model.decode(np.asarray(list(ids), dtype=np.int64).tolist())


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library; EOD is the first of `EOD_NAMES` it has, or
    `eod`."""

    def __init__(self, path: Path, eod: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UsageError(f"{path} needs the `tokenizers` package: pip install tokenizers") from None
        self.path = path
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        names = EOD_NAMES if eod is None else (eod,)
        found = [vocabulary[name] for name in names if name in vocabulary]
        if not found:
            raise DataError(
                f"{path} has no token {' or '.join(names)} to end documents with; name one with --eod-token"
            )
        self.eod_id = found[0]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the special tokens that the file's post-processor would
        add."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._model.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(path: Path, eod: str | None = None) -> Tokenizer:
    """Open a SentencePiece `.model` or a Hugging Face `tokenizer.json`.

    Args:
        path: file whose suffix says which of the two it is.
        eod: name of the token that ends documents; None for the usual ones.
    Raises:
        DataError: no such file, not such a file, or no token to end documents with.
        UsageError: another suffix, or the `tokenizers` package is missing.
    """
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist; give bpe, unigram, a .model or a tokenizer.json file")
    match path.suffix:
        case ".model":
            return SentencePieceTokenizer(path, eod)
        case ".json":
            return HuggingFaceTokenizer(path, eod)
    raise UsageError(f"tokenizer {path}: expected a SentencePiece .model or a Hugging Face tokenizer.json")


def train_sentencepiece(texts: Iterable[str], out: Path, kind: str, vocab_size: int) -> None:
    """Train a lossless SentencePiece model, `kind` bpe or unigram, of exactly `vocab_size` pieces
    and write it to `out`, atomically.

    The same texts in the same order give the same bytes. Memory is bounded by 64 Mi characters of
    sample.

    Raises:
        DataError: no text.
        UsageError: `vocab_size` does not suit the text.
    """
    sample = _thin(sentences(texts), _SAMPLE_CHARS)
    if not sample:
        raise DataError("no text to train a tokenizer on: the corpus is empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_SENTENCE_BYTES,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].removesuffix(" with --character_coverage option.")
        raise UsageError(
            f"cannot train a {kind} tokenizer of {vocab_size} pieces on this text "
            f"({reason.strip()}); change the vocabulary size or give more text"
        ) from None
    write_atomic(out, model.getvalue())


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at line ends, and lines that are too long at white space (or anywhere, if they have
    none)."""
    space, most, limit = r"(?:[^\S\n]|$)", _SENTENCE_CHARS - 1, _SENTENCE_CHARS
    cut = re.compile(f".{{1,{most}}}{space}|.{{1,{limit}}}", re.MULTILINE)
    for text in texts:
        yield from cut.findall(text)


def _thin(items: Iterable[str], limit: int) -> list[str]:
    """At most about `limit` characters of `items`: every 2^k-th, with the smallest k that fits."""
    kept: list[str] = []
    total, stride = 0, 1
    for number, item in enumerate(items):
        if number % stride:
            continue
        kept.append(item)
        total += len(item)
        if total > limit:
            kept = kept[::2]
            total, stride = sum(map(len, kept)), stride * 2
    return kept
