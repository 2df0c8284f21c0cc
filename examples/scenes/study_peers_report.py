"""The table of drafters on one budget: rows of `study_peers.py`, and ours from the study."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from study import key_of
from study_numbers import COLUMNS, SEEDS, Row, bound, least_ms, length, shown, spread
from study_plots import GREEDY, best_way
from study_variants import LONG, LONG_BLIND, LONG_EMBEDDINGS, LONG_ROLLOUT, TRAIN

OURS = {
    "ours": LONG,
    "ours, start: embeddings": LONG_EMBEDDINGS,
    "ours, no image": LONG_BLIND,
    "ours, roll-out": LONG_ROLLOUT,
}
WAY = "chain of 6"  # in which the study itself drafts


def long_runs(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Ours after 400 steps, as rows of peers: these are runs of the study itself.

    Args:
        rows: The study's, by key.
    """
    found = []
    for name, variant in OURS.items():
        alike = [
            row["results"]
            for key, row in rows.items()
            if json.loads(key)["drafter"] == variant.drafter
        ]
        for seed in SEEDS:
            if row := rows.get(key_of(variant, seed)):
                found.append(
                    {
                        "key": f"{name}, seed {seed}, 400 steps",
                        "name": name,
                        "recipe": "ours",
                        "optimizer": "Muon 4e-2",
                        "steps": LONG.train["iterations"],
                        "train_seconds": row["train_seconds"],
                        "ways": {WAY: {"rows": 7, "results": row["results"], "alike": alike}},
                    }
                )
    return found


def budget_of(row: Row) -> str:
    """What a drafter of the peers' table was trained for."""
    if "recipe" not in row:
        return "not trained"
    if row["key"].endswith("equal time"):
        return f"time of ours for {400 if '400 steps' in row['key'] else TRAIN['iterations']} steps"
    return f"{row['steps']} steps"


def peer_rows(rows: Sequence[Row], costs: Mapping[int, float]) -> list[dict[str, Any]]:
    """A row a drafter and budget: all seeds, the best way to draft by the mean bound."""
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row["key"].startswith("tuning"):
            together.setdefault((row["name"], budget_of(row)), []).append(row)
    found = []
    for (name, budget), runs in together.items():
        ways = []
        for way, one in runs[0]["ways"].items():
            of_way = [run["ways"][way] for run in runs]
            columns = [c for c in COLUMNS if c in one["results"]]
            same = [r["ways"][way] for r in rows if r["name"] == name and way in r["ways"]]
            alike = [each for w in same for each in [w["results"], *w.get("alike", [])]]
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
    return sorted(found, key=lambda e: (e["steps"], -best_way(e)["bounds"][GREEDY[0]]["mean"]))


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
            cells += [shown(way["lengths"][c], n) if c in way["lengths"] else "-" for c in COLUMNS]
            cells.append(f"{way['draft_ms']:.1f}")
            cells += [shown(way["bounds"][c], n) for c in GREEDY]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
