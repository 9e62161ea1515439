"""Source of a loop over rows, from the operations that a formula was traced to.

A value is `[rows, heads]`, or `[rows, 1]` where something was taken over the heads, or columns of
such side by side, `[rows, heads, columns]`. Columns are handled one by one: to pick, join and
stretch them is a matter of names. What is left are numbers per head: successive ones share a loop
over heads, and only those that another loop reads are put down in an array.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from server.kernels.cpu_formula_loops import Cell, Loop, Loops, Unknown, Value

NUMBERS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "reciprocal": "F(1) / {0}",
    # Exact at both ends.
    "lerp": "{0} + {2} * ({1} - {0}) if {2} < F(0.5) else {1} - ({1} - {0}) * (F(1) - {2})",
}
COMPARISONS = {
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
}
CONDITIONS = {
    "bitwise_and": "{0} and {1}",
    "bitwise_or": "{0} or {1}",
    "bitwise_not": "not {0}",
}
# Over the heads. NaN wins.
REDUCTIONS = {
    "sum": ("F(0)", "{0} + {1}"),
    "amax": ("F(-inf)", "{1} if {1} > {0} or {1} != {1} else {0}"),
}
# Greatest first, NaN before all, equal ones as they were.
RANKED = """\
for h in range({heads}):
    x, place = {values}[h], 0
    for j in range({heads}):
        y = {values}[j]
        above, below = y > x or (y != y and x == x), x > y or (x != x and y == y)
        place += above or (j < h and not below)
    {order}[place] = h"""
ELEMENTWISE = {
    **NUMBERS,
    **COMPARISONS,
    **CONDITIONS,
    "where": "{1} if {0} else {2}",
}
# Where a traced call creates something, these say no more than its value does.
INDIFFERENT = {"dtype", "layout", "device", "pin_memory", "memory_format"}


class FormulaSource:
    """Writes the function `formula(mass, slot, *tables, *results)`.

    Args:
        graph: traced with `mass` `[rows, heads, columns]` and tables `[rows, heads]`; gives a tuple
            of values.

    Raises:
        Unknown: something in it has no source.
    """

    def __init__(self, graph: Graph) -> None:
        self._values: dict[Node, Value] = {}
        self._several: dict[Node, tuple[Value, ...]] = {}
        self._loops = Loops()
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._shape = tuple(inputs[0].meta["val"].shape)
        for index, node in enumerate(inputs):
            self._values[node] = self._input(index, node)
        for node in graph.nodes:
            if node.op == "call_function":
                self._take(node, self._call(node))
            elif node.op == "output":
                results = [(self._value(each), each.meta["val"].shape[1]) for each in node.args[0]]
            elif node.op != "placeholder":
                raise Unknown(str(node.op))
        self.text = self._text(len(inputs) - 1, results)

    def _take(self, node: Node, found: Value | tuple[Value, ...]) -> None:
        if isinstance(found, Value):
            self._values[node] = found
        else:
            self._several[node] = found

    def _input(self, index: int, node: Node) -> Value:
        rows, heads, columns = self._shape
        dtype, shape = node.meta["val"].dtype, tuple(node.meta["val"].shape)
        if index == 0:
            return Value([Cell(f"mass[r, h, {c}]", dtype, heads) for c in range(columns)], True)
        if shape != (rows, heads):
            raise Unknown(f"a table of {shape}")
        return Value([Cell(f"table{index}[s, h]", dtype, heads)])

    def _text(self, tables: int, results: Sequence[tuple[Value, int]]) -> str:
        names = [f"table{index + 1}" for index in range(tables)]
        outputs = [f"result{index}" for index in range(len(results))]
        stores = [_store(name, *result) for name, result in zip(outputs, results, strict=True)]
        stored = (line for store in stores for line in store)
        body = ["s = slot[r]", *self._loops.source(), *stored]
        return "\n".join(
            [
                f"def formula({', '.join(['mass', 'slot', *names, *outputs])}):",
                *_indented(self._loops.arrays(), 1),
                "    for r in range(mass.shape[0]):",
                *_indented(body, 2),
                "",
            ]
        )

    def _call(self, node: Node) -> Value | tuple[Value, ...]:
        if node.target is operator.getitem:
            source, index = node.args
            return self._several[source][index]  # type: ignore[index]
        name = _name(node)
        if name in ELEMENTWISE:
            return self._elementwise(name, node)
        known: Mapping[str, Callable[..., Value | tuple[Value, ...]]] = {
            "_to_copy": self._converted,
            "amax": self._highest,
            "cat": self._joined,
            "expand": self._stretched,
            "ones_like": self._ones,
            "scalar_tensor": self._filled,
            "scatter": self._scattered,
            "scatter_": self._scattered,
            "select": self._selected,
            "slice": self._sliced,
            "sort": self._sorted,
            "stack": self._stacked,
            "sum": self._sum,
            "unbind": self._unbound,
            "unsqueeze": self._deepened,
            "zeros_like": self._zeros,
        }
        if name not in known:
            raise Unknown(str(node.target))
        return known[name](node, *node.args)

    def _value(self, argument: object) -> Value:
        if isinstance(argument, Node) and argument in self._values:
            return self._values[argument]
        if isinstance(argument, bool | int | float):
            return self._constant(argument)
        raise Unknown(f"an argument {argument}")

    def _constant(self, number: float, dtype: torch.dtype = torch.float32) -> Value:
        name = str(bool(number)) if dtype == torch.bool else f"F({float(number)!r})"
        return Value([Cell(name, dtype, 1)])

    def _elementwise(self, name: str, node: Node) -> Value:
        """Column by column; a single column goes with each of the others."""
        _plain(node)
        values = [self._value(argument) for argument in node.args]
        width = max(len(value.columns) for value in values)
        columns = [[v.columns[c % len(v.columns)] for v in values] for c in range(width)]
        dtype = node.meta["val"].dtype
        combined = [self._combined(name, dtype, cells) for cells in columns]
        return Value(combined, any(value.deep for value in values))

    def _combined(self, name: str, dtype: torch.dtype, cells: Sequence[Cell]) -> Cell:
        loop, template = self._loops.of(max(cell.length for cell in cells)), ELEMENTWISE[name]
        if len(cells) != 1 + ("{1}" in template) + ("{2}" in template):
            raise Unknown(f"{name} of {len(cells)} arguments")
        if name == "where":
            takes = [torch.bool, dtype, dtype]
        else:
            takes = [_takes(name, dtype)] * len(cells)
        read = [_as(wanted, cell, loop) for wanted, cell in zip(takes, cells, strict=True)]
        return self._loops.compute(template.format(*read), dtype, loop)

    # Created, converted and seen otherwise.

    def _ones(self, node: Node, _: object) -> Value:
        return self._filled(node, 1)

    def _zeros(self, node: Node, _: object) -> Value:
        return self._filled(node, 0)

    def _filled(self, node: Node, number: float) -> Value:
        _plain(node)
        made = node.meta["val"]
        if made.dtype not in (torch.float32, torch.bool):
            raise Unknown(f"something of {made.dtype}")
        (cell,) = self._constant(number, made.dtype).columns
        width = made.shape[2] if made.dim() == 3 else 1
        return Value([cell] * width, made.dim() == 3)

    def _converted(self, node: Node, source: Node) -> Value:
        _plain(node)
        dtype, value = node.meta["val"].dtype, self._value(source)
        if dtype != torch.float32:
            raise Unknown(f"a conversion to {dtype}")
        columns = []
        for cell in value.columns:
            loop = self._loops.of(cell.length)
            columns.append(self._loops.compute(_as(dtype, cell, loop), dtype, loop))
        return Value(columns, value.deep)

    def _deepened(self, _: Node, source: Node, axis: int) -> Value:
        if axis % 3 != 2:
            raise Unknown("an axis before the last")
        return Value([self._value(source).flat], True)

    def _stretched(self, node: Node, source: Node, _: Sequence[int]) -> Value:
        value, shape = self._value(source), tuple(node.meta["val"].shape)
        width = shape[2] if len(shape) == 3 else 1
        if len(shape) < 2 or (len(shape) == 3) != value.deep or shape[:2] != self._shape[:2]:
            raise Unknown(f"something stretched to {shape}")
        return Value([value.columns[c % len(value.columns)] for c in range(width)], value.deep)

    # Columns.

    def _selected(self, _: Node, source: Node, axis: int, index: int) -> Value:
        return Value([self._deep(source, axis).columns[index]])

    def _unbound(self, _: Node, source: Node, axis: int = 0) -> tuple[Value, ...]:
        return tuple(Value([cell]) for cell in self._deep(source, axis).columns)

    def _stacked(self, _: Node, sources: Sequence[Node], axis: int = 0) -> Value:
        if axis % 3 != 2:
            raise Unknown("an axis before the last")
        return Value([self._value(source).flat for source in sources], True)

    def _joined(self, _: Node, sources: Sequence[Node], axis: int = 0) -> Value:
        parts = [self._deep(source, axis).columns for source in sources]
        return Value([cell for part in parts for cell in part], True)

    def _sliced(
        self, node: Node, source: Node, axis: int, start: int = 0, stop: int | None = None
    ) -> Value:
        value = self._value(source)
        if value.deep:
            return Value(self._deep(source, axis).columns[start:stop], True)
        if axis % 2 != 1 or start != 0 or value.flat.loop is None:
            raise Unknown("a slice of heads that does not begin with the first")
        value.flat.kept = True
        whole = value.flat
        return Value([Cell(whole.name, whole.dtype, node.meta["val"].shape[1], whole.loop)])

    def _deep(self, source: Node, axis: int) -> Value:
        value = self._value(source)
        if not value.deep or axis % 3 != 2:
            raise Unknown("something taken from another axis than that of columns")
        return value

    # Heads.

    def _sum(self, node: Node, source: Node, axes: Sequence[int], keep: bool = False) -> Value:
        return self._reduced("sum", node, source, axes, keep)

    def _highest(self, node: Node, source: Node, axes: Sequence[int], keep: bool = False) -> Value:
        return self._reduced("amax", node, source, axes, keep)

    def _reduced(
        self, name: str, node: Node, source: Node, axes: Sequence[int], keep: bool
    ) -> Value:
        _plain(node)
        cell = self._value(source).flat
        if [axis % 2 for axis in axes] != [1] or not keep or cell.dtype != torch.float32:
            raise Unknown(f"{name} over something else than heads")
        array, (first, template) = self._loops.array(cell), REDUCTIONS[name]
        loop, result = self._loops.fill(cell.dtype, 1)
        step = template.format(result.name, f"{array}[{'h' if cell.length > 1 else 0}]")
        heads = self._shape[1]
        loop.lines = [f"{result.name} = {first}", f"for h in range({heads}):"]
        loop.lines += [f"    {result.name} = {step}", f"{result.array}[0] = {result.name}"]
        return Value([result])

    def _sorted(self, node: Node, source: Node, axis: int = -1) -> tuple[Value, ...]:
        cell, heads = self._value(source).flat, self._shape[1]
        given = {"dim": axis, **node.kwargs}
        known = [{"dim": n, "stable": True, "descending": True} for n in (1, -1)]
        if given not in known or cell.length == 1 or cell.dtype != torch.float32:
            raise Unknown("sorted otherwise than by falling values of heads, equal ones in order")
        values = self._loops.array(cell)
        loop, order = self._loops.fill(torch.int64, heads)
        text = RANKED.format(heads=heads, values=values, order=order.array)
        loop.lines = text.splitlines()
        loop, ranked = self._loops.fill(cell.dtype, heads)
        loop.lines = [
            f"for h in range({heads}):",
            f"    {ranked.array}[h] = {values}[{order.array}[h]]",
        ]
        return Value([ranked]), Value([order])

    def _scattered(self, node: Node, target: Node, axis: int, index: Node, number: float) -> Value:
        """Into something that nobody else looks at, since it is changed."""
        cell, where = self._value(target).flat, self._value(index).flat
        if axis % 2 != 1 or len(target.users) > 1 or where.dtype != torch.int64:
            raise Unknown("a scatter into something that is used otherwise, too")
        loop, result = self._loops.fill(cell.dtype, self._shape[1])
        (new,) = self._constant(number, cell.dtype).columns
        loop.lines = [
            f"for h in range({loop.length}):",
            f"    {result.array}[h] = {cell.read(loop)}",
            f"for n in range({where.length}):",
            f"    {result.array}[{where.array}[n]] = {new.name}",
        ]
        return Value([result])


def _store(name: str, result: Value, heads: int) -> list[str]:
    loop, lines = Loop(heads), [f"for h in range({heads}):"]
    for c, cell in enumerate(result.columns):
        where = f"r, h, {c}" if result.deep else "r, h"
        lines.append(f"    {name}[{where}] = {cell.read(loop)}")
    return lines


def _name(node: Node) -> str:
    """The operation, whatever it takes; one that works in place ends in `_`."""
    if not isinstance(node.target, OpOverload):
        raise Unknown(str(node.target))
    name: str = node.target.name()  # type: ignore[no-untyped-call]
    return name.removeprefix("aten::").split(".")[0]


def _takes(name: str, gives: torch.dtype) -> torch.dtype:
    """What an elementwise operation takes to give something of a type."""
    if gives != (torch.float32 if name in NUMBERS else torch.bool):
        raise Unknown(f"{name} that gives {gives}")
    return torch.bool if name in CONDITIONS else torch.float32


def _plain(node: Node) -> None:
    if set(node.kwargs) - INDIFFERENT:
        raise Unknown(f"{node.target} with {sorted(node.kwargs)}")


def _as(dtype: torch.dtype, cell: Cell, loop: Loop) -> str:
    """A cell as a number of some type."""
    read = cell.read(loop)
    if cell.dtype == dtype:
        return read
    if (cell.dtype, dtype) == (torch.bool, torch.float32):
        return f"(F(1) if {read} else F(0))"
    raise Unknown(f"{cell.dtype} as {dtype}")


def _indented(lines: Sequence[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]
