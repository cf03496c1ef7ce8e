"""Tables 1 and 2 of judged scenes, as numbers and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from benchmarks.quality.evaluation import OFFICIAL, SCORES, Judgement, Place
from benchmarks.quality.metric import Metric
from benchmarks.quality.selection import (
    FILTER_RATES,
    filter_table,
    gain_interval,
    pooled_spearman,
    spearman,
)


@dataclass(frozen=True)
class Entry:
    """One scene, the same seeds without and with its adapter.

    Attributes:
        base: Qualities of the base alone, by metric. [N] each
        adapted: Qualities and scores with the adapter.
    """

    place: Place
    base: dict[str, Tensor]
    adapted: Judgement


def table_one(entries: Sequence[Entry], metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    """Means over seeds, then scenes, of the base alone and of the adapted one."""
    sides = {
        "base": [entry.base for entry in entries],
        "adapted": [entry.adapted.qualities for entry in entries],
    }
    return {
        side: {m.name: fmean(float(row[m.name].mean()) for row in rows) for m in metrics}
        for side, rows in sides.items()
    }


def table_two(entries: Sequence[Entry], metrics: Sequence[Metric]) -> dict[str, Any]:
    """By score, the means that each filter rate keeps, and what keeping the top quarter gains."""
    found: dict[str, Any] = {}
    for score in SCORES:
        keys = [entry.adapted.scores[score] for entry in entries]
        kept, gains = {}, {}
        for metric in metrics:
            quality = [entry.adapted.qualities[metric.name] for entry in entries]
            kept[metric.name] = filter_table(keys, quality)
            gains[metric.name] = asdict(gain_interval(keys, quality))
        found[score] = {"rates": list(FILTER_RATES), "kept": kept, "top25_gain": gains}
    return found


def correlations(entries: Sequence[Entry], metrics: Sequence[Metric]) -> dict[str, Any]:
    """By score and metric, Spearman's coefficient of each scene, their mean and the pooled one.

    A metric that is better when lower is turned around, so that 1 is always best.
    """
    found: dict[str, Any] = {}
    for score in SCORES:
        found[score] = {}
        for metric in metrics:
            sign = 1 if metric.higher_is_better else -1
            scores = [entry.adapted.scores[score] for entry in entries]
            quality = [sign * entry.adapted.qualities[metric.name] for entry in entries]
            each = [spearman(*pair) for pair in zip(scores, quality, strict=True)]
            found[score][metric.name] = {
                "scenes": {e.place.scene.name: rho for e, rho in zip(entries, each, strict=True)},
                "mean": fmean(each),
                "pooled": pooled_spearman(scores, quality),
            }
    return found


def scene_report(entry: Entry) -> dict[str, Any]:
    """All numbers of one scene, as JSON."""
    return {
        "scene": entry.place.scene.name,
        "origin": entry.place.origin,
        "references": len(entry.place.scene.references),
        "configuration_digest": entry.place.config.digest,
        "base": {"qualities": _lists(entry.base)},
        "adapted": {
            "qualities": _lists(entry.adapted.qualities),
            "scores": _lists(entry.adapted.scores),
            "order": list(entry.adapted.order),
        },
    }


def _lists(rows: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: row.tolist() for name, row in rows.items()}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(report: dict[str, Any], metrics: Sequence[Metric]) -> str:
    """The report's tables for a reader."""
    names = [metric.name for metric in metrics]
    parts = [f"{report['scenes']} scenes x {report['seeds']} seeds; in-hole metrics.\n"]
    one = [
        [side, *(f"{means[m.name]:.{m.digits}f}" for m in metrics)]
        for side, means in report["table_1"].items()
    ]
    parts += ["## Table 1\n", markdown_table(["", *names], one)]
    two = [
        [f"{score}, {rate:.0%} filtered", *(_cell(by, m, k) for m in metrics)]
        for score, by in report["table_2"].items()
        for k, rate in enumerate(by["rates"])
    ]
    parts += ["## Table 2\n", markdown_table(["ranked by", *names], two)]
    gains = [
        [score, *(_interval(by["top25_gain"][m.name], m) for m in metrics)]
        for score, by in report["table_2"].items()
    ]
    head = ["ranked by", *(f"{name} gain (95 %)" for name in names)]
    parts += ["## Gain of the top 25 % over all\n", markdown_table(head, gains)]
    return "\n".join([*parts, *_correlation_parts(report["spearman"], names)])


def _correlation_parts(found: dict[str, Any], names: Sequence[str]) -> list[str]:
    rho = [
        [score, *(f"{by[name]['mean']:+.2f} / {by[name]['pooled']:+.2f}" for name in names)]
        for score, by in found.items()
    ]
    head = ["score", *(f"{name}, mean / pooled" for name in names)]
    official = found[OFFICIAL]
    each = [
        [scene, *(f"{official[name]['scenes'][scene]:+.2f}" for name in names)]
        for scene in official[names[0]]["scenes"]
    ]
    return [
        "## Spearman's coefficient with the score\n",
        markdown_table(head, rho),
        f"## By scene, {OFFICIAL}\n",
        markdown_table(["scene", *names], each),
    ]


def _cell(by: dict[str, Any], metric: Metric, place: int) -> str:
    return f"{by['kept'][metric.name][place]:.{metric.digits}f}"


def _interval(gain: dict[str, float], metric: Metric) -> str:
    digits = metric.digits + 1
    return f"{gain['mean']:+.{digits}f} ({gain['low']:+.{digits}f} to {gain['high']:+.{digits}f})"
