"""What a step's products by weights cost the engines, and nothing else: python -m tests.benchmarks.products BUNDLE

The matrices of a `cpu` fp32 bundle by one token each: the floor under what a program does besides. ONNX Runtime reads
them where they are mapped, in every form that a graph can give them; XNNPACK packs them first, its one form. All take
turns in one process. Numbers are as they lie in the file: what a product reads is the same, whatever it means.
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

from genbundle.runtime.backends.onnx_file import external_weights
from tests.benchmarks.budgets import THREADS

TURNS = 60
BLOCK = 64


@dataclass(frozen=True)
class Form:
    """How a matrix of n outputs and k inputs and a token lie, and whether the matrix is the left side."""

    weight: Callable[[int, int], tuple[int, ...]]
    token: Callable[[int], tuple[int, ...]]
    left: bool = False
    transposed: bool = False

    def product(self, token: ir.Value, weight: ir.Value) -> ir.Node:
        """The node."""
        if self.transposed:
            return ir.node("FusedMatMul", [token, weight], attributes={"transB": 1}, domain="com.microsoft")
        return ir.node("MatMul", [weight, token] if self.left else [token, weight])


FORMS = {
    "rows of outputs, on the right": Form(lambda n, k: (n, k), lambda k: (1, k), transposed=True),
    "rows of outputs, on the left": Form(lambda n, k: (n, k), lambda k: (k, 1), left=True),
    f"on the left, in blocks of {BLOCK} rows": Form(
        lambda n, k: (n // BLOCK, BLOCK, k), lambda k: (1, k, 1), left=True
    ),
    f"on the right, in panels of {BLOCK} outputs": Form(lambda n, k: (n // BLOCK, k, BLOCK), lambda k: (1, 1, k)),
    "columns of outputs, on the right": Form(lambda n, k: (k, n), lambda k: (1, k)),
}


def matrices(bundle: Path) -> list[np.ndarray]:
    """The step's matrices `[outputs, inputs]`, each once, where the file is mapped."""
    found = {}
    for weight in external_weights((bundle / "decode.onnx").read_bytes()):
        if len(weight.shape) == 2 and weight.dtype == ir.DataType.FLOAT and weight.shape[0] % BLOCK == 0:
            file = np.memmap(bundle / weight.location, np.float32, "r", weight.offset, weight.shape)
            found[weight.offset] = np.asarray(file)
    return list(found.values())


def onnx_products(form: Form, weights: list[np.ndarray]) -> Callable[[], Any]:
    """All products as one session's run."""
    inputs, nodes, feeds = {}, [], {}
    for number, weight in enumerate(weights):
        n, k = weight.shape
        shapes = {f"token_{k}": form.token(k), f"weight_{number}": form.weight(n, k)}
        arrays = (np.full(shapes[f"token_{k}"], 0.01, np.float32), weight.reshape(shapes[f"weight_{number}"]))
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            inputs.setdefault(name, ir.val(name, dtype=ir.DataType.FLOAT, shape=shape))
            feeds.setdefault(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        nodes.append(form.product(*(inputs[name] for name in shapes)))
        nodes[-1].outputs[0].name = f"out_{number}"
        nodes[-1].outputs[0].dtype = ir.DataType.FLOAT
    outputs = [node.outputs[0] for node in nodes]
    opsets = {"": 18, "com.microsoft": 1}
    model = ir.Model(ir.Graph(list(inputs.values()), outputs, nodes=nodes, opset_imports=opsets), ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for output in outputs:
        binding.bind_output(output.name)
    return lambda kept=feeds: session.run_with_iobinding(binding)


class Linears(torch.nn.Module):
    """A product by each matrix, of the one of two tokens that fits it."""

    def __init__(self, weights: list[np.ndarray]):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.from_numpy(weight)) for weight in weights)

    def forward(self, tokens: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """`[1, outputs]` for each, of tokens `[1, inputs]` by their inputs."""
        return [torch.nn.functional.linear(tokens[str(weight.shape[1])], weight) for weight in self.weights]


def xnnpack_products(weights: list[np.ndarray]) -> Callable[[], Any]:
    """All products as one call of a program that XNNPACK takes whole."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import _portable_lib

    tokens = {str(k): torch.full((1, k), 0.01) for k in sorted({weight.shape[1] for weight in weights})}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        exported = torch.export.export(Linears(weights).eval(), (tokens,))
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        path = Path(folder) / "products.pte"
        with path.open("wb") as file:
            lowered.to_executorch().write_to_file(file)
        _portable_lib._unsafe_reset_threadpool(THREADS)
        module = _portable_lib._load_for_executorch(str(path))
        feeds = tuple(tokens.values())
        module.run_method("forward", feeds)  # packs the matrices
    return lambda: module.run_method("forward", feeds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    weights = matrices(parser.parse_args().bundle)
    size = sum(weight.nbytes for weight in weights)
    products = {"XNNPACK, packed at opening": xnnpack_products(weights)}
    products |= {name: onnx_products(form, weights) for name, form in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(TURNS):
        for name, product in products.items():
            product()  # what the turn before left in the processor
            started = time.perf_counter()
            product()
            times[name].append(time.perf_counter() - started)
    print(f"{len(weights)} matrices, {size / 1e9:.2f} GB")
    for name, seconds in times.items():
        middle, (low, *_, high) = statistics.median(seconds), statistics.quantiles(seconds, n=10)
        print(f"{name}: {1e3 * middle:.1f} ms ({1e3 * low:.1f}-{1e3 * high:.1f}), {size / middle / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
