"""What products by weights cost the engines, and nothing else: python -m tests.benchmarks.products BUNDLE [--tokens N]

The matrices of a `cpu` fp32 bundle by one token each: the floor under what a step does besides; with `--tokens` a
prompt's, without the head. ONNX Runtime reads them where they are mapped, in every form that a graph can give them;
XNNPACK packs them first, its one form; at int4 both have them rounded as bundles do. All take turns in one process. In
other forms than its own a matrix means something else, but a product reads as much.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from genbundle.builder.passes.weight_only import quantize_weights
from genbundle.builder.rounding import rounded
from genbundle.runtime.backends.onnx_file import external_weights
from tests.benchmarks.budgets import THREADS

TURNS, TURNS_OF_A_PROMPT = 60, 8
BLOCK = 64


@dataclass(frozen=True)
class Form:
    """How a matrix of n outputs and k inputs and t tokens lie, and whether the matrix is the left side."""

    weight: Callable[[int, int], tuple[int, ...]]
    tokens: Callable[[int, int], tuple[int, ...]]
    left: bool = False
    transposed: bool = False

    def product(self, tokens: ir.Value, weight: ir.Value) -> ir.Node:
        """The node."""
        if self.transposed:
            return ir.node("FusedMatMul", [tokens, weight], attributes={"transB": 1}, domain="com.microsoft")
        return ir.node("MatMul", [weight, tokens] if self.left else [tokens, weight])


FORMS = {
    "rows of outputs, on the right": Form(lambda n, k: (n, k), lambda k, t: (t, k), transposed=True),
    "rows of outputs, on the left": Form(lambda n, k: (n, k), lambda k, t: (k, t), left=True),
    f"on the left, in blocks of {BLOCK} rows": Form(
        lambda n, k: (n // BLOCK, BLOCK, k), lambda k, t: (1, k, t), left=True
    ),
    f"on the right, in panels of {BLOCK} outputs": Form(lambda n, k: (n // BLOCK, k, BLOCK), lambda k, t: (1, t, k)),
    "columns of outputs, on the right": Form(lambda n, k: (k, n), lambda k, t: (t, k)),
}


def matrices(bundle: Path) -> list[np.ndarray]:
    """The step's matrices `[outputs, inputs]`, each once, where the file is mapped."""
    found = {}
    for weight in external_weights((bundle / "decode.onnx").read_bytes()):
        if len(weight.shape) == 2 and weight.dtype == ir.DataType.FLOAT and weight.shape[0] % BLOCK == 0:
            file = np.memmap(bundle / weight.location, np.float32, "r", weight.offset, weight.shape)
            found[weight.offset] = np.asarray(file)
    return list(found.values())


def onnx_products(form: Form, weights: list[np.ndarray], tokens: int) -> Callable[[], Any]:
    """All products as one session's run, the matrices bound where they are mapped."""
    inputs: dict[str, ir.Value] = {}
    nodes, feeds = [], {}
    for number, weight in enumerate(weights):
        n, k = weight.shape
        shapes = {f"tokens_{k}": form.tokens(k, tokens), f"weight_{number}": form.weight(n, k)}
        arrays = (np.full(shapes[f"tokens_{k}"], 0.01, np.float32), weight.reshape(shapes[f"weight_{number}"]))
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            inputs.setdefault(name, ir.val(name, dtype=ir.DataType.FLOAT, shape=shape))
            feeds.setdefault(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        nodes.append(form.product(*(inputs[name] for name in shapes)))
    return session_of(list(inputs.values()), nodes, feeds)


def rounded_onnx_products(weights: list[np.ndarray], tokens: int) -> Callable[[], Any]:
    """All products as one session's run, the matrices of 4 bits in it."""
    form = FORMS["rows of outputs, on the right"]
    inputs: dict[str, ir.Value] = {}
    nodes, feeds = [], {}
    for number, weight in enumerate(weights):
        name, shape = f"tokens_{weight.shape[1]}", form.tokens(weight.shape[1], tokens)
        inputs.setdefault(name, ir.val(name, dtype=ir.DataType.FLOAT, shape=shape))
        feeds.setdefault(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, 0.01, np.float32)))
        tensor = ir.tensor(weight, name=f"weight_{number}")
        matrix = ir.val(f"weight_{number}", dtype=tensor.dtype, shape=weight.shape, const_value=tensor)
        nodes.append(form.product(inputs[name], matrix))
    return session_of(list(inputs.values()), nodes, feeds, four_bits=True)


