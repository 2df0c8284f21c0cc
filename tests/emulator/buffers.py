"""Memory whose neighbourhood cannot be touched.

A buffer ends, or starts, at a page that may be neither read nor written, so the first byte too far
stops the kernel. The few bytes of its own pages that it does not need are checked afterwards.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal

Side = Literal["start", "end"]
PAGE = mmap.PAGESIZE
UNTOUCHED = 0xA5
READ_WRITE, PRIVATE_ANONYMOUS = 0x3, 0x22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Buffer:
    """A kernel's argument.

    Attributes:
        name: What the kernel calls it.
        size: In bytes.
        address: Where it begins.
    """

    def __init__(self, name: str, size: int, guard: Side, alignment: int = 16) -> None:
        """Allocate.

        Args:
            name: For messages.
            size: In bytes.
            guard: Which side touches a forbidden page.
            alignment: Of the address; with a guard at the end, bytes behind it that are left over
                by the alignment are checked, not forbidden.
        """
        self.name, self.size = name, size
        self._body = max(PAGE, -(-size // PAGE) * PAGE)
        self._base = _libc.mmap(None, self._body + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
        _libc.mprotect(self._base, PAGE, 0)
        _libc.mprotect(self._base + PAGE + self._body, PAGE, 0)
        shift = (self._body - size) // alignment * alignment if guard == "end" else 0
        self.address = self._base + PAGE + shift
        self._left_over = self._base + PAGE + self._body - self.address - size
        ctypes.memset(self.address + size, UNTOUCHED, self._left_over)

    def write(self, content: bytes) -> None:
        """Fill from the start."""
        ctypes.memmove(self.address, content, len(content))

    def fill(self, byte: int) -> None:
        """Set all bytes."""
        ctypes.memset(self.address, byte, self.size)

    def read(self) -> bytes:
        """Return the content."""
        return ctypes.string_at(self.address, self.size)

    def overrun(self) -> bool:
        """Whether bytes behind it were written."""
        behind = ctypes.string_at(self.address + self.size, self._left_over)
        return behind != bytes([UNTOUCHED]) * self._left_over

    def locate(self, address: int) -> str | None:
        """Say where a forbidden address is, if it belongs to this buffer's surroundings."""
        if not self._base <= address < self._base + self._body + 2 * PAGE:
            return None
        if address >= self.address:
            return f"buffer {self.name!r}, {address - self.address - self.size} bytes past its end"
        return f"buffer {self.name!r}, {self.address - address} bytes before its start"

    def close(self) -> None:
        """Give the memory back."""
        _libc.munmap(self._base, self._body + 2 * PAGE)
