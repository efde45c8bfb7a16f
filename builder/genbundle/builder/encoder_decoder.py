"""The programs of an encoder-decoder: the encoder once, the decoder's first call, and its steps.

The first call computes the cross-attention's keys and values from the encoder's output; they are state from then on.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from genbundle.builder.attention import make_cache
from genbundle.builder.components import Component, name_axes, runs, same_tensors
from genbundle.builder.cut import attribute, forward_of
from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.builder.layers import GROWING, Layer, describe_layers, kept, open_layer
from genbundle.builder.plan import Call, Capture, Inputs, Phase, constant_arguments
from genbundle.builder.programs import BATCH, NEW, PAST, with_past, with_present
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Route, Source
from genbundle.runtime.inputs import TEXT_INPUTS

_SOURCE = 7  # another size than those of programs.py
_OF_THE_DECODER = ("decoder_input_ids", "encoder_outputs", "use_cache", "return_dict")


class Encoder(torch.nn.Module):
    """The encoder: its inputs to the tensors of its output, named `encoder_<field>`."""

    def __init__(self, encoder: torch.nn.Module, constants: dict[str, Any]):
        super().__init__()
        self.encoder, self.constants = encoder, constants
        self.config = getattr(encoder, "config", None)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """`encoder_last_hidden_state` `[batch, source, width]`, and what else it returns."""
        return _fields(self.encoder(**inputs, **self.constants))


class WholeEncoder(torch.nn.Module):
    """The encoder with all that the model's own forward does before it, such as a merge with pictures."""

    def __init__(self, model: PreTrainedModel, encoder: torch.nn.Module):
        super().__init__()
        self.model, self._encoder, self.config = model, (encoder,), model.config

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `Encoder`, from the user's inputs; the decoder behind it is dead code."""
        original, found = self._encoder[0].forward, []

        def record(*args: Any, **kwargs: Any) -> Any:
            found.append(original(*args, **kwargs))
            return found[0]

        first = inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values()))
        start = first.new_ones(first.shape[0], 1, dtype=torch.long)
        with forward_of(self._encoder[0], record):
            self.model(**inputs, decoder_input_ids=start, use_cache=False)
        return _fields(found[0])


class PreparedEncoder(torch.nn.Module):
    """The encoder with all that the model's own `generate` does before the library's, such as a style put in front.

    taken: what the encoder is given of what the library's is.
    """

    def __init__(self, model: PreTrainedModel, encoder: torch.nn.Module, taken: Sequence[str], constants: dict):
        super().__init__()
        self.model, self._encoder, self.config = model, (encoder,), model.config
        self.taken, self.constants = tuple(taken), constants

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `Encoder`, from the user's inputs."""
        given: dict[str, Any] = {}
        generate: Any = self.model.generate

        def record(_: Any, **kwargs: Any) -> None:
            given.update(kwargs)

        with attribute(GenerationMixin, "generate", record):
            generate(**inputs)
        return _fields(self._encoder[0](**{name: given[name] for name in self.taken}, **self.constants))


class CrossDecoder(torch.nn.Module):
    """`model` from decoder tokens and the encoder's output to logits, the present, and (with `begins`) the cross state.

    Inputs: `decoder_input_ids [batch, new]`, the encoder's outputs, `past_<layer>_<what>` and `cross_<layer>_<what>`
    (`[batch, heads, source, width]`) unless it begins, and what else the forward takes.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[Layer], cross: Sequence[Layer], output_type: type,
        constants: dict[str, Any], *, begins: bool,
    ):  # fmt: skip
        super().__init__()
        self.model, self.config, self.begins = model, model.config, begins
        self.layers, self.cross, self.output_type, self.constants = tuple(layers), tuple(cross), output_type, constants

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model's own forward with the encoder's output and the caches given."""
        encoder_outputs = _encoder_outputs(self.output_type, inputs)
        like = inputs["decoder_input_ids"].to(torch.get_default_dtype())
        own = [self._open("past", index, layer, inputs, like) for index, layer in enumerate(self.layers)]
        cross = [self._open("cross", index, layer, inputs, like) for index, layer in enumerate(self.cross)]
        cache = EncoderDecoderCache(make_cache(own), make_cache(cross))
        cache.is_updated = {index: not self.begins for index in range(len(cross))}
        logits = self.model(
            **inputs, **self.constants, encoder_outputs=encoder_outputs, past_key_values=cache, use_cache=True
        ).logits
        outputs = {"logits": logits[:, -1:]}
        for group, made in (("present", own), *((("cross", cross),) if self.begins else ())):
            for index, layer in enumerate(made):
                outputs |= {f"{group}_{index}_{name}": tensor for name, tensor in kept(layer).items()}
        return outputs

    def _open(self, group: str, index: int, layer: Layer, inputs: dict[str, torch.Tensor], like: torch.Tensor) -> Any:
        given = None
        if not self.begins:
            given = {name: inputs.pop(f"{group}_{index}_{name}") for name, _ in layer.shapes()}
        return open_layer(layer, given, like, fused=False)


