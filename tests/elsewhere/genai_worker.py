"""Runs in an environment with onnxruntime-genai alone: calls on standard input, answers on standard output."""

import json
import sys

import numpy as np
import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]


def begin(model, rows, new):
    longest = max(map(len, rows))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + new, batch_size=len(rows))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([row + [0] * (longest - len(row)) for row in rows], np.int32))
    return generator


def finish(generator, count):
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(index).tolist() for index in range(count)]


def answer(model, call):
    """Sequences (`then` goes on with more tokens, `rewind` from a length), a text's tokens, or a chat's."""
    if "text" in call:
        return og.Tokenizer(model).encode(call["text"]).tolist()
    if "chat" in call:
        tokenizer = og.Tokenizer(model)
        text = tokenizer.apply_chat_template(json.dumps(call["chat"]), add_generation_prompt=True)
        return [text, tokenizer.encode(text).tolist()]
    generator = begin(model, call["rows"], call["new"])
    if "then" in call:
        generator.append_tokens(np.array([call["then"]], np.int32))
    if "rewind" in call:
        for _ in range(call["new"] // 2):
            generator.generate_next_token()
        generator.rewind_to(call["rewind"])
    return finish(generator, len(call["rows"]))


if __name__ == "__main__":
    loaded = og.Model(sys.argv[1])
    print(json.dumps([answer(loaded, call) for call in json.load(sys.stdin)]))
