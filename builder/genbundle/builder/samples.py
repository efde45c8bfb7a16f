"""Sample inputs: what the capture runs on, and the held-out inputs that the finished bundle is checked on."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedModel

from genbundle.builder.exporting import MODEL_ERRORS, first_line, quiet
from genbundle.builder.limits import Limits
from genbundle.builder.verify import NEW_TOKENS
from genbundle.bundles import BuildError
from genbundle.bundles.manifest import Manifest
from genbundle.runtime.inputs import TEXT_INPUTS

Inputs = dict[str, torch.Tensor]
_PAST_WINDOW = 5  # how far a held-out prompt goes beyond a sliding window
_PAST_LEAST = 3  # and beyond the fewest tokens that a program takes
_LONG = 200  # tokens of the held-out prompt that is to show what a model does otherwise from some length on
# The steps may be masked otherwise than the prompt.
FIRST_LOGITS: dict[str, Any] = {
    "min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True
}  # fmt: skip
_LONGEST_SAMPLE = 1100  # tokens of a held-out prompt: eager runs it too


@dataclass(frozen=True, kw_only=True)
class Samples:
    """capture: what is traced from, with a padded batch among them. held_out: name -> inputs never traced.

    alone: each is one sequence, since the model's own generation mixes those of a batch.
    """

    capture: list[Inputs]
    held_out: dict[str, Inputs]
    alone: bool = False


def as_inputs(inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> list[Inputs]:
    """What the caller gave as samples, as tensors; BuildError for what isn't generate kwargs."""
    if inputs is None:
        return []
    samples = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    result = []
    for sample in samples:
        if not isinstance(sample, Mapping):
            raise BuildError(
                f"inputs: expected generate kwargs (a dict) or a list of them, got {type(sample).__name__}"
            )
        try:
            tensors = {name: torch.as_tensor(value) for name, value in sample.items() if value is not None}
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise BuildError(f"inputs: expected tensors, or lists of equal lengths: {error}") from error
        ids = tensors.get("input_ids")
        if not tensors or (ids is not None and ids.dim() != 2):
            raise BuildError("inputs: expected generate kwargs with input_ids [batch, length]")
        if ids is not None:
            tensors.setdefault("attention_mask", torch.ones_like(ids))
        result.append(tensors)
    return result


class SampleMaker:
    """Makes variants of sample inputs: longer prompts, other text, other content, padded batches."""

    def __init__(self, model: PreTrainedModel, given: Sequence[Inputs] = (), seed: int = 0):
        self._per_token = per_token(given) if given and "input_ids" in given[0] else frozenset()
        config = model.config.get_text_config(decoder=True)
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = next(model.parameters()).dtype
        special = model.generation_config
        banned = {special.pad_token_id, special.bos_token_id, special.decoder_start_token_id}
        eos = special.eos_token_id
        banned |= set(eos if isinstance(eos, list) else [eos])
        # Config fields that name a token: placeholders of pictures, sounds, boundaries.
        for owner in (model.config, config):
            banned |= {
                value
                for name, value in owner.to_dict().items()
                if isinstance(value, int) and name.endswith(("token_id", "token_index"))
            }
        self._allowed = torch.tensor([token for token in range(config.vocab_size) if token not in banned])

    def text(self, length: int) -> Inputs:
        """One sequence of random tokens, none of them special."""
        picked = torch.randint(len(self._allowed), (1, length), generator=self._generator)
        ids = self._allowed[picked]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def longer(self, sample: Inputs, extra: int) -> Inputs:
        """`sample` with `extra` random tokens after it; arrays with a row per token repeat their last one."""
        ids, result = sample["input_ids"], dict(sample)
        picked = torch.randint(len(self._allowed), (ids.shape[0], extra), generator=self._generator)
        for name, tensor in sample.items():
            if name in self._per_token:
                more = self._allowed[picked] if name == "input_ids" else tensor[:, -1:].repeat_interleave(extra, 1)
                result[name] = torch.cat([tensor, more.to(tensor.dtype)], 1)
        return result

    def other_content(self, sample: Inputs) -> Inputs:
        """`sample` with its floating-point inputs (pixels, features) replaced by noise of the same mean and spread.

        Columns of whole numbers stay: they are places or marks. So do arrays with a row per token, its box on the page.
        """
        result = dict(sample)
        for name, tensor in sample.items():
            if not tensor.is_floating_point() or name in self._per_token:
                continue
            noise = torch.randn(tensor.shape, generator=self._generator)
            spread = tensor.float().std() if tensor.numel() > 1 else 1.0
            whole = (tensor == tensor.round()).flatten(0, -2).all(0) if tensor.dim() > 1 else torch.tensor(False)
            result[name] = torch.where(whole, tensor, (noise * spread + tensor.float().mean()).to(tensor.dtype))
        return result


def per_token(samples: Sequence[Inputs]) -> frozenset[str]:
    """The arrays with a row for each of the token ids `[batch, length]`, in every sample."""
    return frozenset(
        name
        for name, tensor in samples[0].items()
        if all(sample[name].shape[:2] == sample["input_ids"].shape for sample in samples)
        and (tensor.dim() == 2 or len({sample["input_ids"].shape[1] for sample in samples}) > 1)
    )


