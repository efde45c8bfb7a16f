"""Passes: a graph's weights, state and most of its arithmetic in 16 bits; and such a graph for a CPU to check."""

from collections.abc import Collection, Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from genbundle.builder.passes.tensors import sizes, when_read
from genbundle.builder.weights import SHARED_FROM_BYTES

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_NUMPY = {FLOAT16: np.dtype(np.float16), BFLOAT16: np.dtype(ml_dtypes.bfloat16)}

# What multiplies with weights, looks rows of them up, or puts state and new rows together: in 16 bits as soon as one
# operand is, or is a weight.
_NARROWING = {"MatMul", "FusedMatMul", "Gemm", "Conv", "Gather", "Concat", "ScatterND", "ScatterElements"}
# What is in 16 bits where all its operands are. What isn't here stays in float32, as the models' own code has it:
# positions and what is computed of them, squares, means, roots, exponents, masks.
_FOLLOWING = {
    "Add", "Div", "Erf", "Expand", "Flatten", "GatherElements", "GatherND", "Gelu", "Identity", "Mul", "Neg",
    "Relu", "Reshape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Trilu",
    "Unsqueeze", "Where",
}  # fmt: skip
# Without a bfloat16 kernel on CUDA below operator set 22; all the others have one at 20, which the exporter writes:
# https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md
_FLOAT16_ONLY = {"Conv"}


def halve(model: ir.Model, states: Collection[str], dtype: ir.DataType) -> None:
    """Put `model` into float16 or bfloat16, but for its inputs and outputs other than `states`, which stay float32.

    Operands decide as in torch's promotion, so that what a graph computes of positions or of squares stays in float32
    until it meets a product. ONNX Runtime's own converter (onnxruntime.transformers.float16) has these in 16 bits as
    well: beyond 2048 tokens neighbours then share their position, and squares of large activations overflow.
    """
    graph = model.graph
    for value in graph.inputs:
        if value.name in states and value.dtype == FLOAT:
            value.dtype = dtype
    typed = _Typed(graph, dtype)
    for node in list(graph):
        _narrow(node, typed)
    for index, value in enumerate(graph.outputs):
        wanted = dtype if value.name in states else FLOAT
        if value.dtype in (FLOAT, dtype) and value.dtype != wanted:
            graph.outputs[index] = typed.output(value, wanted)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def compute_in_float32(model: ir.Model) -> None:
    """Put every operator of a graph in bfloat16 between casts: what it gives where the engine has no such kernels."""
    graph = model.graph
    typed = _Typed(graph, BFLOAT16)
    for node in list(graph):
        if node.op_type == "Cast":
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == BFLOAT16:
                node.replace_input_with(index, typed.before(node, value, FLOAT))
        for value in node.outputs:
            if value.dtype == BFLOAT16:
                typed.rounded_behind(node, value)


def _narrow(node: ir.Node, typed: "_Typed") -> None:
    """Give a node its type, to its operands and results."""
    for inner, index, value in _read_inside(node):
        if value.dtype == typed.dtype:
            inner.replace_input_with(index, typed.before(node, value, FLOAT))
    operands = [value for value in node.inputs if value is not None and value.dtype in (FLOAT, typed.dtype)]
    if not operands:
        return
    wanted = typed.dtype if _is_narrow(node, operands, typed.dtype) else FLOAT
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in (FLOAT, typed.dtype) and value.dtype != wanted:
            node.replace_input_with(index, typed.before(node, value, wanted))
    for value in node.outputs:
        if value.dtype == FLOAT:
            value.dtype = wanted


def _is_narrow(node: ir.Node, operands: list[ir.Value], dtype: ir.DataType) -> bool:
    if node.domain not in ("", "com.microsoft") or (dtype == BFLOAT16 and node.op_type in _FLOAT16_ONLY):
        return False
    if node.op_type in _NARROWING:
        return any(value.dtype == dtype or _is_weight(value) for value in operands)
    varying = [value for value in operands if value.const_value is None]
    if node.op_type == "Transpose" and not varying:
        return _is_weight(operands[0])
    return node.op_type in _FOLLOWING and bool(varying) and all(value.dtype == dtype for value in varying)


def _is_weight(value: ir.Value) -> bool:
    """Whether it is a matrix, or a filter; frequencies of positions are a row or a column of numbers."""
    tensor = value.const_value
    if tensor is None or tensor.nbytes < SHARED_FROM_BYTES:
        return False
    return sum(int(size) > 1 for size in tuple(tensor.shape)) > 1  # pyright: ignore[reportArgumentType]


def _read_inside(node: ir.Node) -> Iterator[tuple[ir.Node, int, ir.Value]]:
    """Which nodes read what in the bodies of an If or Loop, which stay in float32."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():  # those of bodies in it too
                yield from ((inner, index, value) for index, value in enumerate(inner.inputs) if value is not None)


class _Typed:
    """A graph's values in other types; each is converted once."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType):
        self._graph, self.dtype = graph, dtype
        self._copies: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def before(self, node: ir.Node, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """`value` in another type, for `node` and those behind it."""
        key = (value, wanted)
        if key not in self._copies and value.is_initializer() and wanted != FLOAT:
            self._copies[key] = self._converted(value, wanted)
        elif key not in self._copies:
            cast = _cast(value, wanted)
            self._graph.insert_before(node, cast)
            self._copies[key] = cast.outputs[0]
        return self._copies[key]

    def output(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The graph's output `value` in another type, under its name."""
        name, value.name = value.name, f"{value.name}.computed"
        cast = _cast(value, wanted)
        self._graph.append(cast)
        cast.outputs[0].name = name
        return cast.outputs[0]

    def rounded_behind(self, node: ir.Node, value: ir.Value) -> None:
        """Make a node's result `value` float32, and let whoever read it read its rounded copy."""
        name, value.name = value.name, f"{value.name}.computed"
        cast = _cast(value, self.dtype)
        value.dtype = FLOAT
        value.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        self._graph.insert_after(node, cast)
        cast.outputs[0].name = name

    def _converted(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        tensor, numpy_type = value.const_value, _NUMPY[wanted]
        assert tensor is not None
        name = f"{value.name}.{wanted.name.lower()}"
        most = float(ml_dtypes.finfo(numpy_type).max)

        def rounded(array: np.ndarray) -> np.ndarray:
            # A mask's smallest number stays one: infinite ones make NaN of rows that are hidden as a whole.
            finite = np.where(np.isfinite(array), np.clip(array, -most, most), array)
            return finite.astype(numpy_type)

        lazy = when_read(tensor, rounded, sizes(tensor), name, wanted)
        made = ir.Value(name=name, type=ir.TensorType(wanted), shape=value.shape, const_value=lazy)
        self._graph.register_initializer(made)
        return made


def _cast(value: ir.Value, wanted: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], attributes={"to": int(wanted)})
    (made,) = cast.outputs
    made.type, made.shape = ir.TensorType(wanted), value.shape
    return cast
