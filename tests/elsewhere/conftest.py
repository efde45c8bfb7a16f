"""The other runtimes, as their users install them: once per session, into a folder that xdist's workers share."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
GENAI = "onnxruntime-genai==0.18.0"
NPM = ("@huggingface/transformers@4.3.1", "playwright-core@1.65.1")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def foreign_folder(bundle_folder: Path) -> Path:
    folder = bundle_folder / "foreign"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """`folder / name`, made by the first who asks."""
    made = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / ".ready").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            (made / ".ready").touch()
    return made


def run(*command: str | Path, timeout: float = 300, **options: Any) -> str:
    # Ours must not be seen by another environment's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=timeout, check=False, env=environment, **options
    )
    assert result.returncode == 0, f"{command[0]}: {result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def genai(foreign_folder: Path) -> Callable[[Path, list[dict]], list]:
    """`genai(bundle, calls)`: what tests/elsewhere/genai_worker.py answers in an environment with GenAI alone."""

    def make(folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder / "env")
        run(folder / "env/bin/python", "-m", "pip", "install", "--quiet", GENAI)

    if sys.platform == "win32":
        pytest.skip("the environment's interpreter is looked for where Unix has it")
    python = once(foreign_folder, "genai", make) / "env/bin/python"
    return lambda path, calls: json.loads(
        run(python, HERE / "genai_worker.py", path, input=json.dumps(calls)).splitlines()[-1]
    )


@pytest.fixture(scope="session")
def npm_folder(foreign_folder: Path) -> Path:
    """A folder with the npm package in its node_modules, and the tests' scripts beside that."""
    for name in ("node", "npm"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} isn't installed")

    def make(folder: Path) -> None:
        (folder / "package.json").write_text('{"private": true}')
        # The postinstall scripts would download what is needed for GPUs; the CPU's binaries are in the packages.
        run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *NPM, cwd=folder)
        for script in HERE.glob("*.mjs"):
            shutil.copy(script, folder)
        shutil.copy(HERE / "page.html", folder)

    return once(foreign_folder, "npm", make)


@pytest.fixture(scope="session")
def node(npm_folder: Path) -> Callable[[str, Path, list[dict]], Any]:
    """`node(script, bundle, calls)`: what a script of this folder answers."""
    return lambda script, path, calls: json.loads(
        run("node", npm_folder / script, path, input=json.dumps(calls), cwd=npm_folder).splitlines()[-1]
    )


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed")
    return found
