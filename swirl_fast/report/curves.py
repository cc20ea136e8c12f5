"""The curves of training and the table of their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swirl_fast.metrics import METRICS_FILE, declared
from swirl_fast.outputs.text import is_number
from swirl_fast.report.charts import Series, lines, smoothing, stacked
from swirl_fast.report.markup import escape

MAX_POINTS = 400  # of a curve; longer trainings are averaged over consecutive steps
MAX_ROWS = 200  # of the table of steps
MAX_PHASES = 7  # besides `other`: as many as there are colours

Row = Mapping[str, Any]

HOW = (
    "Point at a chart, or move along it with the arrow keys, to read the values of a step; otherwise those of the last "
    "step are shown. <i>Effective</i> tokens are what separate rows without shared prefixes would have computed."
)


def curves(metrics: Sequence[Row], kl_measured: bool = True) -> str:
    """Charts of the rows of metrics.jsonl, and the rows as a table. Any key may be missing from any row.

    kl_measured: false when no reference model was loaded; the rows then say 0.
    """
    if not metrics:
        return "<p>No training step is finished yet.</p>\n"
    rows, width = _averaged(metrics)
    steps = [int(row["step"]) for row in rows]

    def series(**keys: str) -> list[Series]:
        return [Series(name.replace("_", " "), [_value(row, key) for row in rows]) for name, key in keys.items()]

    charts: dict[str, str] = {}

    def chart(title: str, unit_of: str, shown: list[Series], **more: Any) -> None:
        charts[title] = lines(title, steps, shown, _unit(unit_of), **more)

    chart("Reward and process label", "reward", series(reward="reward", process_label="process_label"), top=1.0)
    faults = series(malformed="malformed", cut_off="cut_off", repeated_call="repeated")
    chart("Malformed, cut off and repeated actions", "malformed", faults)
    length = series(GOOD="action_length_good", BAD="action_length_bad")
    chart("Action length by verdict", "action_length_good", length)
    chart("Text outside the tag", "outside_tag", series(share_of_characters="outside_tag"))
    if kl_measured:
        chart("KL to the reference model", "kl", series(KL="kl"))
    chart("Entropy", "entropy", series(entropy="entropy"))
    chart("Gradient norm", "grad_norm", series(before_clipping="grad_norm"))
    chart(
        "Engine–trainer log-prob gap",
        "engine_gap_mean",
        series(mean="engine_gap_mean", largest="engine_gap_max"),
        log=True,
    )
    speed = series(computed="tokens_computed_per_second", effective="tokens_effective_per_second")
    chart("Throughput", "tokens_computed_per_second", speed)
    cached = series(prompt_tokens_from_the_cache="cache_hit_rate")
    chart("Rollout cache hit rate", "cache_hit_rate", cached, top=1.0)
    charts["Time by phase"] = stacked("Time by phase", steps, _phases(rows), f"{_unit('seconds')} a step")
    if any("mfu" in row for row in rows):  # the peak of a CPU, or of an unknown GPU, is not known
        chart("Model FLOPs utilization", "mfu", series(forward_and_backward="mfu", whole_step="mfu_step"))
    notes = [HOW]
    if width > 1:
        notes.append(f"Each point is the mean of {width} steps.")
    if smoothing(len(rows)) > 1:
        notes.append(f"Bold lines are running means over {smoothing(len(rows))} points.")
    if absent := [title for title, html in charts.items() if not html]:
        notes.append(f"Not recorded in this run: {'; '.join(absent)}.")
    return f'<p>{" ".join(notes)}</p>\n<div class="charts">{"".join(charts.values())}</div>\n{_table(metrics)}'


def _unit(metric: str) -> str:
    """As charts take it."""
    found = declared(metric)
    unit = found.unit if found else ""
    return "%" if unit == "share" else unit


def _value(row: Row, key: str) -> float | None:
    value = row.get(key)
    return float(value) if is_number(value) else None


def _averaged(rows: Sequence[Row]) -> tuple[Sequence[Row], int]:
    """At most MAX_POINTS rows, each the mean of `width` consecutive ones under the last one's step; and width."""
    width = -(-len(rows) // MAX_POINTS)
    if width == 1:
        return rows, 1
    averaged = []
    for at in range(0, len(rows), width):
        group = rows[at : at + width]
        values = {key: [row[key] for row in group if is_number(row.get(key))] for row in group for key in row}
        means = {key: sum(own) / len(own) for key, own in values.items() if own}
        averaged.append(means | {"step": group[-1]["step"]})
    return averaged, width


def _phases(rows: Sequence[Row]) -> list[Series]:
    """Phases of at least 1 % of the time, in the order of a step, and the rest of its seconds as `other`. Sampling beside the training
    (training.lag=1) takes none of a step's time but what it waits for."""
    aside = {"seconds_hidden"}
    if any(_value(row, "seconds_hidden") for row in rows):
        aside |= {"seconds_data", "seconds_rollout", "seconds_judge"}
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("seconds_") and key not in aside)
    seconds = {name: [_value(row, name) or 0.0 for row in rows] for name in names}
    whole = [_value(row, "seconds") or 0.0 for row in rows]
    shown = [name for name, own in seconds.items() if sum(own) >= 0.01 * sum(whole)][:MAX_PHASES]
    phases = [Series(name.removeprefix("seconds_").replace("_", " "), seconds[name]) for name in shown]
    rest = [max(whole[i] - sum(seconds[name][i] for name in shown), 0.0) for i in range(len(rows))]
    return [*phases, Series("other", rest)]


def _table(rows: Sequence[Row]) -> str:
    every = -(-len(rows) // MAX_ROWS)
    shown = [row for i, row in enumerate(rows) if (len(rows) - 1 - i) % every == 0]  # the last one is always there
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "policy_version"))  # equal to the step
    head = "".join(f'<th scope="col"{_meaning(key)}>{escape(key.replace("_", " "))}</th>' for key in keys)
    body = "".join(f"<tr>{''.join(f'<td>{_plain(row.get(key))}</td>' for key in keys)}</tr>\n" for row in shown)
    which = "every step" if every == 1 else f"one in {every} steps"
    return (
        f'<details class="file numbers"><summary>The numbers of {which} as a table</summary>'
        f'<div class="wide" tabindex="0" role="region" aria-label="Metrics of {which}"><table>'
        f"<caption>Metrics of {which}, as in <code>{METRICS_FILE}</code>, to 5 digits</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>\n"
    )


def _meaning(key: str) -> str:
    """An attribute that browsers show as a tooltip."""
    metric = declared(key)
    if metric is None:
        return ""
    return f' title="{escape(f"{metric.meaning} [{metric.unit}]" if metric.unit else metric.meaning)}"'


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and not is_number(value)):
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else escape(str(value))
