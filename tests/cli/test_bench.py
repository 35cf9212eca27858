"""`pyggml bench` and `pyggml sweep`: their output, read as a script of llama-bench reads it."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyggml.bench import plot, runs
from pyggml.bench.panels import Panel
from pyggml.cli import bench, main, measuring, parser_of
from pyggml.generate.session import Session
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from tests.cli.test_progress import terminal_for

ROOT = Path(__file__).resolve().parent.parent.parent
Streams = pytest.CaptureFixture[str]
Command = Callable[..., str]
#: What compare-llama-bench.py of llama.cpp requires of every row, in its versions of 2025 and 2026.
KEYS = {
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename",
    "model_type", "model_size", "model_n_params", "n_batch", "n_ubatch", "n_threads", "cpu_mask",
    "cpu_strict", "poll", "type_k", "type_v", "n_gpu_layers", "n_cpu_moe", "split_mode",
    "main_gpu", "no_kv_offload", "flash_attn", "tensor_split", "tensor_buft_overrides", "use_mmap",
    "load_mode", "embeddings", "no_op_offload", "fit_target", "fit_min_ctx", "n_prompt", "n_gen",
    "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(path, preset("tiny", layers=1), dtype="q8_0", seed=3)
    return path


@pytest.fixture
def command(tiny: Path, capsys: Streams) -> Command:
    """What a command prints; it must succeed."""

    def run(name: str, *words: str) -> str:
        places = () if "--backend" in words else ("--backend", "numpy")
        assert main([name, "-m", str(tiny), *places, *words]) == 0
        out, err = capsys.readouterr()
        assert not err
        return out

    return run


def table(text: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(set(cell) <= {"-", ":"} for cell in cells[1])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def objects(text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


# -- tests ------------------------------------------------------------------------------------


def test_the_table(command: Command, tiny: Path) -> None:
    out = command("bench", "-p", "8,16", "-n", "3", "-pg", "8,2", "-d", "0,20", "--loop", "-r", "2")
    rows = table(out)
    names = "pp8 pp16 tg3 tg3 loop pp8+tg2".replace(" loop", "_loop").split()
    at_depth = [f"{name} @ d20" for name in names]
    assert [row["test"] for row in rows] == [n.replace("_", " ") for n in (*names, *at_depth)]
    heads = list(rows[0])
    assert heads[:5] == ["model", "size", "params", "backend", "threads"]
    assert heads[-5:] == ["compute MiB", "cache MiB", "scores MiB", "test", "t/s"]
    for row in rows:
        mean, deviation = map(float, row["t/s"].split(" ± "))
        assert mean > 0 and deviation >= 0
        assert row["backend"] == "numpy" and row["size"].endswith(" MiB")
        assert row["params"].endswith(" M") and row["model"].startswith("deepseek2 ")
    last = out.rstrip().splitlines()[-1]
    assert last.startswith("build: ") and last.endswith(")")


def test_json_csv_and_lines_have_the_fields_that_scripts_require(command: Command) -> None:
    words = ("-p", "8", "-n", "3", "-r", "3")
    rows = objects(command("bench", *words, "-o", "json"))
    lines = [json.loads(line) for line in command("bench", *words, "-o", "jsonl").splitlines()]
    cells = list(csv.DictReader(io.StringIO(command("bench", *words, "-o", "csv"))))
    assert len(rows) == len(lines) == len(cells) == 2
    for row, line, record in zip(rows, lines, cells):
        assert KEYS <= row.keys() == line.keys()
        assert KEYS <= record.keys() == row.keys() - {"samples_ns", "samples_ts"}
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 3
        n = row["n_prompt"] + row["n_gen"]
        rates = [n * 1e9 / ns for ns in row["samples_ns"]]
        assert row["samples_ts"] == pytest.approx(rates)
        assert row["avg_ts"] == pytest.approx(sum(rates) / 3)
        assert (record["n_prompt"], record["type_k"]) == (str(row["n_prompt"]), "f16")
        assert record["use_mmap"] == "1" and float(record["avg_ts"]) > 0
        assert row["compute_bytes"] > 0 and row["cache_bytes"] > 0


def test_random_weights_of_a_header(tmp_path: Path, capsys: Streams) -> None:
    path = tmp_path / "header.gguf"
    synth(path, preset("tiny-deepseek4"), header_only=True)
    words = ["-m", str(path), "--backend", "numpy"]
    test = ["-p", "8", "-n", "0", "-r", "1", "-o", "json"]
    assert main(["bench", *words, *test]) == 1 and "is incomplete" in capsys.readouterr().err
    assert main(["bench", *words, *test, "--random-weights"]) == 0
    [row] = objects(capsys.readouterr().out)
    assert row["random_weights"] is True and row["avg_ts"] > 0
    assert main(["sweep", *words, "-c", "64", "-ub", "32", "-n", "2", "--random-weights"]) == 0


def test_options_multiply(command: Command) -> None:
    words = ("-p", "8", "-n", "0", "-r", "1", "-ctk", "f16,f32", "-fa", "0", "-fa", "on")
    rows = objects(command("bench", *words, "-amb", "none,1", "-mla", "0,2", "-o", "json"))
    forms = [(row["type_k"], row["flash_attn"], row["mla"], row["amb"]) for row in rows]
    assert forms == [
        (k, fa, mla, amb) for k in ("f16", "f32") for fa in (0, 1) for mla in (0, 3)
        for amb in (0, 1)
    ]  # fmt: skip
    caches = {(row["type_k"], row["mla"]): row["cache_bytes"] for row in rows}
    assert caches["f16", 0] < caches["f32", 0]
    shown = table(
        command("bench", *words, "-ub", "4", "-ot", "none", "-ot", "attn=numpy;blk=numpy")
    )
    assert list(shown[0])[4:-5] == ["threads", "n_ubatch", "type_k", "fa", "ot"]
    assert [row["ot"] for row in shown[:4]] == ["none"] * 4
    assert {row["ot"] for row in shown[4:]} == {"attn=numpy;blk=numpy"}


def test_models_that_differ_in_their_graphs_are_opened_once(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    inner = bench.model_options.open_model
    monkeypatch.setattr(
        bench.model_options, "open_model", lambda args: (opened.append(args.ngl), inner(args))[1]
    )
    words = ("-p", "4", "-n", "0", "-r", "1", "-fa", "0,1", "-ub", "2,4", "-o", "json")
    rows = objects(command("bench", *words, "-ngl", "0-2", "--backend", "null,numpy"))
    assert opened == [0, 1, 2] and len(rows) == 12
    assert [row["n_gpu_layers"] for row in rows] == [n for n in (0, 1, 2) for _ in range(4)]
    shown = table(command("bench", *words[:-2], "-ngl", "1", "--backend", "null,numpy"))
    assert shown[0]["ngl"] == "1" and shown[0]["backend"] == "null,numpy"
    assert "threads" not in shown[0]


#: From the help of llama-bench; those of -mla, -amb and -fmoe from that of ik_llama.cpp.
LONG = {
    "-m": "--model", "-p": "--n-prompt", "-n": "--n-gen", "-d": "--n-depth", "-b": "--batch-size",
    "-ub": "--ubatch-size", "-ctk": "--cache-type-k", "-ctv": "--cache-type-v", "-t": "--threads",
    "-ngl": "--n-gpu-layers", "-fa": "--flash-attn", "-ot": "--override-tensor",
    "-r": "--repetitions", "-o": "--output", "-mla": "--mla-attn", "-amb": "--attn-max-batch",
    "-fmoe": "--fused-moe",
}  # fmt: skip


def test_long_names_are_those_of_llama_bench() -> None:
    values = {
        "-m": "x", "-p": "1,2", "-n": "3", "-d": "4", "-b": "5", "-ub": "6,7", "-ctk": "q8_0",
        "-ctv": "f32", "-t": "8", "-ngl": "9", "-fa": "0,1", "-ot": "exps=numpy", "-r": "10",
        "-o": "jsonl", "-mla": "1", "-amb": "11", "-fmoe": "0",
    }  # fmt: skip
    for name, keys in (("bench", LONG), ("sweep", LONG.keys() - {"-p", "-d", "-r"})):
        parser = parser_of(name)
        given = {key: values[key].replace("0,1", "1").replace("6,7", "6") for key in keys}
        short = [word for key, value in given.items() for word in (key, value)]
        long = [f"{LONG[key]}={value}" for key, value in given.items()]
        assert parser.parse_args(short) == parser.parse_args(long)
    assert parser_of("sweep").parse_args(["-m", "x", "--ctx-size", "70"]).c == 70


def test_ranges_are_those_of_llama_bench() -> None:
    def numbers(text: str) -> list[int]:
        args = parser_of("bench").parse_args(["-m", "x", "-p", text])
        return list(args.p)

    assert numbers("512") == [512] and numbers("1,2,8") == [1, 2, 8]
    assert numbers("1-4") == [1, 2, 3, 4] and numbers("0-10+4") == [0, 4, 8]
    assert numbers("128-2048*4,7") == [128, 512, 2048, 7]
    args = parser_of("bench").parse_args(["-m", "x", "-p", "1", "-p", "2,3", "-m", "y"])
    assert args.p == [1, 2, 3] and args.n == [128] and args.m == ["x", "y"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("bench", "required: -m"),
        ("bench -m x -p 8-4", "'8-4' is not a range"),
        ("bench -m x -p 0-8*2", "'0-8*2' is not a range"),
        ("bench -m x -p 1-8*1", "'1-8*1' is not a range"),
        ("bench -m x -p 1-8+0", "'1-8+0' is not a range"),
        ("bench -m x -p 1-1000000", "more than 1,000 numbers"),
        ("bench -m x -p 1,", "must be numbers such as"),
        ("bench -m x -p -5", "must be numbers such as"),
        ("bench -m x -ub 0,4", "at least 1"),
        ("bench -m x -t 0", "at least 1"),
        ("bench -m x -r 0", "of at least 1, got '0'"),
        ("bench -m x -pg 512", "must be two numbers such as 512,128"),
        ("bench -m x -ctk f16,q9", "unknown type 'q9'"),
        ("bench -m x -fa maybe", "must be on or off, got 'maybe'"),
        ("bench -m x -mla 1,4", "from 0 to 3, got '4'"),
        ("bench -m x -amb 1,-1", "must be a number above 0, got '-1'"),
        ("bench -m x --backend cudaa", "no backend 'cudaa'"),
        ("bench -m x -ot foo", "expected REGEX=PLACE"),
        ("bench -m x -o yaml", "invalid choice: 'yaml'"),
        ("bench -m x -p 0 -n 0", "there is no test"),
        ("bench -m x --plot x.pdf", "must end in .svg or .png"),
        ("bench -m x --plot nowhere/x.svg", "there is no folder"),
        ("bench -m x --peers x.json", "--peers needs --plot"),
        ("sweep -m x -c 100", "a prompt of 512 tokens does not fit in a context of 100"),
        ("sweep -m x -c 8 -ub 4 -n 5", "5 tokens do not fit after 4 in a context of 8"),
        ("sweep -m x -n 0", "at least 1"),
    ],
)
def test_wrong_usage(words: str, why: str, capsys: Streams) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert not out and why in " ".join(err.split())
    assert err.splitlines()[-1].startswith("pyggml") and "error: " in err.splitlines()[-1]


def test_a_file_of_peers_that_is_wrong_is_found_before_the_model_is_opened(
    tmp_path: Path, capsys: Streams
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    path = tmp_path / "peers.json"
    for text in ("{}", "[1]", "no json", '[{"n_prompt": 1}]', '{"rows": [{"engine": "x"}]}'):
        path.write_text(text)
        words = ["--plot", str(tmp_path / "x.svg"), "--peers", str(path)]
        assert main(["bench", "-m", "nofile.gguf", *words]) == 2, text
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and "is neither a record of peers" in err, text


def test_errors_print_what_was_measured(tiny: Path, capsys: Streams) -> None:
    words = ["-p", "4", "-n", "0", "-r", "1", "--backend", "numpy", "-o", "json"]
    assert main(["bench", "-m", "nofile.gguf", *words]) == 1
    assert not capsys.readouterr().out
    assert main(["bench", "-m", str(tiny), "-m", "nofile.gguf", *words]) == 1
    out, err = capsys.readouterr()
    assert len(objects(out)) == 1 and "nofile.gguf: No such file" in err


# -- threads and interrupts -------------------------------------------------------------------


def test_each_number_of_threads_is_measured_in_its_own_process(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    before = dict(os.environ)
    words = ("-p", "4", "-n", "0", "-r", "1", "-o", "json")
    rows = objects(command("bench", *words, "-t", "1,2"))
    assert [row["n_threads"] for row in rows] == [1, 2]
    assert dict(os.environ) == before
    assert objects(command("bench", *words))[0]["n_threads"] == 7
    points = objects(command("sweep", "-c", "8", "-ub", "4", "-n", "1", "-t", "3", "-o", "json"))
    assert {point["n_threads"] for point in points} == {3}


def test_an_error_of_a_process_is_an_error_here(capsys: Streams) -> None:
    words = ["bench", "-m", "nofile.gguf", "--backend", "numpy"]
    assert main([*words, "-t", "1"]) == 1
    out, err = capsys.readouterr()
    assert not out and "nofile.gguf" in err and err.count("\n") == 1
    assert main(words) == 1
    assert capsys.readouterr().err == err  # as without a process
    assert main([*words, "-t", "1", "--debug"]) == 1
    trace = capsys.readouterr().err
    assert "ChildError: Traceback" in trace and "in open_model" in trace and trace.endswith(err)


def test_an_interrupt_prints_what_was_measured(
    tiny: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    inner = runs.nanoseconds_of

    def interrupted(*args: Any) -> int:
        if next(calls) == 7:  # three runs of pp4, three of pp6, the warm-up and a run of tg1
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(runs, "nanoseconds_of", interrupted)
    words = ["-p", "4,6", "-n", "1", "-r", "2", "--backend", "numpy", "-o", "json"]
    assert main(["bench", "-m", str(tiny), *words]) == 130
    out, err = capsys.readouterr()
    assert [row["test"] for row in objects(out)] == ["pp4", "pp6"]
    assert err == "pyggml: interrupted\n"


@pytest.mark.parametrize("threads", [(), ("-t", "1")], ids=["here", "process"])
def test_ctrl_c(threads: tuple[str, ...], tiny: Path) -> None:
    words = ("bench", "-m", str(tiny), "--backend", "numpy", "-p", "4", "-n", "100000", "-r", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "pyggml", *words, *threads], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "pyggml: interrupted\n"
    assert " pp4 " in lines[-1] and out.startswith("\nbuild: ")


def test_a_bar_shows_the_runs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    words = ["-m", str(tiny), "--backend", "null,numpy", "-p", "4", "-n", "1", "-r", "2"]
    assert main(["bench", *words]) == 0
    bars = [bar.rpartition("] ")[2] for bar in terminal.bars if bar.startswith("bench")]
    assert bars == [f"{n} of 8 runs" for n in (0, 1, 2, 3, 4, 4, 5, 6, 7)]
    assert any(bar.startswith("loading") for bar in terminal.bars) and terminal.screen == ""


# -- sweep ------------------------------------------------------------------------------------


def test_the_sweep(command: Command) -> None:
    words = ("-c", "70", "-ub", "16", "-fa", "0", "-amb", "1")
    out = command("sweep", *words)
    assert out.startswith("|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |")
    assert all(line.startswith("|") for line in out.splitlines())  # sweep-bench-plot.py reads all
    rows = table(out)
    assert [(row["PP"], row["TG"], row["N_KV"]) for row in rows] == [
        ("16", "4", n) for n in ("0", "16", "32", "48")
    ]
    points = objects(command("sweep", *words, "-o", "json"))
    assert [point["n_kv"] for point in points] == [0, 16, 32, 48]
    for point in points:
        assert point["speed_pp"] == pytest.approx(16 / point["t_pp"])
        assert point["speed_tg"] == pytest.approx(4 / point["t_tg"])
        assert point["n_kv_max"] == 70 and point["n_ubatch"] == 16 and point["amb"] == 1
        assert 0 < point["score_peak_bytes"] <= 2**20
    caches = [point["cache_bytes"] for point in points]
    assert caches == [(i + 1) * caches[0] for i in range(4)]
    assert len(command("sweep", *words, "-o", "csv").splitlines()) == 5
    assert len(command("sweep", *words, "-o", "jsonl").splitlines()) == 4


# -- plots ------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Panel]]:
    """The panels of the last plot."""
    panels: list[Panel] = []
    inner = plot.draw

    def draw(new: list[Panel], path: Path, title: str) -> None:
        panels[:] = new
        inner(new, path, title)

    monkeypatch.setattr(plot, "draw", draw)
    yield panels


def test_plots(command: Command, drawn: list[Panel], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    peers = str(ROOT / "benchmarks/results/peers.json")
    path = tmp_path / "speed.svg"
    words = ("-r", "1", "-n", "2", "--plot", str(path))
    command("bench", "-p", "8,16", "-fa", "0,1", *words, "--peers", peers)
    prompt, generation = drawn
    assert (prompt.title, prompt.x_label) == ("prompt", "tokens of the prompt")
    assert [line.label for line in prompt.lines if not line.peer] == [
        "pyggml, fa 0",
        "pyggml, fa 1",
    ]
    assert [[x for x, _, _ in line.points] for line in prompt.lines[:2]] == [[8, 16], [8, 16]]
    by_label = {line.label: line.points for line in (*prompt.lines, *generation.lines) if line.peer}
    assert by_label["llama.cpp, standard file"] == ((0, 376.0, 0.0), (4096, 335.0, 0.0))
    assert (2048, 15000.0, 0.0) not in by_label["ik_llama.cpp, standard"]
    assert generation.x_label == "tokens in the cache"
    text = path.read_text()
    assert text.startswith("<?xml") and "deepseek2" not in prompt.title

    rows = command("bench", "-p", "8", "-d", "0,8,16", *words[:4], "-o", "json")
    Path(tmp_path / "before.json").write_text(rows)
    picture = tmp_path / "depth.png"
    words = ("-p", "8", "-d", "0,8,16", "-n", "2", "-r", "1", "--loop", "--plot", str(picture))
    command("bench", *words, "--peers", str(tmp_path / "before.json"))
    prompt, generation = drawn
    assert (prompt.title, prompt.x_label) == ("prompt of 8 tokens", "tokens in the cache")
    assert [line.label for line in generation.lines if not line.peer] == ["pyggml", "pyggml, loop"]
    before = {(r["n_prompt"], r["n_depth"]): r["avg_ts"] for r in objects(rows)}
    assert prompt.lines[-1].points == tuple((d, before[8, d], 0.0) for d in (0, 8, 16))
    assert prompt.lines[-1].peer and prompt.lines[-1].label.startswith("before numpy, fa 1")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_a_sweep(command: Command, drawn: list[Panel], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    path = tmp_path / "sweep.svg"
    words = ("sweep", "-c", "24", "-ub", "8", "-o", "json", "--plot", str(path))
    points = objects(command(*words))
    speeds = [tuple((p["n_kv"], p[f"speed_{what}"]) for p in points) for what in ("pp", "tg")]
    for panel, expected in zip(drawn, speeds, strict=True):
        (line,) = panel.lines
        assert [x for x, _, _ in line.points] == [0, 8, 16] == [x for x, _ in expected]
        assert [y for _, y, _ in line.points] == pytest.approx([y for _, y in expected])
    assert path.exists()


def test_a_plot_needs_matplotlib_before_anything_runs(
    tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(measuring, "with_threads", None)
    assert main(["bench", "-m", "x", "--plot", str(tmp_path / "x.svg")]) == 1
    assert 'pip install -e ".[plot]"' in capsys.readouterr().err


def test_sessions_are_dropped_after_their_test(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their caches may fill a device."""
    import weakref

    alive: weakref.WeakSet[Session] = weakref.WeakSet()
    inner, counts = measuring.Runs.begin, []

    def begin(self: Any, session: Session) -> None:
        alive.add(session)
        counts.append(len(alive))
        inner(self, session)

    monkeypatch.setattr(measuring.Runs, "begin", begin)
    command("bench", "-p", "4,5,6", "-n", "1", "-r", "1")
    assert counts == [1, 1, 1, 1]


def test_a_sharded_model(command: Command) -> None:
    words = ("-p", "4", "-n", "0", "-r", "1", "--no-warmup", "--backend", "numpy:0,numpy:1")
    (row,) = table(command("bench", *words, "--shard", "heads=2,rows=2"))
    assert row["shard"] == "heads=2,rows=2" and row["backend"] == "numpy:0,numpy:1"
    assert "threads" in row and "ngl" not in row
    (whole,) = objects(command("bench", *words[:-1], "numpy", "-o", "json"))
    assert whole["shard"] == "none"