class WholeDecoder(torch.nn.Module):
    """`model` from all decoder tokens so far and the encoder's output to logits; for one that keeps nothing.

    Inputs: `past_ids [batch, past]` and `decoder_input_ids [batch, new]`, the encoder's outputs, and what else the
    forward takes.
    """

    def __init__(self, model: PreTrainedModel, output_type: type, constants: dict[str, Any]):
        super().__init__()
        self.model, self.config = model, model.config
        self.output_type, self.constants = output_type, constants

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last position's logits, and the tokens that they follow."""
        encoder_outputs = _encoder_outputs(self.output_type, inputs)
        ids = torch.cat([inputs.pop("past_ids"), inputs.pop("decoder_input_ids")], 1)
        outputs = self.model(
            decoder_input_ids=ids, **inputs, **self.constants, encoder_outputs=encoder_outputs, use_cache=False
        )
        return {"logits": outputs.logits[:, -1:], "present_ids": ids}


def encoder_decoder_components(
    model: PreTrainedModel, captures: list[Capture], capacity: int | None
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """The components of an encoder-decoder, how they are called, and what to know of them.

    Raises UnsupportedModelError, which names what can't be.
    """
    name = type(model).__name__
    if any(item.encoder is None for item in captures):
        raise UnsupportedModelError(f"{name}: generate never calls its encoder")
    if all(_keeps_nothing(item) for item in captures):
        return _without_cache(model, captures, capacity)
    cache = captures[0].step.get("past_key_values")
    if not isinstance(cache, EncoderDecoderCache):
        raise UnsupportedModelError(f"{name}: generation state of type {type(cache).__name__} can't be carried yet")
    layers = describe_layers(cache.self_attention_cache, f"{name}: decoder")
    cross = describe_layers(cache.cross_attention_cache, f"{name}: cross-attention")
    if not all(layer.plain for layer in (*layers, *cross)):
        raise UnsupportedModelError(f"{name}: its decoder keeps more than keys and values, which can't be carried yet")
    encoder, fields = _encoder(model, captures)
    # Not the encoder's length: what a model makes of its output before the cross-attention is its own business.
    lengths = {item.step["past_key_values"].cross_attention_cache.layers[0].keys.shape[2] for item in captures}
    length = lengths.pop() if len(lengths) == 1 else None
    output_type = type(captures[0].prompt["encoder_outputs"])
    begin, step = _call(name, captures, "prompt"), _call(name, captures, "step")
    prompt = _decoder(model, layers, cross, encoder, fields, output_type, begin, length, begins=True)
    decode = _decoder(model, layers, cross, encoder, fields, output_type, step, length, begins=False)
    continues = runs(decode)
    if not continues:
        decode = _decoder(model, layers, cross, encoder, fields, output_type, step, length, begins=False, new=1)
    route = Route(programs=("encoder", "prompt"), needs=_needs(encoder, begin))
    flow = Flow(prompt=(route,), step=("decode",), continues=continues, capacity=capacity)
    return [encoder, prompt, decode], flow, ()


def _keeps_nothing(item: Capture) -> bool:
    """Whether a step is given every token so far, and nothing that was kept of them."""
    begun, ids = (call.get("decoder_input_ids") for call in (item.prompt, item.step))
    kept = item.step.get("past_key_values") is not None
    return not kept and begun is not None and ids is not None and ids.shape[1] == begun.shape[1] + 1


def _without_cache(
    model: PreTrainedModel, captures: list[Capture], capacity: int | None
) -> tuple[list[Component], Flow, tuple[str, ...]]:
    """The encoder, and one program for the decoder's first call and its steps: each takes the whole sequence."""
    name = type(model).__name__
    encoder, fields = _encoder(model, captures)
    call = _call(name, captures, "step")
    if call != _call(name, captures, "prompt"):
        raise UnsupportedModelError(f"{name}: its decoder keeps nothing, and is called otherwise in a step")
    sample, axes, sources = _behind(encoder, fields, call, past=PAST)
    sample["past_ids"], axes["past_ids"] = torch.ones(BATCH, PAST, dtype=torch.long), {0: "batch", 1: "past"}
    decode = Component(
        name="decode",
        roles=("merge", "language_model", "lm_head", "decode"),
        module=WholeDecoder(model, type(captures[0].prompt["encoder_outputs"]), call.constants).eval(),
        sample=sample,
        axes={**axes, "present_ids": {0: "batch", 1: "total"}},
        sources={**sources, "past_ids": Source(kind="state", name="ids")},
        states={"present_ids": "ids"},
    )
    note = f"{name} keeps no state of its decoder: each step runs the whole sequence again, slow for long ones"
    route = Route(programs=("encoder", "decode"), needs=_needs(encoder, call))
    return [encoder, decode], Flow(prompt=(route,), step=("decode",), continues=True, capacity=capacity), (note,)


def _needs(encoder: Component, call: Call) -> tuple[str, ...]:
    """The user's inputs beside text that the prompt's programs take."""
    needs = {source.name for source in (*encoder.sources.values(), *call.sources.values()) if source.kind == "user"}
    return tuple(sorted(filter(None, needs - set(TEXT_INPUTS))))


def _encoder_outputs(output_type: type, inputs: dict[str, torch.Tensor]) -> Any:
    """The encoder's output object of the fields among a program's inputs, which are taken out of them."""
    fields = [key for key in inputs if key.startswith("encoder_")]
    return output_type(**{key.removeprefix("encoder_"): inputs.pop(key) for key in fields})


def _fields(output: Any) -> dict[str, torch.Tensor]:
    return {f"encoder_{name}": value for name, value in output.items() if isinstance(value, torch.Tensor)}


def _encoder(model: PreTrainedModel, captures: list[Capture]) -> tuple[Component, dict[str, torch.Tensor]]:
    """The program `encoder`, and what it gives for its sample."""
    encoder: Any = model.get_encoder()
    calls = [item.encoder or {} for item in captures]
    constants = constant_arguments(calls, f"{type(model).__name__}: the encoder's", ())
    module = Encoder(encoder, constants).eval()
    tensors = [{key: value for key, value in call.items() if isinstance(value, torch.Tensor)} for call in calls]
    with torch.no_grad():
        results = [module(**inputs) for inputs in tensors]
    samples, sources = tensors, _user_sources(tensors, captures)
    unexplained = sorted(set(tensors[0]) - set(sources))
    if unexplained:
        taken = inspect.signature(model.forward).parameters
        samples = [{key: value for key, value in item.inputs.items() if key in taken} for item in captures]
        sources = {key: Source(kind="user", name=key) for key in samples[0]}
        whole = (WholeEncoder(model, encoder), PreparedEncoder(model, encoder, tuple(tensors[0]), constants))
        module = next((each for each in whole if _gives(each.eval(), samples, results)), None)
        if module is None:
            raise UnsupportedModelError(f"encoder: its input {unexplained[0]!r} has no explanation")
    if any(sample.keys() != sources.keys() for sample in samples):
        raise UnsupportedModelError("encoder: it is given other inputs from run to run")
    sizes = {tuple(result["encoder_last_hidden_state"].shape[axis] for result in results): axis for axis in (1, 0)}
    known = {key: ("batch", "source")[axis] for key, axis in sizes.items() if len(set(key)) > 1}
    # Beside text pictures are counted apart from sequences, though each captured sequence has one.
    apart = {key for key in sources if "input_ids" in sources and samples[0][key].is_floating_point()}
    axes = {
        **name_axes([{k: v for k, v in sample.items() if k not in apart} for sample in samples], known),
        **name_axes([{k: v for k, v in sample.items() if k in apart} for sample in samples]),
    }
    component = Component(
        name="encoder",
        roles=("encoder",),
        module=module,
        sample=samples[0],
        axes={**axes, **name_axes(results, known)},
        sources=sources,
        states={key: key for key in results[0]},
    )
    return component, results[0]


def _user_sources(samples: list[Inputs], captures: list[Capture]) -> dict[str, Source]:
    """The sources of those inputs that are the user's as they are, in every capture."""
    sources: dict[str, Source] = {}
    for key in samples[0]:
        for name in captures[0].inputs:
            if all(_same(item.inputs.get(name), each.get(key)) for item, each in zip(captures, samples, strict=True)):
                sources[key] = Source(kind="user", name=name)
                break
    return sources


def _gives(module: torch.nn.Module, samples: list[Inputs], expected: list[Inputs]) -> bool:
    try:
        with torch.no_grad():
            found = [module(**sample) for sample in samples]
    except MODEL_ERRORS:
        return False
    return all(same_tensors(one, other) for one, other in zip(found, expected, strict=True))


def _call(name: str, captures: list[Capture], phase: Phase) -> Call:
    """The decoder's arguments in that phase: constants, and where each tensor comes from."""
    calls = [getattr(item, phase) for item in captures]
    caches = {key for call in calls for key, value in call.items() if isinstance(value, Cache)}
    constants = constant_arguments(calls, f"{name}: the decoder's", {*_OF_THE_DECODER, *caches})
    sources: dict[str, Source] = {"decoder_input_ids": Source(kind="tokens")}
    for argument in {key: None for call in calls for key in call}:
        values = [call.get(argument) for call in calls]
        if argument in _OF_THE_DECODER or not any(isinstance(value, torch.Tensor) for value in values):
            continue
        if all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in values):
            continue  # pictures and sounds, which the encoder has seen: the replay says whether the decoder does too
        if all(_same(item.inputs.get(argument), value) for item, value in zip(captures, values, strict=True)):
            sources[argument] = Source(kind="user", name=argument)
        elif argument == "decoder_attention_mask" and all(v is not None and bool((v == 1).all()) for v in values):
            sources[argument] = Source(kind="mask")
        else:
            raise UnsupportedModelError(f"{name}: the decoder's {phase} input {argument!r} has no explanation")
    return Call(sources=sources, constants=constants)


