"""The peers, each a worker in its own environment: python peer_workers.py FUNCTION ARGUMENT

A line of stdin is a context (a prompt of so many random tokens), or 0 (one step further); a line of stdout the seconds
that it took. Needs nothing of the project: llama-cpp-python and gguf, or onnxruntime-genai.
"""

import sys
import time
from collections.abc import Generator

Turn = Generator[float, int, None]
THREADS = 2
CAPACITY = 4096


def write_gguf(path: str, kind: str) -> None:
    """Qwen2-0.5B's shape with random weights as f32, q8_0 or q4_0."""
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Type

    hidden, inner, layers, heads, kv_heads, width, vocabulary = 896, 4864, 24, 14, 2, 64, 151936
    stored = {"f32": Type.F32, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}[kind]
    writer, rng = gguf.GGUFWriter(path, "qwen2"), np.random.default_rng(0)
    writer.add_context_length(CAPACITY)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{number}" for number in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)

    def add(name: str, *shape: int) -> None:
        array = rng.standard_normal(shape, dtype=np.float32) * 0.02
        if stored == Type.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)

    add("token_embd.weight", vocabulary, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for name, rows in (("q", heads * width), ("k", kv_heads * width), ("v", kv_heads * width)):
            add(f"blk.{layer}.attn_{name}.weight", rows, hidden)
            writer.add_tensor(f"blk.{layer}.attn_{name}.bias", np.zeros(rows, np.float32))
        add(f"blk.{layer}.attn_output.weight", hidden, heads * width)
        add(f"blk.{layer}.ffn_gate.weight", inner, hidden)
        add(f"blk.{layer}.ffn_up.weight", inner, hidden)
        add(f"blk.{layer}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llamacpp(path: str) -> Turn:
    """llama.cpp on a GGUF file; the first time given is that of opening it."""
    import llama_cpp
    import numpy as np

    started = time.perf_counter()
    model = llama_cpp.Llama(path, n_ctx=CAPACITY, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    seconds, rng = time.perf_counter() - started, np.random.default_rng(0)
    while True:
        context = yield seconds
        if context:
            model.reset()
        ids = [int(token) for token in rng.integers(5, 1900, context)] if context else [7]
        started = time.perf_counter()
        model.eval(ids)
        seconds = time.perf_counter() - started


def ort_genai(folder: str) -> Turn:
    """ONNX Runtime GenAI on a directory of its model builder; the first time given is that of opening it."""
    import numpy as np
    import onnxruntime_genai as og

    started = time.perf_counter()
    config = og.Config(folder)
    # Its default takes one thread here.
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {THREADS}}}}}}}}}')
    model = og.Model(config)
    seconds, rng, generator = time.perf_counter() - started, np.random.default_rng(0), None
    while True:
        context = yield seconds
        if context:
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(max_length=CAPACITY, min_length=CAPACITY, do_sample=False)
            generator = og.Generator(model, parameters)
        started = time.perf_counter()
        if context:
            generator.append_tokens(rng.integers(5, 1900, (1, context)).astype(np.int32))
        generator.generate_next_token()
        seconds = time.perf_counter() - started


def main() -> None:
    """Be a worker, or write a GGUF file."""
    name, *arguments = sys.argv[1:]
    if name == "write_gguf":
        return write_gguf(*arguments)
    turns = {"llamacpp": llamacpp, "ort_genai": ort_genai}[name](*arguments)
    print(next(turns), flush=True)
    for line in sys.stdin:
        print(turns.send(int(line)), flush=True)
    return None


if __name__ == "__main__":
    main()
