"""Packed vision towers for export: the patches of all frames in one call, or those of one frame.

Models call attention once per frame or window, in a Python loop over lengths read from a tensor; upstream traces that
for pieces of one length only (`_reshaped_vision_attention_forward`). A flash attention takes all patches and where the
pieces end, which a mask says as well: towers take ours for one.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from genbundle.builder.components import Component, same_tensors
from genbundle.builder.cut import forward_of
from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input, Source

OFFSETS = "cu_seqlens"
_THROUGH_ALL = ("vision_windows", "vision_blocks", "vision_pairs", "image_tiles", "kept_rows")
"""Preparers whose values count rows through all frames, so that no frame can be taken alone."""
_NAME = "genbundle_flash_packed"
_LENGTHS = ("max_seqlen", "max_window_seqlen")  # which flash attention would ask for, ours doesn't


def segment_attention(
    _module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
    cu_seq_lens_q: torch.Tensor, scaling: float | None = None, **__: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of each patch to those between the same two offsets: `[1, heads, patches, width]` in."""
    places = torch.arange(query.shape[2], dtype=cu_seq_lens_q.dtype)
    segments = (places[:, None] >= cu_seq_lens_q[None, 1:]).sum(-1)
    mask = (segments[:, None] == segments[None, :])[None, None]
    return _attend(query, key, value, mask, scaling)


