"""pyggml run, chat, logits and perplexity on a tiny model."""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyggml.generate.text as text_module
from pyggml.cli import main, model_options, perplexity
from pyggml.generate.session import Session
from pyggml.generate.text import Conversation
from pyggml.models.model import Model, load
from pyggml.models.presets import preset
from pyggml.models.synth import synth

pytest.importorskip("tokenizers", reason="needs the extra 'text'")
pytest.importorskip("jinja2", reason="needs the extra 'text'")

Streams = pytest.CaptureFixture[str]
Command = Callable[..., str]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, preset("tiny", layers=2), dtype="q8_0", seed=3)
    return path


@pytest.fixture
def model(tiny: Path) -> Iterator[Model]:
    model = load(tiny, backends=["numpy"], cache_k="f32")
    yield model
    model.file.close()


@pytest.fixture
def command(tiny: Path, capsys: Streams) -> Command:
    """What a command prints; it must succeed."""

    def run(name: str, *words: str, status: int = 0, stream: str = "out") -> str:
        places = () if "--backend" in words else ("--backend", "numpy")
        assert main([name, "-m", str(tiny), *places, *words]) == status
        out, err = capsys.readouterr()
        assert status or not err
        return out if stream == "out" else err

    return run


def test_run(command: Command) -> None:
    words = ("-p", "hello ab", "-n", "6", "--temp", "0")
    text = command("run", *words)
    assert text.endswith("\n") and len(text) > 6
    assert command("run", *words, "-ub", "2") == text  # the prompt in parts
    for places in (("-ngl", "0"), ("-ngl", "1"), ("-ngl", "2"), ("-ot", r"blk\.1\.=numpy")):
        assert command("run", *words, "--backend", "null,numpy", *places) == text, places
    drawn = [command("run", *words[:4], "--seed", "7") for _ in range(2)]
    assert drawn[0] == drawn[1] != text


def test_run_forms_of_attention_and_caches(command: Command) -> None:
    words = ("-p", "hello", "-n", "4", "--temp", "0", "-ctk", "f32", "-ctv", "f32")
    expected = command("run", *words)
    for form in (("-mla", "0", "-fa", "off"), ("-mla", "1"), ("-mla", "2"), ("-amb", "1")):
        assert command("run", *words, *form, "-fmoe", "off") == expected, form


def test_errors(command: Command, tiny: Path, tmp_path: Path, capsys: Streams) -> None:
    short = ("-p", "hello", "-c", "3")
    assert "5 tokens do not fit: 3 of n_ctx=3 are free" in command(
        "run", *short, status=1, stream="err"
    )
    assert "no tokens" in command("run", "-p", "", status=1, stream="err")
    assert "no backend 'cuad'" in command(
        "run", "-p", "a", "--backend", "cuad", status=2, stream="err"
    )
    assert "token 512 is outside" in command(
        "logits", "--tokens", "1,512", "-o", str(tmp_path / "x.npy"), status=1, stream="err"
    )
    assert "exists and is not a regular file" in command(
        "logits", "-p", "a", "-o", str(tmp_path), status=1, stream="err"
    )
    assert not list(tmp_path.iterdir())
    (tmp_path / "short.txt").write_text("short")
    assert "at least 128 are needed" in command(
        "perplexity", "-f", str(tmp_path / "short.txt"), "-c", "64", status=1, stream="err"
    )
    for wrong in (["--tokens", "1,x"], ["--tokens", "-1"], ["-p", "a", "--tokens", "1"], []):
        assert main(["logits", "-m", str(tiny), *wrong, "-o", "out"]) == 2
        assert "usage" in capsys.readouterr().err


def test_an_interrupted_run_has_status_130(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        yield 5
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "generate", interrupt)
    err = command("run", "-p", "hello", status=130, stream="err")
    assert err == "\npyggml: interrupted\n"  # after the text so far


