"""Which form of an operation computes: MLX's own operations, or the Metal kernel.

A kernel may be faster, and may be slower or wrong: on a chip, a macOS or an MLX that nobody tried.
Others have kernels for the same operation, some of them for some chips only: its rivals. So a form
is used only where it

1. runs at all: the default device is Metal's;
2. takes the arguments' shapes and types;
3. passed a test on this machine: against the definition in float32, twice with the same bits;
4. beat MLX's own operations there, and its rivals, in a short timing.

3 and 4 are asked once for a kernel, its text, the shapes, the types, the device and the version of
MLX, with random numbers of these shapes, and remembered on disk. What fails, fails there, never
while text is generated. `FLASH_MLX_KERNELS=off` asks nothing and uses no kernel, `force` skips 3
and 4 and uses this project's kernel.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from flash_mlx.kernels import metal
from flash_mlx.kernels.decisions import Decision, Decisions
from flash_mlx.kernels.trial import try_out

VARIABLE = "FLASH_MLX_KERNELS"
MODES = ("on", "off", "force")
EXACT = 64  # sizes up to this one are told apart

Arrays = Sequence[mx.array]


@dataclass(frozen=True)
class Rival:
    """Somebody else's kernel for an operation, which takes the same arguments.

    Attributes:
        name: Whose it is.
        version: Of what it comes with.
        launch: The kernel.
        here: Whether this machine has what it is made for.
        fits: Whether it takes some arguments.
    """

    name: str
    version: str
    launch: Callable[..., Arrays]
    here: Callable[[], bool]
    fits: Callable[..., bool]


@dataclass(frozen=True)
class Kernel:
    """An operation in several forms, which take the same arguments.

    Attributes:
        name: Of the operation.
        ops: Its definition in MLX's operations, and what computes it otherwise.
        launch: The Metal kernel.
        fits: Returns why the kernel does not take some arguments, None if it does.
        sources: The texts behind `launch`.
        rivals: Other forms, which compete with `launch`.
    """

    name: str
    ops: Callable[..., Arrays]
    launch: Callable[..., Arrays]
    fits: Callable[..., str | None]
    sources: tuple[metal.Source, ...]
    rivals: tuple[Rival, ...] = ()


def run(kernel: Kernel, *arguments: Any) -> Arrays:
    """Compute an operation in the form that `choose` names; lazy, but for a first use."""
    decision = choose(kernel, *arguments)
    if not decision.use:
        return kernel.ops(*arguments)
    if decision.form == kernel.name:
        return kernel.launch(*arguments)
    return forms(kernel, arguments)[decision.form](*arguments)


def forms(kernel: Kernel, arguments: Sequence[Any]) -> dict[str, Callable[..., Arrays]]:
    """Return the forms besides MLX's operations that take these arguments here, by name.

    The project's own kernel has the operation's name.
    """
    own = {kernel.name: kernel.launch} if kernel.fits(*arguments) is None else {}
    others = {each.name: each.launch for each in rivals_here(kernel) if each.fits(*arguments)}
    return own | others


def rivals_here(kernel: Kernel) -> list[Rival]:
    """Return the rivals that this machine has what they are made for."""
    return [each for each in kernel.rivals if each.here()]


def choose(kernel: Kernel, *arguments: Any) -> Decision:
    """Return whether the kernel is used for these arguments, and why."""
    setting = mode()
    if setting == "off":
        return OFF
    if not metal.available():
        return NO_METAL
    candidates = forms(kernel, arguments)
    if not candidates or (setting == "force" and kernel.name not in candidates):
        return Decision(False, f"it takes {kernel.fits(*arguments)}")
    if setting == "force":
        return replace(FORCED, form=kernel.name)
    decisions = decided()
    key = key_of(kernel, arguments)
    found = decisions.get(key)
    if found is None or (found.use and found.form not in candidates):
        found = try_out(kernel.ops, candidates, arguments)
        decisions.put(key, found)
    return found


def state(kernel: Kernel) -> str:
    """Say whether a kernel is used on this machine, and why, as far as it has been asked."""
    if mode() == "off":
        return OFF.reason
    if not metal.available():
        return NO_METAL.reason
    if mode() == "force":
        return f"used wherever it fits: {FORCED.reason}"
    start = _stamp(kernel)
    others_here = [each.name for each in rivals_here(kernel)]
    against = f"; competes with {' and '.join(others_here)}" if others_here else ""
    known = [d for key, d in decided().named(kernel.name).items() if key.startswith(start)]
    if not known:
        return f"not asked yet{against}"
    used = Counter(decision.form for decision in known if decision.use)
    others = {decision.reason for decision in known if not decision.use}
    text = f"used for {used.pop(kernel.name, 0)} of {len(known)} shapes"
    text += "".join(f", {name} for {count}" for name, count in sorted(used.items()))
    text += f"; else: {'; '.join(sorted(others))}" if others else ""
    return text + against


def mode() -> str:
    """Return what `FLASH_MLX_KERNELS` says; anything unknown is `on`."""
    setting = os.environ.get(VARIABLE, "on").strip().lower()
    return setting if setting in MODES else "on"


@cache
def decided() -> Decisions:
    """Return what was decided on this machine."""
    return Decisions.load()


def key_of(kernel: Kernel, arguments: Sequence[Any]) -> tuple[str, ...]:
    """Return what a decision depends on."""
    return (kernel.name, _stamp(kernel), *(_describe(x) for x in arguments))


@cache
def _stamp(kernel: Kernel) -> str:
    """Return what decisions about a kernel depend on, whatever the arguments."""
    own = f"{metal.fingerprint(kernel.sources)} {metal.device_name()} mlx {version('mlx')}"
    return " ".join([own, *(f"{each.name} {each.version}" for each in kernel.rivals)])


def _describe(argument: object) -> str:
    """Return shape and type, or the value of what is no array.

    What may grow with the text - any axis but the last, and numbers - is rounded up to a power of
    two, so that a longer text does not ask again.
    """
    if isinstance(argument, mx.array):
        kind = str(argument.dtype).removeprefix("mlx.core.")
        return f"{kind}{[*map(_round, argument.shape[:-1]), *argument.shape[-1:]]}"
    return repr(_round(argument) if isinstance(argument, int) else argument)


def _round(size: int) -> int:
    return size if size <= EXACT else 1 << (size - 1).bit_length()


OFF = Decision(False, f"{VARIABLE}=off")
NO_METAL = Decision(False, "the default device is not Metal's")
FORCED = Decision(True, f"{VARIABLE}=force")
