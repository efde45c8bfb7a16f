"""A prompt's program with everything in it: encoder, projector, merge, language model and head.

For models whose media can't be cut from their language model: the program is the model's own top-level forward, from
the user's tensors to logits and the present. Steps go through the same `decode` as a text model's.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from genbundle.builder.components import Component, name_axes
from genbundle.builder.cut import attribute
from genbundle.builder.decoder import Decoder
from genbundle.builder.embedded import NotSimpleError
from genbundle.builder.exporting import MODEL_ERRORS, first_line
from genbundle.builder.image_text import image_text_components, placeholder_token
from genbundle.builder.inner import InnerPrompt, explain_inner
from genbundle.builder.plan import Call, Capture, Inputs, Plan, capture
from genbundle.builder.programs import can_fuse_prompt, make_decoder_plan, step_component, text_components, with_present
from genbundle.builder.samples import generates_from_text_alone
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Route, Source
from genbundle.runtime.inputs import TEXT_INPUTS

FEATURES = "features"
_FAILURES = (UnsupportedModelError, *MODEL_ERRORS)


class _Size:
    """The size of pieces that is only known when the program runs; good for `split` and nothing else."""

    def item(self) -> "_Size":
        """Itself, as a number would be."""
        return self


class _RuntimeSizes(TorchFunctionMode):
    """Numbers that are read from a list-like tensor inside the block are those of a running program."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        # A tracer's own `tolist` unbinds.
        if getattr(func, "__name__", "") in ("tolist", "unbind") and _is_list(args[0]):
            return [_Size()]
        return func(*args, **(kwargs or {}))


@contextmanager
def _media() -> Iterator[list[torch.Tensor]]:
    """What `masked_scatter` puts in the place of placeholders inside the block, `[features, width]` each.

    Models deal features out picture by picture, by sizes that they read from a tensor, and join them again before that:
    inside the block they stay joined, since a Python loop over them would bake the number of pictures into the program.
    """
    scattered: list[torch.Tensor] = []

    def record(original: Callable) -> Callable:
        def masked_scatter(tensor: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            scattered.append(source.reshape(-1, source.shape[-1]))
            return original(tensor, mask, source)

        return masked_scatter

    def joined(original: Callable) -> Callable:
        def split(tensor: torch.Tensor, sizes: Any, *args: Any, **kwargs: Any) -> Any:
            return (tensor,) if _runtime_sizes(sizes) else original(tensor, sizes, *args, **kwargs)

        return split

    # Not by a function mode: exporters put functions of their own in these places, which one doesn't see.
    replaced = ((torch.Tensor, "masked_scatter", record), (torch.Tensor, "split", joined), (torch, "split", joined))
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(attribute(owner, name, replacement(getattr(owner, name))))
        stack.enter_context(_RuntimeSizes())
        yield scattered


def _is_list(value: torch.Tensor) -> bool:
    return value.dim() == 1 and not value.is_floating_point()


def _runtime_sizes(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, _Size) for item in value)


class Fused(torch.nn.Module):
    """The program of a prompt with media, around the decoder that computes it.

    features: which of the scattered features are an output, to be counted against the prompt's placeholders; None for
    none.
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder, self.config = decoder, decoder.config
        self.features: int | None = None

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits and present, and the features that took the placeholders' places."""
        with _media() as scattered:
            outputs = self.decoder(**inputs)
        if self.features is not None:
            outputs[FEATURES] = scattered[self.features].contiguous()
        return outputs


def media_in_forward(model: PreTrainedModel) -> AbstractContextManager[None]:
    """`model.generate` hands pictures to forward as they are inside the block, instead of encoding them before."""
    return attribute(model, "_supports_mm_encoder_outputs", lambda: False)


def capture_whole(model: PreTrainedModel, samples: list[Inputs]) -> list[Capture]:
    """Captures whose prompts hold the user's pictures."""
    with media_in_forward(model):
        return capture(model, samples)


def decoder_components(
    model: PreTrainedModel, captures: list[Capture], *, fuse: bool, capacity: int | None, embedded: bool = False
) -> tuple[list[Component], Flow]:
    """The programs of a decoder, cut where it can be: at its encoders, else nowhere but between prompt and step.

    fuse: use ONNX Runtime's GroupQueryAttention where a program's attention allows it. embedded: as
    `image_text_components` takes it. Raises UnsupportedModelError.
    """
    if captures[0].inner is not None:
        inner = captures[0].inner[0]
        plan = make_decoder_plan(inner, captures)
        call, handed = explain_inner(model, captures, plan.step)
        plan = replace(plan, prompt=call)
        return fused_components(model, plan, captures, fuse=fuse, capacity=capacity, inner=inner, handed=handed)
    if not any(item.prompt.get("mm_encoder_outputs") for item in captures):
        plan = make_decoder_plan(model, captures)
        if plan.prompt is None or not plan.prompt.media:
            return text_components(model, plan, captures, fuse=fuse, capacity=capacity)
        return fused_components(model, plan, captures, fuse=fuse, capacity=capacity)
    try:
        plan, alone = make_decoder_plan(model, captures), generates_from_text_alone(model)
        return image_text_components(
            model, plan, captures, fuse=fuse, capacity=capacity, text_alone=alone, embedded=embedded
        )
    except NotSimpleError:
        raise
    except _FAILURES as error:
        try:
            whole = capture_whole(model, [item.inputs for item in captures])
            return fused_components(model, make_decoder_plan(model, whole), whole, fuse=fuse, capacity=capacity)
        except UnsupportedModelError as second:
            raise UnsupportedModelError(f"{_told(error)}; as one program: {second}") from second


