"""Pass: weights of products and of the token embedding in blocks of 4 or 8 bits, by ONNX Runtime's own quantizer."""

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from genbundle.builder.passes.insertion import take_place
from genbundle.builder.weights import SHARED_FROM_BYTES

# The largest that divides a row is taken; each block has a float32 scale. 64 at 4 bits are 4.5 bits a weight, as many
# as a q4_0 GGUF has with its scales of 16 bits for 32, which are a tenth nearer to normally distributed weights.
BLOCKS = {4: (64, 32, 16), 8: (128, 64, 32, 16)}
# At 8 bits blocks have zero points. At 4 those of a matrix whose rounding error (root mean square) is more than this
# many times as large without: clearly skewed ones. In blocks of 64 it is 1.04 times for normally distributed weights,
# 1.11 for Laplace's; the included model answers as well without (docs/benchmarks.md), and on a processor with AVX2
# alone zero points cost a product by one token a fifth of its time.
ZERO_POINTS_FROM = 1.2
_MEASURED_ROWS = 1024
_LEFT_OVER = 32  # the block where none divides a row; the last one is padded
# Activations are rounded to 8 bits by the same blocks, which integer products need; 0 would compute in float32.
_ACCURACY_LEVEL = 4
# Through these, token ids stay token ids; the index of their data input.
_HANDS_ON = {
    "Cast": (0,), "Clip": (0,), "Expand": (0,), "Identity": (0,), "Reshape": (0,), "Slice": (0,), "Squeeze": (0,),
    "Transpose": (0,), "Unsqueeze": (0,), "Where": (1, 2),
}  # fmt: skip


@dataclass(kw_only=True)
class Rounded:
    """What the pass did: `kept`, weights that it left as they are with their bytes, and `rows`, the size of the token
    embedding that each input of token ids looks up."""

    kept: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    modified: bool = False


def quantize_weights(
    model: ir.Model,
    bits: int,
    *,
    tokens: Collection[str] = (),
    chosen: Callable[[ir.Value], bool] = lambda _: True,
) -> Rounded:
    """Put every matrix of a product with `bits` bits, as com.microsoft MatMulNBits; a table that token ids look up as
    GatherBlockQuantized, which reads the same tensor where head and embedding are one.

    tokens: the graph's inputs that are token ids. chosen: which weights may be rounded. Tables that positions look up,
    convolutions, matrices of experts and whatever else isn't a product with one matrix stay as they are.
    """
    done = Rounded()
    for weight in list(model.graph.initializers.values()):
        tensor = weight.const_value
        if tensor is None or tensor.nbytes < SHARED_FROM_BYTES or tensor.dtype != ir.DataType.FLOAT:
            continue
        if len(tensor.shape) < 2 or not chosen(weight):
            continue
        uses = [(use.node, _rows_are_outputs(use.node, use.idx, tokens)) for use in weight.uses()]
        outputs_first = uses[0][1] if uses else None
        if outputs_first is None or len(tensor.shape) != 2 or any(each != outputs_first for _, each in uses):
            done.kept[weight.name or "weight"] = tensor.nbytes
            continue
        array = tensor.numpy()
        matrix = array if outputs_first else array.T
        gathers = any(node.op_type == "Gather" for node, _ in uses)
        block = next((size for size in BLOCKS[bits] if matrix.shape[1] % size == 0), None)
        if block is None and gathers:
            done.kept[weight.name or "weight"] = tensor.nbytes
            continue
        packed = _Packed(model.graph, weight.name or "weight", matrix, bits, block or _LEFT_OVER)
        for node, _ in uses:
            if node.op_type == "Gather":
                done.rows |= {name: matrix.shape[0] for name in _inputs_behind(node.inputs[1], tokens)}
            _replace(node, packed)
        del model.graph.initializers[weight.name or ""]
        done.modified = True
    if done.modified:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
    return done


def _quantizer() -> Any:
    """The library's module, imported without its `logging.basicConfig`, which would make every library here log."""
    guard = logging.NullHandler()
    logging.root.addHandler(guard)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        logging.root.removeHandler(guard)
    return matmul_nbits_quantizer


