"""How each BPE tokenizer cuts text before it merges: the regexes by `tokenizer.ggml.pre`.

The names and their regexes are those of llama.cpp (src/llama-vocab.cpp) and of the tokenizer.json
of the models that introduced them. The regexes here have the syntax of Oniguruma, as in
tokenizer.json; where llama.cpp rewrites one for std::regex, this table keeps the original.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.errors import GGUFError

_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_WORD = _ENDING + r"|[^\r\n\p{L}\p{N}]?\p{L}+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _WORD + r"|\p{N}{1,3}" + _MARKS + _TAIL
_QWEN2 = _WORD + r"|\p{N}" + _MARKS + _TAIL
_QWEN35 = (
    _ENDING + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED = _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _TAIL

# Words that may begin with capitals and then go on in small letters, so that HelloWorld is two.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(upper: str, lower: str, ending: str = "") -> str:
    first = r"[^\r\n\p{L}\p{N}]?"
    return f"{first}{upper}*{lower}+{ending}|{first}{upper}+{lower}*{ending}"


_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_TEKKEN = _cased(_UPPER, _LOWER) + r"|\p{N}" + _SLASHES + _TAIL
_GPT4O = _cased(_UPPER, _LOWER, _ENDING + "?") + r"|\p{N}{1,3}" + _SLASHES + _TAIL
_KIMI = (
    r"[\p{Han}]+|"
    + _cased(
        _UPPER[:-1] + r"&&[^\p{Han}]]", _LOWER[:-1] + r"&&[^\p{Han}]]", _ENDING + "?"
    )
    + r"|\p{N}{1,3}"
    + _MARKS
    + _TAIL
)  # fmt: skip

# DeepSeek lists cased letters and punctuation by code point.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕ"
    "Ἐ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤ"
    "Ⳬ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _TAIL,
)


@dataclass(frozen=True, slots=True)
class Split:
    """How a tokenizer cuts text into words.

    regexes        each cuts the pieces of the one before, into matches and what is between them
    ignore_merges  a word that is a token as a whole is that token, whatever the merges say
    add_bos        the default of `tokenizer.ggml.add_bos_token`
    """

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_SPLITS: dict[str, Split] = {
    "default": Split(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "gpt-2 phi-2 mpt olmo jais gigachat a.x-4.0 mellum exaone4 trillion granite-docling": Split(
        (_GPT2,)
    ),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": Split(
        (r"\p{N}", _GPT2)
    ),
    "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2": Split(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Split((_LLAMA3,)),
    "glm4 glm5": Split((_LLAMA3,), ignore_merges=True),
    "qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open grok-2": Split(
        (_QWEN2,)
    ),
    "qwen35": Split((_QWEN35,)),
    "deepseek-llm": Split(
        (
            r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", _DEEPSEEK_MARKS, r"\s+$", _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Split(_DEEPSEEK_V3),
    "tekken": Split((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Split((_GPT4O,)),
    "kimi-k2": Split((_KIMI,)),
    "bailingmoe bailingmoe2 llada-moe": Split((_BAILING,)),
    "seed-coder": Split((_SEED,)),
}  # fmt: skip
SPLITS = {name: split for names, split in _SPLITS.items() for name in names.split()}


def split_of(pre: str) -> Split:
    """The split of a `tokenizer.ggml.pre`; GGUFError for an unknown name."""
    if pre not in SPLITS:
        raise GGUFError(
            f"key 'tokenizer.ggml.pre': pyggml does not know how {pre!r} splits text; it knows "
            f"{', '.join(SPLITS)}"
        )
    return SPLITS[pre]
