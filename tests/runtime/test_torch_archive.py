"""A .pt2 from a stranger: what torch.export.load would run is refused before it is called."""

import io
import json
import struct
import zipfile

import pytest
import torch

from genbundle.bundles import BundleError
from genbundle.runtime.backends.torch_archive import checked_archive
from genbundle.runtime.backends.torch_export import _weight_names

SYMBOL = "Symbol('s15', positive=True, integer=True)"
PROGRAM = {
    "verifiers": ["TRAINING"],
    "nodes": [{"name": "add_1", "target": "torch.ops.aten.add.Tensor", "expr_str": f"Add({SYMBOL}, Integer(-1))"}],
}
CONSTANTS = {"config": {"c": {"path_name": "tensor_0", "use_pickle": False}}}


def write(path, program=PROGRAM, constants=CONSTANTS, **more):
    files = {
        "a/models/model.json": json.dumps(program),
        "a/data/constants/model_constants_config.json": json.dumps(constants),
        "a/data/sample_inputs/model.pt": "",
        **more,
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("content", ["", "[]", '{"w": 1}', "{"])
def test_a_weights_table_that_is_none(tmp_path, content):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(BundleError, match=r"w\.json: (can't be read|expected an object)"):
        _weight_names(tmp_path / "w.json")


def test_a_plain_archive(tmp_path):
    checked_archive(write(tmp_path / "a.pt2"), torch)


@pytest.mark.parametrize(
    "name",
    [
        "a/data/weights/model.pt",
        "a/data/constants/model.pt",
        "a/data/aotinductor/model/model.so",
        "a/data/sample_inputs/model.pt",
        "serialized_state_dict.pt",
        "a/models/other.json",
    ],
)
def test_files_that_would_be_run(tmp_path, name):
    with pytest.raises(BundleError, match="never loaded"):
        checked_archive(write(tmp_path / "a.pt2", **{name: "x"}), torch)


@pytest.mark.parametrize("path", ["opaque_obj_tensor", "custom_obj_0", "weight_0/../x"])
def test_payloads_that_are_no_tensors(tmp_path, path):
    constants = {"config": {"c": {"path_name": path, "use_pickle": False}}}
    with pytest.raises(BundleError, match="pickled objects"):
        checked_archive(write(tmp_path / "a.pt2", constants=constants), torch)


@pytest.mark.parametrize(
    "node",
    [
        {"expr_str": "__import__('os').getcwd()"},
        {"expr_str": f"Add({SYMBOL}, breakpoint())"},
        {"name": "x = open(1); add"},
        {"parameter_name": 'a"), print("'},
        {"a;b": 1},
    ],
)
def test_words_that_would_be_code(tmp_path, node):
    with pytest.raises(BundleError, match="neither a name nor an expression"):
        checked_archive(write(tmp_path / "a.pt2", program={"nodes": [node]}), torch)


def packed(files, **options):
    """A zip of `files` as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=options.get("compression"))
    return buffer.getvalue()


def parts(raw):
    """A zip's files, its directory, and the record that ends it."""
    end = raw.rfind(b"PK\5\6")
    size, start = struct.unpack("<II", raw[end + 12 : end + 20])
    return raw[:start], raw[start : start + size], raw[end:]


def two_archives(shown, hidden):
    """One file that Python reads as the zip `shown`; torch's reader finds `hidden`."""
    first, first_directory, _ = parts(packed(hidden))
    second, second_directory, end = parts(packed(shown))
    assert len(first_directory) == len(second_directory)
    moved = bytearray(second_directory)
    # Python adds where the directory is to where it should be; torch goes by the latter.
    place, shift = 0, len(first) - len(second)
    while place < len(moved):
        sizes = struct.unpack("<HHH", moved[place + 28 : place + 34])
        offset = struct.unpack("<I", moved[place + 42 : place + 46])[0]
        moved[place + 42 : place + 46] = struct.pack("<I", offset + shift)
        place += 46 + sum(sizes)
    end = end[:12] + struct.pack("<II", len(moved), len(first)) + end[20:]
    return first + first_directory + second + bytes(moved) + end


def test_what_is_loaded_is_what_was_checked(tmp_path):
    path, shown = tmp_path / "a.pt2", json.dumps(PROGRAM)
    hidden = shown.replace("Integer(-1)", "breakpoint(")
    assert len(hidden) == len(shown)
    plain = {"a/byteorder": "little", "a/.data/version": "3\n"}
    path.write_bytes(two_archives({**plain, "a/models/model.json": shown}, {**plain, "a/models/model.json": hidden}))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("a/models/model.json") == shown.encode()
    assert torch._C.PyTorchFileReader(str(path)).get_record("models/model.json") == hidden.encode()
    assert torch._C.PyTorchFileReader(checked_archive(path, torch)).get_record("models/model.json") == shown.encode()


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.from_file.out",
        "torch.ops.aten.save.default",
        "torch.ops.aten.set_.source_Storage",
        "torch.ops.aten.tensor.default",
        "torch.ops.aten.no_such.default",
        "torch.ops.aten.add",
        "torch.ops.aten.add.__class__",
        "torch.ops.load_library",
        "torch.ops.profiler._record_function_enter.default",
        "torch.os.system",
        "torch.load",
        "torch.sym_max.__globals__",
        "_operator.attrgetter",
        "math",
        "#other",
        "print",
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_operators_that_do_more_than_compute(tmp_path, target, inside):
    node = {"name": "x", "target": target}
    graph = {"as_graph": {"name": "g", "graph": {"nodes": [node]}}}
    nodes = [{"name": "y", "target": "torch.ops.aten.add.Tensor", "inputs": [{"arg": graph}]}] if inside else [node]
    with pytest.raises(BundleError, match=r"(holds the operator '.*', which isn't known|neither a name nor)"):
        checked_archive(write(tmp_path / "a.pt2", program={**PROGRAM, "nodes": nodes}), torch)


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.gelu.default",
        "torch.ops.aten.div.Tensor_mode",
        "torch.ops.aten.copy_.default",
        "torch.ops.aten._assert_scalar.default",
        "torch.ops.aten.scaled_dot_product_attention.default",
        "torch.ops.aten.to.dtype_layout",
        "_operator.floordiv",
        "torch.sym_ite",
    ],
)
def test_operators_that_only_compute(tmp_path, target):
    checked_archive(write(tmp_path / "a.pt2", program={**PROGRAM, "nodes": [{"target": target}]}), torch)