class _Packed:
    """One matrix `[outputs, inputs]` as the operators read it."""

    def __init__(self, graph: ir.Graph, name: str, matrix: np.ndarray, bits: int, block: int):
        self.outputs, self.inputs = matrix.shape
        self.bits, self.block = bits, block
        self._graph, self._name = graph, f"{name}_{bits}bit"
        symmetric = bits == 4 and not _gains_by_zero_points(matrix, block)
        self._weight, scales, zero_points = _rounded(matrix, bits, block, symmetric=symmetric)
        self._others = [self._initializer("scales", scales)]
        if not symmetric:
            self._others.append(self._initializer("zero_points", zero_points))

    def blocks(self) -> list[ir.Value]:
        """Weight `[outputs, blocks, bytes]`, scales and, where there are some, zero points."""
        return [self._initializer("blocks", self._weight), *self._others]

    def table(self) -> list[ir.Value]:
        """The same with the weight's blocks in one row, `[outputs, bytes]`."""
        rows = self._weight.reshape(self.outputs, self.inputs * self.bits // 8)
        return [self._initializer("rows", rows), *self._others]

    def _initializer(self, kind: str, array: np.ndarray) -> ir.Value:
        name = f"{self._name}_{kind}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def _rounded(matrix: np.ndarray, bits: int, block: int, *, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Blocks `[outputs, blocks, bytes]`, scales `[outputs, blocks]` and packed zero points, which say nothing where
    rounding is symmetric: left out, they are 8 at 4 bits."""
    library = _quantizer()
    config = library.DefaultWeightOnlyQuantConfig(block_size=block, bits=bits, is_symmetric=symmetric)
    return library.DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix.T))


def _gains_by_zero_points(matrix: np.ndarray, block: int) -> bool:
    """Whether the error of rounding to 4 bits, measured on rows from all over a matrix, is more than ZERO_POINTS_FROM
    times as large without zero points as with them."""
    rows = matrix[:: -(-len(matrix) // _MEASURED_ROWS) | 1]  # odd: rows of two kinds may take turns
    with_them, without = (_error(rows, block, symmetric=symmetric) for symmetric in (False, True))
    return not without <= ZERO_POINTS_FROM * with_them  # of what isn't a number, too


def _error(matrix: np.ndarray, block: int, *, symmetric: bool) -> float:
    """Root of the summed squares of what rounding to 4 bits changes."""
    packed, scales, zero_points = _rounded(matrix, 4, block, symmetric=symmetric)
    middles = np.uint8(8) if symmetric else _numbers(zero_points)[:, : scales.shape[1], None]
    numbers = _numbers(packed).astype(np.float32) - middles
    values = (numbers * scales[:, :, None]).reshape(len(matrix), -1)[:, : matrix.shape[1]]
    return float(np.linalg.norm(values - matrix))


def _numbers(packed: np.ndarray) -> np.ndarray:
    """The numbers of 4 bits in the last axis' bytes, the lower half first."""
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


def _rows_are_outputs(node: ir.Node, index: int, tokens: Collection[str]) -> bool | None:
    """Whether the weight's rows are what the operator gives (else its columns are); None for another use of it."""

    def attribute(name: str, default: Any) -> Any:
        found = node.attributes.get(name)
        return default if found is None else found.value

    if node.op_type == "Gather" and index == 0 and attribute("axis", 0) == 0:
        return True if list(_inputs_behind(node.inputs[1], tokens)) else None
    if index != 1:
        return None
    if node.op_type == "MatMul":
        return False
    plain = attribute("alpha", 1.0) == 1.0 and not attribute("transA", 0)
    if node.op_type == "Gemm" and plain and attribute("beta", 1.0) == 1.0:
        return bool(attribute("transB", 0))
    if node.op_type == "FusedMatMul" and plain and not attribute("transBatchA", 0) and not attribute("transBatchB", 0):
        return bool(attribute("transB", 0))
    return None


def _inputs_behind(value: ir.Value | None, tokens: Collection[str]) -> Iterator[str]:
    """The inputs of token ids that a value holds, and nothing computed from them."""
    if value is None:
        return
    node = value.producer()
    if node is None:
        if value.is_graph_input() and value.name in tokens:
            yield value.name or ""
        return
    for index in _HANDS_ON.get(node.op_type, ()):
        yield from _inputs_behind(node.inputs[index], tokens)


def _replace(node: ir.Node, packed: _Packed) -> None:
    """Put the operator over packed blocks in a node's place."""
    attributes: dict[str, Any] = {"bits": packed.bits, "block_size": packed.block}
    inputs: list[ir.Value | None]
    if node.op_type == "Gather":
        table, *others = packed.table()
        inputs, kind = [table, node.inputs[1], *others], "GatherBlockQuantized"
        attributes |= {"gather_axis": 0, "quantize_axis": 1}
    else:
        inputs, kind = [node.inputs[0], *packed.blocks()], "MatMulNBits"
        attributes |= {"K": packed.inputs, "N": packed.outputs, "accuracy_level": _ACCURACY_LEVEL}
    made = [ir.node(kind, inputs, attributes=attributes, domain="com.microsoft")]
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        made.append(ir.node("Add", [made[0].outputs[0], node.inputs[2]]))
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, made)
    take_place(node.outputs[0], made[-1].outputs[0])
    graph.remove(node, safe=True)
