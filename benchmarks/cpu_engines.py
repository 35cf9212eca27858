"""The engines that benchmarks/cpu.py compares, each in a process of its own.

    python benchmarks/cpu_engines.py pyggml:cpu|pyggml:numpy|llama.cpp FILE THREADS N_CTX

Reads lines of JSON, {"test": "prompt", "n": 512} or {"test": "decode", "depth": 0, "n": 32}, and
answers each with a line, {"seconds": 1.25}. Decoding takes the best token of the logits and feeds
it back, one token at a time. An engine that waits for its next line uses no core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
#: Most tokens of a batch, for both engines.
N_BATCH = 512


class Engine(ABC):
    """A model with a sequence of tokens."""

    depth: int | None = None  # how many tokens of `decode` it holds

    @abstractmethod
    def forward(self, tokens: Sequence[int]) -> int:
        """Append tokens; the best next token."""

    @abstractmethod
    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens."""

    def prompt(self, n: int) -> float:
        """Seconds for a prompt of `n` tokens."""
        self.depth = None
        self.truncate(0)
        start = perf_counter()
        self.forward(_tokens(0, n))
        return perf_counter() - start

    def decode(self, depth: int, n: int) -> float:
        """Seconds for `n` tokens after `depth` others."""
        if self.depth != depth:
            self.truncate(0)
            for begin in range(0, depth, N_BATCH):
                self.forward(_tokens(begin, min(depth, begin + N_BATCH)))
            self.depth = depth
        self.truncate(depth)
        token = self.forward([1])  # what is done once for a depth
        start = perf_counter()
        for _ in range(n):
            token = self.forward([token])
        return perf_counter() - start


def _tokens(begin: int, end: int) -> list[int]:
    return [i % 1000 + 5 for i in range(begin, end)]


class Ours(Engine):
    """pyggml on one backend."""

    def __init__(self, backend: str, path: str, n_ctx: int) -> None:
        import pyggml as gg

        self.session = gg.load(path, backends=[backend]).session(n_ctx=n_ctx, n_batch=N_BATCH)

    def forward(self, tokens: Sequence[int]) -> int:
        return int(self.session.forward(tokens)[-1].argmax())

    def truncate(self, n: int) -> None:
        self.session.truncate(n)


class Peer(Engine):
    """llama.cpp through llama-cpp-python's C interface, with flash attention."""

    def __init__(self, path: str, threads: int, n_ctx: int) -> None:
        import llama_cpp
        import numpy as np

        self.lib, self.np = llama_cpp, np
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, None)
        self.model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, N_BATCH, N_BATCH
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = 1
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self.past = 0

    def forward(self, tokens: Sequence[int]) -> int:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.past + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if status := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        self.past += len(tokens)
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return int(self.np.ctypeslib.as_array(logits, (self.n_vocab,)).argmax())

    def truncate(self, n: int) -> None:
        memory = self.lib.llama_get_memory(self.context)
        self.lib.llama_memory_seq_rm(memory, 0, n, -1)
        self.past = n


class Process:
    """An engine in a process of its own."""

    def __init__(self, engine: str, path: Path, threads: int, n_ctx: int) -> None:
        command = [sys.executable, __file__, engine, str(path), str(threads), str(n_ctx)]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYGGML_THREADS")
        environment = {
            **os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": ":".join(paths)
        }  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def seconds(self, test: dict[str, Any]) -> float:
        """The seconds that a test takes; RuntimeError if the process has ended."""
        ask, answer = self._pipe(self.process.stdin), self._pipe(self.process.stdout)
        ask.write(json.dumps(test) + "\n")
        ask.flush()
        line = answer.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with status {self.process.wait()}")
        return float(json.loads(line)["seconds"])

    def close(self) -> None:
        self._pipe(self.process.stdin).close()
        self.process.wait()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def main() -> None:
    name, path, threads, n_ctx = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    engine: Engine
    if name == "llama.cpp":
        engine = Peer(path, int(threads), int(n_ctx))
    else:
        engine = Ours(name.partition(":")[2], path, int(n_ctx))
    for line in sys.stdin:
        test = json.loads(line)
        name = test.pop("test")
        seconds = engine.prompt(**test) if name == "prompt" else engine.decode(**test)
        answers.write(json.dumps({"seconds": seconds}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
