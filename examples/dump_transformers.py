"""Write what the modules of a transformers model compute to an .npz file, for `pyggml diff`.

python examples/dump_transformers.py MODEL OUT.npz --tokens 1,2,3

MODEL is a folder or a name that transformers can load, the model from which the GGUF file was made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def dump(model: Any, tokens: Sequence[int], path: str | Path) -> None:
    """Run the model on tokens; write the results of all its modules by name, and the tokens."""
    import torch

    arrays: dict[str, Any] = {"tokens": np.array(tokens, np.int32)}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, result: Any) -> None:
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, torch.Tensor):
                arrays[name] = first.detach().float().cpu().numpy()

        return keep

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(torch.tensor([list(tokens)], device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    np.savez(path, **arrays)


def main(argv: Sequence[str] | None = None) -> int:
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder or a name")
    parser.add_argument("out", help="the .npz file")
    parser.add_argument("--tokens", required=True, help="ids: 1,2,3")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    dump(model, [int(word) for word in args.tokens.split(",")], args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
