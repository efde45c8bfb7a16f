"""Programs that AOTInductor would compile into something else than they say, sizes it takes on trust, and its cache."""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from genbundle.bundles import EngineError
from genbundle.runtime.backends import torch_compiled
from genbundle.runtime.backends.torch_compiled import compiled_module
from genbundle.runtime.backends.torch_packages import BOUNDS, load_package, package_folder, store_package
from genbundle.runtime.backends.torch_trust import broken_bound, expect_harmless, upper_bounds

aten = torch.ops.aten
owners = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no such owner")


class Of(torch.nn.Module):
    """A function as a program's module, with a weight."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        return {"y": self.function(x) + self.weight.sum()}


def traced(function, rows=Dim.DYNAMIC):
    """The program as the runtime gets it: exported, written, and read again."""
    exported = torch.export.export(Of(function), (), {"x": torch.rand(6, 4)}, dynamic_shapes={"x": {0: rows}})
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return torch.export.load(buffer)


def examples(exported):
    return [node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")]


def compiled(exported):
    return compiled_module(torch, exported, archive=b"an archive", device="cpu", program="the program 'p'")


def asserting(x):
    aten._assert_async.msg(x.sum() < 100, "Runtime assertion failed for expression Eq(u0, s94) on node 'eq_36'")
    return x + 1


def branching(x):
    return torch.cond(x.sum() > 1, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), lambda x: x.sin(), (x,))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache; its folder, which isn't made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "genbundle" / "compiled"


def test_ordinary_texts():
    for function in (asserting, branching):
        expect_harmless(traced(function), "the program 'p'")


@pytest.mark.parametrize("text", ['a"', "a\\", "??/", "a\nb", "a\0", "\u00e4", '"), system("true'])
def test_a_text_that_could_end_its_literal(text, no_compiler):
    exported = traced(asserting)
    [node] = exported.graph.find_nodes(op="call_function", target=aten._assert_async.msg)
    for hostile in (text, [["fine"], {"key": text}], [slice(None, text)]):
        node.args = (node.args[0], hostile)
        with pytest.raises(EngineError, match=r"the program 'p': aten\._assert_async\.msg has the text '") as error:
            compiled(exported)
        assert "\n" not in str(error.value)


def test_a_text_in_a_graph_inside_the_graph(no_compiler):
    exported = traced(branching)
    [node] = exported.graph_module.true_graph_0.graph.find_nodes(op="call_function", target=aten.gelu.default)
    node.kwargs = {"approximate": 'tanh"'}
    with pytest.raises(EngineError, match=r"the program 'p': aten\.gelu\.default has the text 'tanh\"'"):
        compiled(exported)


UNCHECKED = {
    "_unsafe_index": lambda x: aten._unsafe_index.Tensor(x, [x[:, 0].long()]),
    "_unsafe_index_put": lambda x: aten._unsafe_index_put.default(x, [x[:, 0].long()], x),
    "_unsafe_masked_index": lambda x: aten._unsafe_masked_index.default(x[0], x[0] > 0, [x[0].long()], 0),
    "_unsafe_masked_index_put_accumulate": lambda x: aten._unsafe_masked_index_put_accumulate.default(
        x[0], x[0] > 0, [x[0].long()], x[0]
    ),
    "as_strided": lambda x: aten.as_strided.default(x, [2], [3]),
    "as_strided_copy": lambda x: aten.as_strided_copy.default(x, [2], [3]),
    "as_strided_scatter": lambda x: aten.as_strided_scatter.default(x, x[0, :2], [2], [3]),
    "max_unpool2d": lambda x: aten.max_unpool2d.default(x[None, None], x[None, None].long(), [8, 8]),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_an_operator_without_checks(name, no_compiler):
    with pytest.raises(EngineError, match=rf"^the program 'p': calls aten\.{name}\.\w+, which compiled .*uncompiled$"):
        compiled(traced(UNCHECKED[name]))


def test_a_weight_of_another_shape_than_the_graph_says(no_compiler):
    exported = traced(torch.sin)
    for weight in (torch.ones(3), torch.ones(4, dtype=torch.int8)):
        exported.state_dict["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(EngineError, match="its code would read 'p_weight' with another shape or dtype"):
            compiled(exported)


@pytest.mark.slow
def test_sizes_that_indices_do_not_reach(cache, monkeypatch):
    exported = traced(torch.sin)
    size = examples(exported)[-1].shape[0].node
    # As `can_use_32bit_indexing` has it checked by `sizevars.check` on a GPU, of a larger tensor.
    assert size.shape_env.guard_or_defer_runtime_assert(size.expr * 2**22 + 5 <= 2**31 - 1, "by hand")
    module = compiled(exported)
    [package] = cache.iterdir()
    with zipfile.ZipFile(package) as file:
        assert [name for name in file.namelist() if name.endswith(f"/{BOUNDS}")]
    monkeypatch.setattr(torch_compiled, "_compile", None)
    for each in (module, compiled(traced(torch.sin))):
        x = torch.rand(511, 4)
        torch.testing.assert_close(each(x=x)["y"], x.sin() + 4)
        with pytest.raises(ValueError, match=rf"{size.expr} <= 1073741821, where \{{{size.expr}: 512\}}"):
            each(x=torch.rand(512, 4))


def test_bounds_that_the_program_states_and_others():
    exported = traced(torch.sin, rows=Dim("rows", max=64))
    name = str(examples(exported)[-1].shape[0])
    bounds = json.loads(json.dumps(upper_bounds(exported, examples(exported))))
    assert bounds == [[f"{name} <= 64", ["LessThan", name, 64]]]
    assert broken_bound(bounds, {name: 64}) is None
    assert broken_bound(bounds, {name: 65}) == f"{name} <= 64"
    open_one = traced(torch.sin)
    assert upper_bounds(open_one, examples(open_one)) == []
    environment = examples(open_one)[-1].fake_mode.shape_env
    environment.guard_or_defer_runtime_assert(environment.create_unbacked_symint().node.expr <= 2**31 - 1, "by hand")
    with pytest.raises(ValueError, match="its code would hold only for u0 <= 2147483647, which no input's size shows"):
        upper_bounds(open_one, examples(open_one))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["read_bytes", "replace"])
def test_nothing_is_left_of_what_could_not_be_stored(step, failure, tmp_path, monkeypatch):
    def fail(*_):
        raise failure

    made, folder = tmp_path / "made.pt2", package_folder()
    made.write_bytes(b"code")
    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(EngineError if isinstance(failure, OSError) else KeyboardInterrupt):
        store_package(made, folder / "a.pt2")
    assert list(folder.iterdir()) == []


@owners
def test_the_folders_are_for_this_user_alone(cache):
    assert package_folder() == package_folder() == cache
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700


@owners
@pytest.mark.parametrize("level", ["genbundle", "compiled"])
def test_a_folder_that_another_user_could_change(level, cache, tmp_path, monkeypatch):
    folder = package_folder() if level == "compiled" else package_folder().parent
    for mode in (0o770, 0o707):
        folder.chmod(mode)
        with pytest.raises(EngineError, match=f"{level}: others can write there, so no compiled program is loaded"):
            package_folder()
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        with pytest.raises(EngineError, match="genbundle: others can write there"):
            package_folder()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=f"{level}: not a plain folder"):
        package_folder()


@owners
def test_a_package_that_another_user_could_change(tmp_path):
    package = package_folder() / "a.pt2"
    assert load_package(torch, package, "cpu", "p") is None
    package.write_bytes(b"damaged")
    package.chmod(0o600)
    assert load_package(torch, package, "cpu", "p") is None
    package.chmod(0o620)
    with pytest.raises(EngineError, match=r"a\.pt2: others can write there, so no compiled program is loaded"):
        load_package(torch, package, "cpu", "p")
    package.chmod(0o600)
    package.rename(tmp_path / "elsewhere")
    package.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=r"a\.pt2: not a plain file, so no compiled program is loaded"):
        load_package(torch, package, "cpu", "p")
