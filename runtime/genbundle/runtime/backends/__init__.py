"""One module per engine, imported when a bundle needs it."""

import importlib

from genbundle.bundles import Bundle, EngineError
from genbundle.runtime.program import Backend

_MODULES = {"cpu": "onnxruntime", "cuda": "onnxruntime", "xnnpack": "executorch", "torch": "torch_export"}


def open_backend(bundle: Bundle, *, device: str | None, threads: int | None, compiled: bool = False) -> Backend:
    """The engine of the bundle's backend with its programs; EngineError or MissingExtraError where it can't run."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise EngineError(f"threads must be a positive integer, got {threads!r}")
    if compiled and bundle.manifest.backend != "torch":
        raise EngineError(
            f"{bundle.path}: a {bundle.manifest.backend!r} bundle can't be compiled: its engine runs it as it is; "
            "only bundles built with the backend 'torch' can"
        )
    options = {"compiled": True} if compiled else {}
    module = importlib.import_module(f"{__name__}.{_MODULES[bundle.manifest.backend]}")
    return module.open_backend(bundle, device=device, threads=threads, **options)
