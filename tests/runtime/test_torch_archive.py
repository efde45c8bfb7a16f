"""A .pt2 from a stranger: what torch.export.load would run is refused before it is called."""

import json
import zipfile

import pytest

from genbundle.bundles import BundleError
from genbundle.runtime.backends.torch_export import _check_archive, _weight_names

SYMBOL = "Symbol('s15', positive=True, integer=True)"
PROGRAM = {
    "nodes": [{"name": "add_1", "target": "torch.ops.aten.add.Tensor", "expr_str": f"Add({SYMBOL}, Integer(-1))"}]
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
    _check_archive(write(tmp_path / "a.pt2"))


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
        _check_archive(write(tmp_path / "a.pt2", **{name: "x"}))


@pytest.mark.parametrize("path", ["opaque_obj_tensor", "custom_obj_0", "weight_0/../x"])
def test_payloads_that_are_no_tensors(tmp_path, path):
    constants = {"config": {"c": {"path_name": path, "use_pickle": False}}}
    with pytest.raises(BundleError, match="pickled objects"):
        _check_archive(write(tmp_path / "a.pt2", constants=constants))


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
        _check_archive(write(tmp_path / "a.pt2", program={"nodes": [node]}))
