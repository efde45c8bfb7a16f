"""Pass: operators that ExecuTorch has no kernel for, in terms of those that it has."""

import math
from typing import Any

import torch


def erfinv(values: torch.Tensor) -> torch.Tensor:
    """The inverse error function: Giles' approximation for single precision, then two of Newton's steps.

    M. Giles, "Approximating the erfinv function", GPU Computing Gems (2012).
    """
    slope = -torch.log((1.0 - values) * (1.0 + values))
    centre, tail = slope - 2.5, torch.sqrt(slope.clamp(min=5.0)) - 3.0
    result = torch.where(slope < 5.0, _polynomial(_CENTRE, centre), _polynomial(_TAIL, tail)) * values
    for _ in range(2):
        result = result - (torch.erf(result) - values) * (0.5 * math.sqrt(math.pi)) * torch.exp(result * result)
    return result


def _polynomial(coefficients: tuple[float, ...], at: torch.Tensor) -> torch.Tensor:
    total = torch.full_like(at, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * at + coefficient
    return total


_CENTRE = (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
           -0.00417768164, 0.246640727, 1.50140941)  # fmt: skip
_TAIL = (-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
         1.00167406, 2.83297682)  # fmt: skip


def sort(values: torch.Tensor, dim: int = -1, descending: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorting as picking all of them in order; equal integers keep theirs, that of equal floats is not promised."""
    if values.dim() == 0:
        return values, torch.zeros_like(values, dtype=torch.long)
    count = values.shape[dim]
    if values.is_floating_point():
        return torch.topk(values, count, dim, descending, True)
    places = torch.arange(count, device=values.device)
    places = places.reshape([-1 if axis == dim % values.dim() else 1 for axis in range(values.dim())])
    keys = values.long() * count + (count - 1 - places if descending else places)
    order = torch.topk(keys, count, dim, descending, True)[1]
    return torch.gather(values, dim, order), order


def stable_sort(
    values: torch.Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sort.stable`; of equal floats the first is promised to come first, which picking can't keep."""
    if stable and values.is_floating_point():
        return NotImplemented
    return sort(values, dim, descending)


def argsort(values: torch.Tensor, dim: int = -1, descending: bool = False) -> torch.Tensor:
    """The order alone."""
    return sort(values, dim, descending)[1]


def stable_argsort(values: torch.Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> torch.Tensor:
    """The order alone."""
    if stable and values.is_floating_point():
        return NotImplemented
    return sort(values, dim, descending)[1]


def bucketize(
    values: torch.Tensor, boundaries: torch.Tensor, *, out_int32: bool = False, right: bool = False
) -> torch.Tensor:
    """How many of the sorted boundaries lie below each value (with `right`, or are equal to it)."""
    below = boundaries <= values[..., None] if right else boundaries < values[..., None]
    return below.sum(-1, dtype=torch.int32 if out_int32 else torch.long)


def conv3d(
    values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """One that takes each of its inputs whole, as a product; ExecuTorch's convolutions have two axes at most."""
    kernel = weight.shape[2:]
    whole = values.dim() == 5 and all(size == own for size, own in zip(values.shape[2:], kernel, strict=True))
    if not whole or groups != 1 or {*_numbers(padding)} != {0} or {*_numbers(dilation)} != {1}:
        return NotImplemented
    product = values.flatten(1) @ weight.flatten(1).T
    return (product if bias is None else product + bias)[:, :, None, None, None]


def _numbers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def antialiased(
    images: torch.Tensor,
    size: list[int],
    align_corners: bool,
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> torch.Tensor:
    """`_upsample_bilinear2d_aa` as two products; ExecuTorch's kernel takes outputs of one size only."""
    if align_corners:
        return NotImplemented
    wide = images @ _triangles(images, images.shape[3], size[1], scale_w).T
    return (wide.transpose(2, 3) @ _triangles(images, images.shape[2], size[0], scale_h).T).transpose(2, 3)


def antialiased_vec(
    images: torch.Tensor, size: list[int] | None, align_corners: bool, scales: list[float] | None
) -> torch.Tensor:
    """The same as it stands before it is resolved; with factors instead of a size it is left as it is."""
    return NotImplemented if size is None or scales else antialiased(images, size, align_corners)


def _triangles(images: torch.Tensor, old: int, new: int, scale: float | None) -> torch.Tensor:
    """How much each of `old` pixels weighs in each of `new`, `[new, old]`."""
    # Sizes as tensors: a size that is only known when the program runs stays exact.
    sizes = images.new_ones(old).sum(), images.new_ones(new).sum()
    ratio = sizes[0] / sizes[1] if scale is None else images.new_full((), 1.0 / scale)
    centres = (torch.arange(new, dtype=images.dtype, device=images.device) + 0.5) * ratio
    pixels = torch.arange(old, dtype=images.dtype, device=images.device) + 0.5
    weights = (1.0 - (pixels - centres[:, None]).abs() / ratio.clamp(min=1.0)).clamp(min=0.0)
    return weights / weights.sum(1, keepdim=True)


DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.aten.erfinv.default: erfinv,
    torch.ops.aten.sort.default: sort,
    torch.ops.aten.sort.stable: stable_sort,
    torch.ops.aten.argsort.default: argsort,
    torch.ops.aten.argsort.stable: stable_argsort,
    torch.ops.aten.bucketize.Tensor: bucketize,
    torch.ops.aten.conv3d.default: conv3d,
    torch.ops.aten._upsample_bilinear2d_aa.default: antialiased,
    torch.ops.aten._upsample_bilinear2d_aa.vec: antialiased_vec,
}


def replace_missing_kernels(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` with the operators of `DECOMPOSITIONS` replaced; itself where it has none of them."""
    used = {node.target for node in program.graph.nodes} & DECOMPOSITIONS.keys()
    return program.run_decompositions({operator: DECOMPOSITIONS[operator] for operator in used}) if used else program
