"""The vocabulary of a GGUF file: texts, types, and which tokens begin and end a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pyggml.errors import GGUFError
from pyggml.gguf import StringArray

PREFIX = "tokenizer.ggml"
#: tokenizer.ggml.token_type, as in llama.cpp.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: Texts of tokens that end a text or a turn, by llama.cpp's list (src/llama-vocab.cpp).
_END_TEXTS = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance>
    <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[ <|fim_pad|> <fim-pad> <fim_pad>
    <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
END_TEXTS = frozenset(_END_TEXTS.split())
#: Keys of tokens that end a text.
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
#: The markup of gpt-oss's answers; it is text, although its type is CONTROL.
SHOWN_TEXTS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


class Vocabulary:
    """The tokens of a file.

    texts   the text of each token; [EMPTY_id] if the file has none
    types   NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE of each token
    bos, eos   ids, or None
    end_tokens   ids of all tokens that end a text or a turn
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        texts = self.get("tokens", StringArray)
        if texts is None:
            raise GGUFError(f"key '{PREFIX}.tokens' is missing: the file has no vocabulary")
        self.texts = [text or f"[EMPTY_{id_}]" for id_, text in enumerate(texts)]
        self.ids = {text: id_ for id_, text in enumerate(self.texts)}
        types = self.numbers("token_type")
        self.types = [NORMAL] * len(self) if types is None else [int(t) for t in types]
        llama = self.get("model", str) == "llama"
        self.bos = self.special("bos", 1 if llama else None)
        self.eos = self.special("eos", 2 if llama else None)
        self.end_tokens = self._ends()

    def __len__(self) -> int:
        return len(self.texts)

    def get(self, name: str, type_: type, default: Any = None) -> Any:
        """The value of tokenizer.ggml.NAME; GGUFError if it has another type."""
        value = self._fields.get(f"{PREFIX}.{name}", default)
        if value is not default and type(value) is not type_:
            raise GGUFError(
                f"key '{PREFIX}.{name}': expected {type_.__name__}, got {type(value).__name__}"
            )
        return value

    def numbers(self, name: str) -> np.ndarray[Any, Any] | None:
        """The array tokenizer.ggml.NAME, one number a token."""
        array: np.ndarray[Any, Any] | None = self.get(name, np.ndarray)
        if array is not None and len(array) < len(self):
            raise GGUFError(f"key '{PREFIX}.{name}': {len(array)} numbers for {len(self)} tokens")
        return array

    def special(self, name: str, default: int | None = None) -> int | None:
        """tokenizer.ggml.NAME_token_id."""
        id_: int | None = self.get(f"{name}_token_id", int, default)
        if id_ is not None and not 0 <= id_ < len(self):
            if id_ == default:
                return None
            raise GGUFError(f"key '{PREFIX}.{name}_token_id': {id_}, of {len(self)} tokens")
        return id_

    def split_texts(self, parse_special: bool) -> Iterator[str]:
        """Texts that are cut out before the rest is encoded, longest first.

        User-defined tokens always; control tokens and the unknown token with parse_special.
        """
        types = {USER_DEFINED} | ({CONTROL, UNKNOWN} if parse_special else set())
        texts = (text for text, type_ in zip(self.texts, self.types) if type_ in types)
        yield from sorted(texts, key=lambda text: -len(text.encode()))

    def _ends(self) -> frozenset[int]:
        """The end tokens. Sets the type of those known by their text to CONTROL.

        A token that merges can make is a part of normal text, such as </s> for Qwen.
        """
        merges = self.get("merges", StringArray, ())
        texts = (END_TEXTS & self.ids.keys()) - {merge.replace(" ", "", 1) for merge in merges}
        by_text = {text: self.ids[text] for text in texts}
        # In these two families of models, <|end|> ends a message but not the answer.
        calls = by_text.keys() & {"<|call|>", "<|calls|>"}
        if calls and by_text.keys() & {"<|return|>", "<|flush|>"} and "<|end|>" in by_text:
            self.types[by_text.pop("<|end|>")] = USER_DEFINED
        if "<|tool_response>" in by_text:  # Gemma 4, where </s> is a normal token
            by_text.pop("</s>", None)
        for id_ in by_text.values():
            self.types[id_] = CONTROL
        for text in SHOWN_TEXTS & self.ids.keys():
            self.types[self.ids[text]] = USER_DEFINED
        by_key = (self.eos if key == "eos" else self.special(key) for key in END_KEYS)
        return frozenset(by_text.values()) | {id_ for id_ in by_key if id_ is not None}
