"""The token merge, traced: the model's own forward with its encoders' features given and its language model recording.

What the language model is called with is the merge's output; the rest of the model, from there to the logits, is the
prompt's program. Both run the model's own top-level forward, cut at the language model.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from genbundle.builder.attention import attention, group_query_attention, make_cache
from genbundle.builder.cut import forward_of
from genbundle.builder.decoder import language_model_of
from genbundle.builder.encoders import Features
from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.builder.layers import Layer, open_layers, present
from genbundle.bundles import UnsupportedModelError

_FLAGS = {"use_cache", "past_key_values", "return_dict"}


class _Unread(BaseModelOutputWithPast):
    """A language model's output of which only the hidden state is read on; models hand other fields through."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Merge(torch.nn.Module):
    """`model`'s forward up to its language model: the tensors that it is called with, by their path.

    Inputs are the forward's own (`input_ids` ...) and the features by name; `constants` are forward arguments that
    every capture passed alike. `only` lists the paths that are outputs: those that aren't inputs handed through.
    """

    def __init__(
        self, model: PreTrainedModel, modality: str, features: list[Features], output_type: type, constants: Mapping
    ):
        super().__init__()
        self.model, self.config = model, model.config
        self._modality, self._features, self._output_type = modality, features, output_type
        self._constants = dict(constants)
        self.only: list[str] | None = None

    def called_with(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The kwargs of the language model for these inputs."""
        inputs = dict(inputs)
        fields: dict[str, Any] = {}
        for item in self._features:
            item.write(fields, inputs.pop(item.name))
        encoder_outputs = {self._modality: self.make_output(fields)}
        language_model, recorded = language_model_of(self.model), {}

        def record(*args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
            if args:
                raise UnsupportedModelError(f"{type(self.model).__name__} calls its language model by position")
            recorded.update(kwargs)
            return _Unread(last_hidden_state=kwargs["inputs_embeds"])

        # The plain additive mask, where the model makes its mask outside its language model.
        with attention(language_model, "eager"), forward_of(language_model, record):
            self.model(**inputs, **self._constants, mm_encoder_outputs=encoder_outputs, use_cache=False)
        return recorded

    def make_output(self, fields: dict[str, Any]) -> Any:
        """The encoder's output object with these fields."""
        return self._output_type(**fields)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The language model's tensors, `merged_<path>`, without inputs that are only handed through."""
        features = [inputs[item.name] for item in self._features[:1]]
        with _AsManyAsFeatures(features[0]) if features else contextlib.nullcontext():
            found = tensors_of(self.called_with(inputs))
        return {f"merged_{name}": found[name].contiguous() for name in self.only or found}


class _AsManyAsFeatures(TorchFunctionMode):
    """Inside, the numbers that a mask of their own shape picks out are the features' numbers.

    Models pick the placeholders' embeddings out to compare how many they are with how many features there are, which
    branches on what a tracer can't know. The runtime makes that comparison itself.
    """

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self._numbers = features

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Indexing by a mask, else what torch does."""
        if func is torch.Tensor.__getitem__:
            tensor, mask = args
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == tensor.shape:
                return self._numbers.reshape(-1)
        return func(*args, **(kwargs or {}))


class Prompt(torch.nn.Module):
    """`model`'s forward from its language model on: the merge's tensors to the last position's logits and the present.

    template: the language model's kwargs as the merge recorded them; each tensor in it is replaced by the input of its
    path. With `fused`, attention becomes GroupQueryAttention, which only traces. begins: the whole prompt in one call,
    without a past; else any part of it, behind the past inputs of `Decoder`, written `in_place` as there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        template: Mapping[str, Any],
        layers: Sequence[Layer],
        *,
        fused: bool,
        in_place: bool = False,
        begins: bool = True,
    ):
        super().__init__()
        self.model, self.config, self.fused, self._begins = model, model.config, fused, begins
        self._in_place = in_place
        self._template = {name: value for name, value in template.items() if name not in _FLAGS}
        self._layers = tuple(layers)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `[batch, 1, vocabulary]` and the present of every layer."""
        embeds = inputs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        before = inputs["attention_mask"].shape[1] - length if self._in_place else None
        layers = open_layers(self._layers, inputs, embeds, fused=self.fused, begins=self._begins, past=before)
        cache = make_cache(layers)
        language_model = language_model_of(self.model)
        original = language_model.forward
        kwargs = replace_tensors(self._template, inputs)

        def resume(*_: Any, **__: Any) -> Any:
            return original(**kwargs, past_key_values=cache, use_cache=True)

        attend = group_query_attention(lambda: cache) if self.fused else None
        with attention(language_model, attend), forward_of(language_model, resume):
            # What stands before the language model is dead code here: any ids do, and a cache that is at its beginning.
            ids = torch.zeros(batch, length, dtype=torch.long)
            empty = make_cache(open_layers(self._layers, {}, embeds, fused=False, begins=True))
            logits = self.model(input_ids=ids, use_cache=True, past_key_values=empty, logits_to_keep=1).logits
        return {"logits": logits[:, -1:], **present(layers)}


def tensors_of(kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors in (nested) kwargs by path: `deepstack_visual_embeds_0`."""
    found: dict[str, torch.Tensor] = {}
    for path, leaf in _walk({name: value for name, value in kwargs.items() if name not in _FLAGS}):
        if isinstance(leaf, torch.Tensor):
            found["_".join(map(str, path))] = leaf
    return found


def replace_tensors(template: Any, tensors: Mapping[str, torch.Tensor], path: tuple = ()) -> Any:
    """`template` with each tensor replaced by the one of its path."""
    if isinstance(template, torch.Tensor):
        return tensors["_".join(map(str, path))]
    if isinstance(template, Mapping):
        return {key: replace_tensors(value, tensors, (*path, key)) for key, value in template.items()}
    if isinstance(template, list | tuple):
        return type(template)(replace_tensors(value, tensors, (*path, index)) for index, value in enumerate(template))
    return template


def _walk(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))
    else:
        yield path, value


def needed_features(
    model: PreTrainedModel, modality: str, output: Any, candidates: list[Features], run: Callable[[Any], dict]
) -> list[Features]:
    """Those feature fields without which the merge gives something else (or fails)."""
    expected = run(output)
    needed = []
    for field in dict.fromkeys(str(item.path[0]) for item in candidates):
        without = copy.copy(output)
        without[field] = None
        try:
            same = _same(run(without), expected)
        except MODEL_ERRORS:
            same = False
        if not same:
            needed.extend(item for item in candidates if item.path[0] == field)
    if not needed:
        raise UnsupportedModelError(f"{type(model).__name__}: its merge reads none of the {modality} encoder's outputs")
    return needed


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
