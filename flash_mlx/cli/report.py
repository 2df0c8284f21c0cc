"""What an answer took, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_mlx.generate import GenerationResponse, Model
    from flash_mlx.stats import GenerationStats


def statistics(answer: GenerationResponse) -> str:
    """What the answer took, in mlx-vlm's words, and what drafting brought."""
    stats = answer.stats
    lines = [
        "=" * 10,
        f"Prompt: {answer.prompt_tokens} tokens, {answer.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {stats.generation_tokens} tokens, {answer.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {answer.peak_memory:.3f} GB",
    ]
    if stats.drafted:
        lines.append(
            f"Speculative decoding: {stats.mean_acceptance_length:.2f} accepted tokens/round "
            f"({stats.accepted / stats.rounds:.2f} accepted drafts/round, "
            f"{100 * stats.acceptance_rate:.1f}% of drafted, "
            f"avg draft {stats.drafted / stats.rounds:.2f}) over {stats.rounds} rounds"
        )
    acceptance = f"acceptance {100 * stats.acceptance_rate:.1f}%, " if stats.drafted else ""
    lines.append(
        f"Speed: {stats.mean_acceptance_length:.2f} tokens per target pass, {acceptance}"
        f"prefill {stats.prefill_seconds:.3f} s, decode {stats.decode_seconds:.3f} s"
    )
    if stats.drafted:
        lines.append(_rounds(stats))
    if answer.visual_tokens:
        read = f" -> {answer.latents} latents for the drafter" if answer.latents else ""
        lines.append(f"Image: {answer.visual_tokens} visual tokens{read}")
    return "\n".join(lines)


def weights(model: Model) -> str:
    """What the weights take."""
    line = f"Weights: target {model.target_bytes / 1e9:.3f} GB"
    own = model.drafter_bytes
    return f"{line}, drafter {own / 1e9:.3f} GB" if own else line


def _rounds(stats: GenerationStats) -> str:
    """How long rounds were, how often each slot was accepted, and what a round's time went to."""
    lengths = ", ".join(f"{n}: {count}" for n, count in sorted(stats.accept_lengths.items()))
    slots = " ".join(f"{100 * share:.0f}%" for share in stats.acceptance_by_position)
    parked = f"; {stats.parked} parked" if stats.parked else ""
    line = f"Rounds by tokens: {lengths}{parked}; accepted by slot: {slots}"
    phases = stats.phases
    if not phases.rounds:
        return line
    draft, verify, host = (
        1e3 * each / phases.rounds
        for each in (phases.draft_seconds, phases.verify_seconds, phases.host_seconds)
    )
    return (
        f"{line}\nRound: {draft:.2f} ms drafter, {verify:.2f} ms target, {host:.2f} ms neither "
        f"({phases.rounds} of {stats.rounds} clocked)"
    )


def as_json_object(
    model: Model, answer: GenerationResponse, *, interrupted: bool
) -> dict[str, Any]:
    """The answer and its figures, as `generate --json` prints them."""
    stats = answer.stats
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": "interrupted" if interrupted else answer.finish_reason,
        "model": model.name,
        "draft_model": model.draft_name,
        "draft_kind": model.draft_kind,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "latents": answer.latents,
        "generation_tokens": stats.generation_tokens,
        "rounds": stats.rounds,
        "parked_rounds": stats.parked,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        "acceptance_by_position": list(stats.acceptance_by_position),
        "accept_lengths": {str(n): count for n, count in sorted(stats.accept_lengths.items())},
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        **stats.phases.per_round(),
        "generation_tps": answer.generation_tps,
        "peak_memory_gb": answer.peak_memory,
        "target_gb": model.target_bytes / 1e9,
        "drafter_gb": model.drafter_bytes / 1e9,
    }
