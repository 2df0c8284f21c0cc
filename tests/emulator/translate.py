"""Metal's `threadgroup` variables as C++.

All other words of the language are handled by headers and macros. But `threadgroup float sums[32];`
declares memory that the threads of a threadgroup share, and no macro can tell that from a pointer
to such memory, `threadgroup float* sums`.
"""

from __future__ import annotations

import re

EXPLICIT_INSTANTIATION = re.compile(r"^template \[\[host_name\(.*$", re.MULTILINE)
COMMENT = re.compile(r"//[^\n]*")
# `threadgroup`, a type, names with or without array sizes; neither `*`, `&` nor `=`.
DECLARATION = re.compile(
    r"(?<=[;{}\s])threadgroup\s+((?:const\s+)?[\w:]+(?:\s*<[^;{}()]*?>)?)\s+"
    r"(\w+\s*(?:\[[^;{}]*?\]\s*)*(?:,\s*\w+\s*(?:\[[^;{}]*?\]\s*)*)*);"
)
DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)(?:,|$)")


def to_cpp(metal: str) -> str:
    """Return Metal source as C++, line by line: line numbers stay."""
    text = EXPLICIT_INSTANTIATION.sub("", metal)
    text = COMMENT.sub(lambda comment: " " * len(comment.group()), text)
    return DECLARATION.sub(_declare, text)


def _declare(match: re.Match[str]) -> str:
    """Replace one declaration by references to the threadgroup's memory.

    The address of a static variable tells one `threadgroup` variable from another, in each
    instance of a template.
    """
    kind, names = match.groups()
    code = ""
    for name, sizes in DECLARATOR.findall(names):
        key = f"key_of_{name}"
        code += f"static char {key}; auto& {name} = "
        code += f"emu::threadgroup_variable<{kind} {' '.join(sizes.split())}>(&{key}); "
    return code + "\n" * match.group().count("\n")
