"""Operators that ExecuTorch has no kernel for, in terms of those that it has."""

import torch

from genbundle.builder.passes.computed_weights import multiply_by_computed_weights
from genbundle.builder.passes.missing_kernels import replace_missing_kernels


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.erfinv(x), *torch.sort(x, dim=0, descending=True)


def test_the_same_from_other_operators() -> None:
    values = torch.cat([torch.linspace(-0.9999, 0.9999, 5001)[torch.randperm(5001)], torch.zeros(1)])[:5001]
    program = torch.export.export(Module(), (values,))
    replaced = replace_missing_kernels(program)
    targets = {node.target for node in replaced.graph.nodes}
    assert not targets & {torch.ops.aten.erfinv.default, torch.ops.aten.sort.default}
    for found, expected in zip(replaced.module()(values), Module()(values), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_program_without_them_is_left_alone() -> None:
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(3),))
    assert replace_missing_kernels(program) is program


class Orders(torch.nn.Module):
    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, ...]:
        orders = [torch.argsort(x, dim=1, descending=each, stable=True) for each in (False, True)]
        return *orders, torch.argsort(x.flatten()), *(torch.bucketize(x, edges, right=each) for each in (False, True))


def test_orders_of_integers_keep_equal_ones() -> None:
    values, edges = torch.tensor([[3, 1, 3, 0, 1], [2, 2, -4, 9, 2]]), torch.tensor([0, 1, 3])
    replaced = replace_missing_kernels(torch.export.export(Orders(), (values, edges)))
    assert not {node.target for node in replaced.graph.nodes} & {
        torch.ops.aten.argsort.default, torch.ops.aten.sort.stable, torch.ops.aten.bucketize.Tensor
    }  # fmt: skip
    found, expected = replaced.module()(values, edges), Orders()(values, edges)
    torch.testing.assert_close(found[:2], expected[:2])
    torch.testing.assert_close(values.flatten()[found[2]], values.flatten()[expected[2]])
    torch.testing.assert_close(found[3:], expected[3:])


class Halves(torch.nn.Module):
    """One packed weight for two layers, and a layer of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.bias = torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(8))
        self.between = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.nn.functional.linear(x, self.packed[:4], self.bias[:4])
        return torch.nn.functional.linear(self.between(first), self.packed[4:])


def test_layers_of_computed_weights_become_products() -> None:
    module, values = Halves(), torch.randn(2, 3, 4)
    program = torch.export.export(module, (values,))
    assert multiply_by_computed_weights(program)
    kept = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [node.args[1].name for node in kept] == ["p_between_weight"]
    torch.testing.assert_close(program.run_decompositions().module()(values), module(values))
    assert not multiply_by_computed_weights(program)


class Resized(torch.nn.Module):
    def forward(self, images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        size = (like.shape[0], like.shape[1])
        return torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def test_antialiased_resizing_to_a_size_that_varies() -> None:
    images, like = torch.randn(1, 3, 6, 6), torch.zeros(3, 9)
    free = {"images": None, "like": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    replaced = replace_missing_kernels(torch.export.export(Resized(), (images, like), dynamic_shapes=free))
    assert not any("_aa" in str(node.target) for node in replaced.graph.nodes)
    for size in ((3, 9), (4, 2), (12, 6)):
        found = replaced.module()(images, torch.zeros(size))
        torch.testing.assert_close(found, Resized()(images, torch.zeros(size)), rtol=1e-5, atol=1e-5)


def test_a_convolution_of_whole_patches_is_a_product() -> None:
    module, patches = torch.nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), torch.randn(5, 3, 2, 4, 4)
    free = {0: torch.export.Dim.AUTO}
    replaced = replace_missing_kernels(torch.export.export(module, (patches,), dynamic_shapes=(free,)))
    assert not any("conv" in str(node.target) for node in replaced.graph.nodes)
    torch.testing.assert_close(replaced.module()(patches[:3]), module(patches[:3]), rtol=1e-5, atol=1e-5)
