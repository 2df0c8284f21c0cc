"""One launch of a compiled kernel on the emulated GPU (`machine.cpp`)."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

from emulator.buffers import Buffer

MAX_THREADS = 1024  # of a threadgroup
MAX_THREADGROUP_BYTES = 32 * 1024


class EmulationError(RuntimeError):
    """The kernel did what it must not do; the message says what and where."""


class _Launch(ctypes.Structure):
    """`emu::Launch` of machine.h."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("schedule", ctypes.c_int),
        ("poison", ctypes.c_int),
        ("threadgroup_bytes", ctypes.c_size_t),
        ("error", ctypes.c_char * 512),
    )


def launch(
    library: ctypes.CDLL,
    buffers: Sequence[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    schedule: int,
    poison: int,
) -> int:
    """Run a kernel.

    Args:
        library: With the kernel's `launch`.
        buffers: Its arguments.
        grid: Threads.
        threadgroup: Threads of a threadgroup.
        schedule: 0: threads run first to last, 1: last to first, 2 and up: at random.
        poison: Byte that threadgroup memory holds at the start.

    Returns:
        Bytes of threadgroup memory used.

    Raises:
        EmulationError: If it breaks a rule.
    """
    if threadgroup[0] * threadgroup[1] * threadgroup[2] > MAX_THREADS:
        raise EmulationError(f"A threadgroup has at most {MAX_THREADS} threads; got {threadgroup}.")
    it = _Launch(schedule=schedule, poison=poison)
    it.grid[:] = grid
    it.threadgroup[:] = threadgroup
    addresses = (ctypes.c_void_p * len(buffers))(*(buffer.address for buffer in buffers))
    if library.launch(ctypes.byref(it), addresses):
        raise EmulationError(_explain(it.error.decode(), buffers))
    if it.threadgroup_bytes > MAX_THREADGROUP_BYTES:
        raise EmulationError(
            f"Threadgroup memory is limited to {MAX_THREADGROUP_BYTES} bytes; the kernel uses "
            f"{it.threadgroup_bytes}."
        )
    for buffer in buffers:
        if buffer.overrun():
            raise EmulationError(f"write past the end of buffer {buffer.name!r}")
    return int(it.threadgroup_bytes)


def _explain(error: str, buffers: Sequence[Buffer]) -> str:
    """Replace the address of a bad access by the buffer that it missed."""
    found = re.match(r"BAD ACCESS (0x[0-9a-f]+|\(nil\)) (.*)", error)
    if found is None:
        return error
    address = 0 if found[1] == "(nil)" else int(found[1], 16)
    places = [place for buffer in buffers if (place := buffer.locate(address))]
    return f"out-of-bounds access: {' or '.join(places) or found[1]}, {found[2]}"
