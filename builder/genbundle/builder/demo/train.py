"""Train the demo model from nothing on a CPU: `python -m genbundle.builder.demo.train --steps 4000 --out DIR`."""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from random import Random
from statistics import mean

import torch
import transformers
from PIL.Image import Resampling
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from genbundle.builder.demo.scenes import (
    COLORS,
    GRID,
    KINDS,
    SHAPES,
    Scene,
    draw,
    held_out_scenes,
    questions_by_kind,
    random_question,
    training_scene,
)
from genbundle.builder.demo.untrained import (
    ASSISTANT,
    END,
    IMAGE,
    IMAGE_SIZE,
    PATCHES,
    USER,
    in_haste,
    make_model,
    make_processor,
)

DRAWN_SIZES = (60, 72, 96, 128, 160, 240, 320)
LESSONS = (*KINDS, "place", "place")  # places are the last thing it learns
ASKED_PER_KIND = 500

CARD = """\
# Scene model

A small image-text model in LLaVA's layout (CLIP vision tower, projector, Llama decoder; {parameters:.2f} million
float32 parameters) that answers questions about pictures of up to three coloured shapes.

```python
from genbundle.builder.demo.scenes import draw, held_out_scenes, questions

scene = held_out_scenes(1)[0]
draw(scene).save("scene.png")
print(*questions(scene), sep="\\n")  # all it can be asked, with the true answers
```

## Data

Drawn during training by `scenes.py`: {shapes}; {colors};
nine places; sizes, positions, shades and background vary. No picture or text from elsewhere. One layout in ten
(shapes, colours and places together) is held out of training.

## Training

    {command}

{steps} steps of {batch} pictures, each with {length} tokens of questions and answers; AdamW, highest learning rate
{rate}; {minutes:.0f} minutes on {threads} CPU thread(s), with torch {torch} and transformers {transformers}.

## Accuracy

Greedy answers that are right to the letter, for {asked} questions of each kind about held-out layouts, drawn at 240
and at 96 pixels and prepared by the model's own processor:

| questions | exactly right |
| --- | --- |
{rows}

## Limits

It knows these pictures and these questions (also in lower case and without their full stop or question mark) and
nothing else: other questions get an answer about shapes, other pictures are described as shapes. Pictures are reduced
to {image_size} x {image_size} pixels. It was trained with one picture per conversation, before the first question.
"""


