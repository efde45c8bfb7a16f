"""From a path to a model: open the bundle, then its engine."""

from pathlib import Path

from genbundle.bundles import Bundle, open_bundle
from genbundle.runtime.backends import open_backend
from genbundle.runtime.model import Model


def load_bundle(
    path: str | Path | Bundle, device: str | None = None, threads: int | None = None, *, compiled: bool = False
) -> Model:
    """Open a bundle to generate with.

    Args:
        path: the bundle's directory, or an opened bundle.
        device: where to run: "cpu" or "cuda"; the bundle's own by default.
        threads: how many threads the engine uses; its own choice by default.
        compiled: compile each program when it is first opened, for this device and processor (`torch` bundles only;
            needs a C++ compiler). That takes from seconds to minutes; what was compiled is kept in the user's cache,
            `genbundle/compiled` in XDG_CACHE_HOME or ~/.cache. For bundles that you trust: the compiled code
            checks less than torch does.

    Raises:
        BundleError: the bundle is damaged or newer than this version (BundleVersionError).
        MissingExtraError: the engine isn't installed; names the pip command.
        EngineError: the engine or device can't run this bundle here, or can't compile it.
    """
    bundle = path if isinstance(path, Bundle) else open_bundle(path)
    return Model(bundle, open_backend(bundle, device=device, threads=threads, compiled=compiled))
