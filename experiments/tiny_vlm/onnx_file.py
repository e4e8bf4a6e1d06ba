"""Weights out of an ONNX file, read as the protocol buffer that it is.

Only what a plain export holds: nodes and float32 initialisers with raw bytes. Numbers
of fields are those of onnx.proto (https://onnx.ai/onnx/repo-docs/IR.html).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


__all__ = ["Graph", "Node", "linear_weights", "read"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT32 = 1


class Node(NamedTuple):
    """An operation of the graph."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph(NamedTuple):
    """A model's operations, in their order, and its float32 tensors by name."""

    nodes: list[Node]
    tensors: dict[str, np.ndarray]


def read(content: bytes) -> Graph:
    """Return what a file holds."""
    graph = next(value for field, value in _fields(memoryview(content)) if field == 7)
    nodes, tensors = [], {}
    for field, value in _fields(graph):
        if field == 1:
            nodes.append(_node(value))
        elif field == 5:
            tensors.update(_tensor(value))
    return Graph(nodes, tensors)


def linear_weights(graph: Graph) -> dict[str, np.ndarray]:
    """Return every nameless matrix by the name of the bias that is added behind it.

    An exporter folds the transposition of a linear layer into its weight, which loses
    its name; the bias keeps its own. The weights are [outputs, inputs] again.
    """
    after = {name: node for node in graph.nodes for name in node.inputs}
    found = {}
    for node in graph.nodes:
        weight = next((n for n in node.inputs if n in graph.tensors), None)
        adds = after.get(node.outputs[0])
        if node.op != "MatMul" or weight is None or adds is None or adds.op != "Add":
            continue
        for bias in adds.inputs:
            if bias in graph.tensors and bias.endswith(".bias"):
                name = bias.removesuffix("bias") + "weight"
                found[name] = graph.tensors[weight].T
    return found


def _node(content: memoryview) -> Node:
    fields = list(_fields(content))
    texts = {k: tuple(str(v, "utf-8") for f, v in fields if f == k) for k in (1, 2, 4)}
    return Node(texts[4][0], texts[1], texts[2])


def _tensor(content: memoryview) -> dict[str, np.ndarray]:
    """Return a tensor under its name, or nothing if it is not of float32."""
    shape: list[int] = []
    kind, name, raw = 0, "", b""
    for field, value in _fields(content):
        if field == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif field == 2:
            kind = value
        elif field == 8:
            name = str(value, "utf-8")
        elif field == 9:
            raw = value
    if kind != _FLOAT32 or not raw:
        return {}
    return {name: np.frombuffer(raw, "<f4").reshape(shape)}


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the number and the value of every field of a message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(content, at)
        elif kind == _BYTES:
            size, at = _varint(content, at)
            value, at = content[at : at + size], at + size
        else:
            size = {_FIXED64: 8, _FIXED32: 4}[kind]
            value, at = content[at : at + size], at + size
        yield key >> 3, value


def _varints(content: memoryview) -> Iterator[int]:
    at = 0
    while at < len(content):
        value, at = _varint(content, at)
        yield value


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