def session_of(
    inputs: list[ir.Value], nodes: list[ir.Node], feeds: dict[str, onnxruntime.OrtValue], *, four_bits: bool = False
) -> Callable[[], Any]:
    """A session of these nodes, each of which is an output."""
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"out_{number}", ir.DataType.FLOAT
    outputs = [node.outputs[0] for node in nodes]
    weights = [value for node in nodes for value in node.inputs if value is not None and value.const_value is not None]
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 18, "com.microsoft": 1}, name="products"
    )
    model = ir.Model(graph, ir_version=10)
    if four_bits:
        quantize_weights(model, 4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for output in graph.outputs:
        binding.bind_output(output.name)
    return lambda kept=feeds: session.run_with_iobinding(binding)


class Linears(torch.nn.Module):
    """A product by each matrix, of the tokens that fit it."""

    def __init__(self, weights: list[np.ndarray]):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for weight in weights:
            layer = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight))
            self.layers.append(layer)

    def forward(self, tokens: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """`[tokens, outputs]` for each, of tokens `[tokens, inputs]` by their inputs."""
        return [layer(tokens[str(layer.in_features)]) for layer in self.layers]


def xnnpack_products(weights: list[np.ndarray], tokens: int, precision: str) -> Callable[[], Any]:
    """All products as one call of a program that XNNPACK takes whole."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import _portable_lib

    sample = {str(k): torch.full((tokens, k), 0.01) for k in sorted({weight.shape[1] for weight in weights})}
    linears = Linears(weights).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        with rounded(linears.layers, precision, vocabulary=None, activations=True):
            exported = torch.export.export(linears, (sample,))
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        path = Path(folder) / "products.pte"
        with path.open("wb") as file:
            lowered.to_executorch().write_to_file(file)
        _portable_lib._unsafe_reset_threadpool(THREADS)
        module = _portable_lib._load_for_executorch(str(path))
        feeds = tuple(sample.values())
        module.run_method("forward", feeds)  # packs the matrices
    return lambda: module.run_method("forward", feeds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=1)
    arguments = parser.parse_args()
    tokens, weights = arguments.tokens, matrices(arguments.bundle)
    if tokens > 1:  # a prompt multiplies the head, the largest, by its last token alone
        weights.pop(max(range(len(weights)), key=lambda place: weights[place].nbytes))
    size = sum(weight.nbytes for weight in weights)
    products = {
        "XNNPACK, packed at opening": xnnpack_products(weights, tokens, "fp32"),
        "XNNPACK, int4": xnnpack_products(weights, tokens, "int4"),
        "ONNX Runtime, int4": rounded_onnx_products(weights, tokens),
    }
    products |= {name: onnx_products(form, weights, tokens) for name, form in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(TURNS if tokens == 1 else TURNS_OF_A_PROMPT):
        for name, product in products.items():
            product()  # what the turn before left in the processor
            started = time.perf_counter()
            product()
            times[name].append(time.perf_counter() - started)
    print(f"{len(weights)} matrices, {size / 1e9:.2f} GB at float32, by {tokens} tokens")
    for name, seconds in times.items():
        middle, (low, *_, high) = statistics.median(seconds), statistics.quantiles(seconds, n=10)
        speed = "" if "int4" in name else f", {size / middle / 1e9:.1f} GB/s"
        print(f"{name}: {1e3 * middle:.1f} ms ({1e3 * low:.1f}-{1e3 * high:.1f}){speed}")


if __name__ == "__main__":
    main()
