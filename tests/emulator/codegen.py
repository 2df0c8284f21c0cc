"""The text that `mx.fast.metal_kernel` hands to Apple's compiler.

`generate` writes what MLX writes; `mlx_text` asks MLX itself, which prints it while exporting a
function, also where there is no Metal. A test holds the two equal.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

# Metal's names of MLX's types.
TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "float32": "float",
}

# What a kernel may ask about its thread; it becomes an argument if its name occurs in the source.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

# Arguments that follow an input if the source names them: `x_shape`, `x_strides`, `x_ndim`.
DESCRIPTIONS = {
    "_shape": "const constant int* ",
    "_strides": "const constant int64_t* ",
    "_ndim": "const constant int& ",
}

SMALL = 8  # inputs with fewer elements go to the constant address space


def type_name(dtype: mx.Dtype) -> str:
    """Return Metal's name of a type."""
    return TYPES[str(dtype).removeprefix("mlx.core.")]


@dataclass(frozen=True)
class KernelText:
    """What a kernel is made from; the arguments of `mx.fast.metal_kernel`."""

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False


@dataclass(frozen=True)
class Call:
    """What a kernel is called with, as far as its text depends on it."""

    inputs: Sequence[mx.array]
    output_shapes: Sequence[Sequence[int]]
    output_dtypes: Sequence[mx.Dtype]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: Sequence[tuple[str, Any]] = ()
    init_value: float | None = None


@dataclass(frozen=True)
class Generated:
    """A kernel's text.

    Attributes:
        text: The Metal source.
        function: The kernel's name in it.
        template: Its template arguments, `<float, 4>`, or nothing.
        arguments: The name of each buffer: an input, an output, or an input with `_shape`, ...
        attributes: The names of the thread attributes that follow them.
    """

    text: str
    function: str
    template: str
    arguments: tuple[str, ...]
    attributes: tuple[str, ...]


def generate(kernel: KernelText, call: Call) -> Generated:
    """Write the text of a call."""
    values = [_template_value(value) for _, value in call.template]
    template = f"<{', '.join(text for _, text in values)}>" if values else ""
    function = f"custom_kernel_{kernel.name}"
    if values:
        function += "_" + template.replace("<", "_").replace(", ", "_").replace(">", "")
    for array in call.inputs:
        size = "s" if array.ndim == 0 else "c" if array.size < SMALL else ""
        function += f"_{type_name(array.dtype)}{size}"
    function += "".join(f"_{type_name(dtype)}" for dtype in call.output_dtypes)

    text = kernel.header
    if values:
        names = (name for name, _ in call.template)
        text += "template <"
        text += ", ".join(f"{kind} {name}" for name, (kind, _) in zip(names, values, strict=True))
        text += ">\n"
    attributes = tuple(name for name in ATTRIBUTES if name in kernel.source)
    parameters = _parameters(kernel, call)
    # MLX ends the list after an output by counting inputs and outputs only, so with shapes and
    # without attributes a text of its own would not compile; kernels always have attributes.
    lines = [f"  {declaration} [[buffer({i})]]" for i, (_, declaration) in enumerate(parameters)]
    lines += [f"  {ATTRIBUTES[name]} {name} [[{name}]]" for name in attributes]
    text += f"[[kernel]] void {function}(\n" + ",\n".join(lines) + ") {\n" + kernel.source + "\n}\n"
    if values:
        text += (
            f'\ntemplate [[host_name("{function}")]] [[kernel]] '
            f"decltype({function}{template}) {function}{template};\n"
        )
    arguments = tuple(name for name, _ in parameters)
    return Generated(text, function, template, arguments, attributes)


def _template_value(value: object) -> tuple[str, str]:
    """Return the kind of a template parameter and its value as text."""
    if isinstance(value, bool):
        return "bool", str(int(value))
    if isinstance(value, int):
        return "int", str(value)
    assert isinstance(value, mx.Dtype)
    return "typename", type_name(value)


def _parameters(kernel: KernelText, call: Call) -> list[tuple[str, str]]:
    """Return name and declaration of each buffer."""
    parameters = []
    for name, array in zip(kernel.input_names, call.inputs, strict=True):
        space = "constant" if array.size < SMALL else "device"
        mark = "&" if array.ndim == 0 else "*"
        parameters.append((name, f"const {space} {type_name(array.dtype)}{mark} {name}"))
        if array.ndim > 0:
            parameters += [
                (name + suffix, f"{declaration}{name}{suffix}")
                for suffix, declaration in DESCRIPTIONS.items()
                if name + suffix in kernel.source
            ]
    for name, dtype in zip(kernel.output_names, call.output_dtypes, strict=True):
        kind = type_name(dtype)
        kind = f"atomic<{kind}>" if kernel.atomic_outputs else kind
        parameters.append((name, f"device {kind}* {name}"))
    return parameters


def mlx_text(metal_kernel: Any, kernel: KernelText, call: Call) -> str:
    """Return MLX's own text of a call.

    Args:
        metal_kernel: MLX's function of that name (a test may have put another in its place).
        kernel: What the kernel is made from.
        call: What it is called with.
    """
    made = metal_kernel(
        name=kernel.name,
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        source=kernel.source,
        header=kernel.header,
        ensure_row_contiguous=kernel.ensure_row_contiguous,
        atomic_outputs=kernel.atomic_outputs,
    )

    def function(*inputs: mx.array) -> tuple[mx.array, ...]:
        return tuple(
            made(
                inputs=list(inputs),
                output_shapes=call.output_shapes,
                output_dtypes=call.output_dtypes,
                grid=call.grid,
                threadgroup=call.threadgroup,
                template=list(call.template) or None,
                init_value=call.init_value,
                verbose=True,
            )
        )

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as captured:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(captured.fileno(), 1)  # MLX prints from C++
        try:
            mx.export_function(str(Path(folder) / "kernel.mlxfn"), function, *call.inputs)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        captured.seek(0)
        printed = captured.read().decode()
    return printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]
