"""The drafter's configuration, as its `config.json` spells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

LARGEST = 2**31


@dataclass(frozen=True)
class FlashConfig:
    """Sizes and switches of a FLASH drafter.

    Attributes:
        hidden_size: D, the target's.
        vocab_size: V, the target's.
        block_size: k, tokens drafted in one pass.
        num_latents: M, rows that each image is compressed to.
        num_heads: Attention heads H; there are as many key as query heads.
        head_dim: Width of a head; `num_heads * head_dim` may differ from `hidden_size`.
        intermediate_size: Width of the MLP; 0 stands for `4 * hidden_size`.
        fusion_bias: Whether the fusion of embedding and hidden has biases.
        attention_bias: Whether the projections of the attention have biases.
        rms_norm_eps: Added to the mean square in each RMSNorm.
        rope_base: Base of the rotary frequencies.
        fuse_pre_image: Whether text before the first image is fused like all other text. False
            only for published weights, which were trained to read the raw hidden there.
        norm_inputs: Whether embedding and hidden pass an RMSNorm each before they are fused: for
            targets whose embeddings are much smaller than their hidden states.
        markov_rank: Rank r of the correction of slot i's logits by the token of slot i - 1; 0 has
            none.
        hydra_size: Width of the MLP that corrects slot i's output by the sum of the embeddings
            of the tokens of slots 0 to i - 1; 0 has none. That of the published weights.
        recurrent_size: Width of the recurrent network that corrects slot i's output by the tokens
            of slots 0 to i - 1; 0 has none. Better than the other two (measured), and instead of
            `hydra_size`.

    Raises:
        ValueError: If a value is out of its range. Numbers and matrices must stay below `LARGEST`
            entries, which MLX can index.
    """

    hidden_size: int
    vocab_size: int
    block_size: int = 4
    num_latents: int = 64
    num_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 0
    fusion_bias: bool = True
    attention_bias: bool = True
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0
    fuse_pre_image: bool = True
    norm_inputs: bool = False
    markov_rank: int = 0
    hydra_size: int = 0
    recurrent_size: int = 0

    def __post_init__(self) -> None:
        """Check types and ranges, and fill in the MLP's width."""
        if self.intermediate_size == 0 and isinstance(self.hidden_size, int):
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("markov_rank", "hydra_size", "recurrent_size") else 1
            match field.type:
                case "int":
                    good = type(value) is int and least <= value < LARGEST
                    rule = f"a whole number below 2**31, at least {least}"
                case "float":
                    good = type(value) in (int, float) and 0 < value < math.inf
                    rule = "a number above 0"
                case _:
                    good, rule = type(value) is bool, "true or false"
            if not good:
                raise ValueError(f"{field.name} of a drafter must be {rule}; got {value!r}.")
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim of a drafter must be even (it is rotated in pairs); got {self.head_dim}."
            )
        if self.hydra_size and self.recurrent_size:
            raise ValueError(
                "A drafter must have hydra_size or recurrent_size, not both; "
                f"got {self.hydra_size} and {self.recurrent_size}."
            )
        self._check_products()

    def _check_products(self) -> None:
        """Require matrices of a size that can be indexed; each factor is in its range already."""
        for names in (
            ("num_heads", "head_dim", "hidden_size"),
            ("intermediate_size", "hidden_size"),
            ("num_latents", "hidden_size"),
            ("block_size", "hidden_size"),
            ("vocab_size", "hidden_size"),
            ("vocab_size", "markov_rank"),
            ("hydra_size", "hidden_size"),
            ("recurrent_size", "hidden_size"),
            ("recurrent_size", "recurrent_size"),
        ):
            values = [getattr(self, name) for name in names]
            if math.prod(values) >= LARGEST:
                raise ValueError(
                    f"{' * '.join(names)} of a drafter must be below 2**31; "
                    f"got {' * '.join(map(str, values))}."
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> FlashConfig:
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

    def to_dict(self) -> dict[str, int | float | bool]:
        """Return all settings, ready for JSON."""
        return asdict(self)
