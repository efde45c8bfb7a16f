"""transformers.js: the names `onnx/...` and the config files with which the npm package opens the bundle's directory.

It chooses its code by the config's `model_type` and that code by the programs' names and inputs. `llama` and `llava`
are its plain cases: a decoder, and one that gets the features of pictures in the place of a token's embeddings. What a
model computes is in its programs, so that these two serve every model which the plain cases feed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from genbundle.builder.also.data_files import move_programs
from genbundle.builder.also.feeding import expect_decoder, special_tokens
from genbundle.builder.components import Component
from genbundle.builder.embedded import EMBEDDINGS, MERGED
from genbundle.builder.weights import WEIGHTS_NAME
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Generation, Images, Manifest, Program

LABEL = "transformers.js"
PIXELS = "pixel_values"
OPTIONS = (
    "do_sample", "temperature", "top_k", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length",
    "min_new_tokens", "forced_bos_token_id", "forced_eos_token_ids", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
"""The options of a generation that its `generate` has too."""
_DTYPES = {"fp32": ("fp32", ""), "int8": ("q8", "_quantized"), "int4": ("q4", "_q4")}
"""Precision -> what it calls that, and how such files end."""
_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_NO_PATCH = 1_000_000
# `generic_text_to_text_forward` of its modeling_utils.js makes a mask of ones for the past of such a prompt.
_PADDING_NOTE = (
    f"{LABEL} forgets a batch's padding after the first token where pictures are given: its sequences have to be "
    "equally long there"
)


def expect(components: Iterable[Component], flow: Flow) -> None:
    """UnsupportedModelError for what it can't run or feed."""
    components = list(components)
    named = {item.name: item for item in components}
    encoders = [item for item in components if item.modality is not None]
    entry = "inputs_embeds" if encoders else "input_ids"
    for item in encoders:
        _expect_pictures(item)
    if any("encoder" in item.roles and item.modality is None for item in components):
        raise UnsupportedModelError(f"{LABEL}: a bundle's encoder-decoders aren't laid out for it yet")
    expect_decoder(LABEL, named[flow.step[-1]], flow, entry=entry)


def _expect_pictures(encoder: Component) -> None:
    """An encoder of pictures as they come from a processor, to one tensor of features."""
    if encoder.modality != "image" or "language_model" in encoder.roles:
        raise UnsupportedModelError(f"{LABEL}: {encoder.name} isn't a program from pictures to features alone")
    if encoder.guides or set(encoder.sources) != {PIXELS} or encoder.sources[PIXELS].kind != "user":
        made = {name: f"{name} by {source.rule}" if source.rule else name for name, source in encoder.sources.items()}
        taken = ", ".join((*made.values(), *encoder.guides))
        raise UnsupportedModelError(
            f"{LABEL} has nothing but {PIXELS} to feed {encoder.name} with, which takes {taken}"
        )


def complete(manifest: Manifest, folder: Path, config: Any) -> tuple[Manifest, tuple[str, ...]]:
    """Give the programs its names and write its config files; the manifest with the moved files, and what it does
    otherwise than the bundle says."""
    stems = _stems(manifest)
    manifest = _renamed(manifest, folder, stems)
    files = {name: _file(manifest.program(name), stem) for name, stem in stems.items()}
    moved = {manifest.program(name).file: file for name, file in files.items()}
    others = [program.file for program in manifest.programs if program.name not in stems]
    counts = move_programs(folder, moved, others)
    programs = tuple(
        replace(program, file=files[program.name]) if program.name in files else program
        for program in manifest.programs
    )
    settings = {
        "dtype": {stem: _DTYPES[manifest.program(name).precision][0] for name, stem in stems.items()},
        "use_external_data_format": {Path(file).name: count for file, count in counts.items()},
    }
    _write(folder / "config.json", _config(manifest, config, settings))
    _write(folder / "generation_config.json", _generation(manifest.generation))
    _complete_tokenizer(manifest, folder)
    notes = (*_write_processor(manifest.images, folder), _PADDING_NOTE) if len(stems) > 1 else ()
    weights = (
        next(iter(counts)) + "_data" if list(counts.values()) == [1] and not (folder / WEIGHTS_NAME).exists() else None
    )
    return replace(manifest, programs=programs, weights=weights), notes


def _stems(manifest: Manifest) -> dict[str, str]:
    """Program -> what its file is called."""
    decoder = manifest.flow.step[-1]
    encoder = next((program.name for program in manifest.programs if program.modality == "image"), None)
    if encoder is None:
        return {decoder: "model"}
    return {encoder: "vision_encoder", manifest.flow.step[0]: "embed_tokens", decoder: "decoder_model_merged"}


