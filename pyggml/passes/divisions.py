"""What a graph computes in parts: sums over devices, and results that are gathered.

No model is known here. A product W x whose x can be computed in parts along k, back to weights
that are cut by rows, becomes a sum over devices. If there is an attention on the way, it is cut by
heads; else the products on the way are cut by rows. A product by expert ids becomes a sum over
devices that have some of the experts, and an attention over a cache a sum over devices that have
some of its rows. If the attention is to chosen rows, the choice (`top_k` of scores of a cache's
rows) is made on each device among its own rows, and then among these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pyggml.graph import Graph
from pyggml.node import Node, label_of
from pyggml.operation import slice_of
from pyggml.ops.attention import causal_mask, flash_attn_ext
from pyggml.ops.copy import get_rows
from pyggml.ops.leaf import constant_op, state_op
from pyggml.ops.linear import mul_mat, mul_mat_id
from pyggml.ops.merge import merge_lse
from pyggml.ops.reduce import soft_max_ext, top_k
from pyggml.ops.views import state_of
from pyggml.passes.parts import Family, divided, interleaved, sliced
from pyggml.traits import Ids

#: The rows of a table or a matrix are divided if there are so many times more than elements of one:
#: those of a vocabulary.
TALL = 4

#: All plans of a store must cut its states alike, and they read caches in steps of 256 positions
#: (`KV_STEP` of generate/plans.py). A row that stands for more positions than 256 / N is therefore
#: on each of N devices; there are few of them.
STEP = 256

#: The shares of the devices that compute a node.
Shares = Sequence[float]


@dataclass(frozen=True, slots=True)
class Sum:
    """A node that is a sum over devices.

    kind    what the devices divide: "k", elements of a product's rows; "ids", what ids choose from;
            "kv", rows of a cache
    family  its parts: along k, along the ids' axis of the weights, along the rows
    """

    kind: Literal["k", "ids", "kv"]
    family: Family


@dataclass(slots=True)
class Divisions:
    """How the nodes of a graph are divided.

    sums     node -> the sum that it is
    passed   nodes that are computed from the parts of a sum, before it is summed
    choices  top_k -> the parts of the rows from which it chooses, along axis 0 of its source
    gathers  node -> the parts along axis 0 of its result
    masked   node -> ids: rows whose id another device has are not needed there
    reasons  for each cut that was asked for, why a node could not be cut
    """

    sums: dict[Node, Sum] = field(default_factory=dict)
    passed: set[Node] = field(default_factory=set)
    choices: dict[Node, Family] = field(default_factory=dict)
    gathers: dict[Node, Family] = field(default_factory=dict)
    masked: dict[Node, Node] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)

    def is_partial(self, node: Node) -> bool:
        """Whether each device has a part of a sum for the node."""
        return node in self.sums or node in self.passed

    def kind(self, node: Node) -> str:
        """The kind of the sum that a node is, or from whose parts it is computed; else ""."""
        while node in self.passed:
            node = next(s for s in node.src if s is not None and self.is_partial(s))
        total = self.sums.get(node)
        return "" if total is None else total.kind


def divide(graph: Graph, cuts: Mapping[str, int], shares_of: Callable[[Node], Shares]) -> Divisions:
    """Decide what is divided.

    cuts       "heads", "rows", "experts", "sequence"
    shares_of  node -> the shares of the devices that compute it; one if it is not divided
    """
    divider = _Divider(graph, cuts, shares_of)
    for node in graph.nodes:
        divider.decide(node)
    for node in graph.nodes:
        divider.gather(node)
        divider.follow(node)
    return divider.result


@dataclass(slots=True)
class _Chain:
    """The nodes that are computed in parts on the way to a sum."""

    products: set[Node] = field(default_factory=set)
    attention: bool = False
    torn: Node | None = None

    @property
    def cut(self) -> str | None:
        """The cut that it is part of."""
        return "heads" if self.attention else "rows" if self.products else None


class _Divider:
    def __init__(
        self, graph: Graph, cuts: Mapping[str, int], shares_of: Callable[[Node], Shares]
    ) -> None:
        self.graph, self.cuts, self.shares_of = graph, cuts, shares_of
        self.result = Divisions()
        self.constant = _constants(graph)
        self.before_attention = _before_attention(graph, self.constant)
        self.roots = set(graph.roots)
        self.units: dict[int, list[int]] = {}  # extent -> units that chains could be cut into
        self.in_chains: set[Node] = set()

    def decide(self, node: Node) -> None:
        """Make `node` a sum if a cut that was asked for says so."""
        shares = self.shares_of(node)
        if len(shares) < 2 or node.op.leaf or node.op.view is not None:
            return
        sums = self.result.sums
        if node.op is flash_attn_ext and "sequence" in self.cuts:
            family = self._by_rows_of_cache(node, len(shares))
            if family is not None:
                sums[node] = Sum("kv", family)
                self.result.used.add("sequence")
        elif node.op is top_k and "sequence" in self.cuts:
            family = interleaved(0, node["a"].ne[0], len(shares))
            if family is not None and self._scores_cache(node["a"], family):
                self.result.choices[node] = family
                self.result.used.add("sequence")
        elif node.op.ids is not None and node.op.writes is None:
            family = self._by_ids(node, node.op.ids, shares)
            if family is not None:
                sums[node] = Sum("ids", family)
        if node not in sums and node.op in (mul_mat, mul_mat_id):
            family = self._by_k(node, shares)
            if family is not None:
                sums[node] = Sum("k", family)

    # -- sums ---------------------------------------------------------------------------------

    def _by_ids(self, node: Node, ids: Ids, shares: Shares) -> Family | None:
        """The parts of what ids choose from: experts, or the rows of a vocabulary."""
        of = node[ids.of]
        weights = {node[name] for name in (*node.op.weights, ids.of)}
        if not weights <= self.constant or node.dtype.name != "f32":
            return None
        n = of.ne[ids.axis]
        cut = "experts" if node.op.weights else "rows"
        tall = node.op is get_rows and n >= TALL * of.ne[0] and of.ne[0] > 1
        if cut not in self.cuts or (cut == "rows" and not tall):
            return None
        family = divided(n, shares)
        if family is None:
            self.result.reasons[cut] = f"{label_of(of)} has {n} for {len(shares)} devices"
            return None
        self.result.used.add(cut)
        return family

    def _by_rows_of_cache(self, node: Node, count: int) -> Family | None:
        """The parts of the keys, if they come from a state; rows take turns over the devices."""
        reasons = self.result.reasons
        k, v, mask = node["k"], node["v"], node.get("mask")
        if node.get("kv_len") is not None or not all(self._from_state(x) for x in (k, v)):
            return None  # keys are counted, or computed from the tokens
        if mask is not None and _stride(mask) * count > STEP:
            why = (
                f"a row of {label_of(node)} stands for {_stride(mask)} tokens, more than {STEP} / N"
            )
            reasons.setdefault("sequence", f"{why} for N = {count} devices")
            return None
        family = interleaved(1, k.ne[1], count)
        if family is None:
            reasons["sequence"] = (
                f"{label_of(node)} reads {k.ne[1]} rows, not the same number for {count} devices"
            )
        return family

    def _scores_cache(self, node: Node, family: Family) -> bool:
        """Whether parts along axis 0 of scores are computed from parts of a state's rows, and all
        else that they read is not from a state."""
        stack, cut = [(node, family)], False
        while stack:
            each, parts = stack.pop()
            if each.op is state_op:
                cut = True
                continue
            if each in self.constant or each.op.leaf:
                continue
            if each.op.writes is not None:  # new rows are written to the parts of the state
                stack.append((each.root, parts))
                continue
            step = sliced(each, parts)
            if step is None:
                if self._reads_state(each):
                    return False
                continue
            stack += [(s, p) for s, p in zip(each.src, step.families) if s is not None and p]
        return cut

    def _reads_state(self, node: Node) -> bool:
        """Whether a tensor is computed from a state, besides others."""
        stack, seen = [node], {node}
        while stack:
            each = stack.pop()
            if each.op is state_op:
                return True
            new = [s for s in each.src if s is not None and s not in seen]
            seen.update(new)
            stack += new
        return False

    def _from_state(self, node: Node) -> bool:
        """Whether a tensor is computed from a state alone."""
        stack, states = [node], False
        while stack:
            each = stack.pop()
            if each.op is state_op or each.op.writes is not None:
                states = True
            elif each.op.leaf and each.op is not constant_op:
                return False
            else:
                stack += [s for s in each.src if s is not None]
        return states

    def _by_k(self, node: Node, shares: Shares) -> Family | None:
        """The parts of the rows of a product with weights, if what it multiplies is computed in
        parts."""
        weights = node[node.op.weights[0]]
        if weights not in self.constant or node.dtype.name != "f32":
            return None
        k, b = weights.ne[0], node["b"]
        known = self.units.setdefault(k, [])
        torn: Node | None = None
        for unit in [*known, *(u for u in _divisors(k) if u not in known)]:
            family = divided(k, shares, unit)
            if family is None:
                continue
            first = sliced(node, family, "k")
            if first is None:
                continue
            chain = self._chain(b, first.families[1])
            if chain.torn is not None and chain.torn.op in (flash_attn_ext, soft_max_ext):
                torn = chain.torn
            if chain.cut is not None and chain.cut in self.cuts:
                if unit not in known:
                    known.append(unit)
                self.result.used.add(chain.cut)
                self.in_chains |= chain.products
                return family
        if torn is not None:
            n_head = torn.ne[1 if torn.op is flash_attn_ext else 2]
            block = weights.dtype.block
            blocks = f" and whole blocks of {block} of {label_of(weights)}" if block > 1 else ""
            self.result.reasons.setdefault(
                "heads",
                f"the {n_head} heads of {label_of(torn)} cannot be divided over {len(shares)} "
                f"devices in whole groups that share K and V{blocks}",
            )
        return None

    def _chain(self, node: Node, family: Family | None) -> _Chain:
        """What is computed in parts so that each device has a part of `node`."""
        chain = _Chain()
        stack = [(node, family)] if family is not None else []
        seen = set(stack)
        while stack:
            node, family = stack.pop()
            assert family is not None
            if node in self.constant or node.op.leaf:
                continue
            if len(self.shares_of(node)) != len(family) or self.result.is_partial(node):
                continue
            step = sliced(node, family)
            if step is None:
                chain.torn = node
                continue
            if any(node[name] in self.constant for name in node.op.weights):
                chain.products.add(node)
            chain.attention |= node.op in (flash_attn_ext, soft_max_ext)
            for source, parts in zip(node.src, step.families):
                if source is not None and parts is not None and (source, parts) not in seen:
                    seen.add((source, parts))
                    stack.append((source, parts))
        return chain

    # -- after the sums -----------------------------------------------------------------------

    def gather(self, node: Node) -> None:
        """Divide the rows of a tall matrix that no sum needs in parts."""
        shares, result = self.shares_of(node), self.result
        if "rows" not in self.cuts or node.op is not mul_mat or len(shares) < 2:
            return
        if node in self.before_attention:  # gathering queries or expanded keys costs more
            return
        a = node["a"]
        taken = node in result.sums or node in self.in_chains
        if taken or a not in self.constant or a.ne[1] < TALL * a.ne[0]:
            return
        family = divided(node.ne[0], shares, 32) or divided(node.ne[0], shares)
        if family is not None:
            result.gathers[node] = family
            result.used.add("rows")

    def follow(self, node: Node) -> None:
        """Note whether `node` can be computed from parts of sums, and from rows for some ids."""
        result = self.result
        if node.op.leaf or node in result.gathers:
            return
        total = result.sums.get(node)
        if total is not None:
            if total.kind == "ids" and node.op.weights:
                result.masked[node] = node["ids"]
            return
        self._pass_on(node)
        self._merge_on(node)
        ids = {result.masked[s] for s in node.src if s in result.masked}
        if len(ids) == 1 and all(self._by_row(node, s) for s in node.src if s in result.masked):
            result.masked[node] = ids.pop()

    def _pass_on(self, node: Node) -> None:
        """A sum comes later if the node is linear in its only source that is one."""
        result, users = self.result, self.graph.users
        linear = node.op.linear
        sources = [node[name] for name in linear]
        if node.op.view is not None and node.op is not state_of:
            sources = [s for s in node.src[:1] if s is not None]
        others = [s for s in node.src if s is not None and s not in sources]
        partial = [s for s in sources if result.is_partial(s)]
        if not sources or len(partial) < len(sources) or node.dtype.name != "f32":
            return
        if any(result.is_partial(s) for s in others):
            return
        alone = all(users[s] == [node] and s not in self.roots for s in sources)
        alike = all(list(self.shares_of(s)) == list(self.shares_of(node)) for s in sources)
        kinds = {result.kind(s) for s in sources}
        smaller = node.spec.elements <= sum(s.spec.elements for s in sources)
        if alone and alike and smaller and "kv" not in kinds:
            result.passed.add(node)

    def _merge_on(self, node: Node) -> None:
        """Attentions that are merged with each other are summed after that, together."""
        result, users = self.result, self.graph.users
        if node.op is not merge_lse or len(self.shares_of(node)) < 2:
            return
        parts = [node["a"], node["b"]]
        alone = all(users[s] == [node] and s not in self.roots for s in parts)
        if alone and all(result.kind(s) == "kv" for s in parts):
            result.passed.add(node)

    def _by_row(self, node: Node, source: Node) -> bool:
        """Whether each row of `node` is computed from the same row of `source`."""
        i = node.src.index(source)
        for axis in (1, 2):
            if node.ne[axis] != source.ne[axis]:
                return False
            rule = slice_of(node, axis, 1)
            cut = None if rule is None else rule.cuts[i]
            plain = cut is not None and cut.axis == axis and (cut.mul, cut.div) == (1, 1)
            if not plain or (cut is not None and (cut.mod or cut.add)):
                return False
        return True


def _constants(graph: Graph) -> set[Node]:
    """The nodes that are computed from constants alone."""
    constant: set[Node] = set()
    for node in graph.nodes:
        derived = not node.op.leaf and all(s is None or s in constant for s in node.src)
        if derived or node.op is constant_op:
            constant.add(node)
    return constant


def _before_attention(graph: Graph, constant: Collection[Node]) -> set[Node]:
    """The nodes that an attention depends on: a fused one, or a product without weights."""
    before: set[Node] = set()
    for node in reversed(graph.nodes):
        product = node["a"].base if node.op is soft_max_ext else node
        scores = product is not node and product.op is mul_mat and product["a"] not in constant
        if node.op is flash_attn_ext or scores or node in before:
            before.update(s for s in node.src if s is not None)
    return before


def _stride(mask: Node) -> int:
    """For how many positions a row stands that a mask hides or not."""
    return int(mask.attrs["stride"]) if mask.op is causal_mask else 1


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
