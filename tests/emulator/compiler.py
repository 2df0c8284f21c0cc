"""Compiles a kernel with g++ and keeps the result.

The standard library of `include/` is precompiled and the machine compiled once, so a kernel takes
less than a second; a kernel with the same text takes nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from emulator.codegen import Call, Generated, KernelText, type_name
from emulator.translate import to_cpp

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-w",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-ftrivial-auto-var-init=pattern",  # a variable read before it is written is no 0
]
if platform.machine() == "x86_64":
    FLAGS += ["-mavx2", "-mfma", "-mf16c"]
# Traps where C++ has no meaning: an index outside a private array, a shift too far, ...
TRAPS = (
    "-fsanitize=bounds,shift,alignment,null,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
)

TEMPLATE = """\
#include "metal.h"
namespace kernel_space {{
#include "msl_names.h"
#include "mlx_preamble.h"
#define device
#define constant
#define threadgroup
#define thread
#define kernel
#line 1 "kernel.metal"
{body}
#undef device
#undef constant
#undef threadgroup
#undef thread
#undef kernel
}}
static void entry(void* packed) {{
  void** a = (void**)packed;
  kernel_space::{function}{template}({arguments});
}}
extern "C" int launch(emu::Launch* it, void** arguments) {{
  it->entry = entry;
  it->arguments = arguments;
  return emu::run(it);
}}
"""


class CompileError(RuntimeError):
    """The kernel is no valid program."""


def why_not() -> str | None:
    """Return why kernels cannot be emulated on this machine; None if they can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the emulator runs on Linux, x86-64 or arm64"
    if shutil.which(_compiler()) is None:
        return "the emulator needs g++ 12 or newer (CXX names another)"
    return None


def compile_kernel(
    kernel: KernelText, call: Call, generated: Generated, traps: bool
) -> ctypes.CDLL:
    """Return a library with the kernel's `launch`.

    Args:
        kernel: What the kernel is made from.
        call: What it is called with.
        generated: Its text.
        traps: Whether undefined behaviour stops it.

    Raises:
        CompileError: If g++ refuses the text.
    """
    source = TEMPLATE.format(
        body=to_cpp(generated.text),
        function=generated.function,
        template=_in_kernel_space(generated.template),
        arguments=", ".join(_arguments(kernel, call, generated)),
    )
    return _library(source, TRAPS if traps else ())


def _arguments(kernel: KernelText, call: Call, generated: Generated) -> list[str]:
    """Return each argument as C++: `(const float*)a[0]`, `*(const int*)a[1]`, an attribute."""
    inputs = dict(zip(kernel.input_names, call.inputs, strict=True))
    outputs = dict(zip(kernel.output_names, call.output_dtypes, strict=True))
    arguments = []
    for i, name in enumerate(generated.arguments):
        if name in inputs:
            star = "*" if inputs[name].ndim == 0 else ""
            kind = f"const {_in_kernel_space(type_name(inputs[name].dtype))}*"
        elif name in outputs:
            star, kind = "", _in_kernel_space(type_name(outputs[name]))
            kind = f"metal::atomic<{kind}>*" if kernel.atomic_outputs else f"{kind}*"
        else:
            star = "*" if name.endswith("_ndim") else ""
            kind = "const int64_t*" if name.endswith("_strides") else "const int*"
        arguments.append(f"{star}({kind})a[{i}]")
    return arguments + [f"attribute::{name}()" for name in generated.attributes]


def _in_kernel_space(text: str) -> str:
    return re.sub(r"\b(b?float16_t)\b", r"kernel_space::\1", text)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def _cache() -> Path:
    """Return the folder of what was compiled, by these headers, this g++ and these flags."""
    version = subprocess.run([_compiler(), "--version"], capture_output=True, check=True).stdout
    files = [*sorted(INCLUDE.iterdir()), HERE / "machine.cpp", Path(__file__)]
    content = version + b"".join(file.read_bytes() for file in files)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(content).hexdigest()[:16]
    folder = Path(base) / "flash-mlx" / "emulator" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to
        folder = Path(tempfile.mkdtemp(prefix="flash-mlx-emulator-"))
    return folder


def _build(words: list[str], target: Path) -> None:
    """Run g++ on words unless `target` is there; several processes may try at once."""
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "made"
        done = subprocess.run(
            [_compiler(), *words, "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CompileError(f"The kernel does not compile:\n{done.stderr[:4000]}")
        made.replace(target)


@functools.cache
def _foundation(extra: tuple[str, ...]) -> tuple[Path, Path]:
    """Return the folder with the precompiled metal.h, and the compiled machine."""
    folder = _cache() / hashlib.sha256(" ".join(extra).encode()).hexdigest()[:8]
    folder.mkdir(exist_ok=True)
    machine, header = folder / "machine.o", folder / "metal.h.gch"
    include = f"-I{INCLUDE}"
    _build([*FLAGS, "-O2", include, "-c", str(HERE / "machine.cpp")], machine)
    _build(
        [*FLAGS, *extra, include, "-x", "c++-header", str(INCLUDE / "metal.h")],
        header,
    )
    return folder, machine


@functools.cache
def _library(source: str, extra: tuple[str, ...]) -> ctypes.CDLL:
    folder, machine = _foundation(extra)
    name = hashlib.sha256(source.encode()).hexdigest()[:24]
    library, written = folder / f"{name}.so", folder / f"{name}.cpp"
    if not library.exists():
        written.write_text(source, encoding="utf-8")
        words = [*FLAGS, *extra, f"-I{folder}", f"-I{INCLUDE}", "-shared"]
        _build([*words, str(written), str(machine)], library)
    return ctypes.CDLL(str(library))
