"""A model of pictures whose one decoder takes embeddings, for prompt and step, and a program that looks tokens up.

It is what loops of other runtimes call: they look up every token and put features in the places of one token. Whether
the model's own merge does just that is tried on the captured prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component
from genbundle.builder.merge import Prompt
from genbundle.builder.plan import Plan
from genbundle.builder.programs import BATCH, NEW, PAST, ROOM, text_sample, with_past
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Source

EMBEDDINGS = "inputs_embeds"
MERGED = f"merged_{EMBEDDINGS}"
"""What both the merge and the look-up give, which goes into the decoder."""


class NotSimpleError(UnsupportedModelError):
    """A model whose merge or decoder does more than put features in the places of tokens."""


class Embed(torch.nn.Module):
    """The model's look-up of token embeddings."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.embeddings, self.config = model.get_input_embeddings(), model.config

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[batch, sequence]` to `[batch, sequence, width]`."""
        return {MERGED: self.embeddings(input_ids)}


def expect_placed(
    model: PreTrainedModel, samples: Sequence[Mapping[str, torch.Tensor]], merged: Sequence[Mapping], token: int | None,
) -> None:  # fmt: skip
    """NotSimpleError unless every merged prompt is its tokens' embeddings with the features in the places of `token`.

    samples: what went into the merge, tokens and features; merged: what came out, by path.
    """
    name = type(model).__name__
    if token is None:
        raise NotSimpleError(f"{name}: no one token stands in its prompts for each of a picture's features")
    embed = Embed(model)
    for sample, made in zip(samples, merged, strict=True):
        ids = sample["input_ids"]
        features = [value for key, value in sample.items() if value.is_floating_point()]
        if len(features) != 1:
            raise NotSimpleError(f"{name}: its merge takes {len(features)} tensors of features, not one")
        with torch.no_grad():
            expected = embed(ids)[MERGED]
        places = ids == token
        rows = features[0].reshape(-1, features[0].shape[-1])
        if rows.shape != (int(places.sum()), expected.shape[-1]):
            raise NotSimpleError(f"{name}: its features {list(features[0].shape)} aren't one row per placeholder")
        expected[places] = rows
        if not torch.allclose(made[EMBEDDINGS], expected, rtol=1e-5, atol=1e-6):
            raise NotSimpleError(f"{name}: its merge does more than put the features in the places of their tokens")


def embedded_components(
    model: PreTrainedModel, plan: Plan, template: Mapping[str, Any], sample: Mapping[str, torch.Tensor],
    sources: Mapping[str, Source], *, fused: bool,
) -> tuple[Component, Component]:  # fmt: skip
    """The programs `embed_tokens` and `decoder`.

    template: the language model's arguments as the merge recorded them; sample: its tensors by path; sources: where
    those come from. NotSimpleError where it takes other tensors than embeddings, padding mask and positions.
    """
    name = type(model).__name__
    if not plan.continues or not all(layer.plain for layer in plan.layers):
        raise NotSimpleError(f"{name}: its prompt is computed otherwise than its steps")
    for path in sample:
        if path != EMBEDDINGS and sources[path].kind not in ("mask", "position"):
            raise NotSimpleError(f"{name}: its language model takes {path!r} beside embeddings, mask and positions")
    tokens, axes = text_sample(plan.step, new=NEW, past=PAST)
    width = sample[EMBEDDINGS].shape[-1]
    given = {EMBEDDINGS: torch.randn(BATCH, NEW, width)}
    given |= {path: tokens[path] for path in sample if path != EMBEDDINGS and path in tokens}
    if given.keys() != set(sample):
        raise NotSimpleError(f"{name}: its prompt takes {sorted(sample)}, its steps {sorted(given)}")
    embedded = {0: "batch", 1: "sequence"}
    in_place = fused and "attention_mask" in given
    decoder = Component(
        name="decoder",
        roles=("language_model", "lm_head", "decode"),
        module=Prompt(model, template, plan.layers, fused=fused, in_place=in_place, begins=False).eval(),
        sample=given,
        axes={**{path: axes[path] for path in (*given, "logits") if path in axes}, EMBEDDINGS: embedded},
        sources={path: sources[path] for path in given},
        fusions=fused,
    )
    embed = Component(
        name="embed_tokens",
        roles=("merge",),
        module=Embed(model).eval(),
        sample={"input_ids": tokens["input_ids"]},
        axes={"input_ids": axes["input_ids"], MERGED: embedded},
        sources={"input_ids": Source(kind="tokens")},
    )
    return embed, with_past(decoder, plan.layers, ROOM if in_place else PAST, in_place=in_place)
