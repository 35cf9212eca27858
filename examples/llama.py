"""SmolLM2 from leaves to text, with nothing from pyggml.models.

docs/from-gguf-to-text.md explains each part. Other llama files work, too, if their rope has no
scaling. The tokenizer needs the extra `text`.

    OPENBLAS_NUM_THREADS=1 python examples/llama.py -m SmolLM2-135M-Instruct.Q4_1.gguf -p "Why?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyggml as gg
from pyggml import gguf
from pyggml.generate.tokenizer import Tokenizer

SWAP = (0, 2, 1, 3)  # [d, n_head, T] <-> [d, T, n_head]


class Llama:
    """The graph of a llama file, and two plans in a store: for parts of a prompt, and one token."""

    def __init__(self, file: gguf.GGUFFile, n_ctx: int = 1024, n_batch: int = 32) -> None:
        key: dict[str, Any] = {k.removeprefix("llama."): v for k, v in file.fields.items()}
        scaled = key.get("rope.scaling.factor", 1.0) != 1 or "rope_freqs.weight" in file.tensors
        if key["general.architecture"] != "llama" or scaled:
            raise gg.GGUFError(f"{file.paths[0]}: the example is for llama without rope scaling")
        self.n_layer, self.n_head = key["block_count"], key["attention.head_count"]
        self.n_head_kv = key.get("attention.head_count_kv", self.n_head)
        self.d = key["embedding_length"] // self.n_head
        self.eps = key["attention.layer_norm_rms_epsilon"]
        self.freq_base = key.get("rope.freq_base", 10000.0)
        self.w = {
            name.removesuffix(".weight"): gg.constant(file.array(name), dtype=t.dtype, name=name)
            for name, t in file.tensors.items()
        }
        self.caches = {
            name: gg.state(name, "f16", ne=(self.d, n_ctx, self.n_head_kv))
            for il in range(self.n_layer)
            for name in (f"k{il}", f"v{il}")
        }
        self.n_past, self.n_ctx, store = 0, n_ctx, gg.Store()
        self.plans = {n: gg.compile(self.graph(n), store=store) for n in (1, n_batch)}

    # -- graph --------------------------------------------------------------------------------

    def graph(self, n_tokens: int) -> dict[str, gg.Node]:
        names = ("tokens", "pos", "rows")
        tokens, pos, rows = (gg.input(name, "i32", ne=(n_tokens,)) for name in names)
        mask = gg.causal_mask(pos, n_kv=self.n_ctx)
        x = gg.get_rows(self.w["token_embd"], tokens)
        for il in range(self.n_layer):
            x = x + self.attention(il, self.norm(f"blk.{il}.attn_norm", x), pos, rows, mask)
            x = x + self.feed_forward(il, self.norm(f"blk.{il}.ffn_norm", x))
        x = gg.get_rows(x, gg.input("last", "i32", ne=(1,)))  # only this token needs logits
        head = self.w.get("output", self.w["token_embd"])
        return {"logits": gg.mul_mat(head, self.norm("output_norm", x))}

    def norm(self, name: str, x: gg.Node) -> gg.Node:
        return gg.rms_norm(x, eps=self.eps) * self.w[name]

    def attention(self, il: int, x: gg.Node, pos: gg.Node, rows: gg.Node, mask: gg.Node) -> gg.Node:
        def heads(name: str, n_head: int) -> gg.Node:
            y = gg.mul_mat(self.w[f"blk.{il}.{name}"], x)
            return gg.reshape(y, ne=(self.d, n_head, x.ne[1]))

        def rotated(y: gg.Node) -> gg.Node:
            return gg.rope_ext(y, pos, n_dims=self.d, mode="normal", freq_base=self.freq_base)

        q = gg.permute(rotated(heads("attn_q", self.n_head)), axes=SWAP)
        k = gg.permute(rotated(heads("attn_k", self.n_head_kv)), axes=SWAP)
        v = gg.permute(heads("attn_v", self.n_head_kv), axes=SWAP)
        k = gg.set_rows(self.caches[f"k{il}"], k, rows)  # the whole cache, with the new rows
        v = gg.set_rows(self.caches[f"v{il}"], v, rows)
        y = gg.flash_attn_ext(q, k, v, mask, scale=self.d**-0.5)
        y = gg.reshape(y, ne=(self.d * self.n_head, x.ne[1]))
        return gg.mul_mat(self.w[f"blk.{il}.attn_output"], y)

    def feed_forward(self, il: int, x: gg.Node) -> gg.Node:
        up, gate, down = (self.w[f"blk.{il}.ffn_{name}"] for name in ("up", "gate", "down"))
        return gg.mul_mat(down, gg.silu(gg.mul_mat(gate, x)) * gg.mul_mat(up, x))

    # -- runs ---------------------------------------------------------------------------------

    def forward(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; logits of the last one, [n_vocab]."""
        if not 0 < len(tokens) <= self.n_ctx - self.n_past:
            raise gg.ShapeError(f"{len(tokens)} tokens: 1 to {self.n_ctx - self.n_past} fit")
        logits = np.empty(0, np.float32)
        size = 1 if len(tokens) == 1 else max(self.plans)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            n, inputs = len(part), np.zeros((3, size), np.int32)
            inputs[0, :n] = part
            inputs[1, :n] = inputs[2, :n] = np.arange(self.n_past, self.n_past + n)
            inputs[2, n:] = -1  # padding writes no row
            names = ("tokens", "pos", "rows")
            outputs = self.plans[size].run(dict(zip(names, inputs)), last=[n - 1])
            logits, self.n_past = outputs["logits"][0], self.n_past + n
        return logits


def generate(model: Llama, tokens: Sequence[int], n: int, end: Collection[int]) -> Iterator[int]:
    """Up to n tokens, each the most probable one."""
    for _ in range(n):
        token = int(model.forward(tokens).argmax())
        if token in end:
            break
        yield token
        tokens = [token]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", metavar="FILE", required=True, help="a llama GGUF file")
    parser.add_argument("-p", metavar="TEXT", default="What is a graph?", help="the question")
    parser.add_argument("-n", metavar="N", type=int, default=64, help="most tokens (default: 64)")
    args = parser.parse_args(argv)
    prompt = f"<|im_start|>user\n{args.p}<|im_end|>\n<|im_start|>assistant\n"
    with gguf.open(args.m) as file:
        model, tokenizer = Llama(file), Tokenizer(file.fields)
        tokens = tokenizer.encode(prompt, parse_special=True)
        for token in generate(model, tokens, args.n, tokenizer.end_tokens):
            sys.stdout.buffer.write(tokenizer.piece(token))  # perhaps a part of a character
            sys.stdout.buffer.flush()
    print()


if __name__ == "__main__":
    main()
