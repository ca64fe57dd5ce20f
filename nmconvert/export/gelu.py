"""A Gelu that is spelt out in elementary operators, in whatever order an exporter writes its products and sums.

Every value is taken for a polynomial in the input x and in t, the one curve among them. It is a Gelu where the last value is
½x + ½xt, and t is erf(x / √2), or tanh(√(2/π) (x + 0.044715 x³)) (Hendrycks and Gimpel 2016, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import pi, sqrt

from onnx import NodeProto

_Polynomial = dict[tuple[int, int], float]  # by the powers of x and t

_GELU: _Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_SLOPE = sqrt(2 / pi)
_CURVES: dict[str, tuple[str, _Polynomial]] = {
    "Erf": ("Gelu", {(1, 0): sqrt(0.5)}),
    "Tanh": ("GeluTanh", {(1, 0): _SLOPE, (3, 0): 0.044715 * _SLOPE}),
}
_MOST = 12  # nodes; the longest spelling known has nine


def spelt_gelu(
    value: str, readers: Mapping[str, Sequence[NodeProto]], number: Callable[[str], float | None]
) -> tuple[str, list[NodeProto]] | None:
    """``Gelu`` or ``GeluTanh`` and its nodes, the last of them last, where ``value`` goes through one; else None.

    ``readers`` are the nodes that read each value, ``number`` says what a name is that stands for one constant number.
    """
    known: dict[str, _Polynomial] = {value: {(1, 0): 1.0}}
    found = ""
    nodes: list[NodeProto] = []
    waiting = [value]
    while waiting and len(nodes) < _MOST:
        for node in readers.get(waiting.pop(0), []):
            operands = [known.get(name) or _constant(number(name)) for name in node.input]
            if any(node is seen for seen in nodes) or None in operands:  # what else it reads may still come
                continue
            if node.domain == "" and node.op_type in _CURVES and not found:
                found, argument = _CURVES[node.op_type]
                result = {(0, 1): 1.0} if _same(operands[0], argument) else None
            else:
                result = _result(node, operands)
            if result is None:
                return None
            nodes.append(node)
            if found and _same(result, _GELU):
                return found, nodes
            known[node.output[0]] = result
            waiting.append(node.output[0])
    return None


def _constant(number: float | None) -> _Polynomial | None:
    return None if number is None else {(0, 0): number}


def _result(node: NodeProto, operands: Sequence[_Polynomial | None]) -> _Polynomial | None:
    """Of a sum, product, quotient by a number, square or cube; None of any other operator."""
    if node.domain or len(operands) != 2:
        return None
    left, right = operands
    assert left is not None
    assert right is not None
    number = right.get((0, 0)) if right.keys() == {(0, 0)} else None
    if node.op_type == "Add":
        return {power: left.get(power, 0.0) + right.get(power, 0.0) for power in left.keys() | right.keys()}
    if node.op_type == "Mul":
        return _product(left, right)
    if node.op_type == "Div" and number:
        return _product(left, {(0, 0): 1 / number})
    if node.op_type == "Pow" and number in (2, 3):
        square = _product(left, left)
        return square if number == 2 else _product(square, left)
    return None


def _product(left: _Polynomial, right: _Polynomial) -> _Polynomial:
    total: _Polynomial = {}
    for ((x, t), a), ((more_x, more_t), b) in product(left.items(), right.items()):
        power = (x + more_x, t + more_t)
        total[power] = total.get(power, 0.0) + a * b
    return total


def _same(found: _Polynomial | None, wanted: _Polynomial) -> bool:
    """To five digits: some exporters round their constants."""
    return found is not None and all(
        abs(found.get(power, 0.0) - wanted.get(power, 0.0)) <= 1e-5 * abs(wanted.get(power, 0.0))
        for power in found.keys() | wanted.keys()
    )
