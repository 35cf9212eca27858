"""Time to open a GGUF file with 102,400 tokens, and to write a random one:
pytest benchmarks/test_gguf.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyggml import gguf
from pyggml.models.presets import preset
from pyggml.models.synth import synth


def test_open_102400_tokens(benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "lite.gguf"
    synth(path, preset("deepseek-v2-lite"), header_only=True)

    def tokens() -> int:
        with gguf.open(path, allow_missing_data=True) as file:
            tokens = file.fields["tokenizer.ggml.tokens"]
            assert isinstance(tokens, gguf.StringArray)
            return len(list(tokens))

    assert benchmark.pedantic(tokens, rounds=5, warmup_rounds=1) == 102_400


def test_synth_small_200_MB(benchmark: Any, tmp_path: Path) -> None:
    config = preset("small", layers=12)
    path = tmp_path / "small.gguf"
    benchmark.pedantic(lambda: synth(path, config, dtype="iq4_nl"), rounds=2)
    assert path.stat().st_size > 200e6
