"""Bundles in ExecuTorch's own runners, as they are: the tokens of our runtime, which are those of eager."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from genbundle.builder import stock_runners
from genbundle.builder.stateful import DecoderCall
from genbundle.bundles.manifest import Runner, Text
from genbundle.runtime.device import write_device_folder
from genbundle.runtime.inspection import as_text
from genbundle.runtime.questions import added_prefix, question_parts, split_ids
from genbundle.runtime.text import TextProcessor
from tests.benchmarks import answers
from tests.bundles.samples import manifest
from tests.zoo import shrink

pytestmark = pytest.mark.slow


def settings(**options):
    from executorch.extension.llm.runner import GenerationConfig

    return GenerationConfig(temperature=0.0, echo=False, **options)


def open_runner(kind, bundle):
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  the operators that an app links
    from executorch.extension.llm import runner

    files = str(bundle.path / "model.pte"), str(bundle.path / "tokenizer.json")
    return runner.TextLLMRunner(*files) if kind == "TextLLMRunner" else runner.MultimodalRunner(*files, None)


def test_the_example_in_the_docs(bundle, tmp_path):
    """In a process of its own, where nothing else has registered ExecuTorch's operators."""
    docs = Path(__file__).parents[2] / "docs" / "devices.md"
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", docs.read_text("utf-8"), re.DOTALL) if "TextLLM" in code
    )
    (tmp_path / "my-model-xnnpack.bundle").symlink_to(bundle("chat", "xnnpack").path)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr
    assert "filler" in run.stdout


@pytest.mark.parametrize("name", ["chat", "chat-gemma2"])
def test_text_decoders(name, loaded):
    model = loaded(name, "xnnpack")
    assert [(runner.name, runner.obstacle) for runner in model.bundle.manifest.runners] == [("TextLLMRunner", None)]
    runner = open_runner("TextLLMRunner", model.bundle)
    for prompt in ("hello world", "a", "The quick brown fox jumps over the lazy dog. " * 3):
        new = model.generate(prompt, max_new_tokens=14, eos_token_id=(), do_sample=False)
        ids, said = new.sequences[0, -14:].tolist(), []
        runner.reset()
        runner.generate(prompt, settings(max_new_tokens=14), said.append, None)
        # The runner stops where the bundle's end token comes.
        ends = [index + 1 for index, token in enumerate(ids) if token in model.bundle.manifest.generation.eos_token_ids]
        assert said == answers.pieces(model, ids[: min(ends, default=14)])


def test_the_demo_models_answers(loaded):
    model, asked = loaded("demo", "xnnpack"), answers.held_out_questions(12)
    assert model.bundle.manifest.runners == (Runner(name="MultimodalRunner"),)
    expected = [answers.in_tokens(model, found) for found in answers.generations(model, asked)]
    assert answers.stock_answers(model, asked) == expected


def test_sound_beside_text(loaded):
    from executorch.extension.llm.runner import make_audio_input, make_token_input

    name = "VoxtralForConditionalGeneration"
    model = loaded(f"chat-{name}", "xnnpack")
    encoder = model.bundle.manifest.program("audio_encoder")
    assert model.bundle.manifest.runners[0].obstacle is None
    runner, compared = open_runner("MultimodalRunner", model.bundle), 0
    for inputs in shrink.variants(name, shrink.make(name))["check"]:
        arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
        if len(arrays["input_ids"]) > 1 or len(arrays.get("input_features", ())) != 1:
            continue
        found = model.generate(**arrays, max_new_tokens=10, do_sample=False, eos_token_id=())
        ids, said = arrays["input_ids"][0].tolist(), []
        sound = make_audio_input(inputs["input_features"])
        parts = split_ids(ids, encoder.placeholder_id, ids.count(encoder.placeholder_id))
        runner.reset()
        given = [sound if part is None else make_token_input(part) for part in parts]
        runner.generate(given, settings(max_new_tokens=10), said.append, None)
        assert said == answers.pieces(model, found.sequences[0, len(ids) :].tolist())[: len(said)]
        assert len(said) == 10 or said[-1] == "<eos>"
        compared += 1
    assert compared


