"""Whether ExecuTorch's own runners run a .pte: those that Android's LlmModule and iOS's MultimodalRunner wrap.

What their methods take is known from the programs (`multimodal_obstacle`). They read text with a tokenizer library of
their own, which knows few kinds of tokenizers: it is tried on the bundle's here (`tried_runners`), so that nobody finds
out on a phone. Their sources: https://github.com/pytorch/executorch/tree/main/extension/llm/runner
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import PreTrainedModel

from genbundle.builder.samples import Inputs, generates
from genbundle.builder.stateful import DecoderCall
from genbundle.builder.stateful_encoder import MediaEncoder
from genbundle.bundles.manifest import Manifest, Runner
from genbundle.runtime.images import preprocess
from genbundle.runtime.questions import Parts, added_prefix, question_parts
from genbundle.runtime.text import TextProcessor

TEXT_RUNNER, MULTIMODAL_RUNNER, SEQ2SEQ_RUNNER = "TextLLMRunner", "MultimodalRunner", "Seq2SeqRunner"
QUESTION = "What is this?"
# Their sampling knows a temperature, and the largest share of probability is fixed.
_FOLLOWED = frozenset({"max_new_tokens", "max_length", "do_sample", "temperature"})
# Every tokenizer of a model that speaks knows the first two; the third shows what is kept of other alphabets.
_PLAIN_TEXTS = ("Hello world", " A leading space, and two  inside it's 1234.5!")
_OTHER_TEXTS = ("Grüße, 東京, שלום, ½ and 👩‍🚀\n\tnew line",)
_LONGEST_TRIAL_S = 120
# In a process of its own: the library ends its process for some tokenizers, and logs past Python.
_TRIAL = """
import json, sys
from pytorch_tokenizers import pytorch_tokenizers_cpp
request = json.load(sys.stdin)
tokenizer = pytorch_tokenizers_cpp.HFTokenizer()
tokenizer.load(request["tokenizer"])
ids = [tokenizer.encode(text, 0, 0) for text in request["texts"]]
said = ["".join(tokenizer.decode(token) for token in tokens) for tokens in request["ids"]]
print(json.dumps({"ids": ids, "said": said}))
"""


def multimodal_obstacle(
    call: DecoderCall, encoder: MediaEncoder, prompts: Iterable[torch.Tensor], placeholder: int, features: int
) -> str | None:
    """Why MultimodalRunner can't run the methods of `call` and `encoder`; None where it can.

    prompts: captured token ids `[batch, length]`, in which `placeholder` stands for each of a picture's `features`.
    """
    more = [
        what
        for what, taken in (
            ("positions by rows (M-RoPE)", call.position_axes),
            ("whether a prompt's tokens see those after them", call.both_ways),
            ("features for deeper layers", call.deepstack),
        )
        if taken
    ]
    if more:
        return f"text_decoder also takes {' and '.join(more)}; the runner gives it embeddings and a position alone"
    if encoder.packed or len(encoder.names) != 1:
        return (
            f"{encoder.method} takes {', '.join(encoder.names)} of packed patches; the runner gives it one picture "
            "[channels, height, width]"
        )
    if any(length % features for ids in prompts for length in _runs(ids, placeholder)):
        return "a picture's placeholders don't stand together in the prompt, and the runner puts its features together"
    return None


def _runs(ids: torch.Tensor, token: int) -> list[int]:
    """How often `token` stands there without another in between, each time."""
    runs = [0]
    for row in (ids == token).tolist():
        for here in [*row, False]:
            if here:
                runs[-1] += 1
            elif runs[-1]:
                runs.append(0)
    return runs


def tried_runners(manifest: Manifest, folder: Path) -> tuple[Runner, ...]:
    """The manifest's runners with what the tokenizer and the generation config mean for them.

    folder: holds the bundle's tokenizer.
    """
    return tuple(_tried(runner, manifest, folder) if runner.obstacle is None else runner for runner in manifest.runners)


def _tried(runner: Runner, manifest: Manifest, folder: Path) -> Runner:
    flow, options = manifest.flow, manifest.generation.options
    if manifest.text is None:
        return replace(runner, obstacle="it reads text, and the bundle was built without a tokenizer")
    if flow.restart is not None and (flow.capacity is None or flow.restart < flow.capacity):
        return replace(
            runner,
            obstacle=f"from {flow.restart} tokens on the model computes the whole sequence again, which it doesn't: "
            f"build with a max_length of at most {flow.restart}",
        )
    processor = text_processor(manifest, folder)
    prefix = added_prefix(processor)
    if prefix is None:
        return replace(runner, obstacle="the bundle's tokenizer adds tokens behind a text, which it doesn't")
    texts = [*(prefix + text for text in _PLAIN_TEXTS), *_question(manifest, processor, prefix)]
    obstacle, other = _try_tokenizer(processor, folder / manifest.text.tokenizer, texts, _OTHER_TEXTS)
    if obstacle is not None:
        return replace(runner, obstacle=obstacle)
    ignored = sorted(options.keys() - _FOLLOWED)
    differs = [f"it doesn't follow the generation config's {', '.join(ignored)}"] if ignored else []
    return replace(runner, prefix=prefix, differs=(*differs, *other))


def asking(
    model: PreTrainedModel, manifest: Manifest, folder: Path, given: Sequence[Inputs], room: int | None
) -> dict[str, Inputs]:
    """A held-out question in words, about a picture or a sound where the model takes any: what a phone is checked with.

    given: samples, whose first picture or sound it is about where the bundle has no steps from a picture to its pixels.
    Empty where no runner but genbundle's runs the bundle, and for a question of more than `room` tokens.
    """
    ready = [runner for runner in manifest.runners if runner.obstacle is None]
    if not ready or manifest.text is None:
        return {}
    processor, images, ids = text_processor(manifest, folder), manifest.images, []
    media, placeholder, count = _first_media(manifest, given)
    if media and (images is None or images.placeholder is None):
        parts: Parts = (*([ready[0].prefix] if ready[0].prefix else []), None, QUESTION)
    else:
        parts = question_parts(processor, images, QUESTION, ready[0].prefix)
    for part in parts:
        ids += [placeholder] * count if part is None else processor.encode(part, add_special_tokens=False)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **media}
    fits = sum(part is None for part in parts) == len(media) and (room is None or len(ids) <= room)
    return {f"asked: {QUESTION}": inputs} if fits and generates(model, inputs) else {}


def _first_media(manifest: Manifest, given: Sequence[Inputs]) -> tuple[Inputs, int, int]:
    """A picture or sound as the model takes it, its placeholder token and how often that stands in a prompt."""
    images = manifest.images
    encoder = next((program for program in manifest.programs if program.modality is not None), None)
    if encoder is None:
        return {}, 0, 0
    if images is not None and images.steps:
        pixels = torch.from_numpy(preprocess([PIL.Image.linear_gradient("L").convert("RGB")], images))
        return {images.input: pixels}, images.token_id or 0, images.tokens_per_image or 0
    token = manifest.placeholder_of(encoder)
    name = next((item.source.name for item in encoder.inputs if item.source.kind == "user"), None)
    if not given or name not in given[0] or token is None:
        return {}, 0, 0
    rows = given[0][name]
    return {name: rows[:1]}, token, int((given[0]["input_ids"][0] == token).sum()) // len(rows)


def text_processor(manifest: Manifest, folder: Path) -> TextProcessor:
    """The manifest's tokenizer and template, whose files are in `folder`."""
    assert manifest.text is not None
    return TextProcessor.from_files(manifest.text, folder, chat_adds_special_tokens=manifest.images is not None)


