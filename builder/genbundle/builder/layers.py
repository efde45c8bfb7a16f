"""What a model's layers carry from call to call, and cache layers that begin with given tensors of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from genbundle.builder.attention import BufferLayer, FusedLayer, PastLayer
from genbundle.builder.cut import attribute
from genbundle.bundles import UnsupportedModelError

Tensors = Mapping[str, torch.Tensor]
GROWING = ("key", "value")
POSITIONS = "positions"  # of integers, where all else are floating-point numbers
_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer)
_BOTH = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer keeps of a sequence.

    attention: `(heads, width)` of its keys and of its values, for every token; None without attention. index: the width
    of the keys by which sparse attention picks tokens, one for every token; positions: how many numbers each token's
    position has that it keeps beside them, None where it keeps none. states: tensors of a fixed size, by kind and
    number (`conv_0`, `recurrent_0`), with their shapes behind the batch; integers: those that hold token ids. numbers:
    how many of each the layer has room for. unwritten: it could keep something and was never given any (a
    cross-attention without a picture), which models ask for.
    """

    attention: tuple[tuple[int, int], tuple[int, int]] | None = None
    index: int | None = None
    positions: int | None = None
    states: dict[str, tuple[int, ...]] = field(default_factory=dict)
    integers: frozenset[str] = frozenset()
    numbers: int = 0
    unwritten: bool = False

    @property
    def plain(self) -> bool:
        """Whether it keeps keys and values of every token and nothing else."""
        return self.attention is not None and not self.states

    def dtype(self, kind: str) -> torch.dtype:
        """Of one thing that it keeps, as `shapes` names it."""
        return torch.long if kind == POSITIONS or kind in self.integers else torch.get_default_dtype()

    def shapes(self) -> Iterator[tuple[str, tuple[int | None, ...]]]:
        """The names of what it keeps and their shapes behind the batch; None for the axis that grows."""
        for kind, (heads, width) in zip(GROWING, self.attention or (), strict=False):
            yield kind, (heads, None, width)
        if self.index is not None:
            yield "index", (None, self.index)
        if self.positions is not None:
            yield POSITIONS, (self.positions, None)
        yield from self.states.items()


def describe_layers(cache: Any, name: str) -> tuple[Layer, ...]:
    """What each layer of a captured cache keeps; UnsupportedModelError for what can't be carried."""
    if type(cache) is not DynamicCache:
        raise UnsupportedModelError(f"{name}: generation state of type {type(cache).__name__} can't be carried yet")
    described = tuple(_describe(layer, f"{name}: layer {index}") for index, layer in enumerate(cache.layers))
    # What is as long as something else than the tokens (a picture's keys) doesn't grow with them. Windows are shorter.
    kept = [getattr(layer, "keys", None) for layer in cache.layers if type(layer) is DynamicLayer]
    lengths = [keys.shape[2] for keys in kept if keys is not None]
    if len(set(lengths)) > 1:
        raise UnsupportedModelError(f"{name}: its layers keep {sorted(set(lengths))} keys, not one for each token")
    return described


def _describe(layer: Any, name: str) -> Layer:
    kind = type(layer)
    if kind is DummyLayer:
        return Layer()
    indexer = getattr(layer, "indexer_keys", None)
    positions = getattr(layer, "indexer_position_ids", None)
    if kind not in (*_ATTENTION, *_BOTH, LinearAttentionLayer):
        raise UnsupportedModelError(f"{name} keeps a {kind.__name__}, which can't be carried yet")
    attention = None
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is not None and values is not None:
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[2] == 0:
            raise UnsupportedModelError(f"{name} keeps no keys of its own, which can't be carried yet")
        attention = ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
    states: dict[str, tuple[int, ...]] = {}
    integers = set()
    for group in ("conv", "recurrent"):
        for number, tensor in getattr(layer, f"{group}_states", {}).items():
            if tensor is not None:
                states[f"{group}_{number}"] = tuple(tensor.shape[1:])
                if not tensor.is_floating_point():
                    integers.add(f"{group}_{number}")
    index = None if indexer is None else indexer.shape[2]
    return Layer(
        attention=attention,
        index=index,
        positions=None if positions is None else positions.shape[0],
        states=states,
        integers=frozenset(integers),
        numbers=getattr(layer, "number_of_states", 0),
        unwritten=attention is None and not states,
    )


@contextmanager
def whole_windows() -> Iterator[None]:
    """Inside the block, layers of a sliding window keep what has left it too; the models' masks do the windowing.

    What is cut off depends on the length, in branches that no program could follow.
    """
    with ExitStack() as stack:
        for name in ("update", "get_mask_sizes", "get_seq_length"):
            stack.enter_context(attribute(DynamicSlidingWindowLayer, name, getattr(DynamicLayer, name)))
        yield


