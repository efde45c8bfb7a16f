"""What an image-text model does before its decoder, for the ExecuTorch runtimes: seen once in eager, then checked.

`probe_call` runs the model's own generate on a sample and reads off how the decoder was called. `Scatter` is the merge
that runs on the device: features in the places of the placeholder tokens. `check_scatter` holds it against what the
model did.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.masking_utils import sdpa_mask

from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.builder.plan import Capture
from genbundle.builder.stateful import DecoderCall, decoder_of
from genbundle.builder.stateful_attention import stateful_attention
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input, Source

Inputs = Mapping[str, torch.Tensor]
_DEEPSTACK = {"visual_pos_masks", "deepstack_visual_embeds"}
_UNDERSTOOD = {"inputs_embeds", "position_ids", "attention_mask", "past_key_values", "cache_position", *_DEEPSTACK}


@dataclass(kw_only=True)
class Seen:
    """One prompt's call of the decoder: its keyword arguments, and each layer's mask (or whether it is causal)."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    masks: list[torch.Tensor | bool] = field(default_factory=list)


class _PromptDone(Exception):
    """Ends generate once the decoder has seen the prompt."""


def watch_prompt(model: PreTrainedModel, inputs: Inputs) -> Seen:
    """Run `model.generate(**inputs)` up to its first decoder call and say what that call was.

    Raises UnsupportedModelError when generate refuses the inputs or never calls the decoder.
    """
    decoder, seen = decoder_of(model), Seen()

    def attention(module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        # As scaled_dot_product_attention does: without a mask, the module's own flag says whether it is causal.
        causal = kwargs.get("is_causal")
        seen.masks.append(
            (causal if causal is not None else getattr(module, "is_causal", True))
            if attention_mask is None
            else attention_mask
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def before(_module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.kwargs.update(kwargs)

    def after(*_: Any) -> None:
        raise _PromptDone

    hooks = [decoder.register_forward_pre_hook(before, with_kwargs=True), decoder.register_forward_hook(after)]
    try:
        with torch.no_grad(), stateful_attention(decoder, attention, sdpa_mask):
            cast(Any, model).generate(**dict(inputs), max_new_tokens=1, do_sample=False, num_beams=1)
    except _PromptDone:
        return seen
    except MODEL_ERRORS as error:
        raise UnsupportedModelError(f"{type(model).__name__}.generate refuses {sorted(inputs)}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    raise UnsupportedModelError(f"{type(model).__name__}.generate never calls its language model with {sorted(inputs)}")


def probe_call(model: PreTrainedModel, inputs: Inputs) -> tuple[DecoderCall, Seen]:
    """How the decoder is called in a prompt of `inputs`, and the call itself.

    Raises UnsupportedModelError for an argument, a position rule or an attention pattern that has no explanation.
    """
    seen = watch_prompt(model, inputs)
    both_ways = _sees_both_ways(seen.masks, inputs)
    if seen.kwargs.get("inputs_embeds") is None:
        return DecoderCall(both_ways=both_ways), seen
    for name, value in seen.kwargs.items():
        if name not in _UNDERSTOOD and any(map(torch.is_tensor, tree_leaves(value))):
            raise UnsupportedModelError(
                f"language_model: its input {name!r} has no explanation on the xnnpack backend: build for another "
                "backend, for instance cpu"
            )
    offset, axes = _positions(seen.kwargs.get("position_ids"), inputs)
    deepstack = seen.kwargs.get("deepstack_visual_embeds")
    call = DecoderCall(
        embeds=True,
        position_offset=offset,
        position_axes=axes,
        both_ways=both_ways,
        deepstack=len(deepstack) if deepstack is not None else 0,
    )
    return call, seen


def text_alone(model: PreTrainedModel, inputs: Inputs, placeholder: int, call: DecoderCall) -> DecoderCall | None:
    """How the decoder is called for a prompt of text alone; None where it isn't, or not as `call` allows."""
    ids = inputs["input_ids"][-1][_mask_of(inputs)[-1]]
    ids = ids[ids != placeholder][None]
    try:
        text, _ = probe_call(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    except UnsupportedModelError:
        return None
    same = text.position_offset == call.position_offset and text.position_axes in (0, call.position_axes)
    return text if same and not (text.both_ways and not call.both_ways) else None


class Scatter(torch.nn.Module):
    """The merge: `(tokens [1, S], features [1, N, D]) -> embeds [1, S, D]`, features where `image_token` stands.

    With deepstack features `[layers, N, D]` as a third input, `[layers, 1, S, D]` (zeros elsewhere) is a second output.
    """

    def __init__(self, embedding: "TokenEmbedding", image_token: int):
        super().__init__()
        self.embedding, self.image_token = embedding, image_token

    def forward(self, tokens: torch.Tensor, features: torch.Tensor, *deepstack: torch.Tensor) -> Any:
        """The embeddings, and the deepstack features in their places."""
        here = tokens[0] == self.image_token
        place = (here.long().cumsum(0) - 1).clamp(min=0)
        embeds = torch.where(here[:, None], features[0][place], self.embedding.embed(tokens)[0])[None]
        if not deepstack:
            return embeds
        dense = [torch.where(here[:, None], layer[place], 0.0)[None] for layer in deepstack[0]]
        return embeds, torch.stack(dense)


class TokenEmbedding(torch.nn.Module):
    """`tokens [1, S] -> embeds [1, S, D]`; with `deepstack` layers, zeros `[layers, 1, S, D]` besides."""

    def __init__(self, model: PreTrainedModel, deepstack: int = 0):
        super().__init__()
        self.table, self.deepstack = cast(torch.nn.Embedding, model.get_input_embeddings()), deepstack
        self._rows = int(self.table.weight.shape[0])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embeddings; a placeholder that lies beyond the table gets some row, which the merge replaces."""
        return self.table(tokens.clamp(max=self._rows - 1))

    def forward(self, tokens: torch.Tensor) -> Any:
        """The embeddings, and the zeros."""
        embeds = self.embed(tokens)
        if not self.deepstack:
            return embeds
        return embeds, embeds.new_zeros(1).expand(self.deepstack, *embeds.shape).contiguous()


def check_scatter(scatter: Scatter, inputs: Inputs, found: list[torch.Tensor], seen: Seen) -> None:
    """UnsupportedModelError unless the model's own merge gave what `scatter` gives for the same features.

    found: the features `[N, D]` of all pictures, then those of each deeper level.
    """
    ids, mask, first = inputs["input_ids"], _mask_of(inputs), 0
    expected = [seen.kwargs["inputs_embeds"]]
    for level in seen.kwargs.get("deepstack_visual_embeds") or []:
        dense = torch.zeros_like(expected[0])
        dense[seen.kwargs["visual_pos_masks"]] = level
        expected.append(dense)
    for row in range(ids.shape[0]):
        count = int((ids[row] == scatter.image_token).sum())
        features, *levels = (part[first : first + count] for part in found)
        merged = scatter(ids[row : row + 1], features[None], *([torch.stack(levels)] if levels else []))
        given = [merged[0], *merged[1]] if levels else [merged]
        for a, b in zip(given, expected, strict=True):
            if not torch.allclose(a[0][mask[row]], b[row][mask[row]], rtol=1e-4, atol=1e-5):
                raise UnsupportedModelError(
                    "merge: the language model's embeddings aren't the tokens' with image features in the "
                    "placeholders' places, which is what the xnnpack backend does: build for another backend, for "
                    "instance cpu"
                )
        first += count


def fixed_inputs(captures: list[Capture], known: set[str]) -> tuple[Input, ...]:
    """Inputs of the captured generations that no program takes: each must be one number, which the runtime insists on.

    PaliGemma's token_type_ids, all 0 in a prompt, and a pixel_attention_mask without padding are such. Raises
    UnsupportedModelError for an input that holds different numbers.
    """
    found = []
    for name, tensor in captures[0].inputs.items():
        if name in known:
            continue
        per_token = tensor.shape == captures[0].inputs["input_ids"].shape
        values = [item.inputs[name][_mask_of(item.inputs)] if per_token else item.inputs[name] for item in captures]
        numbers = torch.cat([value.flatten() for value in values]).unique()
        if len(numbers) != 1:
            raise UnsupportedModelError(
                f"language_model: the input {name!r} has no explanation on the xnnpack backend, and isn't one number "
                "throughout: build for another backend, for instance cpu"
            )
        shape = tuple(f"{name}_{axis}" for axis in range(tensor.dim()))
        source = Source(kind="user", name=name, options={"equals": numbers[0].item()})
        found.append(Input(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=shape, source=source))
    return tuple(found)


def _mask_of(inputs: Inputs) -> torch.Tensor:
    """Which tokens are no padding, `[batch, S]`."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _positions(position_ids: torch.Tensor | None, inputs: Inputs) -> tuple[int, int]:
    """The offset of positions that count up and 0, or 0 and the rows of explicit ones."""
    if position_ids is None:
        return 0, 0
    mask = _mask_of(inputs)
    counted = torch.where(mask, mask.long().cumsum(-1) - 1, 0)
    offset = (position_ids - counted)[mask.expand_as(position_ids)].unique()
    if len(offset) == 1 and position_ids.dim() == 2:
        return int(offset), 0
    if position_ids.dim() == 3:
        return 0, position_ids.shape[0]
    raise UnsupportedModelError("language_model: its position_ids don't count the tokens, unexplained")


def _sees_both_ways(masks: list[torch.Tensor | bool], inputs: Inputs) -> bool:
    """Whether the prompt's tokens attend to those after them: all to all, or none to any."""
    valid, answers = _mask_of(inputs), set()
    for mask in masks:
        if isinstance(mask, bool):
            answers.add(not mask)
            continue
        for row in range(valid.shape[0]):
            seen = mask[row, 0][valid[row]][:, valid[row]]
            later = torch.ones_like(seen).triu(1)
            ahead = int(seen[later].sum())
            # A picture's tokens may see each other and the text not: neither all nor none.
            if ahead not in (0, int(later.sum())) or (ahead and not bool(seen.all())):
                raise UnsupportedModelError(
                    "language_model: some of a prompt's tokens attend to later ones and others don't, which the "
                    "xnnpack backend can't express: build for another backend, for instance cpu"
                )
            answers.add(ahead > 0)
    if len(answers) != 1:
        raise UnsupportedModelError("language_model: layers differ in whether a prompt's tokens attend to later ones")
    return answers.pop()
