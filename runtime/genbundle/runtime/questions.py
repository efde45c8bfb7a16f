"""A question to a model as runners without chat templates take it: pieces of text, and places for pictures in between.

ExecuTorch's own runners read text with all of a model's words around it, and put each picture's features behind the
text before them, so that a picture's placeholder tokens are left out.
"""

import re
from collections.abc import Sequence

from genbundle.bundles.manifest import Images
from genbundle.runtime.images import expand_placeholders
from genbundle.runtime.text import TextProcessor

Parts = tuple[str | None, ...]
"""Pieces of text, and None where a picture's features go."""


def added_prefix(processor: TextProcessor) -> str | None:
    """What the tokenizer adds in front of a text, as text; None where it adds something behind it as well."""
    plain, whole = processor.encode("a", add_special_tokens=False), processor.encode("a")
    count = len(whole) - len(plain)
    if whole[count:] != plain:
        return None
    return "".join(processor.decode([token], skip_special_tokens=False) for token in whole[:count])


def question_parts(processor: TextProcessor, images: Images | None, question: str, prefix: str = "") -> Parts:
    """The parts of a prompt that asks `question`, about one picture where the model takes any.

    As `genbundle run` puts it: by the chat template, else the picture and the text. prefix: what the tokenizer adds.
    """
    placeholder = images.placeholder if images is not None else None
    if processor.description.chat_template is None:
        return split_pictures(processor, images, f"{prefix}{_expanded((placeholder or '') + question, images)}")
    picture = [{"type": "image"}] if placeholder is not None else []
    content = [*picture, {"type": "text", "text": question}] if images is not None else question
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    added = prefix if processor.encode_chat(prompt) != processor.encode(prompt, add_special_tokens=False) else ""
    return split_pictures(processor, images, f"{added}{_expanded(prompt, images)}")


def split_pictures(processor: TextProcessor, images: Images | None, prompt: str) -> Parts:
    """A prompt whose placeholders are expanded, cut where pictures are."""
    if images is None or images.token_id is None:
        return (prompt,)
    token = re.escape(processor.decode([images.token_id], skip_special_tokens=False))
    pieces = re.split(f"(?:{token})+", prompt)
    parts = [part for piece in pieces for part in (piece, None)][:-1]
    return tuple(part for part in parts if part != "")


def split_ids(ids: Sequence[int], token_id: int | None, length: int | None) -> list[list[int] | None]:
    """Token ids cut where pictures of `length` placeholders are."""
    parts: list[list[int] | None] = []
    run = 0
    for token in ids:
        if token_id is not None and token == token_id:
            if run % (length or len(ids)) == 0:
                parts.append(None)
            run += 1
            continue
        if run or not parts:
            parts.append([])
        run = 0
        last = parts[-1]
        assert last is not None
        last.append(int(token))
    return parts


def _expanded(prompt: str, images: Images | None) -> str:
    if images is None or images.placeholder is None or images.placeholder not in prompt:
        return prompt
    return expand_placeholders(prompt, 1, images)
