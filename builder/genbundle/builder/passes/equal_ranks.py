"""Pass: both operands of an elementwise operator with as many axes, where ExecuTorch would return too few."""

import torch

_ELEMENTWISE = frozenset(
    {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor}
)


def give_equal_ranks(graph: torch.fx.Graph) -> bool:
    """Unsqueeze the operand of fewer axes where the result may have its sizes; whether any was.

    ExecuTorch's optimized kernels give such a result the operand's shape: `[1, 128, 1] * [128, 16]` has two axes there,
    not three, and the program stops (kernels/optimized/cpu/binary_ops.h, ExecuTorch 1.4.1).
    """
    modified = False
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _ELEMENTWISE:
            continue
        operands = [item for item in node.args[:2] if isinstance(item, torch.fx.Node)]
        tensors = [value for item in operands if isinstance(value := item.meta.get("val"), torch.Tensor)]
        if len(tensors) != 2:
            continue
        few, many = sorted((0, 1), key=lambda index: tensors[index].dim())
        missing = tensors[many].dim() - tensors[few].dim()
        if missing == 0 or not _may_have_its_sizes(tensors[few].shape, tensors[many].shape):
            continue
        with graph.inserting_before(node):
            wider = operands[few]
            for _ in range(missing):
                value = wider.meta["val"].unsqueeze(0)
                wider = graph.call_function(torch.ops.aten.unsqueeze.default, (wider, 0))
                wider.meta["val"] = value
        node.args = tuple(wider if index == few else item for index, item in enumerate(node.args))
        modified = True
    return modified


def _may_have_its_sizes(few: torch.Size, many: torch.Size) -> bool:
    """Whether `few` broadcast with `many` may be as large as `few`, the axes that it lacks left out."""
    extra = len(many) - len(few)
    if any(isinstance(size, int) and size != 1 for size in many[:extra]):
        return False
    widens = any(not (isinstance(size, int) and size != 1) for size in many[extra:])
    return widens or not few
