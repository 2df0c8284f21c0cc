r"""The study's tables and plots, from its rows.

    python study_report.py --runs runs/study --results ../results > tables.md

Lengths are mean acceptance lengths: tokens a pass of the target, its own included. What stands
against the base, a group's first variant, is the ratio of lengths at temperature 0 over both
families, seeds paired, with a 95% interval of a bootstrap over seeds and prompts. The bound is
tau / (C + draft) for captions at temperature 0, C and draft in plain passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


from study import key_of, read_rows
from study_measure import MAX_TOKENS
from study_numbers import COLUMNS, SEEDS, Row, against, bound, least_ms, length, shown, spread
from study_peers_report import long_runs, peer_rows, peer_table
from study_plots import plot_peers, plot_ratios
from study_variants import DRAFTER, GROUPS, TRAIN, Variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--clip-runs", type=Path, help="the study on answers about clips")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    groups, rows, costs = of_runs(args.runs)
    about: dict[str, Any] = {
        "steps": TRAIN,
        "drafter": DRAFTER,
        "seeds": SEEDS,
        "max_tokens": MAX_TOKENS,
        "verify_ms": costs,
    }
    if args.clip_runs:
        of_clips, _, about["clip_verify_ms"] = of_runs(args.clip_runs)
        groups |= {f"clips: {group}": found for group, found in of_clips.items()}
    print(tables(groups))
    write(args.results / "ablations.json", {"conditions": about, "groups": groups})
    plot_ratios(groups, args.results / "ablations.png")
    peers = peer_rows(read_rows(args.runs / "peers.jsonl") + long_runs(rows), costs)
    if peers:
        print(peer_table(peers))
        write(args.results / "peers.json", {"conditions": about, "drafters": peers})
        plot_peers(peers, args.results / "peers.png")
    if (args.runs / "sight.json").exists():
        sight = json.loads((args.runs / "sight.json").read_text())
        print(sight_tables(sight))
        write(args.results / "sight.json", sight)


def of_runs(folder: Path) -> tuple[dict[str, list[Row]], dict[str, Row], dict[int, float]]:
    """The summaries of each group, the runs by key, and what verifying costs."""
    costs = {int(k): v for k, v in json.loads((folder / "verify_ms.json").read_text()).items()}
    rows = {row["key"]: row for row in read_rows(folder / "rows.jsonl")}
    groups = {
        group: [each for name in variants if (each := summary(name, variants, rows, costs))]
        for group, variants in GROUPS.items()
    }
    return {group: found for group, found in groups.items() if len(found) > 1}, rows, costs


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def summary(
    name: str, group: Mapping[str, Variant], rows: Mapping[str, Row], costs: Mapping[int, float]
) -> dict[str, Any]:
    """What is known of a variant of a group; empty if nothing is."""
    variant, first = group[name], next(iter(group.values()))
    runs = {seed: rows[key_of(variant, seed)] for seed in SEEDS if key_of(variant, seed) in rows}
    if not runs:
        return {}
    num_rows = {**DRAFTER, **variant.drafter}["block_size"] + 1
    drafter = json.loads(json.dumps(variant.drafter))
    alike = [row for key, row in rows.items() if json.loads(key)["drafter"] == drafter]
    draft_ms = least_ms([row["results"] for row in alike])
    found: dict[str, Any] = {
        "variant": name,
        "is_base": variant == first,
        "seeds": len(runs),
        "lengths": {c: spread([length(row, [c]) for row in runs.values()]) for c in COLUMNS},
        "draft_ms": round(draft_ms, 2),
        "bound": spread([bound(row, num_rows, draft_ms, costs) for row in runs.values()]),
        "train_seconds": round(statistics.median(row["train_seconds"] for row in runs.values()), 1),
    }
    base = {seed: rows[key_of(first, seed)] for seed in runs if key_of(first, seed) in rows}
    if variant != first and base.keys() == runs.keys():
        found["against_base"] = against(list(runs.values()), list(base.values()))
    return found


def tables(groups: Mapping[str, Sequence[Row]]) -> str:
    """All groups as one Markdown table each."""
    lines: list[str] = []
    for group, found in groups.items():
        lines += [f"\n### {group.capitalize()}\n"]
        lines += ["| | seeds | captions T=0 | questions T=0 | captions T=1 | questions T=1 "]
        lines[-1] += "| against base, T=0 | draft ms | bound | training s |"
        lines += ["| --- " * 10 + "|"]
        for each in found:
            n, ratio = each["seeds"], each.get("against_base")
            cells = [each["variant"], str(n)]
            cells += [shown(each["lengths"][column], n) for column in COLUMNS]
            cells.append(
                f"{100 * ratio['ratio'] - 100:+.0f}% ({100 * ratio['low'] - 100:+.0f} to "
                f"{100 * ratio['high'] - 100:+.0f})"
                if ratio
                else "-"
            )
            cells += [f"{each['draft_ms']:.1f}", shown(each["bound"], n)]
            cells.append(f"{each['train_seconds']:.0f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sight_tables(sight: Mapping[str, Any]) -> str:
    """What latents of another picture do, and what can be read off latents."""
    lines = [
        "\n### Latents of another picture\n",
        "| | prompts | right picture | another | change |",
    ]
    lines.append("| --- " * 5 + "|")
    for name, found in sight["another picture"].items():
        low, high = (100 * found[f"ratio_{end}"] - 100 for end in ("low", "high"))
        change = 100 * found["another"] / found["right"] - 100
        cells = [name, str(found["prompts"]), f"{found['right']:.2f}", f"{found['another']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{change:.0f}% ({low:.0f} to {high:.0f})"]) + " |")
    probes = {name: found for name, found in sight["probes"].items() if isinstance(found, dict)}
    sources = list(next(iter(probes.values())))
    lines += ["\n### What a linear probe reads\n", "| | " + " | ".join(sources) + " |"]
    lines.append("| --- " * (len(sources) + 1) + "|")
    lines += [
        f"| {name} | " + " | ".join(f"{found[source]:.3f}" for source in sources) + " |"
        for name, found in probes.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