def frame_attention(
    _module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
    scaling: float | None = None, **__: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of each patch to all: the same for a single frame."""
    return _attend(query, key, value, None, scaling)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> tuple[torch.Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


class Packed(torch.nn.Module):
    """An encoder whose towers' attention takes all patches at once, with a mask where frames and windows end.

    The models' own forwards stay, where upstream puts one for all that leaves out what some of them do: it normalizes
    no queries and keys that one product made (GLM-OCR, Dots3-Note).
    """

    def __init__(self, module: torch.nn.Module, attention: Callable[..., Any] = segment_attention):
        super().__init__()
        self._attention = attention
        self.module, self.config = module, getattr(module, "config", None)
        self._towers = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
        self._forwards = [
            (part, _undivided(part))
            for part in module.modules()
            if OFFSETS in inspect.signature(type(part).forward).parameters and not isinstance(part, PreTrainedModel)
        ]

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:
        """The features by name."""
        with ExitStack() as stack:
            for part, forward in self._forwards:
                stack.enter_context(forward_of(part, forward))
            stack.enter_context(_attention(self._towers, self._attention))
            return self.module(**inputs, **dict.fromkeys(_LENGTHS, 1))


def _undivided(part: torch.nn.Module) -> Callable[..., Any]:
    """A module's own forward; told a greatest length, which it would read from the offsets for flash attention."""
    forward = MethodType(type(part).forward, part)
    if "max_seqlen" not in inspect.signature(forward).parameters:
        return forward
    return lambda *args, **kwargs: forward(*args, **{**kwargs, "max_seqlen": 1})


@contextmanager
def _attention(towers: list[PreTrainedModel], attention: Callable[..., Any]) -> Iterator[None]:
    """Inside, the towers' attention is the one given, under a name that they take for a flash attention."""
    before = [(tower.config, tower.config._attn_implementation) for tower in towers]
    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    try:
        for config, _ in before:
            # set_attn_implementation would look for a kernel library of that name.
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def all_frames(component: Component) -> Component:
    """A packed encoder as a program for all frames at once."""
    module = Packed(component.module).eval()
    with torch.no_grad():
        expected, found = component.module(**component.sample), module(**component.sample)
    if not same_tensors(found, expected):
        raise UnsupportedModelError(f"{component.name}: its attention to the patches of a window can't be traced")
    return replace(component, module=module, guides={})


class OneFrame(torch.nn.Module):
    """A packed tower for the patches of one frame: what says where frames end becomes a constant of the call."""

    def __init__(self, component: Component):
        super().__init__()
        self.module, self.config = component.module, getattr(component.module, "config", None)
        # The grid may steer nothing once what follows from it is given, but towers ask for it.
        self.rest: dict[str, Any] = {
            name: value[:1] for name, value in component.sample.items() if _steers(name, component)
        }

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features of one frame."""
        rows = next(iter(inputs.values())).shape[0]
        offsets = torch.cat([torch.zeros(1), torch.full((1,), rows)]).to(torch.int32)
        return self.module(**inputs, **self.rest, **{OFFSETS: offsets})


class SizedFrame(OneFrame):
    """The same for towers that read the grid's numbers: inputs `[height, width, patches of a block, ...]` in blocks of
    `merge` x `merge` patches, whose sizes are those numbers."""

    def __init__(self, component: Component, grid: str, merge: int):
        super().__init__(component)
        self.grid, self.merge = grid, merge
        self.rest = {name: Sizes(value.tolist()) for name, value in self.rest.items()}

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features of one frame."""
        height, width = next(iter(inputs.values())).shape[:2]
        sizes = Sizes([(1, height * self.merge, width * self.merge)])
        self.rest = {name: sizes if name == self.grid else self.rest[name] for name in self.rest}
        return super().forward(**{name: value.flatten(0, 2) for name, value in inputs.items()})


class OnePicture(torch.nn.Module):
    """A tower that reads its pictures' sizes, for one picture of its own size `[1, channels, height, width]`."""

    def __init__(self, module: torch.nn.Module, sizes: str):
        super().__init__()
        self.module, self.config, self._sizes = module, getattr(module, "config", None), sizes

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features of one picture."""
        (picture,) = inputs.values()
        return self.module(**inputs, **{self._sizes: Sizes([tuple(picture.shape[-2:])])})


class Sizes(list):
    """Rows of sizes that a trace knows as sizes, for code that reads them from a tensor."""

    def tolist(self) -> list:
        """The rows."""
        return list(self)

    def prod(self, dim: int = -1) -> "Sizes":
        """The product of each row."""
        del dim
        return Sizes(math.prod(row) for row in self)


def in_pieces(component: Component) -> Component:
    """An encoder whose inputs' numbers steer it, as a program for one frame or picture, which the runtime calls for
    each; or for all frames at once where that can't be divided so. Any other one as it is.

    Upstream traces packed attention for frames of one size only: frames of several sizes would get wrong features.
    """
    if any("pieces" in source.options for source in component.sources.values()):
        return component  # divided already
    if OFFSETS not in component.sample:
        return _picture_by_picture(replace(component, guides={}))
    divided = _divided(component)
    if divided is not None and not steering(component):
        own = replace(component, module=Packed(component.module, frame_attention).eval())
        try:
            return _frames(component, OneFrame(own).eval(), divided, {})
        except (UnsupportedModelError, *MODEL_ERRORS):  # towers that know no flash attention
            return _frames(component, OneFrame(component).eval(), divided, {})
    packed = all_frames(component)
    if not _reads_numbers(packed):
        return packed
    if divided is None:
        raise UnsupportedModelError(f"{component.name}: what it reads of its patch grids can't be traced")
    for merge in (*_merges(component.module), 1):
        frames = _sized_frames(component, divided, merge)
        if frames is not None:
            return frames
    raise UnsupportedModelError(
        f"{component.name}: it takes its patch grids otherwise than as sizes, which can't be traced"
    )


def _steers(name: str, component: Component) -> bool:
    source, value = component.sources[name], component.sample[name]
    return name != OFFSETS and source.kind == "user" and not value.is_floating_point()


def _divided(component: Component) -> list[str] | None:
    """The inputs with a row per patch; None where there are others that can't be divided between frames."""
    total = int(component.sample[OFFSETS][-1])
    rest = [name for name in component.sample if name != OFFSETS and not _steers(name, component)]
    blocked = any(component.sources[name].rule in _THROUGH_ALL for name in rest)
    return None if blocked or any(component.sample[name].shape[0] != total for name in rest) else rest


def steering(component: Component) -> bool:
    """Whether other grids than the true ones, beside what follows from the true ones, change anything."""
    wrong = {name: value * 2 + 2 if _steers(name, component) else value for name, value in component.sample.items()}
    try:
        with torch.no_grad():
            return not same_tensors(component.module(**wrong), component.module(**component.sample))
    except MODEL_ERRORS:
        return True


def _reads_numbers(component: Component) -> bool:
    """Whether the module reads numbers out of its inputs, which a trace can't."""
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes) as mode, torch.no_grad():
        try:
            component.module(**{name: mode.from_tensor(value) for name, value in component.sample.items()})
        except DataDependentOutputException:
            return True
        except GuardOnDataDependentSymNode:
            pass  # on how many something is: for the exporter to say
    return False


def _merges(module: torch.nn.Module) -> list[int]:
    found = (getattr(part, "spatial_merge_size", None) for part in module.modules())
    found = [value for value in found if isinstance(value, int)]
    kernels = (getattr(part, "merge_kernel_size", None) for part in module.modules())
    return list(dict.fromkeys([*found, *(kernel[0] for kernel in kernels if isinstance(kernel, tuple | list))]))


def _sized_frames(component: Component, names: list[str], merge: int) -> Component | None:
    grids = [name for name in component.sample if _steers(name, component) and component.sample[name].shape[1:] == (3,)]
    if len(grids) != 1:
        return None
    # Other numbers must be what they were in every capture: a constant of the program.
    if any(_steers(name, component) and name not in (*grids, *component.guides) for name in component.sample):
        return None
    module = SizedFrame(component, grids[0], merge).eval()
    if (component.sample[grids[0]][:, 1:] % merge).any():
        return None
    try:
        return _frames(component, module, names, {"grid": grids[0], "merge": merge})
    except (AttributeError, TypeError):
        return None  # it takes the grid for a tensor


