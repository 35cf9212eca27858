"""Convert the weights of a GGUF file to another type.

As in llama-quantize, vectors, norms, biases and the router keep their type. output.weight (or
token_embd.weight, if it is the output matrix, too) is q8_0 if TYPE has fewer than 6.5 bits. A row
that is not whole blocks of TYPE becomes q8_0, or f16 if it is not whole blocks of 32 either.

pyggml quantize model-f16.gguf model-q4_0.gguf q4_0
pyggml quantize model-f16.gguf model-q8_0.gguf q8_0 --json
"""

from __future__ import annotations

import argparse
import time

from pyggml import gguf
from pyggml.cli.progress import progress
from pyggml.cli.terminal import print_json
from pyggml.gguf.quantize import QUANTIZABLE, quantize


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="IN", help="a GGUF file, or the first of its parts")
    add("out", metavar="OUT", help="the file to write; it appears when it is complete")
    add("type", metavar="TYPE", type=str.lower, choices=QUANTIZABLE,
        help=f"storage type: {' '.join(QUANTIZABLE)}")  # fmt: skip
    add("--allow-requantize", action="store_true",
        help="convert block types, too, which loses quality twice")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    with gguf.open(args.file) as file:
        before = sum(tensor.nbytes for tensor in file.tensors.values())
        size = quantize(
            file,
            args.out,
            args.type,
            requantize=args.allow_requantize,
            progress=progress("writing", "bytes"),
        )
    seconds = time.perf_counter() - start
    if args.json:
        sizes = {"bytes": size, "bytes_before": before, "seconds": seconds}
        print_json({"file": args.out, **sizes})
        return 0
    print(f"{args.out}: {size:,} bytes from {before:,} in {seconds:.1f} s")
    return 0