def fused_components(
    model: PreTrainedModel, plan: Plan, captures: list[Capture], *, fuse: bool, capacity: int | None,
    inner: PreTrainedModel | None = None, handed: tuple[str, ...] = (),
) -> tuple[list[Component], Flow]:  # fmt: skip
    """The programs `prompt`, for prompts with media, and `decode`, for steps and prompts of text alone.

    inner: the model inside that generates, whose prompt gets the arguments `handed` from the outer generate.
    """
    assert plan.prompt is not None
    owner = model if inner is None else inner
    fused = fuse and can_fuse_prompt(owner, plan, captures)

    def decoder(*, fused: bool) -> Decoder:
        options: dict[str, Any] = {
            "layers": plan.layers,
            "fused": fused,
            "begins": True,
            "cache_argument": plan.cache_argument,
            "constants": plan.prompt.constants if plan.prompt is not None else {},
        }
        return Decoder(model, **options) if inner is None else InnerPrompt(model, inner, handed, **options)

    samples = [_tensors(item, plan.prompt.sources) for item in captures]
    try:
        token, features = _placeholder(model, Fused(decoder(fused=False)).eval(), captures, samples)
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its prompt can't be computed by one program: {_told(error)}"
        ) from error
    module = Fused(decoder(fused=fused)).eval()
    module.features = features
    prompt = replace(_prompt_component(model, plan, module, samples, token), fusions=fused or not fuse)
    decode = step_component(owner, plan, captures, fuse=fuse)
    media = Route(programs=("prompt",), needs=_needs(plan.prompt))
    text = Route(programs=("decode",), one_by_one=not plan.continues)
    routes = (media, text) if generates_from_text_alone(model) and not plan.step.unmasked else (media,)
    flow = Flow(prompt=routes, step=("decode",), continues=plan.continues, capacity=capacity)
    return [prompt, decode], flow


def _needs(call: Call) -> tuple[str, ...]:
    return tuple(sorted(name for name in call.media if name not in TEXT_INPUTS))


def _prompt_component(
    model: PreTrainedModel, plan: Plan, module: Fused, samples: list[dict[str, torch.Tensor]], token: int | None
) -> Component:
    call = plan.prompt
    assert call is not None
    sizes = {tuple(sample["input_ids"].shape[axis] for sample in samples): axis for axis in (1, 0)}
    known = {key: ("batch", "sequence")[axis] for key, axis in sizes.items() if len(set(key)) > 1}
    # With placeholders pictures are counted apart from sequences, though each captured sequence has one.
    apart = {
        name
        for name in (call.media if token is not None else ())
        if any(sample[name].shape[:2] != sample["input_ids"].shape for sample in samples)
    }
    axes = {
        **name_axes([{k: v for k, v in sample.items() if k not in apart} for sample in samples], known),
        **name_axes([{k: v for k, v in sample.items() if k in apart} for sample in samples]),
        "logits": {0: "batch"},
    }
    component = Component(
        name="prompt",
        roles=("encoder", "projector", "merge", "language_model", "lm_head"),
        modality=modality(model, call.media),
        module=module,
        sample=_twice(samples[0], axes, apart),
        axes={**axes, **({FEATURES: {0: FEATURES}} if token is not None else {})},
        sources=call.sources,
        placeholder_id=token,
    )
    return with_present(component, plan.layers, "total" if plan.step.unmasked else "sequence")


def _twice(
    sample: dict[str, torch.Tensor], axes: Mapping[str, Mapping[int, str]], apart: Collection[str]
) -> dict[str, torch.Tensor]:
    """The batch twice over: code that takes one of two away (all but the last) would fix what is left at 1."""
    if sample["input_ids"].shape[0] == 1:
        return sample
    counts = {name: 0 for name in apart if 0 in axes.get(name, {})}
    counts |= {name: axis for name, each in axes.items() for axis, symbol in each.items() if symbol == "batch"}
    return {
        name: torch.cat([tensor] * 2, counts[name]) if name in counts else tensor for name, tensor in sample.items()
    }


def modality(model: PreTrainedModel, media: Sequence[str]) -> str:
    """What kind of media the model's inputs hold: image, audio or video."""
    known = [kind for kind in getattr(model, "input_modalities", ()) if kind != "text"]
    told = {"pixel_values_videos": "video", "pixel_values": "image", "input_features": "audio", "input_values": "audio"}
    return next((told[name] for name in media if told.get(name) in known), known[0] if known else "image")


def _tensors(item: Capture, sources: Mapping[str, Source]) -> dict[str, torch.Tensor]:
    """The tensors of a captured prompt, with the mask that generate drops when it is all ones."""
    given = item.prompt if item.inner is None else {**item.inputs, "position_ids": item.prompt.get("position_ids")}
    tensors = {name: given.get(name) for name in sources}
    if "attention_mask" in tensors and tensors["attention_mask"] is None:
        tensors["attention_mask"] = torch.ones_like(given["input_ids"])
    missing = next((name for name, value in tensors.items() if value is None), None)
    if missing is not None:
        raise UnsupportedModelError(f"prompt: its input {missing!r} is given in some runs only, unexplained")
    return {name: value for name, value in tensors.items() if value is not None}


def _placeholder(
    model: PreTrainedModel, module: Fused, captures: list[Capture], samples: list[dict[str, torch.Tensor]]
) -> tuple[int | None, int | None]:
    """The token that stands for the features of one `masked_scatter`, and which one; None without one."""
    counts = []
    for sample in samples:
        with torch.no_grad(), _media() as scattered:
            module.decoder(**sample)
        counts.append([len(features) for features in scattered])
    for index, each in enumerate(zip(*counts, strict=False)):
        token = placeholder_token(model, captures, list(each))
        if token is not None:
            return token, index
    return None, None


def _told(error: BaseException) -> str:
    """A cause as part of a sentence."""
    return str(error) if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {first_line(error)}"
