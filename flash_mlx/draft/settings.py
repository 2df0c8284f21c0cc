"""What the settings of all drafters have in common: types, ranges, and `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Self

LARGEST = 2**31


@dataclass(frozen=True)
class Settings:
    """Sizes and switches of a drafter; subclasses add theirs.

    Numbers and matrices must stay below `LARGEST` entries, which MLX can index.

    Attributes:
        hidden_size: D, the target's.
        vocab_size: V, the target's.
        MAY_BE_ZERO: Names of the whole numbers that may be 0; all others are 1 or more.
        MATRICES: Names whose product is the number of entries of a matrix.
        WORDS: What each word may be.
    """

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset()
    MATRICES: ClassVar[tuple[tuple[str, ...], ...]] = ()
    WORDS: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    hidden_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            ValueError: If a value is out of its range.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in self.MAY_BE_ZERO else 1
            match field.type:
                case "int":
                    good = type(value) is int and least <= value < LARGEST
                    rule = f"a whole number below 2**31, at least {least}"
                case "str":
                    good = value in self.WORDS[field.name]
                    rule = f"one of {', '.join(self.WORDS[field.name])}"
                case "float":
                    good = type(value) in (int, float) and 0 < value < math.inf
                    rule = "a number above 0"
                case _:
                    good, rule = type(value) is bool, "true or false"
            if not good:
                raise ValueError(f"{field.name} of a drafter must be {rule}; got {value!r}.")
        for names in self.MATRICES:
            values = [getattr(self, name) for name in names]
            if math.prod(values) >= LARGEST:
                raise ValueError(
                    f"{' * '.join(names)} of a drafter must be below 2**31; "
                    f"got {' * '.join(map(str, values))}."
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Return the configuration that `to_dict` wrote.

        Raises:
            ValueError: If a setting is missing, unknown (it may change what the weights mean) or
                out of its range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"A drafter's settings must be among {', '.join(sorted(known))}; "
                f"got {', '.join(unknown)} as well. A newer flash-mlx may know them."
            )
        if missing := sorted({"hidden_size", "vocab_size"} - values.keys()):
            raise ValueError(f"A drafter's settings must hold {' and '.join(missing)}.")
        return cls(**values)  # type: ignore[arg-type]  # checked by __post_init__

    def to_dict(self) -> dict[str, int | float | bool | str]:
        """Return all settings, ready for JSON."""
        return asdict(self)


def require_even(head_dim: int) -> None:
    """Require a width that can be rotated.

    Raises:
        ValueError: If it is odd.
    """
    if head_dim % 2:
        raise ValueError(
            f"head_dim of a drafter must be even (it is rotated in pairs); got {head_dim}."
        )
