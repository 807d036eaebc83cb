"""Memory for parameters: every one owns its storage, large ones in pages the kernel can make huge.

First-touch page faults, not copying, are the largest cost of loading on a CPU: 4 KiB pages are
touched at about 2 GB/s, 2 MiB pages at about 15 (docs/performance.md). So a parameter of at least 2
MiB gets a mapping of its own, with only the whole 2 MiB inside it advised, so that no page reaches
over its end and the peak stays at the parameters' own size. Where huge pages are off the same code
works, slower.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from bioinit.layout import Dims, numel, row_major

HUGE_PAGE = 2 * 2**20


def allocate(
    shape: Dims, dtype: torch.dtype, device: torch.device, strides: Dims | None = None
) -> torch.Tensor:
    """An uninitialized tensor that owns its storage, exactly as large as it needs.

    It is row-major, or has the dense ``strides``.
    """
    if strides is not None and strides != row_major(shape) and numel(shape):
        return allocate((numel(shape),), dtype, device).as_strided(shape, strides)
    size = numel(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        mapping, start = _aligned(size)
    except OSError:
        # The kernel limits how many mappings a process has; the allocator has other ways.
        return torch.empty(shape, dtype=dtype, device=device)
    mapping.madvise(mmap.MADV_HUGEPAGE, start, size - size % HUGE_PAGE)
    return torch.frombuffer(mapping, dtype=dtype, count=numel(shape), offset=start).view(shape)


def _aligned(size: int) -> tuple[mmap.mmap, int]:
    """A private mapping and the first offset in it that begins a huge page."""
    rounded = -(-size // HUGE_PAGE) * HUGE_PAGE
    mapping = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not _address(mapping) % HUGE_PAGE:
        return mapping, 0
    mapping = mmap.mmap(-1, rounded + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mapping, -_address(mapping) % HUGE_PAGE


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
