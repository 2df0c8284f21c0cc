"""A report as text for a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flash_mlx.bench.answers import MLX_VLM, PLAIN

Row = Mapping[str, Any]

COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("drafter", lambda row: str(row["drafter"])),
    ("T", lambda row: f"{row['temperature']:g}"),
    ("threads", lambda row: str(row["threads"] or "-")),
    ("tok/s", lambda row: f"{row['generation_tps']:.1f}"),
    ("speed-up", lambda row: f"{row['speedup']:.2f}"),
    ("95% interval", lambda row: f"{row['speedup_low']:.2f} - {row['speedup_high']:.2f}"),
    ("of bound", lambda row: f"{row['of_bound']:.0%}" if row.get("drafted") else "-"),
    ("end-to-end", lambda row: f"{row['end_to_end_speedup']:.2f}"),
    ("p50 s", lambda row: f"{row['latency_p50']:.3f}"),
    ("p95 s", lambda row: f"{row['latency_p95']:.3f}"),
    ("tokens/pass", lambda row: f"{row['mean_acceptance_length']:.2f}"),
    ("accepted/pass", lambda row: f"{row['accepted_per_round']:.2f}"),
    ("identical", lambda row: "-" if row["temperature"] else f"{row['identical']:.2f}"),
    ("bits/token", lambda row: f"{row['entropy']:.3f}"),
)
BEFORE = 3  # columns that a failed row has, too


def render(report: Row, *, markdown: bool = False) -> str:
    """Return the report's rows as a table, and below it what they depend on."""
    entropy = {r["temperature"]: r["target_entropy"] for r in report["rows"] if _has_entropy(r)}
    rows = [{**row, "entropy": entropy.get(row["temperature"], 0.0)} for row in report["rows"]]
    cells = [[name for name, _ in COLUMNS]]
    failed = []
    for row in rows:
        if row["error"]:
            start = ", ".join(show(row) for _, show in COLUMNS[:1])
            failed.append(f"{start} at temperature {row['temperature']:g} failed: {row['error']}")
            cells.append([show(row) for _, show in COLUMNS[:BEFORE]] + ["failed"])
        else:
            cells.append([show(row) for _, show in COLUMNS])
    lines = [*failed, *_lines(report)]
    if markdown:
        return "\n".join([*as_markdown(cells), "", *(f"- {line}" for line in lines)])
    return "\n".join([*aligned(cells), *lines])


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the first column to the left and the others to the right."""
    widths = [0] * len(cells[0])
    for row in cells:
        widths[: len(row)] = [max(w, len(cell)) for w, cell in zip(widths, row, strict=False)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in cells
    ]


def as_markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""

    def line(row: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    width = len(cells[0])
    filled = [[*row, *[""] * (width - len(row))] for row in cells]
    return [line(filled[0]), line(["---"] * width), *map(line, filled[1:])]


def _has_entropy(row: Row) -> bool:
    return row.get("target_entropy") is not None


def _lines(report: Row) -> list[str]:
    """Return what stands below the table."""
    good = [row for row in report["rows"] if not row["error"]]
    lines = [*map(_baseline, (row for row in good if row["drafter"] == MLX_VLM))]
    drafting = [row for row in good if row["drafter"] not in (PLAIN, MLX_VLM)]
    lines += filter(None, map(_round, good))
    lines += filter(None, map(_slots, drafting))
    # Above temperature 0 the texts are other draws of the same law.
    differ = (row for row in good if row["first_divergence"] and not row["temperature"])
    lines += [_divergence(row, report) for row in differ]
    for row in drafting:
        lines += [_topic(row, topic, of) for topic, of in row["by_topic"].items()]
    lines += [_projected(row, each) for row in drafting for each in row.get("projected", ())]
    costs = "  ".join(f"{m}: {cost:.2f}" for m, cost in report["verify_cost"].items())
    lines.append(f"Cost of a pass over m rows, relative to one row: {costs}")
    lines += _conditions(report, drafting)
    return lines + [f"Skipped {name}: {why}" for name, why in report["skipped"].items()]


def _baseline(row: Row) -> str:
    low, high = row["speedup_low"], row["speedup_high"]
    return (
        f"mlx_vlm.stream_generate: {row['generation_tps']:.1f} tok/s, {row['speedup']:.2f} "
        f"({low:.2f} - {high:.2f}) of plain decoding's speed here"
    )


def _conditions(report: Row, drafting: Sequence[Row]) -> list[str]:
    asked = report["asked"]
    if asked is None:
        return []
    latents = {row["drafter"]: row["latents"] for row in drafting if row["latents"]}
    counts = "".join(f", {round(each, 1):g} latents for {name}" for name, each in latents.items())
    read = f"; on average{counts[1:]}" if counts else ""
    memory = max(row["peak_memory_gb"] for row in report["rows"] if not row["error"])
    machine = report["machine"]
    versions = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("flash-mlx", "mlx", "mlx-vlm")
    )
    return [
        f"Prompts: {len(asked['prompts'])}, {asked['text_only']} of them without a picture; "
        f"medians: {asked['prompt_tokens']:g} tokens, {asked['visual_tokens']:g} of them visual"
        f"{read}; peak memory {memory:.3f} GB",
        f"Machine: {machine['processor']}, {machine['system']}, {machine['backend']}, "
        f"{machine['blas']['name']}, {versions}, revision {report['revision'] or 'not known'}",
    ]


def _label(row: Row) -> str:
    return f"{row['drafter']} at temperature {row['temperature']:g}"


def _round(row: Row) -> str:
    """What a row's rounds spend their time on; nothing if that was not clocked."""
    times = [row.get(f"{phase}_seconds") for phase in ("draft", "verify", "host")]
    if None in times:
        return ""
    draft, verify, host = (1e3 * float(each) for each in times if each is not None)
    total = draft + verify + host
    return (
        f"{_label(row)}: round of {total:.2f} ms: drafter {draft:.2f}, target {verify:.2f}, "
        f"neither {host:.2f} ({host / total:.1%})"
    )


