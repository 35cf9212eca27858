"""The parts of sparse attention for one token, alone: the indexer, the choice, listed rows.

    python benchmarks/sparse.py [--backend cpu] [--seconds 3] [--quick]

Sizes are those of DeepSeek V3.2 at a depth of 65,536: index keys and cache rows of f16, 64 index
heads, 2,048 chosen rows, 128 heads of 576/512. Each row is the shortest of many runs, in
microseconds; the tests take turns. The record is benchmarks/results/sparse/BACKEND-DATE.json.
--quick only checks that everything runs: small sizes, no record.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

import pyggml as gg
from benchmarks import record
from benchmarks.record import Record, Row
from pyggml.node import Node

#: (rows of the cache, elements of a long row for top_k, chosen rows, heads)
FULL, QUICK = (65536, 163840, 2048, 128), (512, 2000, 100, 4)
INDEX, HEADS, ROW, VALUE = 128, 64, 576, 512


@dataclass(frozen=True)
class Test:
    """A plan with its inputs; states have random values.

    work  operations of a run
    """

    name: str
    plan: gg.Plan
    inputs: dict[str, np.ndarray]
    work: float

    def seconds(self) -> float:
        start = perf_counter()
        self.plan.run(self.inputs)
        return perf_counter() - start


def _test(
    name: str, place: str, y: Node, work: float, rng: np.random.Generator, most: int = 0
) -> Test:
    """most: ids are distinct numbers below it."""
    plan = gg.compile({"y": y}, backends=[place])
    inputs: dict[str, np.ndarray] = {}
    plan.bind()
    for leaf in gg.Graph({"y": y}).nodes:
        if not leaf.op.leaf:
            continue
        label, shape = leaf.attrs["name"], leaf.shape
        if leaf.dtype.name == "i32":
            inputs[label] = rng.permutation(most)[: leaf.ne[0]].reshape(shape).astype(np.int32)
        elif leaf.op is gg.ops.leaf.state_op:
            plan.store.write(label, rng.standard_normal(shape, dtype=np.float32).astype("f2"))
        else:
            inputs[label] = rng.standard_normal(shape, dtype=np.float32)
    return Test(name, plan, inputs, work)


def tests(place: str, sizes: tuple[int, int, int, int]) -> list[Test]:
    n_kv, long, chosen, heads = sizes
    rng = np.random.default_rng(0)
    keys = gg.state("index", "f16", ne=(INDEX, n_kv))
    rows = gg.state("rows", "f16", ne=(ROW, n_kv))
    q, values = gg.input("q", ne=(ROW, 1, heads)), gg.view(rows, ne=(VALUE, n_kv))
    ids = gg.input("ids", "i32", ne=(chosen, 1))
    scores = gg.lightning_indexer(
        gg.input("queries", ne=(INDEX, HEADS, 1)), keys, gg.input("weights", ne=(HEADS, 1))
    )
    listed = gg.flash_attn_ext(q, rows, values, ids=ids, scale=0.05)
    dense = gg.flash_attn_ext(q, rows, values, scale=0.05)
    pair = 2.0 * heads * (ROW + VALUE)
    graphs = [
        *(
            (f"top_k_{chosen}_of_{n}", gg.top_k(gg.input("scores", ne=(n,)), k=chosen), float(n))
            for n in (n_kv, long)
        ),
        (f"indexer_{n_kv}", scores, 2.0 * n_kv * HEADS * INDEX),
        (f"list_{chosen}_of_{n_kv}", listed, pair * chosen),
        (f"dense_{n_kv}", dense, pair * n_kv),
    ]
    return [_test(name, place, y, work, rng, n_kv) for name, y, work in graphs]


def measured(all_tests: Sequence[Test], seconds: float) -> list[Row]:
    """Rows of all tests, which take turns for so many seconds each."""
    times: dict[str, list[float]] = {test.name: [] for test in all_tests}
    for test in all_tests:
        test.seconds()
    begun = perf_counter()
    while perf_counter() - begun < seconds * len(all_tests):
        for test in all_tests:
            turn = perf_counter()
            while not times[test.name] or perf_counter() - turn < seconds / 10:
                times[test.name].append(1e6 * test.seconds())
    rows = []
    for test in all_tests:
        samples = [round(us, 1) for us in sorted(times[test.name])[:20]]
        rate = test.work / samples[0] / 1e3
        rows.append(record.row(test.name, "us", samples[0], samples, giga_ops=round(rate, 2)))
    return rows


def main(arguments: Sequence[str]) -> Record:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="cpu", help="the place that runs it (default: cpu)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each test (default: 3)")
    parser.add_argument("--about", default="", help="a note for the record")
    parser.add_argument("--quick", action="store_true", help="small sizes, no record")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    seconds = 0.05 if options.quick else options.seconds
    rows = measured(tests(options.backend, sizes), seconds)
    result = record.new(" ".join(["python", "benchmarks/sparse.py", *arguments]), rows=rows)
    result["about"] = {"backend": options.backend, "note": options.about}
    for row in rows:
        print(f"{row['name']:24} {row['value']:12.1f} us  {row['giga_ops']:9.2f} G/s")
    if not options.quick:
        name = options.backend.partition(":")[0]
        record.write(Path(record.RESULTS) / "sparse" / f"{name}-{result['date']}.json", result)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
