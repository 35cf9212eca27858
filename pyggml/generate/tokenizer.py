"""Text to tokens and back, by the vocabulary of a GGUF file."""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyggml.errors import GGUFError, IdError
from pyggml.extras import package
from pyggml.generate.splits import Split, split_of
from pyggml.generate.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
)
from pyggml.gguf import StringArray

SPACE = "▁"  # SentencePiece's spelling of a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """A tokenizer from the fields of an open GGUF file. It needs the extra `text`.

    tokenizer = Tokenizer(file.fields)
    tokens = tokenizer.encode("Hello")
    tokenizer.decode(tokens)              # "Hello"

    vocabulary   texts and types of the tokens
    bos, eos     ids, or None
    end_tokens   ids that end a text or a turn
    add_bos, add_eos   whether `encode(add_special=True)` adds them

    It supports tokenizer.ggml.model `gpt2` (BPE on bytes) and `llama` (SentencePiece). GGUFError
    for another model, for an unknown `tokenizer.ggml.pre`, and for keys that are missing or do not
    fit together.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        model = fields.get(f"{PREFIX}.model")
        if model not in ("gpt2", "llama"):
            raise GGUFError(
                f"key '{PREFIX}.model': pyggml has no tokenizer {model!r}; it has gpt2 and llama"
            )
        self.vocabulary = vocabulary = Vocabulary(fields)
        self.bos, self.eos = vocabulary.bos, vocabulary.eos
        self.end_tokens = vocabulary.end_tokens
        if model == "llama":
            self._pieces = list(_spm_pieces(vocabulary))
            self._encoder = _spm_encoder(vocabulary)
            self._space_prefix = vocabulary.get("add_space_prefix", bool, True)
            add_bos = True
        else:
            split = split_of(_pre(vocabulary))
            self._pieces = list(_bpe_pieces(vocabulary))
            self._encoder = _bpe_encoder(vocabulary, split)
            self._space_prefix = False
            add_bos = split.add_bos
        self._spm = model == "llama"
        self.add_bos = vocabulary.get("add_bos_token", bool, add_bos)
        self.add_eos = vocabulary.get("add_eos_token", bool, False)
        for name, add, id_ in (("bos", self.add_bos, self.bos), ("eos", self.add_eos, self.eos)):
            if add and id_ is None:
                raise GGUFError(
                    f"key '{PREFIX}.{name}_token_id' is missing, but texts need this token"
                )
        self._splits = {both: list(vocabulary.split_texts(both)) for both in (False, True)}

    def __len__(self) -> int:
        return len(self.vocabulary)

    # -- encode -------------------------------------------------------------------------------

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The tokens of a text.

        add_special    put BOS first and EOS last, if the model was trained so
        parse_special  read the texts of control tokens, such as <|im_end|>, as these tokens; do not
                       use it for text from others
        Bytes that are not UTF-8 (as surrogates, from the command line) become U+FFFD.
        """
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        tokens = [self.bos] if add_special and self.add_bos and self.bos is not None else []
        after_token = True
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                tokens.append(fragment)
            else:
                tokens += self._encode_fragment(fragment, self._space_prefix and after_token)
            after_token = isinstance(fragment, int)
        if add_special and self.add_eos and self.eos is not None:
            tokens.append(self.eos)
        return tokens

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """The text cut at tokens that no merge makes; the longest ones are cut out first."""
        fragments: list[str | int] = [text] if text else []
        for special in self._splits[parse_special]:
            if special in text:
                id_ = self.vocabulary.ids[special]
                fragments = [p for f in fragments for p in _cut(f, special, id_)]
        return fragments

    def _encode_fragment(self, text: str, space: bool) -> list[int]:
        if self._spm:
            text = (" " * space + text).replace(" ", SPACE)
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        return ids

    # -- decode -------------------------------------------------------------------------------

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, perhaps a part of a character.

        special  show control tokens as their texts; otherwise, they are empty
        """
        if not 0 <= token < len(self):
            raise IdError(f"token {token} is outside the vocabulary of {len(self)}")
        if self.vocabulary.types[token] in (CONTROL, UNKNOWN) and not special:
            return b""
        return self._pieces[token]

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of tokens, without the space that `encode` put first; bytes that are not UTF-8
        become U+FFFD.
        """
        raw = b"".join(self.piece(token, special=special) for token in tokens)
        if self._space_prefix:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", "replace")

    def stream(self, *, special: bool = False) -> Stream:
        """A decoder for tokens that come one at a time."""
        return Stream(self, special)


class Stream:
    """Decodes tokens one at a time, and keeps bytes back until their character is complete."""

    def __init__(self, tokenizer: Tokenizer, special: bool) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that is complete with this token."""
        return self._decoder.decode(self._tokenizer.piece(token, special=self._special))

    def finish(self) -> str:
        """U+FFFD for an incomplete character, or nothing."""
        return self._decoder.decode(b"", final=True)


