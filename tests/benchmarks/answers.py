"""The included model's answers about held-out scenes: how many are right, whether every backend gives eager's, and
whether ExecuTorch's own runner gives those of this runtime, token by token.

python -m tests.benchmarks.answers [--scenes 500] [--backends cpu torch xnnpack] [--precision fp32 int8 int4]
"""

import argparse
import itertools
import operator
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from genbundle.builder import build_bundle
from genbundle.builder.demo.scenes import draw, held_out_scenes, random_question
from genbundle.builder.demo.show import MODEL, sample_inputs
from genbundle.runtime import Model, load_bundle
from genbundle.runtime.generate import Generation
from genbundle.runtime.images import preprocess
from genbundle.runtime.quality import in_words
from genbundle.runtime.questions import question_parts

Asked = list[tuple[Any, str, str]]  # picture, question, true answer


def held_out_questions(count: int) -> Asked:
    """One question about each of `count` held-out scenes."""
    rng = Random(11)
    return [(draw(scene, 240, rng), *random_question(scene, rng)) for scene in held_out_scenes(count)]


def eager_answers(asked: Asked) -> list[str]:
    """What transformers gives, with the model's own processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from genbundle.builder.demo.train import as_prompt

    processor: Any = AutoProcessor.from_pretrained(MODEL)
    model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
    answers = []
    for picture, question, _ in asked:
        inputs = processor(text=as_prompt(processor, question), images=[picture], return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


def generations(model: Model, asked: Asked) -> list[Generation]:
    """What the bundle gives, from the picture and the question."""
    found = []
    for picture, question, _ in asked:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        found.append(model.generate([{"role": "user", "content": content}]))
    return found


def bundle_answers(model: Model, asked: Asked) -> list[str]:
    """The same as text."""
    return [answer.text.strip() for answer in generations(model, asked)]


def pieces(model: Model, ids: list[int]) -> list[str]:
    """The text of each token by itself, as ExecuTorch's runners give it out."""
    return [model.text.decode([token], skip_special_tokens=False) for token in ids]


def in_tokens(model: Model, answer: Generation) -> list[str]:
    """The new tokens of an answer in that way."""
    return pieces(model, answer.sequences[0, int(answer.timings.prompt_tokens) :].tolist())


def stock_answers(model: Model, asked: Asked) -> list[list[str]]:
    """What ExecuTorch's MultimodalRunner gives from the bundle's files, token by token."""
    import executorch.extension.llm.custom_ops.custom_ops  # the operators that an app links
    import executorch.kernels.quantized  # noqa: F401  those of rounded weights
    import torch
    from executorch.extension.llm import runner as library

    folder, images = model.bundle.path, model.bundle.manifest.images
    runner = library.MultimodalRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"), None)
    settings = library.GenerationConfig(temperature=0.0, echo=False, max_new_tokens=48)
    answers = []
    for picture, question, _ in asked:
        pixels = torch.from_numpy(np.ascontiguousarray(preprocess([picture], images)[0]))
        given = [
            library.make_image_input(pixels) if part is None else library.make_text_input(part)
            for part in question_parts(model.text, images, question)
        ]
        runner.reset()
        answers.append([])
        runner.generate(given, settings, answers[-1].append, None)
    return answers


def main() -> None:
    """Ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--backends", nargs="+", default=["cpu", "torch", "xnnpack"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], metavar="NAME")
    options = parser.parse_args()
    asked = held_out_questions(options.scenes)
    expected = eager_answers(asked)
    print(f"eager: {_right(expected, asked)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for backend, precision in itertools.product(options.backends, options.precision):
            path = Path(folder) / f"{backend}-{precision}.bundle"
            bundle = build_bundle(MODEL, sample_inputs(), backend, precision=precision, output=path, progress=False)
            model = load_bundle(path)
            answers = generations(model, asked)
            found = [answer.text.strip() for answer in answers]
            same = sum(one == other for one, other in zip(found, expected, strict=True))
            print(
                f"{backend} {precision}: {same} of {len(asked)} answers equal eager's; {_right(found, asked)}; "
                f"{bundle.size} bytes",
                flush=True,
            )
            runner = next((each for each in bundle.manifest.runners if each.name == "MultimodalRunner"), None)
            if runner is not None and runner.obstacle is None:
                same = sum(map(operator.eq, stock_answers(model, asked), (in_tokens(model, each) for each in answers)))
                print(f"    {runner.name}: {same} of {len(asked)} token by token", flush=True)
            if bundle.manifest.verification is not None and bundle.manifest.verification.quality is not None:
                print(f"    {in_words(bundle.manifest.verification.quality)}", flush=True)


def _right(answers: list[str], asked: Asked) -> str:
    count = sum(answer == truth for answer, (_, _, truth) in zip(answers, asked, strict=True))
    return f"{count} of {len(asked)} right ({count / len(asked):.2%})"


if __name__ == "__main__":
    main()