def main() -> None:
    """Parse the command line, train, evaluate, and write the model card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model, its processor and its card")
    parser.add_argument("--start", type=Path, help="continue from this model with a fresh learning-rate cycle")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step")
    parser.add_argument("--length", type=int, default=160, help="tokens per picture, filled with questions and answers")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--compile", action="store_true", help="a fifth faster; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    processor = make_processor()
    if options.start:
        model = LlavaForConditionalGeneration.from_pretrained(options.start)
    else:
        model = make_model(processor.tokenizer)
    processor.save_pretrained(options.out)
    model.save_pretrained(options.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(processor.tokenizer)} tokens", flush=True)

    minutes = train(model, processor, options)
    accuracy = evaluate(options.out, asked_per_kind=ASKED_PER_KIND)
    write_card(options, parameters, minutes, accuracy)


# ---- training ----


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, options: argparse.Namespace) -> float:
    """Train with checkpoints in `options.out`; return the minutes it took."""
    # What each patch shows is a cheap extra lesson: the vision tower learns from it long before the answers do.
    patch_kinds = (len(SHAPES) + 1, len(COLORS) + 1, GRID**2)
    patch_lesson = torch.nn.Linear(model.lm_head.in_features, sum(patch_kinds))
    patches: list[torch.Tensor] = []

    def keep_patches(_module, _inputs, output: torch.Tensor) -> None:
        patches.append(output)

    model.model.multi_modal_projector.register_forward_hook(keep_patches)

    learned = [*model.parameters(), *patch_lesson.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=options.rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.rate, total_steps=options.steps, pct_start=0.1, cycle_momentum=False
    )
    started, losses = time.monotonic(), []
    model.train()
    if options.compile:
        model.model.language_model.compile()
    for step, batch in zip(range(1, options.steps + 1), batches(processor, options), strict=False):
        answers, targets, shown = (batch.pop(key) for key in ("answers", "targets", "shown"))
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        answer_loss = F.cross_entropy(model.lm_head(hidden[answers]), targets)
        guesses = patch_lesson(patches.pop()).split(patch_kinds, dim=-1)
        errors = [F.cross_entropy(guess.flatten(0, 1), kind) for guess, kind in zip(guesses, shown, strict=True)]
        patch_loss = torch.stack(errors).sum()
        optimizer.zero_grad()
        (answer_loss + 0.3 * patch_loss).backward()
        clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append((answer_loss.item(), patch_loss.item()))
        if step % 100 == 0:
            answers_mean, patches_mean = map(mean, zip(*losses[-100:], strict=True))
            seconds = time.monotonic() - started
            print(f"step {step}  answers {answers_mean:.4f}  patches {patches_mean:.4f}  {seconds:.0f} s", flush=True)
        if step % 500 == 0 or step == options.steps:
            model.save_pretrained(options.out)
    return (time.monotonic() - started) / 60


def batches(processor: LlavaProcessor, options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches: each picture once, with several questions about it in one sequence."""
    rng, known = Random(options.seed), {}

    def encode(text: str) -> list[int]:
        if text not in known:
            known[text] = processor.tokenizer.encode(text, add_special_tokens=False)
        return known[text]

    while True:
        scenes = [training_scene(rng) for _ in range(options.batch)]
        pictures = [draw(scene, rng.choice(DRAWN_SIZES), rng if rng.random() < 0.95 else None) for scene in scenes]
        # The processor's own first step, at a fraction of its overhead.
        pictures = [picture.resize((IMAGE_SIZE, IMAGE_SIZE), Resampling.BICUBIC) for picture in pictures]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        yield {
            "pixel_values": pixels,
            "shown": patch_labels(scenes),
            **sequences(scenes, encode, rng, options.length),
        }


def sequences(scenes, encode, rng: Random, length: int) -> dict[str, torch.Tensor]:
    """Token sequences in the chat template's format, each a picture and turns about it.

    Three in four have turns blind to each other: every question is a first question, which is the hard and the usual
    case. The others are conversations, to teach that earlier turns may be there.
    """
    user, assistant, end, image = (encode(token)[0] for token in (USER, ASSISTANT, END, IMAGE))
    rows = []
    for scene in scenes:
        separate = rng.random() < 0.75
        tokens, turn_of = [user] + [image] * PATCHES**2, [0] * (1 + PATCHES**2)
        positions, learn = list(range(len(tokens))), [False] * len(tokens)
        while True:
            question, answer = random_question(scene, rng, LESSONS)
            if rng.random() < 0.15:
                question = in_haste(question)
            opening = [] if separate or not any(learn) else [user]
            asked = [*opening, *encode(question), end, assistant]
            answered = [*encode(answer), end]
            if len(tokens) + len(asked) + len(answered) > length:
                break
            start = 1 + PATCHES**2 if separate else len(tokens)
            positions += range(start, start + len(asked) + len(answered))
            tokens += asked + answered
            learn += [False] * len(asked) + [True] * len(answered)
            turn_of += [len(tokens) if separate else 0] * (len(asked) + len(answered))
        rows.append((tokens, positions, turn_of, learn))

    def padded(column: int, filler: int) -> torch.Tensor:
        return torch.tensor([row[column] + [filler] * (length - len(row[column])) for row in rows])

    tokens, turn_of, learn = padded(0, 0), padded(2, -1), padded(3, False)
    visible = (turn_of[:, None, :] == 0) | (turn_of[:, None, :] == turn_of[:, :, None])
    return {
        "input_ids": tokens,
        "position_ids": padded(1, 0),
        "attention_mask": visible.tril()[:, None],
        "answers": learn.roll(-1, dims=1),  # the place before each answer token predicts it
        "targets": tokens[learn],
    }