def _cut(fragment: str | int, text: str, id_: int) -> Iterator[str | int]:
    if isinstance(fragment, int):
        yield fragment
        return
    for i, part in enumerate(fragment.split(text)):
        if i:
            yield id_
        if part:
            yield part


# -- BPE on bytes -----------------------------------------------------------------------------


def _pre(vocabulary: Vocabulary) -> str:
    pre: str | None = vocabulary.get("pre", str)
    if pre is None:
        warnings.warn(
            f"key '{PREFIX}.pre' is missing; text is split as llama.cpp's 'default', which may not "
            "be how the model was trained",
            stacklevel=4,
        )
    return pre or "default"


def _bpe_encoder(vocabulary: Vocabulary, split: Split) -> Any:
    """A tokenizers.Tokenizer. Tokens that text must not make are not in it."""
    merges = vocabulary.get("merges", StringArray)
    if merges is None:
        raise GGUFError(f"key '{PREFIX}.merges' is missing")
    pairs = []
    for merge in merges:
        left, space, right = merge[1:].partition(" ")
        if not space:
            raise GGUFError(f"key '{PREFIX}.merges': {merge!r} is not two texts with a space")
        pairs.append((merge[0] + left, right))
    lib = package("tokenizers", "a tokenizer")
    model = _model(
        lib, _mergeable(vocabulary), pairs, fuse_unk=False, byte_fallback=False,
        ignore_merges=split.ignore_merges,
    )  # fmt: skip
    encoder = lib.Tokenizer(model)
    pre, regex = lib.pre_tokenizers, lib.Regex
    encoder.pre_tokenizer = pre.Sequence(
        [pre.Split(regex(text), "isolated") for text in split.regexes]
        + [pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return encoder


def _model(lib: Any, ids: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Any:
    try:
        return lib.models.BPE(ids, merges, **options)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise GGUFError(f"key '{PREFIX}.merges': {error}") from error


def _mergeable(vocabulary: Vocabulary) -> dict[str, int]:
    types = vocabulary.types
    return {t: i for t, i in vocabulary.ids.items() if types[i] not in (CONTROL, UNKNOWN)}


def byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable characters as themselves, others from U+0100 up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _bpe_pieces(vocabulary: Vocabulary) -> Iterator[bytes]:
    table = byte_characters()
    for text, type_ in zip(vocabulary.texts, vocabulary.types):
        if type_ == NORMAL and all(char in table for char in text):
            yield bytes(table[char] for char in text)
        else:
            yield text.encode()


# -- SentencePiece ----------------------------------------------------------------------------


def _spm_encoder(vocabulary: Vocabulary) -> Any:
    """A tokenizers.Tokenizer that merges the pair whose token has the highest score."""
    scores = vocabulary.numbers("scores")
    if scores is None:
        raise GGUFError(f"key '{PREFIX}.scores' is missing")
    ids = _mergeable(vocabulary)
    merges = []
    for text, id_ in ids.items():
        if vocabulary.types[id_] != BYTE:
            pairs = ((text[:i], text[i:]) for i in range(1, len(text)))
            merges += [(-scores[id_], pair) for pair in pairs if pair[0] in ids and pair[1] in ids]
    merges.sort(key=lambda merge: merge[0])
    lib = package("tokenizers", "a tokenizer")
    unknown = vocabulary.special("unknown", 0)
    text = vocabulary.texts[unknown or 0]
    ids[text] = unknown or 0
    pairs_ = [pair for _, pair in merges]
    return lib.Tokenizer(_model(lib, ids, pairs_, unk_token=text, byte_fallback=True))


def _spm_pieces(vocabulary: Vocabulary) -> Iterator[bytes]:
    for text, type_ in zip(vocabulary.texts, vocabulary.types):
        byte = _BYTE.fullmatch(text) if type_ == BYTE else None
        if byte:
            yield bytes.fromhex(byte[1])
        elif type_ == USER_DEFINED:
            yield text.encode()
        else:
            yield text.replace(SPACE, " ").encode()