def left_padded(samples: Sequence[Inputs], pad: int) -> Inputs:
    """Several single samples as one batch, prompts padded on the left; other inputs joined along their first axis."""
    longest, rows = max(sample["input_ids"].shape[1] for sample in samples), per_token(samples)
    result: Inputs = {}
    for name in samples[0]:
        parts = []
        for sample in samples:
            tensor, missing = sample[name], longest - sample["input_ids"].shape[1]
            if name in rows:
                value = pad if name == "input_ids" else 0
                room = (0, 0) * (tensor.dim() - 2) + (missing, 0)
                tensor = torch.nn.functional.pad(tensor, room, value=value)
            parts.append(tensor)
        result[name] = torch.cat(parts)
    return result


def padding_token(model: PreTrainedModel) -> int:
    """What prompts are padded with."""
    config = model.generation_config
    eos = config.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    return next(token for token in (config.pad_token_id, first_eos, 0) if token is not None)


def from_processor(model: PreTrainedModel, processor: Any) -> list[Inputs]:
    """Samples that an image-text model's own processor makes of noise pictures of two sizes, and two questions.

    Empty for a model that takes no pictures. BuildError when the processor can't be used so: give `inputs` then.
    """
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        return []
    if getattr(processor, "image_processor", None) is None:
        raise BuildError(f"{type(model).__name__} takes pictures: give inputs (generate kwargs), or its processor")
    noise = np.random.default_rng(0)
    samples = []
    for height, width, question in ((160, 224, "What is in the picture?"), (256, 192, "Describe it, please.")):
        picture = PIL.Image.fromarray(noise.integers(0, 255, (height, width, 3), np.uint8))
        try:
            with quiet():
                encoded = processor(text=_question(processor, question), images=[picture], return_tensors="pt")
        except MODEL_ERRORS as error:
            raise BuildError(
                f"inputs: {type(processor).__name__} makes none of a picture and a question "
                f"({first_line(error)}); give generate kwargs"
            ) from error
        samples.append({name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)})
    return samples


def _question(processor: Any, question: str) -> str:
    """A prompt with one picture, as the model's chat template puts it, else the picture's token and the question."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{getattr(processor, 'image_token', '<image>')}{question}"


def make_samples(model: PreTrainedModel, given: list[Inputs], limits: Limits) -> Samples:
    """Samples for the capture and held-out inputs, from what was given or, for a text model, its vocabulary.

    Raises BuildError for inputs that can't be used, and for a capacity that they don't fit in.
    """
    samples = _make_samples(model, given, limits)
    ids = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    longest = max(sample[ids].shape[1] if ids in sample else 1 for sample in samples.held_out.values()) + NEW_TOKENS
    if limits.capacity is not None and longest > limits.capacity:
        raise BuildError(
            f"a bundle of {limits.capacity} tokens can't be checked: the longest sample takes {longest} (prompt and "
            "generated): raise max_length, or give shorter inputs"
        )
    return samples


def reaching(
    model: PreTrainedModel, given: list[Inputs], samples: Samples, manifest: Manifest, limits: Limits
) -> dict[str, Inputs]:
    """Prompts that are long enough for programs that take no shorter ones, where no held-out one is."""
    if model.config.is_encoder_decoder:
        return {}
    maker, found = SampleMaker(model, given), {}
    for route in manifest.flow.prompt:
        needed = max(manifest.program(name).least for name in route.programs) + _PAST_LEAST
        fitting = [item for item in samples.held_out.values() if item.keys() - set(TEXT_INPUTS) == set(route.needs)]
        missing = needed - max((item["input_ids"].shape[1] for item in fitting), default=needed)
        if missing > 0 and (limits.capacity is None or needed + NEW_TOKENS <= limits.capacity):
            sample = max(fitting, key=lambda item: item["input_ids"].shape[1])
            found[f"prompt of {needed} tokens"] = maker.longer(sample, missing) if given else maker.text(needed)
    return found


def _make_samples(model: PreTrainedModel, given: list[Inputs], limits: Limits) -> Samples:
    maker, pad = SampleMaker(model, given), padding_token(model)
    if not given:
        capture = [left_padded([maker.text(5), maker.text(9)], pad), maker.text(6)]
        held_out = {
            "one token": maker.text(1),
            "short prompt": maker.text(3),
            "longer prompt": maker.text(33),
            "padded batch": left_padded([maker.text(4), maker.text(12), maker.text(7)], pad),
        }
        longest = min(limits.capacity or _LONGEST_SAMPLE, _LONGEST_SAMPLE + NEW_TOKENS) - NEW_TOKENS
        marks = {"long prompt": _LONG}
        if limits.window is not None:
            marks["prompt past the window"] = limits.window + _PAST_WINDOW
        if limits.restart is not None:
            marks["past the length of a restart"] = limits.restart - NEW_TOKENS // 2
        held_out |= {name: maker.text(length) for name, length in marks.items() if 33 < length <= longest}
        return Samples(capture=capture, held_out=held_out)
    first, last = given[0], given[-1]
    if "input_ids" not in first:
        if not model.config.is_encoder_decoder:
            raise BuildError("inputs: expected generate kwargs with input_ids [batch, length]")
        return _encoder_samples(maker, first, last)
    single = first["input_ids"].shape[0] == 1
    if not single and len(first) > 2:
        raise BuildError(
            f"inputs: expected one sequence per sample, got a batch of {first['input_ids'].shape[0]}: give its rows as "
            "a list of samples, so that it's known which pictures belong to which"
        )
    batch = left_padded([first, maker.other_content(maker.longer(first, 3))], pad) if single else first
    # Sizes that are alike in both captures would be taken for constants.
    extra = 5 if last["input_ids"].shape[1] + 4 == batch["input_ids"].shape[1] else 4
    capture = [batch, maker.other_content(maker.longer(last, extra))]
    held_out = {
        "as given": first,
        "other content, longer prompt": maker.other_content(maker.longer(first, 17)),
        **{f"sample {number} as given": sample for number, sample in enumerate(given[1:], 2)},
    }
    if len(first) == 2:
        # A tracer may take what holds for the prompts that it is shown to hold for any.
        shortest = {"one token": maker.text(1), "short prompt": maker.text(3)}
        held_out |= {name: inputs for name, inputs in shortest.items() if generates(model, inputs)}
    if generates_from_text_alone(model) and len(first) > 2:
        held_out["text alone"] = maker.text(11)
    both = _one_after_another(first, last, per_token([first, last]))
    if both is not None and generates(model, both):
        held_out["two pictures"] = both
    if single:
        # Content of another size can't always share a batch.
        alike = all(first[name].shape[1:] == tensor.shape[1:] or tensor.dim() < 3 for name, tensor in last.items())
        third = last if alike else first
        rows = [
            maker.other_content(maker.longer(sample, extra)) for sample, extra in ((third, 2), (first, 9), (first, 1))
        ]
        held_out["padded batch"] = left_padded(rows, pad)
    return Samples(capture=capture, held_out=held_out)


def _encoder_samples(maker: SampleMaker, first: Inputs, last: Inputs) -> Samples:
    """Samples for an encoder-decoder whose input isn't tokens: other content, and batches of it."""
    others = [maker.other_content(first) for _ in range(3)]
    batch = {name: torch.cat([tensor, others[0][name]]) for name, tensor in first.items()}
    held_out = {
        "as given": first,
        "other content": maker.other_content(last),
        "batch": {name: torch.cat([tensor, others[1][name], others[2][name]]) for name, tensor in first.items()},
    }
    return Samples(capture=[batch, last], held_out=held_out)