def _renamed(manifest: Manifest, folder: Path, stems: Mapping[str, str]) -> Manifest:
    """The same with the outputs named as it reads them: features, and embeddings of the look-up and of the merge."""
    if len(stems) == 1:
        return manifest
    encoder = next(name for name, stem in stems.items() if stem == "vision_encoder")
    names = {manifest.program(encoder).outputs[0].name: "image_features", MERGED: EMBEDDINGS}
    programs = []
    for program in manifest.programs:
        if any(output.name in names for output in program.outputs):
            model = ir.load(folder / program.file)
            for value in model.graph.outputs:
                value.name = names.get(value.name or "", value.name)
            ir.save(model, folder / program.file)
        inputs = (
            replace(item, source=replace(item.source, name=names[item.source.name]))
            if item.source.kind == "output" and item.source.name in names
            else item
            for item in program.inputs
        )
        outputs = (replace(output, name=names.get(output.name, output.name)) for output in program.outputs)
        programs.append(replace(program, inputs=tuple(inputs), outputs=tuple(outputs)))
    return replace(manifest, programs=tuple(programs))


def _file(program: Program, stem: str) -> str:
    return f"onnx/{stem}{_DTYPES[program.precision][1]}.onnx"


def _config(manifest: Manifest, config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What transformers.js reads, and nothing else that it knows; the model's own config is in `genbundle`."""
    plain: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": _layers(manifest.program(manifest.flow.step[-1])),
        "max_position_embeddings": manifest.flow.capacity,
    }
    if len(_stems(manifest)) > 1:
        plain = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "max_position_embeddings": manifest.flow.capacity,
            "image_token_index": manifest.images.token_id if manifest.images is not None else None,
            "text_config": plain,
        }
    return {**plain, "genbundle": config.to_diff_dict(), "transformers.js_config": settings}


def _layers(decoder: Program) -> int:
    """How many layers' keys it has to look for: one more than the last that has some."""
    numbers = [int(item.name.split(".")[1]) for item in decoder.inputs if item.name.endswith(".key")]
    return max(numbers, default=-1) + 1


def _generation(generation: Generation) -> dict[str, Any]:
    """generation_config.json, in the names of transformers."""
    renamed = {"forced_eos_token_ids": "forced_eos_token_id"}
    options = {renamed.get(name, name): value for name, value in generation.options.items()}
    return {**special_tokens(generation), **{name: value for name, value in options.items() if value is not None}}


def _complete_tokenizer(manifest: Manifest, folder: Path) -> None:
    """It looks for the chat template in tokenizer_config.json only."""
    path = folder / "tokenizer_config.json"
    if manifest.text is None or manifest.text.chat_template is None:
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    config["chat_template"] = (folder / manifest.text.chat_template).read_text(encoding="utf-8")
    _write(path, config)


def _write_processor(images: Images | None, folder: Path) -> tuple[str, ...]:
    """Write how its own processor prepares pictures and expands their placeholder; a note where it can't."""
    if images is None or not images.steps:
        reason = "the bundle was built without one" if images is None or images.reason is None else images.reason
        return (f"{LABEL} has no processor for this model's pictures and takes ready {PIXELS}: {reason}",)
    steps = {step["op"]: step for step in images.steps}
    unknown = sorted(steps.keys() - {"convert_rgb", "resize", "center_crop", "rescale", "normalize"})
    count = images.tokens_per_image or 0
    if unknown or images.expansion != (images.placeholder or "") * count or _size(steps.get("resize")) is None:
        what = ", ".join(unknown) or "the text around a picture, or its size"
        return (f"{LABEL} has no processor for this model's pictures and takes ready {PIXELS}: it doesn't know {what}",)
    resize, crop = steps.get("resize"), steps.get("center_crop")
    rescale, normalize = steps.get("rescale"), steps.get("normalize")
    preparation = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": "convert_rgb" in steps,
        "do_resize": resize is not None,
        "size": _size(resize),
        "resample": _FILTERS.index(resize["resample"]) if resize is not None else None,
        "do_center_crop": crop is not None,
        "crop_size": None if crop is None else {"height": crop["height"], "width": crop["width"]},
        "do_rescale": rescale is not None,
        "rescale_factor": None if rescale is None else rescale["factor"],
        "do_normalize": normalize is not None,
        "image_mean": None if normalize is None else normalize["mean"],
        "image_std": None if normalize is None else normalize["std"],
    }
    # It counts the patches of a picture and adds a number of tokens: no patch is so large that there is one.
    expansion = {
        "processor_class": "LlavaProcessor",
        "image_token": images.placeholder,
        "patch_size": _NO_PATCH,
        "num_additional_image_tokens": count,
    }
    _write(folder / "preprocessor_config.json", {name: item for name, item in preparation.items() if item is not None})
    _write(folder / "processor_config.json", expansion)
    return ()


def _size(resize: Mapping[str, Any] | None) -> dict[str, int] | None:
    """The size that its processor resizes to; None for one that it doesn't know."""
    if resize is None:
        return {}
    found = {name: value for name, value in resize.items() if name not in ("op", "resample")}
    return found if found.keys() in ({"height", "width"}, {"shortest_edge"}) else None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8", newline="\n")
