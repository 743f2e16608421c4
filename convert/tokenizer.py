"""The training tokenizer as transformers loads it: `tokenizer.json` with the same ids as the SentencePiece model.

A `tokenizer.json` is copied. A SentencePiece model is rebuilt from its protobuf for the `tokenizers` library:
    normalizer  the model's character map if it has one, white space removed if it says so, U+2581 before the text
                if it adds a dummy prefix, spaces -> U+2581
    BPE         merges (a, b) of every piece ab, in the order of the piece's score; the same greedy choice
    unigram     the same pieces and log probabilities
    decoder     the inverse
Nothing splits the text first: SentencePiece applies its vocabulary to the whole line. Encoding adds no BOS or EOS, as
in training. Two differences remain. A control piece spelled out in the text (`</s>`) becomes that piece, as users of
transformers expect, where SentencePiece spells it in characters. Where two segmentations by a unigram model are equally
probable (runs of one character: `aa a` or `a aa`), the choice can differ: SentencePiece adds in FP32, `tokenizers` in
FP64.
Field numbers: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from convert.directory import write_json
from data.tokenizer import load_tokenizer
from errors import UsageError

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
CONTROL, USER_DEFINED = 3, 4  # SentencePiece.Type
SPACE = "\u2581"
# Each export is verified on these; they hold what normalisation, prefixes, bytes and merges disagree about.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading, trailing  and   many    spaces ",
    "lines\nand\n\nparagraphs\r\n\tand tabs\n",
    "Accents \u00e9\u00e8\u00fc, CJK \u6f22\u5b57, emoji \U0001f600, full-width \uff21, combining e\u0301",
    "ligature \ufb01, no-break\u00a0space, mark \u2581",
    "1234567890 3.14 -- \"quotes\" 'and' (brackets) {x: [1, 2]}; aaaaaaaaaaaa",
    "",
    " ",
)


def _fields(buffer: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: int, float (fixed32) or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = buffer[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(buffer):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        value = buffer[at : at + size]
        at += size
        yield number, struct.unpack("<f", value)[0] if wire == 5 else value


@dataclass(frozen=True)
class SentencePieceModel:
    """What of a SentencePiece model decides its ids."""

    pieces: list[tuple[str, float, int]]  # text, score, SentencePiece.Type
    model_type: int
    unknown: int
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(proto: bytes) -> SentencePieceModel:
    """Parse a serialized SentencePiece ModelProto; unset fields have the defaults of its .proto."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(proto):
        if number == 1:
            piece = {1: b"", 2: 0.0, 3: 1} | dict(_fields(value))
            pieces.append((piece[1].decode("utf-8"), piece[2], piece[3]))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if trainer.get(24):
        raise UsageError("a SentencePiece model with treat_whitespace_as_suffix has no tokenizer.json equivalent")
    return SentencePieceModel(
        pieces=pieces,
        model_type=trainer.get(3, UNIGRAM),
        unknown=trainer.get(40, 0),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score first; ties in the order of the vocabulary."""
    rank = {text: index for index, (text, _, _) in enumerate(pieces)}
    found = []
    for text, score, _ in pieces:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in rank and right in rank:
                found.append((-score, rank[text], rank[left], rank[right], (left, right)))
    return [merge for *_, merge in sorted(found)]


def build_tokenizer(model: SentencePieceModel) -> Any:
    """A `tokenizers.Tokenizer` equivalent to the SentencePiece model; raises UsageError for char and word models."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    except ImportError:
        raise UsageError("writing tokenizer.json needs the `tokenizers` package: pip install tokenizers") from None
    unknown = model.pieces[model.unknown][0]
    if model.model_type == BPE:
        vocab = {text: index for index, (text, _, _) in enumerate(model.pieces)}
        core = models.BPE(
            vocab, _merges(model.pieces), unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback
        )
    elif model.model_type == UNIGRAM:
        scores = [(text, score) for text, score, _ in model.pieces]
        core = models.Unigram(scores, unk_id=model.unknown, byte_fallback=model.byte_fallback)
    else:
        raise UsageError("only BPE and unigram SentencePiece models have a tokenizer.json equivalent")
    tokenizer = Tokenizer(core)
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if model.dummy_prefix else []))
    control = [text for text, _, kind in model.pieces if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (unknown, *control)])
    whole = [text for text, _, kind in model.pieces if kind == USER_DEFINED and len(text) > 1]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in whole])
    return tokenizer


def _tie(model: SentencePieceModel, first: list[int], second: list[int]) -> bool:
    """Whether two segmentations use the same pieces in another order to spell the same text."""
    spell = ["".join(model.pieces[index][0] for index in ids) for ids in (first, second)]
    return spell[0] == spell[1] and sorted(first) == sorted(second)


def write_tokenizer(directory: Path, source: Path, seq_len: int) -> dict[str, int]:
    """Write the tokenizer files of `source` (.model or tokenizer.json) into `directory`.

    Returns the ids that config.json repeats: `eos_token_id`, and `bos_token_id`, `pad_token_id` where they exist.
    Raises UsageError if the rebuilt tokenizer does not give the SentencePiece model's ids.
    """
    trained = load_tokenizer(source)
    ids = {"eos_token_id": trained.eod_id}
    if source.suffix == ".json":
        import tokenizers

        shutil.copyfile(source, directory / "tokenizer.json")
        end = tokenizers.Tokenizer.from_file(str(source)).id_to_token(trained.eod_id)
        _write_settings(directory, {"eos_token": end}, seq_len)
        return ids
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source))
    model = read_model(processor.serialized_model_proto())
    tokenizer = build_tokenizer(model)
    for text in PROBES:
        ours, theirs = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if ours != theirs and not (model.model_type == UNIGRAM and _tie(model, ours, theirs)):
            raise UsageError(
                f"{source} cannot be expressed as a tokenizer.json: {text!r} becomes {theirs} instead of {ours}; "
                "export without a tokenizer (--tokenizer none)"
            )
    tokenizer.save(str(directory / "tokenizer.json"))
    shutil.copyfile(source, directory / "tokenizer.model")
    found = {"bos": processor.bos_id(), "eos": trained.eod_id, "unk": processor.unk_id(), "pad": processor.pad_id()}
    tokens = {f"{role}_token": processor.id_to_piece(token) for role, token in found.items() if token >= 0}
    _write_settings(directory, tokens, seq_len)
    return {f"{role}_token_id": token for role, token in found.items() if token >= 0 and role != "unk"}


def _write_settings(directory: Path, tokens: Mapping[str, str | None], seq_len: int) -> None:
    """tokenizer_config.json and special_tokens_map.json for the class that takes tokenizer.json as it is."""
    write_json(directory / "special_tokens_map.json", dict(tokens))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
    )
