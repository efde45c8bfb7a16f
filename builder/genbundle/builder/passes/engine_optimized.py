"""Pass: a graph as ONNX Runtime optimizes it, so that opening it has nothing left to do."""

import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

# Larger weights are never folded or fused into others: they stand aside meanwhile, and none is read or copied.
_ASIDE_FROM_BYTES = 1 << 20


def optimize(model: ir.Model) -> tuple[ir.Model, bool]:
    """`model` after ONNX Runtime's own optimizations, and whether opening may skip them; itself where they fail, or
    put many computed numbers in place of how they are computed.

    They are those of the level "extended", which don't depend on the processor. What "all" adds is another layout for
    convolutions that does: programs with some are still laid out when they are opened, and so are those that compute
    something from large weights alone, which is folded then:
    https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html
    """
    import onnxruntime

    large = _set_aside(model)
    try:
        proto: Any = ir.to_proto(model)
    finally:
        _bring_back(model, large)
    with tempfile.TemporaryDirectory(prefix="genbundle-") as folder:
        path = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime's have no common base; whether the graph can be run is found out at its replay
            return model, False
        optimized = ir.load(path)
    _bring_back(optimized, large)
    if _bytes(optimized) > _bytes(model) + _ASIDE_FROM_BYTES:
        return model, False
    optimized.meta.update(model.meta)
    used = {node.domain for node in optimized.graph.all_nodes()}
    for domain in set(optimized.graph.opset_imports) - used - {""}:
        del optimized.graph.opset_imports[domain]  # it names every operator set that it knows
    return optimized, not any(_left_for_opening(node) for node in optimized.graph.all_nodes())


def _bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _left_for_opening(node: ir.Node) -> bool:
    weights = [value is None or value.is_initializer() for value in node.inputs]
    return "Conv" in node.op_type or (bool(weights) and all(weights))


def _set_aside(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Make the large weights inputs of the graph; returns them."""
    large = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _ASIDE_FROM_BYTES:
            large[name] = tensor
            del model.graph.initializers[name]
            value.const_value, value.type, value.shape = None, ir.TensorType(tensor.dtype), tensor.shape  # pyright: ignore
            model.graph.inputs.append(value)
    return large


def _bring_back(model: ir.Model, large: dict[str, ir.TensorProtocol]) -> None:
    """The opposite, of `model` or of what it was made into."""
    for value in [value for value in model.graph.inputs if value.name in large]:
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = large[value.name or ""]
            model.graph.register_initializer(value)
