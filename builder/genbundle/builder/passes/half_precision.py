"""Pass: a graph's weights, state and arithmetic in float16, by ONNX Runtime's own converter."""

import logging
from collections.abc import Collection
from typing import Any

import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT,)


def halve(model: ir.Model, states: Collection[str]) -> ir.Model:
    """`model` in float16, but for its inputs and outputs other than `states`, which stay float32.

    What float16 can't hold is cut off at its largest number, masks of the smallest float32 among them; what has no
    float16 kernel (ranges, sums along an axis ...) stays in float32 between casts. The converter is
    onnxruntime.transformers.float16:
    https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/python/tools/transformers/float16.py
    """
    from onnxruntime.transformers import float16

    values = (*model.graph.inputs, *model.graph.outputs)
    kept: Any = [value.name for value in values if value.dtype in FLOATS and value.name not in states]
    logger = logging.getLogger(float16.__name__)
    before, meta = logger.level, dict(model.meta)
    logger.setLevel(logging.ERROR)  # a warning for each constant that is cut off
    try:
        proto = float16.convert_float_to_float16(
            ir.to_proto(model), keep_io_types=kept, disable_shape_infer=True, force_fp16_initializers=True
        )
    finally:
        logger.setLevel(before)
    halved = ir.from_proto(proto)
    halved.meta.update(meta)
    return halved