def _one_after_another(first: Inputs, second: Inputs, rows: Collection[str]) -> Inputs | None:
    """Two samples' prompts as one prompt with the content of both; None where they have none or don't fit."""
    if len(first) < 3 or first["input_ids"].shape[0] != 1:
        return None
    joined: Inputs = {}
    for name, tensor in first.items():
        axis = 1 if name in rows else 0
        if tensor.shape[axis + 1 :] != second[name].shape[axis + 1 :]:
            return None
        joined[name] = torch.cat([tensor, second[name]], axis)
    return joined


def padded_single(model: PreTrainedModel, samples: Sequence[Inputs]) -> Inputs:
    """The last of the samples, one sequence, to trace programs for one sequence from: padded, with other content beside
    its own if it may be.

    What there is one of would be taken for a constant, and generate drops a mask of ones.
    """
    single, rows = samples[-1], per_token(samples)
    # The same content twice wouldn't show which of the two something is made of.
    twice = _one_after_another(single, SampleMaker(model, samples).other_content(single), rows)
    sample = single if twice is None or not generates(model, twice) else twice
    pad = padding_token(model)
    return {
        name: torch.nn.functional.pad(
            tensor, (*(0, 0) * (tensor.dim() - 2), 2, 0), value=pad if name == "input_ids" else 0
        )
        if name in rows
        else tensor
        for name, tensor in sample.items()
    }


def generates(model: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether eager generation takes these inputs."""
    generate: Any = model.generate
    try:
        with quiet(), torch.no_grad():
            generate(**inputs, max_new_tokens=1, do_sample=False)
    except MODEL_ERRORS:
        return False
    return True


def generates_from_text_alone(model: PreTrainedModel) -> bool:
    """Whether `model.generate` takes token ids and nothing else, and gives the same for them padded.

    Some models mask a text differently once it is padded: no one program could replay both.
    """
    generate: Any = model.generate
    maker = SampleMaker(model)
    alone = maker.text(4)
    padded = left_padded([alone, maker.text(6)], padding_token(model))
    try:
        with quiet(), torch.no_grad():
            logits = [torch.stack(generate(**inputs, **FIRST_LOGITS).logits)[:, 0] for inputs in (alone, padded)]
    except MODEL_ERRORS:
        return False
    return torch.allclose(*logits, rtol=1e-3, atol=1e-3)
