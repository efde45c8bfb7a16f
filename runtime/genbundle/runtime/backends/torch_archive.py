"""What may stand in a `.pt2`: an archive that torch loads is written anew here, from nothing but what was checked."""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from genbundle.bundles import BundleError
from genbundle.runtime.backends.torch_operators import GROUPED_MM

# What `torch.export.save` writes, and nothing else: `torch.export.load` would also unpickle older layouts' files and
# open shared libraries that it finds in an archive.
_ARCHIVED = re.compile(
    r"[\w.-]+/(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|\.data/version|byteorder|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt|archive_(format|version))",
    re.ASCII,
)
_PLAIN = re.compile(r"[\w.+-]*")
_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")
_EXPRESSION = re.compile(r"([A-Z][A-Za-z]*\(|[\s\d(),.+*/-])*")
# Read as JSON, or quoted where torch writes them into Python, or (the guards) not read at all. A compiler doesn't quote
# an operator's texts: torch_trust.py looks at them before.
_UNREAD = ("in_spec", "out_spec", "as_string", "as_strings", "guards_code")
# Operators computed in Python, on sizes; a name that isn't here may be any function of torch or Python.
_ON_SIZES = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift)|"
    r"math\.(trunc|ceil|floor|sqrt)|torch\.sym_(not|int|float|ite|max|min|sqrt|sum)"
)
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_OTHER = (f"torch.ops.{GROUPED_MM.replace('::', '.')}.default",)
# An operator that takes anything else takes storage, a stream, any Python object, or text: the name of a file.
_TYPES = {
    "Tensor", "int", "float", "bool", "number", "SymInt", "SymFloat", "SymBool", "Device", "Generator", "str",
}  # fmt: skip
_TEXTS = {
    "approximate", "assert_msg", "driver", "equation", "indexing", "interpolation", "mode", "norm", "ord", "pad_mode",
    "padding", "padding_side", "reduce", "rounding_mode", "side", "UPLO",
}  # fmt: skip
_DIALECTS = ("ATEN", "TRAINING")


def checked_archive(file: Path, torch: Any) -> io.BytesIO:
    """The archive as torch may load it; BundleError where it holds anything that loading or running would execute.

    Python and torch don't read the same of a hostile archive, so torch gets a new one, of the bytes that were checked.
    """
    try:
        entries = _entries(file)
        for name, content in entries.items():
            if name.endswith(".json"):
                value = json.loads(content.decode("utf-8"))
                if name.endswith("_config.json"):
                    _check_payloads(file, value)
                _check_words(file, value, "")
                if name.endswith("/model.json"):
                    _check_program(file, value, torch)
    # zipfile raises RuntimeError for what is encrypted, NotImplementedError for a version that it doesn't know.
    except (
        zipfile.BadZipFile, EOFError, OSError, ValueError, AttributeError, TypeError, RuntimeError, OverflowError,
    ) as error:  # fmt: skip
        raise BundleError(f"{file}: not a torch.export archive: {error}") from error
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    buffer.seek(0)
    return buffer


def _entries(file: Path) -> dict[str, bytes]:
    """The archive's files, each read once: stored as they are, so that they are no larger than the archive."""
    with zipfile.ZipFile(file) as archive:
        items, names = archive.infolist(), archive.namelist()
        strange = [name for name in names if not _ARCHIVED.fullmatch(name)]
        if strange or len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) > 1:
            raise BundleError(f"{file}: holds {(strange or names)[0]!r}, which is never loaded")
        for item in items:
            if "/data/sample_inputs/" in item.filename and item.file_size:
                raise BundleError(f"{file}: holds pickled sample inputs, which are never loaded")
            if item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1:
                raise BundleError(f"{file}: {item.filename!r} is compressed or encrypted, which no bundle's files are")
        if sum(item.file_size for item in items) > file.stat().st_size:
            raise BundleError(f"{file}: holds files that are together larger than itself")
        return {item.filename: archive.read(item) for item in items}


def _check_payloads(file: Path, value: Any) -> None:
    for entry in value.get("config", {}).values():
        if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", entry.get("path_name", ""), re.ASCII):
            raise BundleError(f"{file}: holds pickled objects, which are never loaded")


def _check_words(file: Path, value: Any, key: str) -> None:
    """BundleError for a name or expression that is more than that: torch evaluates expressions and writes names into
    the Python code that it generates."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_words(file, name, "")
            _check_words(file, item, name)
    elif isinstance(value, list):
        for item in value:
            _check_words(file, item, key)
    elif isinstance(value, str) and key not in _UNREAD and not _PLAIN.fullmatch(value):
        expression = key == "expr_str" and _EXPRESSION.fullmatch(_SYMBOL.sub("0", value))
        if not expression:
            raise BundleError(f"{file}: holds {value[:80]!r}, which is neither a name nor an expression of sizes")


def _check_program(file: Path, value: Any, torch: Any) -> None:
    """BundleError for an operator that does anything but compute, and for a program that torch wouldn't verify."""
    verifiers = value.get("verifiers")
    if not verifiers or not isinstance(verifiers, list) or not all(name in _DIALECTS for name in verifiers):
        raise BundleError(f"{file}: its verifiers are {verifiers!r}, expected some of {', '.join(_DIALECTS)}")
    for target in sorted(_targets(value)):
        if not _ON_SIZES.fullmatch(target) and target not in _OTHER and not _only_computes(target, torch):
            raise BundleError(f"{file}: holds the operator {target[:80]!r}, which isn't known to only compute")


def _targets(value: Any) -> set[str]:
    """Every operator, in graphs inside graphs too."""
    if isinstance(value, list):
        return set().union(*map(_targets, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(_targets, value.values()))
    target = value.get("target")
    return found | {target} if isinstance(target, str) else found


def _only_computes(target: str, torch: Any) -> bool:
    """Whether it is an operator of aten that takes nothing but tensors, numbers and the names of its own modes."""
    match = _ATEN.fullmatch(target)
    if match is None:
        return False
    operator: Any = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    for argument in operator._schema.arguments:
        kind = re.sub(r"Optional\[|List\[|\]", "", str(argument.type))
        if kind not in _TYPES or (kind == "str" and argument.name not in _TEXTS):
            return False
    return True
