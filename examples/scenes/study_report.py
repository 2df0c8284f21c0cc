r"""The study's tables and plots, from its rows.

    python study_report.py --runs runs/study --results ../results > tables.md

Lengths are mean acceptance lengths: tokens a pass of the target, its own included. What stands
against the base is the ratio of lengths at temperature 0 over both families, seeds paired, with a
95% interval of a bootstrap over seeds and prompts. The bound is tau / (C + draft) for captions at
temperature 0, C and draft in plain passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from study import key_of, read_rows
from study_measure import MAX_TOKENS
from study_plots import GREEDY, best_way, plot_peers, plot_ratios
from study_variants import BASE, DRAFTER, GROUPS, TRAIN, Variant

Row = Mapping[str, Any]
RESAMPLES = 4000
COLUMNS = (*GREEDY, "caption t=1", "question t=1")
SEEDS = (1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    costs = {int(k): v for k, v in json.loads((args.runs / "verify_ms.json").read_text()).items()}
    about = {
        "steps": TRAIN,
        "drafter": DRAFTER,
        "seeds": SEEDS,
        "max_tokens": MAX_TOKENS,
        "verify_ms": costs,
    }
    rows = {row["key"]: row for row in read_rows(args.runs / "rows.jsonl")}
    groups = {
        group: [summary(name, variant, rows, costs) for name, variant in variants.items()]
        for group, variants in GROUPS.items()
    }
    groups = {group: [each for each in found if each] for group, found in groups.items()}
    groups = {group: found for group, found in groups.items() if len(found) > 1}
    print(tables(groups))
    write(args.results / "ablations.json", {"conditions": about, "groups": groups})
    plot_ratios(groups, args.results / "ablations.png")
    peers = peer_rows(read_rows(args.runs / "peers.jsonl"), costs)
    if peers:
        print(peer_table(peers))
        write(args.results / "peers.json", {"conditions": about, "drafters": peers})
        plot_peers(peers, args.results / "peers.png")
    if (args.runs / "sight.json").exists():
        sight = json.loads((args.runs / "sight.json").read_text())
        print(sight_tables(sight))
        write(args.results / "sight.json", sight)


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def length(row: Row, columns: Sequence[str]) -> float:
    """Mean acceptance length over these results of a run."""
    results = [row["results"][name] for name in columns]
    return sum(sum(r["tokens"]) for r in results) / sum(sum(r["rounds"]) for r in results)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and most over seeds."""
    return {
        "mean": round(statistics.mean(values), 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
    }


def least_ms(results: Sequence[Row], column: str = GREEDY[0]) -> float:
    """Milliseconds of a round's drafts: the least of all runs, as a network costs what it costs.

    Args:
        results: Of runs of the same network, from `HeldOut.measure`.
        column: Says the temperature.
    """
    alike = [c for c in COLUMNS if c.split()[1] == column.split()[1]]
    return min(found[c]["draft_ms"] for found in results for c in alike if c in found)


def bound(
    row: Row, rows: int, draft_ms: float, costs: Mapping[int, float], column: str = GREEDY[0]
) -> float:
    """Return tau / (C + draft), by the cost of a verification of so many rows."""
    pass_ms = float(np.interp(rows, list(costs), list(costs.values())))
    return length(row, [column]) * costs[1] / (pass_ms + draft_ms)


def summary(
    name: str, variant: Variant, rows: Mapping[str, Row], costs: Mapping[int, float]
) -> dict[str, Any]:
    """What is known of a variant; empty if nothing is."""
    runs = {seed: rows[key_of(variant, seed)] for seed in SEEDS if key_of(variant, seed) in rows}
    if not runs:
        return {}
    num_rows = {**DRAFTER, **variant.drafter}["block_size"] + 1
    drafter = json.loads(json.dumps(variant.drafter))
    alike = [row for key, row in rows.items() if json.loads(key)["drafter"] == drafter]
    draft_ms = least_ms([row["results"] for row in alike])
    found: dict[str, Any] = {
        "variant": name,
        "is_base": variant == BASE,
        "seeds": len(runs),
        "lengths": {c: spread([length(row, [c]) for row in runs.values()]) for c in COLUMNS},
        "draft_ms": round(draft_ms, 2),
        "bound": spread([bound(row, num_rows, draft_ms, costs) for row in runs.values()]),
        "train_seconds": round(statistics.median(row["train_seconds"] for row in runs.values()), 1),
    }
    base = {seed: rows[key_of(BASE, seed)] for seed in runs if key_of(BASE, seed) in rows}
    if variant != BASE and base.keys() == runs.keys():
        found["against_base"] = against(list(runs.values()), list(base.values()))
    return found


def against(runs: Sequence[Row], base: Sequence[Row]) -> dict[str, float]:
    """Ratio of lengths at temperature 0, with the interval of a bootstrap.

    Args:
        runs: One a seed.
        base: The base's, with the same seeds and prompts.
    """
    both = np.array([[_counts(row) for row in pair] for pair in zip(runs, base, strict=True)])
    rng = np.random.default_rng(0)
    num_seeds, num_prompts = both.shape[0], both.shape[-1]
    ratios = []
    for _ in range(RESAMPLES):
        seeds, prompts = (
            rng.integers(0, num_seeds, num_seeds),
            rng.integers(0, num_prompts, num_prompts),
        )
        ratios.append(_ratio(both[seeds][..., prompts]))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "ratio": round(_ratio(both), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def _counts(row: Row) -> list[list[int]]:
    """[2, prompts]: tokens and rounds of each prompt at temperature 0."""
    results = [row["results"][name] for name in GREEDY]
    return [[n for r in results for n in r[name]] for name in ("tokens", "rounds")]


def _ratio(both: npt.NDArray[np.int64]) -> float:
    """Ratio of lengths, over the seeds' geometric mean; [seeds, 2, 2, prompts]."""
    sums = both.sum(-1)
    lengths = sums[:, :, 0] / sums[:, :, 1]
    return float(np.exp(np.log(lengths[:, 0] / lengths[:, 1]).mean()))


def _shown(value: Mapping[str, float], seeds: int, digits: int = 2) -> str:
    if seeds == 1:
        return f"{value['mean']:.{digits}f}"
    return f"{value['mean']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


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
            cells += [_shown(each["lengths"][column], n) for column in COLUMNS]
            cells.append(
                f"{100 * ratio['ratio'] - 100:+.0f}% ({100 * ratio['low'] - 100:+.0f} to "
                f"{100 * ratio['high'] - 100:+.0f})"
                if ratio
                else "-"
            )
            cells += [f"{each['draft_ms']:.1f}", _shown(each["bound"], n)]
            cells.append(f"{each['train_seconds']:.0f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peer_rows(rows: Sequence[Row], costs: Mapping[int, float]) -> list[dict[str, Any]]:
    """A row a drafter and budget: all seeds, the best way to draft by the mean bound."""
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["key"].startswith("tuning"):
            continue
        budget = "same time" if row["key"].endswith("equal time") else "same steps"
        budget = budget if "recipe" in row else "not trained"
        together.setdefault((row["name"], budget), []).append(row)
    found = []
    for (name, budget), runs in together.items():
        ways = []
        for way, one in runs[0]["ways"].items():
            of_way = [run["ways"][way] for run in runs]
            columns = [c for c in COLUMNS if c in one["results"]]
            alike = [r["ways"][way]["results"] for r in rows if r["name"] == name]
            ways.append(
                {
                    "way": way,
                    "lengths": {c: spread([length(w, [c]) for w in of_way]) for c in columns},
                    "draft_ms": round(least_ms(alike), 2),
                    "bounds": {
                        c: spread(
                            [bound(w, one["rows"], least_ms(alike, c), costs, c) for w in of_way]
                        )
                        for c in columns
                    },
                }
            )
        first = runs[0]
        found.append(
            {
                "drafter": name,
                "budget": budget,
                "seeds": len(runs),
                "recipe": f"{first['recipe']}, {first['optimizer']}" if "recipe" in first else "",
                "steps": first.get("steps", 0),
                "train_seconds": round(
                    statistics.median(run.get("train_seconds", 0) for run in runs), 1
                ),
                "best_way": max(ways, key=lambda w: w["bounds"][GREEDY[0]]["mean"])["way"],
                "ways": ways,
            }
        )
    return sorted(found, key=lambda each: -best_way(each)["bounds"][GREEDY[0]]["mean"])


def peer_table(peers: Sequence[Row]) -> str:
    lines = [
        "\n### Drafters on one budget\n",
        "| drafter | budget | recipe | steps, s | seeds | way to draft | captions T=0 "
        "| questions T=0 | captions T=1 | questions T=1 | draft ms | bound, captions "
        "| bound, questions |",
        "| --- " * 13 + "|",
    ]
    for each in peers:
        for way in each["ways"]:
            n = each["seeds"]
            mark = "**" if way["way"] == each["best_way"] else ""
            cells = [each["drafter"], each["budget"], each["recipe"]]
            cells += [f"{each['steps']}, {each['train_seconds']:.0f}", str(n)]
            cells.append(f"{mark}{way['way']}{mark}")
            cells += [_shown(way["lengths"][c], n) if c in way["lengths"] else "-" for c in COLUMNS]
            cells.append(f"{way['draft_ms']:.1f}")
            cells += [_shown(way["bounds"][c], n) for c in GREEDY]
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
