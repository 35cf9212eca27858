"""The attention kernels of GPUs with less shared memory, run on one that has more.

    python benchmarks/gpu_portable.py                  on a GPU of 9.0 or newer
    python benchmarks/gpu_portable.py --backend numpy  the cases alone, without a GPU

flash_attn_ext of few queries as 8.0 (163 KB of shared memory a block) and 8.6 or 8.9 (99 KB) take
it, against float64: the same instances, compiled for the GPU at hand without what only 9.0 has.
Nothing is timed. Exit status: 1 where a case fails, or ran on a kernel that is not meant.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

from pyggml.backends.cuda.launch import Launch
from pyggml.parity.case import Case
from pyggml.parity.cases import expand
from pyggml.parity.running import tested

#: Bytes of shared memory that a block can have, by compute capability.
SHARED = {"8.0": 166_912, "8.9": 101_376}
#: What few queries may run on.
MEANT = ("split<", "latent<", "combine<", "survey")
LINES = """
flash_attn_ext(f32[{64|128|256},{1|2},8], {f16|bf16|q8_0}[$1,{1|17|3000},{2|8}], $3[$1,$4,$5], scale=0.1)
flash_attn_ext(f32[192,{1|3},16], {f16|bf16|q8_0}[192,{130|1999},{4|16}], $2[128,$3,$4], {-|f16[$3,3]~causal|f16[$3,3]~blocks}, scale=0.07)
flash_attn_ext(f32[{80|96},{1|3},4,2], {f16|bf16}[$1,{33|1000},{1|4},2], $3[$1,$4,$5,2], {-|f16[$4,3]~mask}, scale=0.1, lse=True)
flash_attn_ext(f32[{64|128|256},1,4], {f16|q8_0}[$1,999,4], $2[$1,999,4], f16[999,1,4]~mask, f32[4], i32[1]#{0|500}, scale=0.2, max_bias=8.0, logit_softcap=10.0)
flash_attn_ext(f32[576,{1|2},{5|16|128}]@p0213, {f16|bf16|q8_0}[576,{100|4096}], $3[512,$4]=1+{0|64}, {-|f16[$4,2]~causal}, scale=0.04)
flash_attn_ext(f32[576,1,16], {f16|q8_0}[576,999], $1[512,999]=1+64, f16[999,1,16]~mask, f32[16], i32[1]#{0|500}, scale=0.04, max_bias=8.0, logit_softcap=10.0, lse=True)
"""  # noqa: E501


def check(cases: Sequence[Case], backend: str) -> bool:
    """Whether all are right; a line says how many."""
    counts: Counter[str] = Counter()
    worst, start = 0.0, perf_counter()
    for case in cases:
        outcome = tested(case, backend)
        counts[outcome.status] += 1
        worst = max(worst, outcome.error or 0.0)
        if outcome.status != "ok" and counts[outcome.status] < 4:
            print(f"{outcome.status} {case}\n     {outcome.why[:400]}")
    seconds = perf_counter() - start
    print(f"{counts['ok']} of {len(cases)} right, worst NMSE {worst:.2g}, {seconds:.1f} s")
    return counts["ok"] == len(cases)


@contextmanager
def narrowed(shared: int) -> Iterator[Counter[str]]:
    """cuda:0 with less shared memory and no kernels of 9.0a; how often each kernel was bound."""
    from pyggml.backends.cuda.device import driver

    context, used = driver.context(0), Counter[str]()
    about, load = context.about, context.load

    def counted(launches: Sequence[Launch]) -> None:
        used.update(one.name for one in launches)
        load(launches)

    context.about = replace(about, arch=about.arch.rstrip("a"), shared=shared)
    context.load = counted  # type: ignore[method-assign]
    try:
        yield used
    finally:
        context.about, context.load = about, load  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=["cuda", "numpy"], default="cuda")
    parser.add_argument("--every", type=int, default=1, help="only each so manieth case")
    args = parser.parse_args()
    cases = expand(LINES)[:: args.every]
    if args.backend == "numpy":
        return not check(cases, "numpy")
    fine = True
    for capability, shared in SHARED.items():
        print(f"portable kernels of {capability}:")
        with narrowed(shared) as used:
            fine &= check(cases, "cuda")
        other = sorted(name for name in used if not name.startswith(MEANT))
        small = [name for name in used if name.startswith(("split<", "latent<"))]
        print(f"{len(small)} instances: {', '.join(sorted(small))}")
        if other or not small:
            fine = False
            print(f"FAIL not meant: {', '.join(other) or 'none ran'}")
    print("portable kernels:", "ok" if fine else "FAIL")
    return not fine


if __name__ == "__main__":
    sys.exit(main())
