"""One table between the manifest's dtype names and numpy's."""

import ml_dtypes
import numpy as np

_BY_NAME: dict[str, np.dtype] = {
    name: np.dtype(name)
    for name in (
        "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
        "bool",
    )
}  # fmt: skip
_BY_NAME["bfloat16"] = np.dtype(ml_dtypes.bfloat16)

DTYPE_NAMES = tuple(_BY_NAME)


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype a manifest names; KeyError for a name outside the table."""
    return _BY_NAME[name]