class LinearState(LinearAttentionLayer):
    """Convolution and recurrent states without writing in place; `[batch, ...]` each, or none at the beginning."""

    def __init__(self, layer: Layer, given: Tensors | None):
        super().__init__(number_of_states=layer.numbers)
        for name, shape in layer.states.items():
            group, _, number = name.partition("_")
            if group == "conv":
                self.conv_kernel_size[int(number)] = shape[-1]
            if given is not None:
                # A copy, since the model may write into it and the program's inputs are the caller's.
                getattr(self, f"{group}_states")[int(number)] = given[name].clone()
                getattr(self, f"is_{group}_states_initialized")[int(number)] = True
                self.has_previous_state[int(number)] = True

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> torch.Tensor:
        """Keep the last columns of what was kept (zeros at the beginning) and what is new; returns both together."""
        kernel = self.conv_kernel_size[state_idx] or conv_kernel_size or conv_states.shape[-1]
        before = self.conv_states[state_idx] if self.has_previous_state[state_idx] else None
        # Zeros stand for what was before the beginning, whatever the length: no branch on it.
        past = conv_states.new_zeros(*conv_states.shape[:-1], kernel) if before is None else before
        full = torch.cat([past, conv_states], dim=-1)
        self.conv_states[state_idx] = full[..., -kernel:]
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        return full

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        """Keep the new state."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def states(self) -> dict[str, torch.Tensor]:
        """What is kept now, by name."""
        found = {f"conv_{number}": tensor for number, tensor in self.conv_states.items()}
        found |= {f"recurrent_{number}": tensor for number, tensor in self.recurrent_states.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class LinearAndPast(LinearState, PastLayer):
    """A layer with both attention and linear attention."""

    is_compileable = False

    def __init__(self, layer: Layer, given: Tensors | None, keys: torch.Tensor, values: torch.Tensor):
        LinearState.__init__(self, layer, given)
        PastLayer.__init__(self, keys, values)

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to do: it has what it begins with."""


class IndexedPast(PastLayer):
    """A growing layer with an index `[batch, length, width]` beside its keys, and maybe the positions of its tokens,
    `[batch, numbers, length]`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, index: torch.Tensor, positions: torch.Tensor | None):
        super().__init__(keys, values)
        self.indexer_keys, self.is_indexer_initialized = index, True
        # The model keeps the batch behind the numbers.
        self.indexer_position_ids = None if positions is None else positions.transpose(0, 1)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """The index with the new tokens' keys appended."""
        self.indexer_keys = torch.cat([self.indexer_keys, indexer_key_states], dim=1)
        return self.indexer_keys


def open_layer(layer: Layer, given: Tensors | None, like: torch.Tensor, *, fused: bool, past: Any = None) -> Any:
    """A cache layer that begins with the tensors `given` (by the names of `layer.shapes()`), or empty.

    like: any floating-point tensor `[batch, ...]` to make the empty ones like. past: how many tokens keys and values in
    buffers hold, as a fused layer takes it, or as a tensor `[1]` for any other attention.
    """
    if layer.attention is None and not layer.states:
        return DynamicLayer() if layer.unwritten else DummyLayer()
    if layer.attention is None:
        return LinearState(layer, given)
    if given is None:
        keys, values = (like.new_zeros(like.shape[0], heads, 0, width) for heads, width in layer.attention)
    else:
        keys, values = (given[kind] for kind in GROWING)
    if layer.index is not None:
        index = like.new_zeros(like.shape[0], 0, layer.index) if given is None else given["index"]
        return IndexedPast(keys, values, index, None if given is None else given.get(POSITIONS))
    if layer.states:
        return LinearAndPast(layer, given, keys, values)
    if fused:
        return FusedLayer(keys, values, past)
    return PastLayer(keys, values) if past is None else BufferLayer(keys, values, past)


def open_layers(
    layers: Sequence[Layer],
    inputs: dict[str, torch.Tensor],
    like: torch.Tensor,
    *,
    fused: bool,
    begins: bool,
    past: Any = None,
) -> list[Any]:
    """Cache layers that begin with the past taken out of a program's `inputs`, `past_<layer>_<what>`.

    like, past: as `open_layer` takes them. begins: there is no past.
    """
    opened = []
    for index, layer in enumerate(layers):
        given = None if begins else {name: inputs.pop(f"past_{index}_{name}") for name, _ in layer.shapes()}
        opened.append(open_layer(layer, given, like, fused=fused, past=past))
    return opened


def present(cache_layers: Sequence[Any]) -> dict[str, torch.Tensor]:
    """What layers that `open_layers` made keep after the call: a program's outputs `present_<layer>_<what>`."""
    found = (kept(layer).items() for layer in cache_layers)
    return {f"present_{index}_{name}": tensor for index, items in enumerate(found) for name, tensor in items}


def kept(cache_layer: Any) -> dict[str, torch.Tensor]:
    """What a layer that `open_layer` made keeps after the call, by name."""
    found: dict[str, torch.Tensor] = {}
    if isinstance(cache_layer, PastLayer):
        found |= zip(GROWING, cache_layer.present(), strict=True)
    if isinstance(cache_layer, IndexedPast):
        found["index"] = cache_layer.indexer_keys
        if cache_layer.indexer_position_ids is not None:
            found[POSITIONS] = cache_layer.indexer_position_ids.transpose(0, 1)
    if isinstance(cache_layer, LinearState):
        found |= cache_layer.states()
    return found