def _question(manifest: Manifest, processor: TextProcessor, prefix: str) -> list[str]:
    """The texts of a prompt in the model's own form."""
    try:
        parts = question_parts(processor, manifest.images, QUESTION, prefix)
    except Exception:  # a template that wants other messages than a user's question
        return []
    return [part for part in parts if part is not None]


def _try_tokenizer(
    processor: TextProcessor, path: Path, texts: Sequence[str], others: Sequence[str]
) -> tuple[str | None, list[str]]:
    """Why ExecuTorch's tokenizers can't stand in for the bundle's, and what they do otherwise for `others`."""
    expected = [processor.encode(text, add_special_tokens=False) for text in (*texts, *others)]
    said = [processor.decode(ids, skip_special_tokens=False) for ids in expected[: len(texts)]]
    found = _run_trial({"tokenizer": str(path), "texts": [*texts, *others], "ids": expected[: len(texts)]})
    if "error" in found:
        return f"its tokenizer library can't read the tokenizer: {found['error']}", []
    differs = []
    for text, ours, theirs in zip((*texts, *others), expected, found["ids"], strict=True):
        if ours != theirs:
            difference = f"its tokenizer library makes {_short(theirs)} of {text!r}, the model's own {_short(ours)}"
            if text in texts:
                return difference, []
            differs.append(difference)
    for ids, ours, theirs in zip(expected, said, found["said"], strict=False):
        if ours.strip() != theirs.strip():
            return f"its tokenizer library reads {theirs!r} from {_short(ids)}, the model's own {ours!r}", []
    return None, differs


def _run_trial(request: dict[str, Any]) -> dict[str, Any]:
    # -P: without it, Python's own modules come from the working directory first, which may be a stranger's model.
    try:
        run = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL], input=json.dumps(request), capture_output=True, encoding="utf-8",
            errors="replace", timeout=_LONGEST_TRIAL_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"it takes more than {_LONGEST_TRIAL_S} seconds"}
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    # The library says in its log what it doesn't know, and in the exception only that something failed.
    logged = [line.partition("] ")[2] for line in lines if "tokenizers:" in line and "Registering" not in line]
    return {"error": (logged or lines or [f"it ended with exit code {run.returncode}"])[-1].strip()}


def _short(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return f"[{shown}{', ...' if len(ids) > 8 else ''}]"
