"""Write a program that runs one node on two places, with its inputs in a file next to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.errors import GraphError
from pyggml.graph import toposort
from pyggml.node import Node, line_of
from pyggml.ops.leaf import constant_op, input_op, state_op
from pyggml.ops.views import view_op
from pyggml.parity.alone import Alone, Values, decoded

_PROGRAM = '''"""{title}, alone on {a} and on {b}.

Its inputs are in {arrays}, next to this file. The exit status is 1 if it is out of bound.
"""

import sys
from pathlib import Path

import numpy as np

import pyggml as gg
from pyggml.parity.tolerance import within
{imports}
A, B, BOUND = {a!r}, {b!r}, {bound!r}
arrays = np.load(Path(__file__).with_suffix(".npz"))

{graph}


def run(place):
    plan = gg.compile({{"y": {result}}}, backends=[place]).bind()
    for name, key in {states!r}.items():
        plan.store.write(name, arrays[key])
    return plan.run({{name: arrays[key] for name, key in {inputs!r}.items()}})["y"]


a, b = run(A), run(B)
{changed}result = within(b, a, BOUND)
print(f"{{A}} and {{B}}: {{result}}")
sys.exit(0 if result else 1)
'''

_CHANGED = """# Elements that neither of them wrote do not count.
same = (a == arrays["before"]) & (b == arrays["before"])
a[same] = b[same] = 0
"""


def write_script(
    path: Path, single: Alone, values: Values, label: str, places: tuple[str, str], bound: float
) -> None:
    """Write the program `path`, and the arrays of the node's leaves next to it."""
    nodes = toposort([single.result])
    var = {node: f"t{i}" for i, node in enumerate(nodes)}
    of = {leaf: root for root, leaf in single.leaves.items()}
    arrays = {var[leaf]: values[root] for leaf, root in of.items()}
    changed = ""
    if single.state is not None:
        arrays["before"] = decoded(single.state, values[single.state])
        changed = _CHANGED
    node, built = single.node, line_of(single.node)
    at = f", built at {built}" if built else ""
    text = _PROGRAM.format(
        title=_quotable(f"{label} = {node.op.name} {node.spec}{at}"),
        a=places[0],
        b=places[1],
        bound=bound,
        arrays=_quotable(path.with_suffix(".npz").name),
        imports="".join(_imports(nodes)),
        graph="\n".join(f"{var[n]} = {_built(n, var)}" for n in nodes),
        result=var[single.result],
        states=_names(state_op, var),
        inputs=_names(input_op, var),
        changed=changed,
    )
    path.write_text(text, encoding="utf-8")
    np.savez(path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]


def _quotable(text: str) -> str:
    """The text, safe inside a docstring."""
    return text.replace("\\", "/").replace('"""', "'''")


def _names(kind: Any, var: Mapping[Node, str]) -> dict[str, str]:
    """Leaf name -> its key among the arrays."""
    return {node.attrs["name"]: key for node, key in var.items() if node.op is kind}


def _public(node: Node) -> bool:
    """Whether `pyggml` exports the node's op under its name."""
    return node.op.leaf or node.op is view_op or getattr(ops, node.op.name, None) is node.op


def _imports(nodes: tuple[Node, ...]) -> list[str]:
    """Import lines for ops from outside the library."""
    lines = []
    for node in nodes:
        if _public(node):
            continue
        module, name = node.op.__module__, node.op.name
        if module == "__main__" or getattr(sys.modules.get(module), name, None) is not node.op:
            raise GraphError(
                f"the script cannot import the op {name} from {module}; define it in a module, "
                "under its own name"
            )
        lines.append(f"from {module} import {name}\n")
    return lines


def _built(node: Node, var: Mapping[Node, str]) -> str:
    """The call that builds the node."""
    attrs, kind = dict(node.attrs), node.dtype.name
    if node.op is constant_op:
        return f"gg.constant(arrays[{var[node]!r}], dtype={kind!r}, name={attrs['name']!r})"
    if node.op.leaf:
        sizes = node.ne[: node.spec.rank]
        return f"gg.{node.op.name}({attrs['name']!r}, {kind!r}, ne={sizes})"
    if node.op is view_op:
        attrs["ne"] = attrs["ne"][: attrs.pop("rank")]
    arguments = ["None" if s is None else var[s] for s in node.src]
    arguments += [f"{key}={_literal(value)}" for key, value in attrs.items()]
    return f"{'gg.' if _public(node) else ''}{node.op.name}({', '.join(arguments)})"


def _literal(value: Any) -> str:
    infinite = isinstance(value, float) and abs(value) == inf
    return f'float("{value}")' if infinite else repr(value)
