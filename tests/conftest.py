"""Tiny bundles, each built once per test session when a test first asks for it."""

import fcntl
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from genbundle.bundles import Bundle, open_bundle
from genbundle.runtime import Model, load_bundle

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers on as many cores: tiny models' threads would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's bundles are; with pytest-xdist its workers share them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "bundles"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Callable[..., Bundle]:
    """`bundle(name, backend="cpu")`: the bundle of the tiny model `name` in tests/zoo/models.py.

    `name` may also be a class in tests/zoo/shrink.py, "chat" (a llama with a tokenizer and a chat template), either
    with "chat-" in front (the same with a tokenizer), or "demo" (the embedded image-text model);
    "chat+", "demo+" and "demo+int4" are those for the other runtimes too.
    A failed build fails every test that asks for it, and is tried once.
    """

    @functools.cache
    def get(name: str, backend: str = "cpu") -> Bundle | Exception:
        path = bundle_folder / f"{name}-{backend}.bundle"
        with (bundle_folder / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                return open_bundle(path) if path.exists() else _build(name, backend, path)
            except Exception as error:
                return error

    def ask(name: str, backend: str = "cpu") -> Bundle:
        found = get(name, backend)
        if isinstance(found, Exception):
            raise found
        return found

    return ask


@pytest.fixture(scope="session")
def loaded(bundle: Callable[..., Bundle]) -> Callable[..., Model]:
    """`loaded(name, backend="cpu")`: the same, opened with the runtime."""

    @functools.cache
    def get(name: str, backend: str = "cpu") -> Model:
        return load_bundle(bundle(name, backend))

    return get


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTInductor is not to be asked from here on."""
    from genbundle.runtime.backends import torch_compiled

    def fail(*_: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch_compiled, "_compile", fail)


def _build(name: str, backend: str, path: Path) -> Bundle:
    from genbundle.builder import build_bundle
    from genbundle.builder.also import ALSO
    from tests.zoo import coverage, models, shrink, tokenizers

    if name in ("demo", "demo+", "demo+int4"):
        from genbundle.builder.demo.show import MODEL, sample_inputs

        also = [] if name == "demo" else ["transformers.js"]
        precision = "int4" if name == "demo+int4" else "fp32"
        inputs = sample_inputs()
        return build_bundle(MODEL, inputs, backend, also=also, precision=precision, output=path, progress=False)
    also, name = (ALSO, "chat") if name == "chat+" else ((), name)
    with_tokenizer, name = name.startswith("chat"), "llama" if name == "chat" else name.removeprefix("chat-")
    model = shrink.make(name) if name in shrink.CLASSES else models.make(name)
    vocabulary = model.config.get_text_config().vocab_size
    processor = tokenizers.chat_tokenizer(vocabulary) if with_tokenizer else None
    if name in shrink.CLASSES:
        inputs = shrink.variants(name, model)
        samples, room = inputs["build"], coverage.room_for(inputs)
    else:
        samples, room = models.samples(name), None
    return build_bundle(
        model, samples, backend, processor=processor, also=also, output=path, max_length=room, progress=False
    )