@pytest.mark.parametrize("name", ["chat", "demo", "chat-VoxtralForConditionalGeneration"])
def test_a_phones_folder_proves_itself(name, bundle, tmp_path):
    """What the written Kotlin and Swift do with golden.json, in the runner that they call."""
    from executorch.extension.llm import runner as library

    opened = bundle(name, "xnnpack")
    facts = write_device_folder(opened, "android", tmp_path / "phone")
    cases = json.loads((tmp_path / "phone" / "golden.json").read_text())["cases"]
    assert len(cases) == facts["golden_cases"] >= 1 and facts["planned_bytes"] > 0
    files = str(tmp_path / "phone" / "model.pte"), str(tmp_path / "phone" / "tokenizer.json")
    runner = library.TextLLMRunner(*files) if name == "chat" else library.MultimodalRunner(*files, None)
    media = library.make_image_input if name == "demo" else library.make_audio_input
    processor = TextProcessor(opened)
    ends = [processor.decode([end], skip_special_tokens=False) for end in opened.manifest.generation.eos_token_ids]
    for case in cases:
        given, said = [], []
        for part in case["parts"]:
            if "text" in part:
                given.append(library.make_text_input(part["text"]))
                continue
            array = np.fromfile(tmp_path / "phone" / part["file"], "<f4").reshape(part["shape"])
            tensor = torch.from_numpy(array)
            given.append(media(tensor if name == "demo" else tensor[None]))
        runner.reset()
        inputs = "".join(part["text"] for part in case["parts"]) if name == "chat" else given
        count = len(case["expected_token_ids"]) + case["ended"]
        runner.generate(inputs, settings(max_new_tokens=count), said.append, None)
        assert "".join(text for text in said if text not in ends) == case["expected_text"]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("qwen3_vl", r"text_decoder also takes positions by rows \(M-RoPE\) and features for deeper layers"),
        ("paligemma", "text_decoder also takes whether a prompt's tokens see those after them"),
        ("llama", "reads text, and the bundle was built without a tokenizer"),
    ],
)
def test_why_a_runner_cannot(name, cause, bundle):

    made = bundle(name, "xnnpack")
    (runner,) = made.manifest.runners
    assert re.search(cause, runner.obstacle)
    assert f"not in {runner.name}: " in as_text(made)


def test_pictures_that_stand_apart_are_an_obstacle():
    class Encoder:
        packed, names, method = False, ("pixel_values",), "vision_encoder"

    together, apart = torch.tensor([[5, 7, 7, 6, 7, 7, 7, 7]]), torch.tensor([[7, 5, 7, 6]])
    found = [
        stock_runners.multimodal_obstacle(DecoderCall(embeds=True), Encoder(), [ids], 7, 2)  # pyright: ignore[reportArgumentType]
        for ids in (together, apart)
    ]
    assert found[0] is None
    assert found[1] is not None and "don't stand together" in found[1]


def runner_of(tokenizer, folder, **changes):
    """What is found of a bundle with this tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    made = manifest(text=Text(tokenizer="tokenizer.json"), runners=(Runner(name="TextLLMRunner"),), **changes)
    return stock_runners.tried_runners(made, folder)[0]


def bpe(**options):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def test_tokenizers_that_the_library_reads(tmp_path):
    tokenizer = bpe()
    assert runner_of(tokenizer, tmp_path) == Runner(name="TextLLMRunner")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = runner_of(tokenizer, tmp_path)
    assert (found.obstacle, found.prefix) == (None, "<s>")
    processor = TextProcessor.from_files(Text(tokenizer="tokenizer.json"), tmp_path)
    assert added_prefix(processor) == "<s>"
    assert question_parts(processor, None, "Why?", "<s>") == ("<s>Why?",)


def test_tokenizers_that_it_does_not(tmp_path):
    other = bpe()
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    assert "can't read the tokenizer: " in runner_of(other, tmp_path).obstacle
    assert "Metaspace" in runner_of(other, tmp_path).obstacle
    behind = bpe()
    behind.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert "adds tokens behind a text" in runner_of(behind, tmp_path).obstacle


def test_a_library_that_ends_its_process_is_an_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr(stock_runners, "_TRIAL", "import os; os.abort()")
    assert "can't read the tokenizer: it ended with exit code" in runner_of(bpe(), tmp_path).obstacle


def test_what_the_runner_does_otherwise(tmp_path):
    made = manifest().generation
    config = replace(made, options={"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.2})
    assert runner_of(bpe(), tmp_path, generation=config).differs == (
        "it doesn't follow the generation config's repetition_penalty, top_k",
    )
    restarts = replace(manifest().flow, restart=32, capacity=64)
    assert "build with a max_length of at most 32" in runner_of(bpe(), tmp_path, flow=restarts).obstacle


def test_the_prompts_ids_cut_at_pictures():
    assert split_ids([1, 7, 7, 7, 7, 2, 7, 7], 7, 2) == [[1], None, None, [2], None]
    assert split_ids([1, 2], None, None) == [[1, 2]]
