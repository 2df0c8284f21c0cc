"""What the drafter learns from: the frozen target, and its pass over a batch.

The target reads each batch when it is needed, and only rows that the drafter uses are gathered;
`features` keeps its states on disk for those who ask for it.

Shapes: those of `data`. D: hidden size.    V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from flash_mlx.decode import Target
from flash_mlx.draft import FlashModel
from flash_mlx.prompt import Prompt
from flash_mlx.train.data import Batch, Example, Inputs, Taught
from flash_mlx.tree import DraftTree, Topology


@dataclass(frozen=True, eq=False)
class Teacher:
    """The frozen target as three functions.

    Attributes:
        hidden: [B, T, D], the LM head's input at every row of a batch; padding may hold
            anything finite. For drafters with taps the inputs of the tapped layers come first;
            layer 0's are the embeddings, those of images included.
            Called outside of the gradient.
        embed: [R] ids -> [R, D].
        lm_head: [R, D] -> [R, V]; gradients pass through it, to the drafter's output.
    """

    hidden: Callable[[Batch], mx.array]
    embed: Callable[[mx.array], mx.array]
    lm_head: Callable[[mx.array], mx.array]

    @classmethod
    def of(
        cls,
        target: Target,
        memory_bytes: int = 0,
        read: Callable[[Example], mx.array] | None = None,
        examples: Sequence[Example] = (),
    ) -> Teacher:
        """Let a target read one example after the other, as it does when it generates.

        Args:
            target: The frozen target.
            memory_bytes: Of its states that stay in memory for the next time [bytes]: those of
                the first examples that fit.
            read: Takes an example to the target's states, [rows, D], where those are known
                already; None: the target reads it.
            examples: Of a run. Answers to the same prompt are read at once, as far as they fit.
        """
        known: dict[Example, mx.array] = {}
        answers: dict[Prompt, list[Example]] = {}
        for one in examples if memory_bytes and read is None else ():
            answers.setdefault(one.prompt, []).append(one)
        used, is_full = 0, not memory_bytes

        def read_one(example: Example) -> mx.array:
            """Return [rows, D]."""
            nonlocal used, is_full
            if example in known:
                return known[example]
            wanted = [example]
            if not is_full:
                wanted = [one for one in answers.get(example.prompt, wanted) if one not in known]
            all_hidden = read_examples(target, wanted) if read is None else [read(example)]
            for one, hidden in zip(wanted, all_hidden, strict=True):
                mx.eval(hidden)  # one sequence's activations at a time
                if used + hidden.nbytes <= memory_bytes:
                    known[one], used = hidden, used + hidden.nbytes
                else:
                    is_full = True
            return all_hidden[wanted.index(example)]

        def read_all(batch: Batch) -> mx.array:
            num_rows = batch.tokens.shape[1]
            rows = [read_one(example) for example in batch.examples]
            rows = [mx.pad(hidden, [(0, num_rows - hidden.shape[0]), (0, 0)]) for hidden in rows]
            stacked = mx.stack(rows)
            mx.eval(stacked)
            return stacked

        return cls(read_all, target.embed, target.lm_head)


def read_examples(target: Target, examples: Sequence[Example]) -> list[mx.array]:
    """Return the target's states at prompt and answer, [rows, D] each, of answers to one prompt."""
    cache = target.make_cache()
    before = target.prefill(examples[0].prompt, cache).hidden
    states = []
    for example in examples:
        states.append(before)
        if example.answer:  # nothing is committed, so the next one begins where this one did
            chain = Topology.chain(len(example.answer) - 1)
            tree = DraftTree(chain, mx.array(example.answer, dtype=mx.int32))
            states[-1] = mx.concatenate([before, target.verify(tree, cache).hidden])
            mx.eval(states[-1])
    return states


def compress(
    model: FlashModel,
    inputs: Inputs,
    hidden: mx.array,
    embed: Callable[[mx.array], mx.array],
) -> mx.array:
    """Return the compressed sequences, [B, S, D].

    Args:
        model: The drafter.
        inputs: The batch.
        hidden: [B, T, D] the target's; with taps [B, T, `model.width`].
        embed: The target's.
    """
    hidden = model.features(hidden)
    num_seqs, _, size = hidden.shape
    text = mx.take_along_axis(hidden, inputs.text_rows[..., None], axis=1)
    embedding = embed(inputs.followers.flatten()).reshape(text.shape).astype(text.dtype)
    fused = model.fuse(embedding, text)
    if not model.config.fuse_pre_image:
        raw = mx.arange(fused.shape[1]) < inputs.num_raw[:, None]
        fused = mx.where(raw[..., None], text, fused)
    if inputs.image_rows.size == 0:
        return mx.take_along_axis(fused, inputs.order[..., None], axis=1)
    rows = inputs.image_rows.reshape(num_seqs, -1, 1)
    images = mx.take_along_axis(hidden, rows, axis=1).reshape(*inputs.image_rows.shape, size)
    latents = model.latents(images, inputs.image_mask).reshape(num_seqs, -1, size)
    pieces = mx.concatenate([fused, latents], axis=1)
    return mx.take_along_axis(pieces, inputs.order[..., None], axis=1)


def slot_outputs(
    model: FlashModel,
    inputs: Inputs,
    hidden: mx.array,
    embed: Callable[[mx.array], mx.array],
) -> mx.array:
    """Return the LM head's inputs, [n, k, D], at all base rows that are not padding.

    Slots are corrected by the answer's own tokens. That is what happens in decoding too wherever
    it matters: after a wrong draft, later slots are dropped.

    Args, shapes: see `compress`.
    """
    sequence = compress(model, inputs, hidden, embed)
    states = hidden[..., -model.config.hidden_size :]
    at_base = mx.take_along_axis(states, inputs.base_rows[..., None], axis=1)
    outputs = model(sequence, inputs.base, at_base)
    outputs = outputs.reshape(-1, *outputs.shape[2:])[inputs.chosen]
    if not model.config.hydra_size and not model.config.recurrent_size:
        return outputs
    later = inputs.said[:, 1:]
    said = embed(later.flatten()).reshape(*later.shape, -1)
    return model.correct(outputs, said.astype(outputs.dtype))


def rolled_out(inputs: Taught, hidden: mx.array, outputs: mx.array) -> mx.array:
    """Return the hidden states as the drafter believes them to be after one more block.

    The row after each base row gets what slot 0 predicted for it; all others stay the target's.
    Drafting again from these rows is drafting a second block before the first was checked, and r
    such passes are r + 1 blocks. As a hidden state of the target's own text gives its next token
    away, it also forces the drafter to look at the rest of the context.

    Args:
        inputs: The batch.
        hidden: [B, T, D] the target's.
        outputs: [n, k, D] of the pass before; taps stay the target's.

    Returns:
        [B, T, D]; gradients flow to `outputs`.

    Source: ViSpec, arXiv 2509.15235, the extra passes of its second stage; EAGLE-3's training-time
    test, arXiv 2503.01840, mixes the two kinds of rows instead.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = inputs.teacher_rows[inputs.teacher[:, 0]]
    size = outputs.shape[-1]
    change = (outputs[:, 0].astype(flat.dtype) - flat[rows, -size:]) * inputs.weight[:, :1]
    change = mx.pad(change.astype(flat.dtype), [(0, 0), (flat.shape[-1] - size, 0)])
    return flat.at[rows].add(change).reshape(hidden.shape)
