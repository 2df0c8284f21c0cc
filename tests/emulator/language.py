"""What C++ does not know of Metal: address spaces. Asked of clang, in which they exist.

The text is parsed, never run, with Metal's `device`, `constant` and `threadgroup` as clang's
numbered address spaces (`include/address_spaces.h`). A `device` pointer given where a `threadgroup`
one is wanted, or a small input that MLX puts in `constant`, is then an error.
"""

from __future__ import annotations

import re
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"
SPACES = r"\b(?:device|constant|threadgroup|thread)\b"
POINTER = re.compile(
    r"(?<![\w.>:])(?:const\s+)?(?:float|half|bfloat|u?int|u?short|u?char|u?long|u?int(?:8|16|32|64)_t"
    r"|b?float16_t|T)\s*(?:const\s*)?\*\s*\w"
)
VARIABLE = re.compile(
    r"^(\s*)threadgroup\s+(?=[\w:<>, ]+\s\w+\s*(?:\[[^;]*\])?\s*(?:,[^;*&=]*)?;)", re.MULTILINE
)
ARGUMENTS = [
    "-x",
    "c++",
    "-std=c++17",
    "-fsyntax-only",
    "-nostdinc",
    "-ffreestanding",
    "--target=x86_64-linux-gnu",  # any that has half and bfloat
    "-msse2",
    "-Wno-unknown-attributes",
    "-Wno-ignored-attributes",
    "-Wno-reserved-user-defined-literal",
    f"-I{INCLUDE}",
]
ERROR = 3  # clang's severity


def check_language(metal: str) -> list[str]:
    """Return what is wrong with a generated text, one line each.

    Args:
        metal: As `codegen.generate` makes it, with its explicit instantiation.

    Raises:
        ImportError: Without the libclang wheel.
    """
    from clang.cindex import Index

    text = VARIABLE.sub(r"\1static threadgroup ", metal)
    text = re.sub(r"#include <metal_\w+>", "", text)
    text = re.sub(
        r"^template \[\[host_name\(\"\w+\"\)\]\] \[\[kernel\]\]",
        "template",
        text,
        flags=re.MULTILINE,
    )
    source = f'#include "address_spaces.h"\n#line 1 "kernel.metal"\n{text}'
    unit = Index.create().parse("kernel.cpp", ARGUMENTS, [("kernel.cpp", source)])
    found = [
        f"line {problem.location.line}: {problem.spelling}"
        for problem in unit.diagnostics
        if problem.severity >= ERROR
    ]
    return found + _bare_pointers(metal)


def _bare_pointers(metal: str) -> list[str]:
    """Find pointers without an address space, which clang takes for a space of its own."""
    found = []
    for number, line in enumerate(re.sub(r"//[^\n]*", "", metal).split("\n"), start=1):
        for match in POINTER.finditer(line):
            before = line[: match.start()]
            named = re.search(rf"{SPACES}\s+(?:const\s+)?(?:volatile\s+)?$", before)
            if named is None and re.search(SPACES, match.group()) is None:
                found.append(f"line {number}: pointer without an address space: {match.group()}")
    return found