def _same(given: Any, value: Any) -> bool:
    if not isinstance(given, torch.Tensor) or not isinstance(value, torch.Tensor):
        return False
    return given.shape == value.shape and bool((given == value).all())


def _decoder(
    model: PreTrainedModel, layers: Sequence[Layer], cross: Sequence[Layer], encoder: Component,
    fields: dict[str, torch.Tensor], output_type: type, call: Call, source_length: int | None, *, begins: bool,
    new: int = NEW,
) -> Component:  # fmt: skip
    """The decoder's first call, or its step, for `new` tokens.

    fields: what the encoder gave for its sample. source_length: how many keys the cross-attention has; None where that
    varies.
    """
    sample, axes, sources = _behind(encoder, fields, call, past=0 if begins else PAST, new=new)
    varies = source_length is None
    source_length = source_length or _SOURCE
    states: dict[str, str] = {}
    for index, layer in enumerate(cross):
        for kind, (heads, width) in zip(GROWING, layer.attention or (), strict=False):
            name = f"cross_{index}_{kind}"
            axes[name] = {0: "batch", **({2: "source"} if varies else {})}
            if begins:
                states[name] = f"{index}.cross_{kind}"
            else:
                sample[name] = torch.zeros(BATCH, heads, source_length, width)
                sources[name] = Source(kind="state", name=f"{index}.cross_{kind}")
    component = Component(
        name="prompt" if begins else "decode",
        roles=("merge", "language_model", "lm_head") if begins else ("merge", "language_model", "lm_head", "decode"),
        module=CrossDecoder(model, layers, cross, output_type, call.constants, begins=begins).eval(),
        sample=sample,
        axes=axes,
        sources=sources,
        states=states,
    )
    return with_present(component, layers, "sequence") if begins else with_past(component, layers)


