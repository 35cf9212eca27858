"""Measure how fast a model reads prompts and generates tokens, with llama-bench's tests.

pyggml bench -m FILE                                pp512 and tg128
pyggml bench -m FILE -p 512-4096*2 -n 0             prompts of 512, 1024, 2048 and 4096 tokens
pyggml bench -m FILE -p 0 -n 64 -d 0,4096 --loop    generation by depth, also without the host
pyggml bench -m FILE -fa 0,1 -amb 0,256 -o json     every combination of the options
pyggml bench -m FILE -d 0-8192+1024 --plot out.svg --peers peers.json
pyggml bench -m FILE --ops -p 0 -n 1 -d 4096        what each step of a token costs

Options are lists: 1,2 or 0-8+2 or 1-8*2, or the option several times. Every combination is
measured. Each test runs once untimed and then -r times. t/s is the mean and the standard deviation.

tgN feeds tokens from the host and waits for the logits of each, as llama-bench does. `tgN loop` is
the loop on the device that `generate(ahead=N)` uses. The memory is that of a session for the test.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import groupby, product
from typing import TYPE_CHECKING

from pyggml import backends
from pyggml.cli import bench_ops, measuring, model_options, options
from pyggml.cli.options import UsageError
from pyggml.cli.processes import add_nproc
from pyggml.errors import DTypeError
from pyggml.runtime.shards import shard_text

if TYPE_CHECKING:
    from pyggml.bench.runs import Row, Test

#: Option -> its field in the output. It is a column if a value differs from the default.
FIELDS = {
    "b": "n_batch", "ub": "n_ubatch", "ctk": "type_k", "ctv": "type_v", "cti": "type_i",
    "fa": "flash_attn", "mla": "mla", "amb": "amb", "fmoe": "fmoe",
    "decode_weights": "decode_weights", "ot": "tensor_buft_overrides", "shard": "shard",
}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tests")
    add = options.by_first_name(group.add_argument)
    add("-p", "--n-prompt", type=options.numbers(0), metavar="N,..", action=options.Values,
        default=[512], help="tokens of a prompt; 0 for none (default: 512)")  # fmt: skip
    add("-n", "--n-gen", type=options.numbers(0), metavar="N,..", action=options.Values,
        default=[128], help="tokens to generate; 0 for none (default: 128)")  # fmt: skip
    add("-pg", type=_pair, metavar="P,N", action="append", default=[],
        help="a prompt of P tokens, then N generated ones, timed together")  # fmt: skip
    add("-d", "--n-depth", type=options.numbers(0), metavar="N,..", action=options.Values,
        default=[0], help="tokens in the cache before each test (default: 0)")  # fmt: skip
    add("--loop", action="store_true",
        help="add the tests tgN loop, in which the device feeds the tokens itself")  # fmt: skip
    add("-r", "--repetitions", type=options.count, metavar="N", default=5,
        help="runs of each test that count (default: %(default)s)")  # fmt: skip
    bench_ops.add_ops_options(parser)
    measuring.add_output_options(parser)
    model_options.add_model_options(parser, lists=True)
    add_nproc(parser)


@options.option
def _pair(text: str) -> tuple[int, int]:
    words = text.split(",")
    if len(words) != 2 or not all(word.isascii() and word.isdecimal() for word in words):
        raise DTypeError(f"must be two numbers such as 512,128, got {text!r}")
    return int(words[0]), int(words[1])


def run(args: argparse.Namespace) -> int:
    measuring.check_together(args)
    if args.ops:
        return bench_ops.ops(args)
    from pyggml.bench import panels
    from pyggml.bench.tables import Markdown

    if args.trace is not None:
        raise UsageError("--trace needs --ops")
    if not tests_of(args):
        raise UsageError("there is no test: -p and -n are 0, and there is no -pg")
    peers = measuring.peers_of(args)
    measuring.report(
        args,
        partial(Markdown, columns(args)),
        measuring.with_threads(rows, args),
        partial(panels.row_panels, peers=peers),
    )
    return 0


def tests_of(args: argparse.Namespace) -> list[Test]:
    """The tests, in llama-bench's order."""
    from pyggml.bench.runs import Test

    tests: list[Test] = []
    for depth in args.d:
        tests += [Test(n, 0, depth) for n in args.p if n]
        for n, loop in product(args.n, (False, True)[: 1 + args.loop]):
            if n:
                tests.append(Test(0, n, depth, loop))
        tests += [Test(p, n, depth) for p, n in args.pg if p + n]
    return tests


def columns(args: argparse.Namespace) -> dict[str, str]:
    """The fields that the table shows -> the longest text of those that are texts.

    As in llama-bench, these are ngl or threads, and the options that are not always the default.
    """
    parser = argparse.ArgumentParser()
    model_options.add_model_options(parser, lists=True)
    default = next(model_options.combinations(parser.parse_args(["-m", ""])))
    settings = list(model_options.combinations(args))
    fields = dict.fromkeys(
        "n_threads" if _on_host(setting) else "n_gpu_layers" for setting in settings
    )
    if args.t != [None]:
        fields["n_threads"] = None
    for name, field in FIELDS.items():
        if any(getattr(setting, name) != getattr(default, name) for setting in settings):
            fields[field] = None
    texts = {
        "backends": [",".join(setting.backend) for setting in settings],
        "tensor_buft_overrides": [measuring.pins_text(setting.ot) for setting in settings],
        "shard": [shard_text(setting.shard or "none") for setting in settings],
    }
    longest = {name: max(words, key=len) for name, words in texts.items()}
    return {name: longest.get(name, "") for name in (*fields, "backends")}


def _on_host(setting: argparse.Namespace) -> bool:
    """Whether the first place is in the host's memory: numpy, or numpy:0 of several."""
    return setting.backend[0].partition(":")[0] in backends.HOSTS


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of every combination. Models that differ only in their graphs are opened once."""
    from pyggml.bench.runs import WARMUPS, measure

    tests = tests_of(args)
    settings = list(model_options.combinations(args))
    each = args.r + WARMUPS * (not args.no_warmup)
    runs = measuring.Runs("bench", each * len(tests) * len(settings))
    for _, group in groupby(settings, model_options.same_model):
        same = list(group)
        with model_options.open_model(same[0]) as model:
            for setting in same:
                yield from measure(
                    model_options.variant(model, setting),
                    tests,
                    n_batch=setting.b,
                    n_ubatch=setting.ub,
                    repeats=args.r,
                    warmup=not args.no_warmup,
                    setting=measuring.unknown_to_models(setting),
                    begin=runs.begin,
                    ran=runs.ran,
                )
