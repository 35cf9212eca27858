"""The progress bar of pyggml run, chat, logits, perplexity and synth, and Ctrl-C meanwhile."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml import backends
from pyggml.cli import main
from pyggml.cli.progress import WIDTH, clear, progress
from pyggml.generate.session import Session
from pyggml.models.model import load
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from tests.interrupts import everywhere


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def __init__(self, terminal: bool = True) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def screen(self) -> str:
        """What it shows at the end."""
        lines = []
        for text in self.getvalue().split("\n"):
            line, at = "", 0
            for part in re.findall(r"\r|\x1b\[K|[^\r\x1b]+", text):
                if part == "\r":
                    at = 0
                elif part == "\x1b[K":
                    line = line[:at]
                else:
                    line, at = line[:at] + part + line[at + len(part) :], at + len(part)
            lines.append(line)
        return "\n".join(lines)

    @property
    def bars(self) -> list[str]:
        """Every bar that was shown."""
        return re.findall(r"\r(\w+ \[[^\r\x1b]*)\x1b\[K", self.getvalue())


def terminal_for(monkeypatch: pytest.MonkeyPatch, terminal: bool = True) -> Terminal:
    """A terminal as stderr. pytest replaces sys.stderr after fixtures have run, so they cannot."""
    stream = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, preset("tiny", layers=2), dtype="q8_0", seed=3)
    return path


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    show = progress("loading", "bytes")
    assert show is not None
    for done in (0, 10**9, 10**9 + 1, 2 * 10**9, 4 * 10**9):
        show(done, 4 * 10**9)
    assert terminal.bars == [
        f"loading [{' ' * WIDTH}] 0.0 of 4.0 GB",
        f"loading [{'#' * (WIDTH // 4):{WIDTH}}] 1.0 of 4.0 GB",  # once: the next is the same
        f"loading [{'#' * (WIDTH // 2):{WIDTH}}] 2.0 of 4.0 GB",
    ]
    assert terminal.screen == ""
    length = len(terminal.getvalue())
    clear()
    assert len(terminal.getvalue()) == length  # there is none to clear


def test_an_interrupt_while_the_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)

    def begin() -> Callable[[], object]:
        show = progress("loading", "bytes")
        assert show is not None
        return lambda: show(1, 3)

    for where in everywhere(begin):
        clear()
        assert terminal.screen == "", where
    assert terminal.bars


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_for(monkeypatch, False)
    assert progress("loading", "bytes") is None


@pytest.mark.parametrize(
    ("places", "bars"), [("numpy", {"prompt"}), ("null,numpy", {"loading", "prompt"})]
)
def test_bars_of_loading_and_of_a_prompt(
    places: str, bars: set[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy reads weights in place, so there is nothing to load."""
    pytest.importorskip("tokenizers", reason="needs the extra 'text'")
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(30)))
    common = ("-m", str(tiny), "--backend", places, "-ub", "4")
    for words in (
        ("run", "-p", "hello ab hello ab", "-n", "3"),
        ("logits", "-p", "hello ab hello ab", "-o", str(tmp_path / "x.npy")),
        ("perplexity", "-f", str(tmp_path / "text.txt"), "-c", "32", "--chunks", "2"),
    ):
        terminal = terminal_for(monkeypatch)
        assert main([*words, *common]) == 0
        names = {bar.partition(" ")[0].replace("perplexity", "prompt") for bar in terminal.bars}
        assert names == bars, words
        assert terminal.screen == "", words
        prompt = [bar for bar in terminal.bars if not bar.startswith("loading")]
        assert "] 0 of " in prompt[0] and len(prompt) > 1


def test_synth_has_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    assert main(["synth", str(tmp_path / "x.gguf"), "--preset", "tiny"]) == 0
    assert terminal.bars and terminal.screen == ""


# -- Ctrl-C -----------------------------------------------------------------------------------


def interrupting(call: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function, but its call `number` (from 1) is interrupted."""
    count = iter(range(1, 10**6))

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(count) == number:
            raise KeyboardInterrupt
        return call(*args, **options)

    return interrupted


@pytest.mark.parametrize("on_terminal", (True, False))
@pytest.mark.parametrize("stage", ("loading", "prompt"))
def test_an_interrupt_prints_one_line(
    stage: str, on_terminal: bool, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = terminal_for(monkeypatch, on_terminal)
    if stage == "loading":
        device = backends.get("null")
        monkeypatch.setattr(device, "weight", interrupting(device.weight, 5), raising=False)
    else:
        monkeypatch.setattr(Session, "_run", interrupting(Session._run, 2))
    words = ("--tokens", ",".join(map(str, range(12))), "-ub", "4", "--backend", "null,numpy")
    out = tmp_path / "x.npy"
    assert main(["logits", "-m", str(tiny), *words, "-o", str(out)]) == 130
    assert stream.screen == "pyggml: interrupted\n"
    assert (stage in " ".join(stream.bars)) == on_terminal
    assert not list(tmp_path.iterdir())


@pytest.fixture
def expected(tiny: Path) -> Iterator[np.ndarray[Any, Any]]:
    model = load(tiny, backends=["numpy"], cache_k="f32", cache_v="f32")
    yield model.session(64).forward(range(12))
    model.file.close()


@pytest.mark.parametrize("number", (1, 2, 9))
def test_a_session_goes_on_after_an_interrupt_while_it_loads(
    number: int, tiny: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny, backends=["null", "numpy"], cache_k="f32", cache_v="f32")
    session, device = model.session(64, 4), backends.get("null")
    with monkeypatch.context() as patch:
        patch.setattr(device, "weight", interrupting(device.weight, number), raising=False)
        with pytest.raises(KeyboardInterrupt):
            session.forward(range(12))
    assert session.tokens == []
    np.testing.assert_allclose(session.forward(range(12)), expected, rtol=1e-4, atol=1e-4)
    model.file.close()