def _slots(row: Row) -> str:
    if not row["drafted"]:
        return f"{_label(row)}: nothing was drafted in {row['rounds']} passes"
    slots = " ".join(f"{100 * share:.0f}%" for share in row["acceptance_by_position"])
    wide = row["unmeasured_rounds"]
    guessed = f", {wide} of {row['rounds']} passes wider than were timed" if wide else ""
    return (
        f"{_label(row)}: {row['acceptance_rate']:.1%} of {row['drafted']} drafts accepted; by "
        f"slot: {slots}; bound {row['bound']:.2f}{guessed}"
    )


def _divergence(row: Row, report: Row) -> str:
    found = row["first_divergence"]
    name = report["asked"]["prompts"][found["prompt"]]["name"]
    gap = found["logit_gap"]
    how = "the texts end differently" if gap is None else f"logits {gap:.2g} apart"
    return f"{_label(row)}: first other token in {name}, place {found['position']}: {how}"


def _topic(row: Row, topic: str, of: Row) -> str:
    speed = "-" if of["speedup"] is None else f"{of['speedup']:.2f}"
    return (
        f"{_label(row)}, {topic or 'no topic'} ({of['samples']}): speed-up {speed}, "
        f"{of['mean_acceptance_length']:.2f} tokens/pass, {of['accepted_per_round']:.2f} accepted"
    )


def _projected(row: Row, each: Row) -> str:
    paced = ""
    if "projected_paced" in each:
        paced = f", {each['projected_paced']:.2f} paced (worst {each['projected_worst']:.2f})"
    beyond = ""
    if each["rows"] > each["measured_rows"]:
        beyond = (
            f"; up to {each['rows']} rows a pass, but measured for {each['measured_rows']}, beyond "
            "which costs are taken to go on as they ended"
        )
    return (
        f"{_label(row)}, projected at the 4-bit costs of {each['curve']}: "
        f"{each['projected_speedup']:.2f} with {each['drafts']} drafts a round, "
        f"{each['projected_as_recorded']:.2f} with those of here{paced}; drafting taken to cost "
        f"{each['draft_cost']:.2f} of a plain token, as here; {each['source']}{beyond}"
    )
