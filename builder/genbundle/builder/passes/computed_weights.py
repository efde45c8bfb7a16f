"""Pass: a linear layer whose weight or bias the program computes is a product of two tensors."""

import torch


def multiply_by_computed_weights(program: torch.export.ExportedProgram) -> bool:
    """Put a product in the place of each such layer of `program`; whether there was one.

    XNNPACK takes linear layers of stored weights only, and its own pass over one that was decomposed beside others
    takes the product for a layer and fails
    (https://github.com/pytorch/executorch/blob/main/backends/xnnpack/_passes/convert_to_linear.py).
    """
    signature, graph = program.graph_signature, program.graph
    stored = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    # A rounded weight is its blocks with their scales, which XNNPACK reads where they stand.
    stored |= {
        node.name
        for node in graph.nodes
        if str(node.target) == "torchao.dequantize_affine.default" and node.args[0].name in stored
    }
    found = [
        node
        for node in graph.nodes
        if node.target is torch.ops.aten.linear.default
        and any(isinstance(item, torch.fx.Node) and item.name not in stored for item in node.args[1:])
    ]
    for node in found:
        values, weight, *bias = node.args
        with graph.inserting_before(node):
            product = values, graph.call_function(torch.ops.aten.t.default, (weight,))
            if bias and bias[0] is not None:
                product = graph.call_function(torch.ops.aten.matmul.default, product), bias[0]
        # In its place, so that an output keeps its name; without what it is said to come from, a linear layer.
        node.target = torch.ops.aten.add.Tensor if bias and bias[0] is not None else torch.ops.aten.matmul.default
        node.args, node.meta = product, {"val": node.meta["val"]}
    if found:
        program.graph_module.recompile()
    return bool(found)
