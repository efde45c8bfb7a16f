"""What transformers' `ExportedModel.save_pretrained` wrote from `export_for_generation`, read and checked.

`export.json` names each component's file and what its exporter recorded of the inputs; the graphs say the rest. Nothing
here needs the exporter. Formats: `transformers.exporters.base`, `transformers.exporters.metadata`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from genbundle.builder.exporting import first_line
from genbundle.builder.noise import quiet
from genbundle.builder.weights import SHARED_FROM_BYTES
from genbundle.bundles import BuildError, UnsupportedModelError

EXPORT_NAME = "export.json"
_SCHEMA_VERSION = 1
_OTHER_FORMATS = ("dynamo", "executorch", "openvino")
_STAGES = {"prompt": "prefill", "decode": "decode"}
"""Program -> upstream's component."""
_ENCODING = re.compile(r"\w*(encoder|projector|tower)\w*|language_model")
_KEYS = re.compile(r"(input\.)?past_key_values\.layers\.\d+\.keys")
_TENSORS = ("input_ids", "attention_mask", "position_ids")
_CACHES = ("DynamicCache",)


@dataclass(frozen=True, kw_only=True)
class UpstreamExport:
    """graphs: by program. model: the architecture without weights, its config and its generation config. notes: what a
    user should know of what wasn't in the directory."""

    folder: Path
    graphs: dict[str, ir.Model]
    model: PreTrainedModel
    packages: dict[str, str]
    notes: tuple[str, ...]


def read_export(folder: Path) -> UpstreamExport:
    """Read `folder`; BuildError for what isn't such a directory or is damaged, UnsupportedModelError for a component
    that is missing, or an input that nothing explains."""
    described = _described(folder)
    components = _components(described, folder)
    graphs = {name: _graph(folder, stage, components[stage]) for name, stage in _STAGES.items() if stage in components}
    for stage in components:
        _expect_shaped(stage, components[stage]["metadata"])
        _expect_explained(stage, components[stage]["metadata"])
        _expect_plain(stage, components[stage]["metadata"])
    metadata = components["decode"]["metadata"]
    model, notes = _model(folder, metadata, _layers(graphs["decode"]))
    packages = {name: str(version) for name, version in metadata.get("packages", {}).items()}
    return UpstreamExport(folder=folder, graphs=graphs, model=model, packages=packages, notes=notes)


def _described(folder: Path) -> dict[str, Any]:
    """The content of export.json."""
    path = folder / EXPORT_NAME
    if not folder.is_dir():
        raise BuildError(f"pack: no such directory {str(folder)!r}")
    if not path.is_file():
        raise BuildError(
            f"pack: {str(folder)!r} holds no {EXPORT_NAME}: expected a directory that transformers' "
            "ExportedModel.save_pretrained wrote from export_for_generation"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BuildError(f"pack: {str(path)!r} is damaged: {first_line(error)}") from error
    entries = value.get("components") if isinstance(value, dict) else None
    if not isinstance(entries, dict) or not all(_is_entry(entry) for entry in entries.values()):
        raise BuildError(f"pack: {str(path)!r} isn't transformers': no components with a file and metadata")
    version = value.get("schema_version", 1)
    if not isinstance(version, int) or version > _SCHEMA_VERSION:
        raise BuildError(f"pack: {str(path)!r} is of schema {version!r}, and known here is {_SCHEMA_VERSION}")
    return value


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("file"), str) and isinstance(entry.get("metadata"), dict)


