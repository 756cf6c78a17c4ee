"""The names that safetensors gives to dtypes, and torch's dtypes: the one table of both."""

from __future__ import annotations

import torch

from eigenzoo.errors import UnsupportedError

# Sub-byte dtypes (F4, F6_E2M3, F6_E3M2) are left out on purpose: their values have no address of their own.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(name: str) -> torch.dtype:
    """Give torch's dtype for a safetensors name.

    >>> dtype_of("BF16")
    torch.bfloat16
    """
    dtype = DTYPES.get(name)
    if dtype is None:
        raise UnsupportedError(
            f"dtype {name[:40]!r} has no torch dtype of whole bytes",
            rule=f"readable dtypes are {', '.join(DTYPES)}",
            next_step="dequantise the weights, or save them in one of these",
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Give the safetensors name for a torch dtype.

    >>> dtype_name(torch.float8_e4m3fn)
    'F8_E4M3'
    """
    name = _NAMES.get(dtype)
    if name is None:
        raise UnsupportedError(
            f"safetensors cannot hold {dtype}", rule=f"writable dtypes are {', '.join(str(d) for d in _NAMES)}"
        )
    return name