def _behind(
    encoder: Component, fields: dict[str, torch.Tensor], call: Call, *, past: int, new: int = NEW
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]], dict[str, Source]]:
    """Sample, axes and sources of what every program of a decoder takes: tokens, the encoder's output, masks.

    past: how many tokens before the new ones.
    """
    sources = dict(call.sources)
    sequence = {} if new == 1 else {1: "sequence"}
    sample: dict[str, torch.Tensor] = {"decoder_input_ids": torch.ones(BATCH, new, dtype=torch.long)}
    axes: dict[str, dict[int, str]] = {"decoder_input_ids": {0: "batch", **sequence}, "logits": {0: "batch"}}
    for key, tensor in fields.items():
        axes[key] = dict(encoder.axes.get(key, {}))
        sizes = {axis: {"batch": BATCH, "source": _SOURCE}.get(name, 0) for axis, name in axes[key].items()}
        sample[key] = torch.zeros([sizes.get(axis) or size for axis, size in enumerate(tensor.shape)])
        sources[key] = Source(kind="state", name=key)
    source_length = sample["encoder_last_hidden_state"].shape[1]
    for key, source in call.sources.items():
        if source.kind == "user":
            sample[key] = torch.ones(BATCH, source_length, dtype=torch.long)
            axes[key] = {0: "batch", **({1: "source"} if source_length == _SOURCE else {})}
        elif source.kind == "mask":
            sample[key] = torch.ones(BATCH, past + new, dtype=torch.long)
            axes[key] = {0: "batch", 1: "total" if past else "sequence"}
    return sample, axes, sources