@pytest.mark.parametrize("verifiers", [None, [], [""], "ATEN", ["OTHER"]])
def test_programs_that_torch_would_not_verify(tmp_path, verifiers):
    with pytest.raises(BundleError, match="its verifiers are"):
        checked_archive(write(tmp_path / "a.pt2", program={**PROGRAM, "verifiers": verifiers}), torch)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_compressed_archives(tmp_path, method):
    path = tmp_path / "a.pt2"
    path.write_bytes(packed({"a/models/model.json": " " * 10_000_000 + "{}"}, compression=method))
    assert path.stat().st_size < 100_000
    with pytest.raises(BundleError, match="is compressed or encrypted"):
        checked_archive(path, torch)


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99), (6, 99), (26, 1), (42, 200)])
def test_archives_with_a_strange_directory(tmp_path, place, value):
    """An encrypted file, an unknown method, a newer zip, more bytes than there are, a file that begins elsewhere."""
    raw = bytearray(packed({"a/models/model.json": json.dumps(PROGRAM)}))
    raw[raw.find(b"PK\1\2") + place] = value
    (tmp_path / "a.pt2").write_bytes(raw)
    with pytest.raises(BundleError, match=r"a\.pt2: (not a torch.export archive|holds|.* is compressed or encrypted)"):
        checked_archive(tmp_path / "a.pt2", torch)


def test_files_that_stand_twice(tmp_path):
    path = write(tmp_path / "a.pt2")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/models/model.json", "{}")
    with pytest.raises(BundleError, match="never loaded"):
        checked_archive(path, torch)
    with pytest.raises(BundleError, match="never loaded"):
        checked_archive(write(tmp_path / "b.pt2", **{"b/models/model.json": json.dumps(PROGRAM)}), torch)