def _frames(component: Component, module: OneFrame, names: list[str], options: dict[str, Any]) -> Component:
    """`component` as a program `module` for one frame, with the sample's first; `options` as runtime/pieces.py reads
    them, where rows go in by the frame's size."""
    offsets = component.sample[OFFSETS].tolist()
    frames = [{name: component.sample[name][a:b] for name in names} for a, b in itertools.pairwise(offsets)]
    if options:
        grid = component.sample[options["grid"]]
        merge = options["merge"]
        sizes = [(height // merge, width // merge) for count, height, width in grid.tolist() for _ in range(count)]
        frames = [
            {name: value.reshape(*size, merge * merge, *value.shape[1:]) for name, value in frame.items()}
            for frame, size in zip(frames, sizes, strict=True)
        ]
    sample, (first, *_) = frames[0], _expect_same(component, module, frames, "frame")
    sources = {name: _with(component.sources[name], {"pieces": OFFSETS, **options}) for name in names}
    guides = {OFFSETS: _guide(component, OFFSETS, "offsets", ("offsets",))}
    axes = {0: "height", 1: "width"} if options else None
    if options:
        guides[options["grid"]] = _guide(component, options["grid"], "grid", ("pictures", 3))
        guides |= {name: component.guides[name] for name in set(module.rest) - {options["grid"]}}
    return replace(
        component,
        module=module,
        sample=sample,
        axes={**{name: axes or {0: f"{name}_0"} for name in sample}, **{name: {0: f"{name}_0"} for name in first}},
        sources=sources,
        guides=guides,
    )


def _picture_by_picture(component: Component) -> Component:
    """An encoder of pictures padded to one size with their own sizes beside them, one at its own size a call."""
    names = [name for name in component.sample if not _steers(name, component)]
    sizes = [name for name in component.sample if _steers(name, component)]
    if not sizes:
        return replace(component, alternative=_one_by_one(component))
    if len(names) != 1 or len(sizes) != 1 or not _reads_numbers(component):
        return component
    (name,), (size,) = names, sizes
    pictures = component.sample[name]
    if pictures.dim() != 4 or component.sample[size].shape != (len(pictures), 2):
        raise UnsupportedModelError(f"{component.name}: what it reads of its {size!r} can't be traced")
    module = OnePicture(component.module, size).eval()
    own = enumerate(component.sample[size].tolist())
    parts = [{name: pictures[index : index + 1, :, :height, :width]} for index, (height, width) in own]
    try:
        sample, (first, *_) = parts[0], _expect_same(component, module, parts, "picture")
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(f"{component.name}: what it reads of its {size!r} can't be traced") from error
    return replace(
        component,
        module=module,
        sample=sample,
        axes={name: {2: "height", 3: "width"}, **{key: {0: f"{key}_0"} for key in first}},
        sources={name: _with(component.sources[name], {"pieces": "each", "sizes": size})},
        guides={size: _guide(component, size, "sizes", ("pictures", 2))},
    )


def _one_by_one(component: Component) -> Component | None:
    """An encoder of pictures of one size, one picture a call; None where inputs aren't a row per picture."""
    count = {len(value) for value in component.sample.values()}
    if len(count) != 1 or any(value.dim() != 4 for value in component.sample.values()):
        return None
    rows = range(count.pop())
    parts = [{name: value[row : row + 1] for name, value in component.sample.items()} for row in rows]
    try:
        _expect_same(component, component.module, parts, "picture")
    except UnsupportedModelError:
        return None
    sample = parts[0]
    return replace(
        component,
        sample=sample,
        axes={
            name: {axis: symbol for axis, symbol in axes.items() if axis or name not in sample}
            for name, axes in component.axes.items()
        },
        sources={name: _with(source, {"pieces": "each"}) for name, source in component.sources.items()},
    )


def _expect_same(
    component: Component, module: torch.nn.Module, parts: list[dict[str, torch.Tensor]], piece: str
) -> list[dict[str, torch.Tensor]]:
    """What `module` gives for each part of the sample; UnsupportedModelError where, joined, it isn't what `component`
    gives for all of it."""
    with torch.no_grad():
        whole, found = component.module(**component.sample), [module(**part) for part in parts]
    joined = {name: torch.cat([each[name] for each in found]) for name in whole}
    if not same_tensors(joined, whole):
        raise UnsupportedModelError(
            f"{component.name}: one {piece} alone doesn't give the features that it gives in a row"
        )
    return found


def _with(source: Source, options: dict[str, Any]) -> Source:
    return replace(source, options={**source.options, **options})


def _guide(component: Component, name: str, pieces: str, shape: tuple[str | int, ...]) -> Input:
    return Input(name=name, dtype="int64", shape=shape, source=_with(component.sources[name], {"pieces": pieces}))