def patch_labels(scenes: list[Scene]) -> torch.Tensor:
    """The shape and the colour (0 for none) in each patch's cell of the grid, and which cell that is."""
    labels = torch.zeros(3, len(scenes), PATCHES, PATCHES, dtype=torch.long)
    cells = torch.arange(PATCHES) // (PATCHES // GRID)
    labels[2] = GRID * cells[:, None] + cells
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            here = labels[2, index] == GRID * thing.row + thing.column
            labels[0, index][here] = 1 + SHAPES.index(thing.shape)
            labels[1, index][here] = 1 + list(COLORS).index(thing.color)
    return labels.flatten(1)


# ---- evaluation ----


def evaluate(directory: Path, *, asked_per_kind: int, sizes: tuple[int, ...] = (240, 96)) -> dict[str, float]:
    """Load the saved model and return, per kind of question, the share of held-out answers that are exactly right."""
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    rng, asked, scenes = Random(7), [], held_out_scenes(2 * asked_per_kind)
    for kind in KINDS:
        fitting = [scene for scene in scenes if questions_by_kind(scene)[kind]]
        for index, scene in enumerate(fitting[:asked_per_kind]):
            asked.append((kind, draw(scene, sizes[index % len(sizes)], rng), *random_question(scene, rng, (kind,))))
    right, total = Counter(), Counter()
    for kind, question, answer, given in answered(model, processor, asked):
        total[kind] += 1
        right[kind] += given == answer
        if given != answer:
            print(f"wrong: {question} {given!r}, not {answer!r}")
    accuracy = {kind: right[kind] / total[kind] for kind in KINDS} | {"all": right.total() / total.total()}
    print({kind: round(share, 4) for kind, share in accuracy.items()}, f"{total.total()} questions", flush=True)
    return accuracy


def answered(model, processor, asked) -> Iterator[tuple[str, str, str, str]]:
    """Answer greedily; prompts of one length share a batch, so none is padded."""
    prompts = {question: as_prompt(processor, question) for _, _, question, _ in asked}
    length = {question: len(processor.tokenizer(prompt)["input_ids"]) for question, prompt in prompts.items()}
    for _, group in groupby(sorted(asked, key=lambda one: length[one[2]]), key=lambda one: length[one[2]]):
        group = list(group)
        for start in range(0, len(group), 32):
            batch = group[start : start + 32]
            inputs = processor(
                images=[picture for _, picture, _, _ in batch],
                text=[prompts[question] for _, _, question, _ in batch],
                return_tensors="pt",
            )
            with torch.inference_mode():
                output = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(output, skip_special_tokens=True)
            for (kind, _, question, answer), given in zip(batch, texts, strict=True):
                yield kind, question, answer, given


def as_prompt(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def write_card(options: argparse.Namespace, parameters: int, minutes: float, accuracy: dict[str, float]) -> None:
    """Say beside the model what it is, how it was trained and how often it is right."""
    command = (
        f"python -m genbundle.builder.demo.train --steps {options.steps} --seed {options.seed} --rate {options.rate}"
    )
    command += " --start EARLIER" * bool(options.start) + " --compile" * options.compile
    card = CARD.format(
        parameters=parameters / 1e6,
        shapes=", ".join(f"{shape}s" for shape in SHAPES),
        colors=", ".join(COLORS),
        asked=ASKED_PER_KIND,
        image_size=IMAGE_SIZE,
        command=command,
        steps=options.steps,
        batch=options.batch,
        length=options.length,
        rate=options.rate,
        minutes=minutes,
        threads=options.threads,
        torch=torch.__version__,
        transformers=transformers.__version__,
        rows="\n".join(f"| {kind} | {share:.1%} |" for kind, share in accuracy.items()),
    )
    (options.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
