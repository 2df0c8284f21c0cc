"""`mx.fast.metal_kernel`, emulated."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from emulator.buffers import Buffer, Side
from emulator.codegen import Call, Generated, KernelText, generate
from emulator.compiler import compile_kernel
from emulator.machine import EmulationError, launch


@dataclass(frozen=True)
class Run:
    """How a kernel is run.

    Attributes:
        schedule: Order of threads; see `machine.launch`.
        guard: The side of each buffer at which a byte too far stops the kernel.
        poison: Byte that outputs and threadgroup memory hold at the start.
    """

    schedule: int = 0
    guard: Side = "end"
    poison: int = 0xFF


QUICK = (Run(),)
# 0xFF is NaN in every float type, 0x7F a huge number, 0x00 the zero that hides what is unwritten.
THOROUGH = (
    Run(),
    Run(schedule=1, guard="start", poison=0x00),
    Run(schedule=2, guard="end", poison=0x7F),
)


@dataclass(frozen=True)
class Launched:
    """A launch that went well, for tests that look at what ran."""

    kernel: KernelText
    call: Call
    generated: Generated
    threadgroup_bytes: int


class Emulator:
    """Makes kernels that run here.

    A kernel is run once for each of `runs`, and all have to give the same bits: else the result
    depends on the order of threads, or on memory that nobody has written.

    Attributes:
        launches: What ran, in order.
    """

    def __init__(self, runs: Sequence[Run] = THOROUGH, *, traps: bool = False) -> None:
        """Choose how kernels run.

        Args:
            runs: At least one.
            traps: Whether undefined behaviour of the C++ translation stops a kernel.
        """
        self.launches: list[Launched] = []
        self._runs, self._traps = runs, traps

    def metal_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        **_options: object,
    ) -> Callable[..., list[mx.array]]:
        """Return a kernel; arguments as those of `mx.fast.metal_kernel`."""
        kernel = KernelText(
            name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs
        )

        def call(
            *,
            inputs: Sequence[Any],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            template: Sequence[tuple[str, Any]] | None = None,
            init_value: float | None = None,
            **_options: object,
        ) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            return self.run(
                kernel,
                Call(
                    arrays,
                    output_shapes,
                    output_dtypes,
                    grid,
                    threadgroup,
                    template or (),
                    init_value,
                ),
            )

        return call

    def run(self, kernel: KernelText, call: Call) -> list[mx.array]:
        """Run a kernel, and again in each other way.

        Raises:
            EmulationError: If it breaks a rule or two runs differ.
            CompileError: If it is no valid program.
        """
        generated = generate(kernel, call)
        library = compile_kernel(kernel, call, generated, self._traps)
        first: list[bytes] = []
        for run in self._runs:
            outputs, used = _run_once(library, kernel, call, generated, run)
            first = first or outputs
            for name, one, other in zip(kernel.output_names, first, outputs, strict=True):
                if one != other:
                    raise EmulationError(
                        f"Output {name!r} of {kernel.name} depends on the order of threads or on "
                        f"memory that was not written: {self._runs[0]} and {run} differ."
                    )
        self.launches.append(Launched(kernel, call, generated, used))
        return [
            _to_array(content, shape, dtype)
            for content, shape, dtype in zip(
                first, call.output_shapes, call.output_dtypes, strict=True
            )
        ]


def _run_once(
    library: ctypes.CDLL, kernel: KernelText, call: Call, generated: Generated, run: Run
) -> tuple[list[bytes], int]:
    """Return the outputs' bytes and the threadgroup memory used."""
    contents = _inputs(kernel, call)
    buffers = {}
    try:
        for name in generated.arguments:
            if name in contents:
                content = contents[name]
                alignment = 8 if name not in kernel.input_names else 16
                buffers[name] = Buffer(name, len(content), run.guard, alignment)
                buffers[name].write(content)
        for name, shape, dtype in zip(
            kernel.output_names, call.output_shapes, call.output_dtypes, strict=True
        ):
            buffers[name] = Buffer(name, int(np.prod(shape)) * dtype.size, run.guard)
            buffers[name].fill(run.poison)
            if call.init_value is not None:
                initial = mx.full(tuple(shape), call.init_value, dtype)
                buffers[name].write(_to_bytes(initial, keep_strides=False)[0])
        ordered = [buffers[name] for name in generated.arguments]
        used = launch(library, ordered, call.grid, call.threadgroup, run.schedule, run.poison)
        return [buffers[name].read() for name in kernel.output_names], used
    finally:
        for buffer in buffers.values():
            buffer.close()


def _inputs(kernel: KernelText, call: Call) -> dict[str, bytes]:
    """Return the bytes of each input, and of its shape, strides and number of axes."""
    contents = {}
    for name, array in zip(kernel.input_names, call.inputs, strict=True):
        content, strides = _to_bytes(array, keep_strides=not kernel.ensure_row_contiguous)
        contents[name] = content
        contents[f"{name}_shape"] = np.array(array.shape, np.int32).tobytes()
        contents[f"{name}_strides"] = np.array(strides, np.int64).tobytes()
        contents[f"{name}_ndim"] = np.array([array.ndim], np.int32).tobytes()
    return contents


def _to_bytes(array: mx.array, *, keep_strides: bool) -> tuple[bytes, list[int]]:
    """Return an array's memory and its strides in elements.

    Args:
        array: Of any layout.
        keep_strides: Whether a view is given as it lies in memory, gaps included, or copied.
    """
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(plain)
    seen = np.asarray(plain)  # shares MLX's memory
    if not keep_strides:
        seen = np.ascontiguousarray(seen)
    strides = [step // seen.itemsize for step in seen.strides]
    reach = sum((size - 1) * step for size, step in zip(seen.shape, strides, strict=True))
    span = (reach + 1) * seen.itemsize if seen.size else 0
    return ctypes.string_at(seen.ctypes.data, span), strides


def _to_array(content: bytes, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bfloat16:
        plain = np.frombuffer(content, np.uint16).reshape(shape)
        return mx.array(plain).view(mx.bfloat16)
    name = str(dtype).removeprefix("mlx.core.").replace("bool_", "bool")
    return mx.array(np.frombuffer(content, name).reshape(shape))
