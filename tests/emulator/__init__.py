"""Runs the Metal source of `mx.fast.metal_kernel` on a CPU, to find what is wrong with it.

    emulator = Emulator()
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)

lets every kernel made from then on run here. In reading order:

* `codegen`: the text that MLX makes of a call, letter by letter.
* `translate`: the little of that text that C++ cannot take: `threadgroup` variables.
* `compiler`: g++, the headers in `include/`, a cache.
* `machine`, `machine.cpp`: a launch; how threadgroups, simdgroups and threads run.
* `buffers`: memory that notices a byte read or written outside it.
* `emulator`: the whole, with the signature of `mx.fast.metal_kernel`; several schedules must agree.
* `language`: what g++ does not know of Metal - address spaces - asked of clang.

It says nothing about speed, registers, Apple's compiler and drivers, the last bits of `exp`, the
order of `simd_sum`, or memory ordering between threadgroups.
"""

from emulator.codegen import Call, KernelText, generate, mlx_text
from emulator.compiler import why_not
from emulator.emulator import QUICK, THOROUGH, Emulator, Run
from emulator.language import check_language
from emulator.machine import EmulationError

__all__ = [
    "QUICK",
    "THOROUGH",
    "Call",
    "EmulationError",
    "Emulator",
    "KernelText",
    "Run",
    "check_language",
    "generate",
    "mlx_text",
    "why_not",
]