def _components(described: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The components of a text decoder; an error that names the one that is missing."""
    kind, components = described.get("export_format"), described["components"]
    if kind in _OTHER_FORMATS:
        raise BuildError(
            f"pack: {str(folder)!r} is in the format {kind!r}, and only 'onnx' can be packed: export it with "
            "OnnxExporter, or build from the model with `genbundle build --backend xnnpack` or `torch`"
        )
    if kind != "onnx":
        raise BuildError(f"pack: {str(folder / EXPORT_NAME)!r}: unknown format {kind!r}: expected 'onnx'")
    names = ", ".join(components)
    if set(components) == {"model"}:
        raise UnsupportedModelError(
            "the components 'prefill' and 'decode' are missing: there is the one graph 'model', which `export` makes, "
            "and none carries a past: use `export_for_generation`"
        )
    parts = [name for name in components if _ENCODING.fullmatch(name)]
    if parts:
        raise UnsupportedModelError(
            f"the component that puts features in the places of tokens (the merge) is missing: transformers' export "
            f"({names}) leaves it out, and what prepares its encoders' inputs: build from the model instead"
        )
    if "decode" not in components:
        raise UnsupportedModelError(f"the component 'decode' is missing, which takes every further token: got {names}")
    unknown = sorted(set(components) - set(_STAGES.values()))
    if unknown:
        raise UnsupportedModelError(f"nothing says what the component {unknown[0]!r} is for: got {names}")
    return components


def _graph(folder: Path, stage: str, entry: Mapping[str, Any]) -> ir.Model:
    """A component's graph, its weights checked to be where it says, and small ones inside."""
    path = folder / entry["file"]
    if Path(entry["file"]).name != entry["file"] or not path.is_file():
        raise BuildError(f"pack: the file {entry['file']!r} of the component {stage!r} is missing")
    try:
        model = ir.load(path)
        _expect_whole_branches(stage, model)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                _expect_there(folder, stage, tensor)
                if tensor.nbytes < SHARED_FROM_BYTES:
                    value.const_value = ir.tensor(tensor.numpy().copy(), name=value.name)
    except BuildError:
        raise
    except Exception as error:  # whatever a parser of damaged bytes raises
        raise BuildError(
            f"pack: the graph {entry['file']!r} of the component {stage!r} is damaged: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not model.graph.inputs or not any(value.name == "logits" for value in model.graph.outputs):
        raise BuildError(f"pack: the graph {entry['file']!r} of the component {stage!r} has no inputs or no logits")
    return model


def _expect_whole_branches(stage: str, model: ir.Model) -> None:
    """Weights in other files belong to the outer graph alone, where they are looked at one by one."""
    roots = (model.graph, *model.functions.values())
    tensors = [
        value.const_value for root in roots for graph in root.subgraphs() for value in graph.initializers.values()
    ]
    attributes = [each for root in roots for node in root.all_nodes() for each in node.attributes.values()]
    attributes += [each for function in model.functions.values() for each in function.attributes.values()]
    for attribute in attributes:
        if attribute.value is None:  # it names one of its function's
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            tensors.append(attribute.value)
        elif attribute.type == ir.AttributeType.TENSORS:
            tensors += attribute.value
    outside = next((tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)), None)
    if outside is not None:
        raise BuildError(
            f"pack: {outside.name or 'a constant'!r} inside a node of the component {stage!r} reads from another file, "
            f"{str(outside.location)!r}: only weights of the graph itself may"
        )


def _expect_there(folder: Path, stage: str, tensor: ir.ExternalTensor) -> None:
    location = str(tensor.location)
    path = folder / location
    if Path(location).name != location or not path.resolve().is_relative_to(folder.resolve()):
        raise BuildError(f"pack: the component {stage!r} reads weights outside the directory, from {location!r}")
    if not path.is_file():
        raise BuildError(f"pack: the file {location!r} with the weights of the component {stage!r} is missing")
    if tensor.length not in (None, tensor.nbytes) or (tensor.offset or 0) < 0:
        raise BuildError(
            f"pack: {tensor.name!r} of the component {stage!r} is {tensor.nbytes} bytes, and its graph reads "
            f"{tensor.length} from {tensor.offset or 0} on in {location!r}"
        )
    if (tensor.offset or 0) + tensor.nbytes > path.stat().st_size:
        raise BuildError(f"pack: the file {location!r} with the weights of the component {stage!r} is cut short")


def _expect_shaped(stage: str, metadata: Mapping[str, Any]) -> None:
    """BuildError for metadata that isn't as its exporter writes it."""
    for name in ("kwargs", "in_constants", "packages", "export_config"):
        if not isinstance(metadata.get(name, {}), dict):
            raise BuildError(f"pack: {EXPORT_NAME}: {name!r} of the component {stage!r} isn't an object")
    for name, traced in metadata.get("kwargs", {}).items():
        if not isinstance(traced, dict):
            raise BuildError(f"pack: {EXPORT_NAME}: {name!r} in 'kwargs' of the component {stage!r} isn't an object")


def _expect_explained(stage: str, metadata: Mapping[str, Any]) -> None:
    """UnsupportedModelError for a traced argument that the runtime has no rule for."""
    kwargs = metadata.get("kwargs", {})
    for name, traced in kwargs.items():
        container = traced.get("container")
        if name == "past_key_values":
            if container not in _CACHES:
                raise UnsupportedModelError(
                    f"{stage}: its past is a {container}, and only a DynamicCache is carried: export without "
                    "cache_implementation='static'"
                )
        elif name in _TENSORS and container is None:
            if traced.get("rank") != 2:
                raise UnsupportedModelError(f"{stage}: {name} has {traced.get('rank')} axes, and no rule gives those")
        elif name not in metadata.get("in_constants", {}) and container != "NoneType":
            raise UnsupportedModelError(f"{stage}: its input {name!r} has no explanation without the model")
    if "input_ids" not in kwargs:
        raise UnsupportedModelError(f"{stage}: the component that makes its inputs from token ids is missing")


def _expect_plain(stage: str, metadata: Mapping[str, Any]) -> None:
    """UnsupportedModelError for what would be another precision."""
    dtype, config = metadata.get("export_dtype"), metadata.get("export_config", {})
    if dtype != "float32":
        raise UnsupportedModelError(f"{stage}: exported at {dtype}, and bundles are float32 or rounded by a build")
    if config.get("quantizer"):
        raise UnsupportedModelError(f"{stage}: exported with a quantizer, whose precision a bundle can't say")


def _layers(decode: ir.Model) -> int:
    """How many layers' keys a graph takes."""
    return sum(_KEYS.fullmatch(value.name or "") is not None for value in decode.graph.inputs)


def _model(folder: Path, metadata: Mapping[str, Any], layers: int) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The exported architecture without weights: what it is made of, and what its generation config asks for."""
    name = str(metadata.get("architecture"))
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UnsupportedModelError(
            f"decode: its architecture {name!r} isn't one of the causal language models of transformers "
            f"{transformers.__version__}"
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Before the model is made, which takes time and memory for each layer even without its weights.
        _expect_layers(config, layers)
        with quiet(), torch.device("meta"):
            model: Any = getattr(transformers, name)(config)
    except BuildError:
        raise
    except Exception as error:  # whatever a config's and a model's own code raises
        raise BuildError(f"pack: {str(folder / 'config.json')!r} makes no {name}: {first_line(error)}") from error
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError("the component of the encoder is missing: transformers' export leaves it out")
    notes = ()
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise BuildError(f"pack: generation_config.json is damaged: {first_line(error)}") from error
    else:
        notes = ("the export holds no generation_config.json: end tokens and options are those of config.json",)
    return model.eval(), notes


def _expect_layers(config: Any, layers: int) -> None:
    """BuildError for a config of a model with other layers than the graph takes keys for."""
    text = config.get_text_config(decoder=True)
    told, shared = text.num_hidden_layers, getattr(text, "num_kv_shared_layers", None) or 0
    if layers != told - shared:
        raise BuildError(
            f"pack: config.json says {told} layers, {shared} of them with another's keys, and the component 'decode' "
            f"takes keys for {layers}"
        )
