"""What speculative decoding would bring on a machine, from a model's configuration alone.

A pass over few rows takes the time of reading all weights, and for each row the keys and values of
the context, as mlx's attention does for few rows:

    plain    = weights + context                        [bytes, read once a token]
    pass(m)  = weights * C(m) + context * m             m rows; C(m) is measured, not assumed
    draft    = drafter's weights + rows of the LM head
    tokens   = 1 + a + a^2 + ... + a^k                  k drafts; a: a draft's chance if those
                                                        before it were accepted
    speed-up = tokens * plain / (pass(k + 1) + draft)

Bandwidth turns bytes into seconds and leaves the speed-up as it is. Every figure is projected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx.utils import tree_flatten

from flash_mlx.cost import Costs
from flash_mlx.draft.config import FlashConfig
from flash_mlx.draft.model import FlashModel
from flash_mlx.sizes import text_settings

GROUP = 64  # weights that share a scale and a bias of 16 bits each, if quantised
CONTEXT_BYTES = 2  # of a key's or a value's element
MOST_DRAFTS = 8


@dataclass(frozen=True)
class Shape:
    """The language model of a target, as far as its passes' bytes go.

    Attributes:
        name: As reports name it.
        hidden_size: D.
        intermediate_size: Width of its gated MLP.
        layers: Number of layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocab_size: V.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> Shape:
        """Return the shape of the model that a `config.json` describes.

        Raises:
            ValueError: If it lacks a size.
        """
        text = text_settings(config)
        try:
            heads = int(text["num_attention_heads"])
            size = int(text["hidden_size"])
            return cls(
                name,
                size,
                int(text["intermediate_size"]),
                int(text["num_hidden_layers"]),
                heads,
                int(text.get("num_key_value_heads", heads)),
                int(text.get("head_dim") or size // heads),
                int(text["vocab_size"]),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"The configuration of {name} must give the sizes of its language model; "
                f"{type(error).__name__}: {error}."
            ) from error

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        attention = 2 * self.hidden_size * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_weights(self) -> int:
        """Weights of the LM head, whether or not the embedding shares them."""
        return self.vocab_size * self.hidden_size

    @property
    def weights(self) -> int:
        """Weights that a pass reads: all but the embedding's table."""
        return self.layers * self.layer_weights + self.head_weights

    def context_bytes(self, rows: int) -> int:
        """Return what attention reads of a context of so many rows [bytes]."""
        return 2 * self.layers * self.kv_heads * self.head_dim * CONTEXT_BYTES * rows

    def drafter_weights(self, block_size: int) -> int:
        """Return the weights of a FLASH drafter of the usual sizes, without the LM head."""
        config = FlashConfig(self.hidden_size, self.vocab_size, block_size)
        # Arrays are lazy: their sizes are known without any memory for them.
        parameters: Any = tree_flatten(FlashModel(config).parameters())
        return sum(weight.size for _, weight in parameters)


MODELS = (  # each from the config.json of the repository of that name on the Hugging Face hub
    Shape("llava-hf/llava-1.5-7b-hf", 4096, 11008, 32, 32, 32, 128, 32064),
    Shape("Qwen/Qwen2.5-VL-3B-Instruct", 2048, 11008, 36, 16, 2, 128, 151936),
    Shape("Qwen/Qwen2.5-VL-7B-Instruct", 3584, 18944, 28, 28, 4, 128, 152064),
    Shape("Qwen/Qwen3-VL-4B-Instruct", 2560, 9728, 36, 32, 8, 128, 151936),
    Shape("Qwen/Qwen3-VL-8B-Instruct", 4096, 12288, 36, 32, 8, 128, 151936),
)


def bytes_of(weights: int, bits: int) -> float:
    """Return the bytes of weights, with their scales and biases if quantised."""
    return weights * (bits / 8 + (4 / GROUP if bits < 16 else 0.0))


@dataclass(frozen=True)
class Machine:
    """What passes cost somewhere.

    Attributes:
        name: As reports name it.
        bandwidth: Of its memory [GB/s].
        costs: C(m), of weights read by m rows over those read by one.
        source: Where C(m) comes from.
    """

    name: str
    bandwidth: float
    costs: Costs
    source: str

    @property
    def measured_rows(self) -> int:
        """Most rows that C(m) was measured for; beyond them it goes on as it ended."""
        return self.costs.rounds[-1][0]


def is_extrapolated(row: Mapping[str, Any]) -> bool:
    """Whether a projection uses C(m) beyond the rows that were measured."""
    return int(row["drafts"]) + 1 > int(row["measured_rows"])


def project(
    shape: Shape,
    machine: Machine,
    *,
    bits: int,
    context: int,
    acceptance: float,
    drafts: int,
    draft_vocab: int | None = None,
) -> dict[str, Any]:
    """Return a projected speed-up and all that it is made of.

    Args:
        shape: The target's.
        machine: Where it would run.
        bits: Of a weight: 4, 8, 16 or 32.
        context: Rows in the cache.
        acceptance: a, 0 to 1.
        drafts: k, 1 or more.
        draft_vocab: Tokens that the drafter may propose; None: all.
    """
    proposed = min(draft_vocab or shape.vocab_size, shape.vocab_size)
    head_weights = proposed * shape.hidden_size
    weights, memory = bytes_of(shape.weights, bits), float(shape.context_bytes(context))
    draft = bytes_of(shape.drafter_weights(drafts) + head_weights, bits)
    cost, plain = machine.costs.round(1 + drafts), weights + memory
    tokens = sum(acceptance**i for i in range(drafts + 1))
    speedup = tokens * plain / (weights * cost + memory * (1 + drafts) + draft)
    plain_tps = machine.bandwidth * 1e9 / plain
    return {
        "model": shape.name,
        "bits": bits,
        "machine": machine.name,
        "bandwidth_gb_s": machine.bandwidth,
        "context": context,
        "weights_gb": weights / 1e9,
        "context_gb": memory / 1e9,
        "draft_gb": draft / 1e9,
        "acceptance": acceptance,
        "drafts": drafts,
        "draft_vocab": proposed,
        "pass_cost": cost,
        "measured_rows": machine.measured_rows,
        "tokens_per_pass": tokens,
        "projected_plain_tps": plain_tps,
        "projected_speedup": speedup,
        "projected_tps": speedup * plain_tps,
        "cost_source": machine.source,
        "shape": asdict(shape),
    }


def best(
    shape: Shape,
    machine: Machine,
    *,
    bits: int,
    context: int,
    acceptance: float,
    drafts: int | None = None,
    draft_vocab: int | None = None,
) -> dict[str, Any]:
    """Return the projection with the number of drafts that pays most, or with a given one.

    Args: see `project`.
    """
    counts: Sequence[int] = range(1, MOST_DRAFTS + 1) if drafts is None else (drafts,)
    found = (
        project(
            shape,
            machine,
            bits=bits,
            context=context,
            acceptance=acceptance,
            drafts=k,
            draft_vocab=draft_vocab,
        )
        for k in counts
    )
    return max(found, key=lambda each: float(each["projected_speedup"]))


def arithmetic(row: Mapping[str, Any]) -> str:
    """Return how a projection comes about, in a line."""
    guessed = f"; C({row['drafts'] + 1}) was not measured: beyond {row['measured_rows']} rows it "
    guessed += "is taken to go on as it ended"
    return (
        f"{row['model']} on {row['machine']}, projected: {row['tokens_per_pass']:.2f} tokens x "
        f"({row['weights_gb']:.2f} + {row['context_gb']:.2f}) GB / ({row['weights_gb']:.2f} GB x "
        f"{row['pass_cost']:.2f} + {row['context_gb']:.2f} GB x {1 + row['drafts']} + "
        f"{row['draft_gb']:.2f} GB) = "
        f"{row['projected_speedup']:.2f}; {row['bandwidth_gb_s']:g} GB/s / "
        f"{row['weights_gb'] + row['context_gb']:.2f} GB = {row['projected_plain_tps']:.1f} tok/s"
        f"{guessed if is_extrapolated(row) else ''}"
    )
