"""The first smoke, in seconds and without a model: import times and directions, names, sizes."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {name: ROOT / name / "genbundle" / name for name in ("bundles", "runtime", "builder")}
HEAVY = ("torch", "transformers", "onnxruntime", "executorch", "onnx", "onnxscript")
MOST_LINES = 400


def modules(package):
    return sorted(PACKAGES[package].rglob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


def imports(path, *, module_level_only):
    """The modules that a file imports; those inside functions and `if TYPE_CHECKING` left out if asked."""
    found, waiting = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif module_level_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
    return found


def of(names, *roots):
    return sorted(name for name in names if any(name == root or name.startswith(f"{root}.") for root in roots))


@pytest.mark.parametrize("root", PACKAGES)
def test_the_namespace_has_no_init(root):
    assert not (ROOT / root / "genbundle" / "__init__.py").exists()


@pytest.mark.parametrize("path", [*modules("bundles"), *modules("runtime")], ids=named)
def test_runtime_and_bundles_import_nothing_heavy_at_module_level(path):
    assert of(imports(path, module_level_only=True), *HEAVY) == []


@pytest.mark.parametrize("path", [*modules("bundles"), *modules("runtime")], ids=named)
def test_runtime_and_bundles_never_import_transformers_or_the_builder(path):
    assert of(imports(path, module_level_only=False), "transformers", "genbundle.builder") == []


@pytest.mark.parametrize("path", modules("bundles"), ids=named)
def test_bundles_import_no_other_package_of_ours(path):
    assert of(imports(path, module_level_only=False), "genbundle.runtime", "genbundle.builder") == []


def test_one_builder_module_touches_the_exporters():
    touching = [
        named(path)
        for path in modules("builder")
        if of(imports(path, module_level_only=False), "transformers.exporters", "transformers.integrations.executorch")
    ]
    assert touching == ["builder/genbundle/builder/exporting.py"]


@pytest.mark.parametrize("path", [path for package in PACKAGES for path in modules(package)], ids=named)
def test_modules_are_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(text))
    assert path.name != "utils.py"


def test_the_runtime_names_no_architecture():
    """Roles, not names: whatever is special about a model is data in its manifest."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # Words that are architectures' names to transformers and plain words to us.
    plain = {"auto", "text", "encoder", "decoder", "vision"}
    types = {name for name in CONFIG_MAPPING_NAMES if len(name) > 3} - plain
    for path in modules("runtime"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compared = {
            item.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare | ast.Dict)
            for item in ast.walk(node)
            if isinstance(item, ast.Constant) and isinstance(item.value, str)
        }
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert compared & types == set(), named(path)
        assert "model_type" not in compared | names, named(path)


@pytest.mark.parametrize("name", ["genbundle.bundles", "genbundle.runtime", "genbundle.builder"])
def test_all_is_what_is_exported(name):
    module = importlib.import_module(name)
    submodules = {item.name for item in pkgutil.iter_modules(module.__path__)}
    public = {item for item in vars(module) if not item.startswith("_")} - submodules - {"TYPE_CHECKING"}
    assert sorted(module.__all__) == list(module.__all__)
    assert public <= set(module.__all__)
    assert all(getattr(module, item) is not None for item in module.__all__)


def test_importing_the_runtime_is_quick_and_light():
    """The budget is 0.25 s (tests/benchmarks); here only that it isn't seconds, on a machine that may be busy."""
    script = (
        "import time, sys; begun = time.perf_counter(); import genbundle.runtime; "
        "print(time.perf_counter() - begun, *sorted(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, *loaded = result.stdout.split()
    assert set(loaded) & {*HEAVY, "PIL", "rich", "tokenizers", "jinja2"} == set()
    assert float(seconds) < 2


def test_the_help_loads_no_engine_and_no_builder():
    script = (
        "import sys; from genbundle.runtime.cli import invoke; code = invoke(['--help']); "
        "print(code, *sorted(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, *loaded = result.stderr.split()
    assert code == "0"
    assert set(loaded) & {*HEAVY, "genbundle.builder", "PIL", "rich", "tokenizers"} == set()
    for command in ("build", "run", "inspect", "verify", "bench", "demo"):
        assert f"\n  {command} " in result.stdout
