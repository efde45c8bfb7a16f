"""Tiny random models of every generative class that transformers maps, made from the classes' default configs.

    python -m tests.zoo.shrink [NAMES...]

makes each class in a child of its own, generates eagerly on every variant and prints one line per class.
"""

import argparse
import copy
import itertools
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto as auto

from tests.zoo import children, config_rules, overrides, sample_inputs
from tests.zoo.sample_inputs import Inputs

NEW_TOKENS = 12
_KINDS = {
    # The first that has a class decides: many are in several.
    "speech": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "multimodal": auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "text": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def _classes() -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, mapping in _KINDS.items():
        for name in mapping.values():
            found.setdefault(name, kind)
    return dict(sorted(found.items()))


CLASSES: dict[str, str] = _classes()


def make(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """The tiny model of class `name`, in float32 eval mode, with weights that make greedy choices clear."""
    torch.manual_seed(seed)
    cls = getattr(hf, name)
    config = overrides.tiny_config(cls)
    config.dtype = torch.float32
    model = cls(config).eval().float().requires_grad_(False)
    config_rules.spread_weights(model, seed)
    _prepare_generation(model)
    overrides.finish(model)
    _vary(model)
    return model


_SCALES = ((1, 1), (0.4, 1), (1, 1.5), (0.16, 1), (1, 2.5), (0.4, 2.5), (1, 4))  # embeddings, layers
_VARIED = 12  # different tokens among the 24 of two probes


def _vary(model: hf.PreTrainedModel) -> None:
    """Take the scales of weights by which greedy decoding says different things: one token repeated proves little."""
    try:
        probes = [sample_inputs.sample(model, 4, 5, 0, 1), sample_inputs.sample(model, 6, 8, 1, 2)]
    except Exception:  # whoever makes inputs next meets it again, and reports it
        return
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def apply(scales: tuple[float, float]) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
        config_rules.rescale(model, embeddings=scales[0], layers=scales[1])

    found: dict[tuple[float, float], int] = {}
    for scales in _SCALES:
        apply(scales)
        try:
            said = [observed(model, probe).sequences[:, -NEW_TOKENS:].flatten().tolist() for probe in probes]
        except Exception:
            continue
        found[scales] = len(set(said[0]) | set(said[1])) - 8 * (said[0] == said[1])
        if found[scales] >= _VARIED:
            break
    apply(max(found, key=lambda scales: found[scales]) if found else _SCALES[0])


def _prepare_generation(model: hf.PreTrainedModel) -> None:
    """Greedy decoding that goes on: the special tokens' logits are zero, which is never the largest of 256."""
    generation = model.generation_config
    given = config_rules.token_ids(model.config)
    generation.pad_token_id, generation.bos_token_id = config_rules.PAD, config_rules.BOS
    generation.eos_token_id = config_rules.EOS
    if model.config.is_encoder_decoder:
        decoders = (model.config, getattr(model.config, "decoder", None), model.config.get_text_config(decoder=True))
        starts = [getattr(each, "decoder_start_token_id", None) for each in decoders]
        start = next((token for token in starts if token is not None and token < config_rules.VOCABULARY), None)
        generation.decoder_start_token_id = config_rules.BOS if start is None else start
    for field in ("max_length", "min_length", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"):
        setattr(generation, field, None)
    generation.begin_suppress_tokens = None
    generation.do_sample, generation.num_beams = False, 1
    silence_tokens(model, {config_rules.PAD, config_rules.BOS, config_rules.EOS, *given})


def silence_tokens(model: hf.PreTrainedModel, tokens: set[int]) -> None:
    """Zero the head's rows of `tokens`."""
    owners = (model, getattr(model, "text_decoder", None), getattr(model, "decoder", None))
    head = next((found for owner in owners if (found := config_rules.output_head(owner)) is not None), None)
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2:
        return
    rows = torch.tensor([token for token in sorted(tokens) if token < weight.shape[0]])
    weight[rows] = 0
    bias = getattr(head, "bias", None)
    if bias is not None:
        bias[rows] = 0


def variants(name: str, model: hf.PreTrainedModel, *, clip: bool = False) -> dict[str, list[Inputs]]:
    """Generate kwargs for `model`: two to build from and two or more, never built from, to check with."""
    del name  # the model knows its class
    return sample_inputs.variants(model, lambda asked, inputs: observed(asked, inputs).margin, clip=clip)


@dataclass(frozen=True)
class Observed:
    """Eager's greedy generation. margin: the least distance of the two best logits, in the logits' deviations."""

    sequences: torch.Tensor
    new_tokens: int
    margin: float


def observed(model: hf.PreTrainedModel, inputs: Inputs) -> Observed:
    """Generate `NEW_TOKENS` eagerly; RuntimeError where fewer come, or logits aren't finite."""
    generate: Any = model.generate
    with torch.no_grad():
        result = generate(
            **copy.deepcopy(inputs),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    if len(result.logits) < NEW_TOKENS:
        raise RuntimeError(f"ended after {len(result.logits)} tokens")
    logits = torch.stack([step.float() for step in result.logits], 1)
    if logits.isnan().any() or not logits.isfinite().any(-1).all():
        raise RuntimeError("logits that aren't finite")
    best = logits.topk(2, -1).values
    spread = logits.masked_fill(~logits.isfinite() | (logits < -1e9), 0).std(-1).clamp_min(1e-9)
    return Observed(result.sequences, len(result.logits), float(((best[..., 0] - best[..., 1]) / spread).min()))


def measure(name: str) -> dict[str, Any]:
    """Make `name` and generate on every variant: parameters, seconds, the smallest margin, and how tokens vary."""
    start = time.perf_counter()
    model = make(name)
    every = variants(name, model)
    results = [observed(model, inputs) for inputs in [*every["build"], *every["check"]]]
    pairs = itertools.combinations(results, 2)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "margin": round(min(result.margin for result in results[2:]), 4),
        "tokens": len({token for result in results for token in result.sequences[:, -NEW_TOKENS:].flatten().tolist()}),
        "alike": any(torch.equal(one.sequences, other.sequences) for one, other in pairs),
        "batch": any(result.sequences.shape[0] > 1 for result in results),
    }


def report(name: str, ask: Callable[[str], dict[str, Any]] = measure, **limits: Any) -> bool:
    """Measure `name` in a child and print one line; whether it generates."""
    answer = children.call(ask, name, **limits)
    if "error" in answer:
        print(f"FAILED {CLASSES[name]:10} {name}: {answer['error']}", flush=True)
        return False
    print(
        f"ok     {CLASSES[name]:10} {name}: {answer['parameters']} parameters, {answer['seconds']} s, "
        f"margin {answer['margin']}, {answer['tokens']} tokens{'' if answer['batch'] else ', no batch'}"
        f"{', two variants give the same' if answer['alike'] else ''}",
        flush=True,
    )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes, or patterns of them; all by default")
    parser.add_argument("--kind", choices=sorted(set(CLASSES.values())))
    parser.add_argument("--limit-s", type=float, default=60)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    chosen = [
        name
        for name, kind in CLASSES.items()
        if (not options.names or any(re.fullmatch(pattern, name) for pattern in options.names))
        and options.kind in (None, kind)
    ]
    good: dict[str, list[bool]] = {}
    for name in chosen:
        good.setdefault(CLASSES[name], []).append(report(name, limit_s=options.limit_s))
    for kind, results in sorted(good.items()):
        print(f"{kind}: {sum(results)} of {len(results)} generate eagerly")
    print(f"all: {sum(map(sum, good.values()))} of {len(chosen)}")


if __name__ == "__main__":
    main()