def test_chat_answers_each_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nhow are you?\n"))
    lines = command("chat", "-n", "5", "--temp", "0", "--system", "Be brief.")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert lines.startswith(command("chat", "-n", "5", "--temp", "0", "--system", "Be brief."))


def test_an_interrupt_ends_an_answer_but_not_the_chat(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Session.generate, []

    def interrupt(self: Session, tokens: Any, *words: Any) -> Iterator[int]:
        calls.append(len(self.tokens))
        yield from real(self, tokens, 2, *words[1:])
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "generate", interrupt)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhow are you?\n"))
    out = command("chat", "-n", "5", "--temp", "0")
    assert len(calls) == 2 and out.count("\n") >= 2
    assert calls[1] > len("<s>user: hello</s>") - 6  # the first message did not run again


def test_a_conversation_runs_only_what_is_new(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Template:
        def render(self, messages: list[dict[str, str]]) -> str:
            return "".join(f"<s>{m['role'][0]}{m['content']}</s>" for m in messages) + "<s>a"

    lengths: list[int] = []
    real = text_module._read

    def read(session: Session, tokens: list[int], progress: Any) -> Any:
        lengths.append(len(tokens))
        return real(session, tokens, progress)

    monkeypatch.setattr(text_module, "_read", read)
    tokenizer = text_module.Tokenizer(model.file.fields)
    # Answers of bytes only, so that their texts encode to the same tokens
    monkeypatch.setattr(tokenizer, "piece", lambda token, special=False: b"ab")
    session = model.session(n_ctx=64, n_batch=16)
    talk = Conversation(session, tokenizer, Template())  # type: ignore[arg-type]
    assert "".join(talk.answer("hi", n=3)) == "ababab"
    answer = talk.answer("you", n=3)
    assert next(answer) == "ab"
    answer.close()  # as Ctrl-C does
    roles = [message["role"] for message in talk.messages]
    assert roles == ["user", "assistant"] * 2 and talk.messages[-1]["content"] == "ab"
    assert lengths[0] == 7 and lengths[1] < 7 + 3 + 8
    messages = list(talk.messages)
    with pytest.raises(text_module.ShapeError, match="do not fit"):
        list(talk.answer("x" * 64))
    assert talk.messages == messages
    assert "".join(talk.answer("ok", n=1)) == "ab"
    # The same conversation in one piece ends with the same logits.
    logits = session.forward([5])
    other = model.session(n_ctx=64).forward(session.tokens)
    np.testing.assert_allclose(logits, other, rtol=1e-4, atol=1e-4)


def test_logits(command: Command, model: Model, tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    printed = command("logits", "-p", "hello ab", "-o", str(path), "-ub", "4", "-ctk", "f32")
    assert printed == f"{path}: float32 (7, 512)\n"
    logits = np.load(path)
    tokens = text_module.Tokenizer(model.file.fields).encode("hello ab")
    np.testing.assert_allclose(logits, model.session().forward(tokens, "all"), 1e-4, 1e-4)
    assert logits.dtype == np.float32 and [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    command("logits", "--tokens", ",".join(map(str, tokens)), "-o", str(path), "-ctk", "f32")
    np.testing.assert_allclose(np.load(path), logits, 1e-4, 1e-4)


def test_logits_need_room_on_the_disk(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.npy"
    path.write_bytes(b"old")
    for free in (128 + 2 * 512 * 4 - 1, 128 + 2 * 512 * 4):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        status = int(free % 2)
        command("logits", "--tokens", "1,2", "-o", str(path), status=status)
        assert (path.read_bytes() == b"old") == bool(status)
        assert [p.name for p in tmp_path.iterdir()] == ["out.npy"]
    os.mkfifo(tmp_path / "fifo")
    command("logits", "-p", "ab", "-o", str(tmp_path / "fifo"), status=1)
    assert (tmp_path / "fifo").is_fifo()


def test_perplexity(command: Command, model: Model, tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(30))
    (tmp_path / "text.txt").write_text(text)
    out = command("perplexity", "-f", str(tmp_path / "text.txt"), "-c", "32", "--chunks", "2")
    tokens = text_module.Tokenizer(model.file.fields).encode(text)
    losses = []
    for chunk in (tokens[:32], tokens[32:64]):
        logits = model.session().forward(chunk, "all").astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-logp[i, chunk[i + 1]] for i in range(16, 31)]
    mean = np.mean(losses)
    error = np.sqrt((np.mean(np.square(losses)) - mean**2) / (len(losses) - 1)) * np.exp(mean)
    numbers = [float(text) for text in re.findall(r"\d+\.\d+", out)]
    first = np.exp(np.mean(losses[:15]))
    np.testing.assert_allclose(numbers, [first, np.exp(mean), np.exp(mean), error], rtol=5e-3)
    assert re.fullmatch(r"\[1\][\d.]+,\[2\][\d.]+,\nFinal estimate: PPL = .* \+/- .*\n", out)


def test_bos_begins_each_chunk(model: Model) -> None:
    session = model.session(n_ctx=16)
    chunk = list(range(10, 26))
    with_bos = perplexity.chunk_losses(session, chunk, first=0)
    assert with_bos == perplexity.chunk_losses(session, [0, *chunk[1:]])
    assert with_bos != perplexity.chunk_losses(session, chunk)


def test_layers_on_the_gpu() -> None:
    def host(n: int | None, *names: str, tied: bool = False) -> list[str]:
        pins = model_options.layer_pins(n, 3, names or ("cuda", "numpy"), tied=tied)
        labels = [f"blk.{i}.attn_q.weight" for i in (0, 1, 2, 11)]
        labels += ["cache_k_l1", "cache_k_l11", "output.weight", "token_embd.weight"]
        return [label for label in labels if any(re.search(p, label) for p in pins)]

    blocks = [f"blk.{i}.attn_q.weight" for i in range(3)]
    assert host(None) == host(4) == host(99) == host(1, "numpy") == []
    assert host(3) == blocks[:1]
    assert host(2) == [*blocks[:2], "cache_k_l1"]
    assert host(1) == [*blocks, "cache_k_l1"]
    assert host(0) == [*blocks, "cache_k_l1", "output.weight"]
    assert host(0, tied=True)[-2:] == ["output.weight", "token_embd.weight"]


def test_options_reach_the_model(tiny: Path) -> None:
    parser = argparse.ArgumentParser()
    model_options.add_model_options(parser)
    words = "-c 100 -b 30 -ub 40 -ctk bf16 -ctv f32 -cti f32 -fa off -mla 2 -fmoe off -amb 5"
    args = parser.parse_args(
        ["-m", str(tiny), "--backend", "numpy", *words.split(), "-ot", "a=numpy"]
    )
    with model_options.open_model(args) as model:
        session = model_options.new_session(args, model)
        assert (session.n_ctx, session.n_batch) == (100, 30)
        given = model.options
        assert (given.cache_k, given.cache_v, given.mla) == ("bf16", "f32", 3)
        assert given.cache_i == "f32"
        assert not given.flash and not given.fused
        assert model.amb == 5 and model.pins == {"a": "numpy"}


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("cpu", [True, False])
def test_auto_is_cuda_if_there_is_a_gpu_and_cpu_or_numpy_on_the_host(
    cuda: bool, cpu: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyggml.backends.cuda.present", lambda: cuda)
    monkeypatch.setattr("pyggml.backends.cpu.present", lambda: cpu)
    expected = [*(["cuda"] if cuda else []), "cpu" if cpu else "numpy"]
    parser = argparse.ArgumentParser()
    model_options.add_model_options(parser)
    for words in ([], ["--backend", "auto"]):
        assert parser.parse_args(["-m", str(tiny), *words]).backend == expected
    with load(tiny) as model:
        assert list(model.backends) == expected
