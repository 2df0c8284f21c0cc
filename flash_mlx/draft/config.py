"""The drafter's configuration, as its `config.json` spells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flash_mlx.draft.compression import COMPRESSIONS
from flash_mlx.draft.settings import Settings, require_even
from flash_mlx.pace import PRIOR

LEAST_TOKENS = 4  # of those that may be proposed: siblings in a tree are different ones


@dataclass(frozen=True)
class FlashConfig(Settings):
    """Sizes and switches of a FLASH drafter.

    Attributes:
        hidden_size: D, the target's.
        vocab_size: V, the target's.
        block_size: k, tokens drafted in one pass.
        num_latents: M, rows that each image is compressed to; 0: the drafter reads no image.
        compression: How (see `compression`); `queries` are learned, with `none` an image's rows
            are read as they are and `num_latents` says nothing.
        video_groups: Most images that a video counts as: neighbouring frames are compressed
            together, so that a long video costs no more than a short one; 0: each frame is one.
        num_heads: Attention heads H; there are as many key as query heads.
        head_dim: Width of a head; `num_heads * head_dim` may differ from `hidden_size`.
        intermediate_size: Width of the MLP; 0 stands for `4 * hidden_size`.
        fusion: `gated` multiplies SiLU of one linear layer over embedding and hidden with another
            one; `linear` is the latter alone, as in EAGLE.
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
        taps: Whether the drafter reads the inputs of three of the target's layers besides its
            last hidden states (see `FlashModel.taps`).
        draft_vocab_size: U, tokens that it may propose (see `vocabulary`); 0: all V.
        expected_acceptance: Chance that a draft is accepted if those before it are, as training
            measured it; only decides how far ahead a text's first drafts go.

    Raises:
        ValueError: If a value is out of its range.
    """

    MAY_BE_ZERO: ClassVar[frozenset[str]] = frozenset(
        {
            "num_latents",
            "markov_rank",
            "hydra_size",
            "recurrent_size",
            "video_groups",
            "draft_vocab_size",
        }
    )
    MATRICES: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("num_heads", "head_dim", "hidden_size"),
        ("intermediate_size", "hidden_size"),
        ("num_latents", "hidden_size"),
        ("block_size", "hidden_size"),
        ("vocab_size", "hidden_size"),
        ("vocab_size", "markov_rank"),
        ("hydra_size", "hidden_size"),
        ("recurrent_size", "hidden_size"),
        ("recurrent_size", "recurrent_size"),
    )

    WORDS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "compression": COMPRESSIONS,
        "fusion": ("gated", "linear"),
    }

    block_size: int = 4
    num_latents: int = 64
    compression: str = "queries"
    video_groups: int = 8
    num_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 0
    fusion: str = "gated"
    fusion_bias: bool = True
    attention_bias: bool = True
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0
    fuse_pre_image: bool = True
    norm_inputs: bool = False
    markov_rank: int = 0
    hydra_size: int = 0
    recurrent_size: int = 0
    taps: bool = False
    draft_vocab_size: int = 0
    expected_acceptance: float = PRIOR

    @property
    def num_proposed(self) -> int:
        """U, tokens that it may propose."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def learns_queries(self) -> bool:
        """Whether images are pooled by learned queries."""
        return self.compression == "queries" and self.num_latents > 0

    @property
    def reads_whole_images(self) -> bool:
        """Whether an image's rows are read as they are."""
        return self.compression == "none"

    def latents_of(self, num_rows: int) -> int:
        """Return how many rows are read of an image of `num_rows` rows."""
        return num_rows if self.reads_whole_images else self.num_latents

    def __post_init__(self) -> None:
        """Check types and ranges, and fill in the MLP's width."""
        if self.intermediate_size == 0 and isinstance(self.hidden_size, int):
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        super().__post_init__()
        require_even(self.head_dim)
        if self.expected_acceptance > 1:
            raise ValueError(
                "expected_acceptance of a drafter must be a share, at most 1; "
                f"got {self.expected_acceptance}."
            )
        if self.draft_vocab_size and not LEAST_TOKENS <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size of a drafter must be 0 (all tokens) or {LEAST_TOKENS} to its "
                f"vocab_size, {self.vocab_size}; got {self.draft_vocab_size}."
            )
        if self.hydra_size and self.recurrent_size:
            raise ValueError(
                "A drafter must have hydra_size or recurrent_size, not both; "
                f"got {self.hydra_size} and {self.recurrent_size}."
            )
