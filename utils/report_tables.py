"""Tables of a report: aggregates over seeds, the best and whether it is significant, as Markdown, LaTeX and CSV."""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from utils.markdown import markdown_table
from utils.report_rows import AUROCS, METRICS, ZERO_SHOT, Row, own_predictions
from utils.report_scores import (
    ALPHA,
    Prediction,
    by_seed_p,
    constant_p,
    pairable,
    pairable_by_seed,
    paired_p,
    same_examples,
    score,
    welch_p,
)

SHOWN_AS_MEAN = ("sgp",)
"""Methods whose prediction with the posterior mean has a row of its own."""
TITLES = {"acc": "ACC", "nll": "NLL (nats)", "ece": "ECE", "brier": "Brier", **{a: a[6:] + " AUROC" for a in AUROCS}}
ROUNDING = 1e-5
"""Difference in a metric that rounding makes between evaluations of one model on the same examples."""
TIE = 1e-12
"""Difference in a mean that its own rounding makes, as of one number of right answers over other seeds."""
CAPTION = (
    "Mean ± standard deviation over seeds (their number in brackets where it varies). Bold: the best mean of those "
    f"with all seeds, if it differs from every other method of the task at level {ALPHA} (two-sided). Two methods with "
    "predictions of the same examples, for all seeds of the one with fewer, are compared by a t-test paired over seeds "
    "and examples; its squared standard error adds that over examples (bootstrapped for the ECE) and that over seeds, "
    "and with one seed it speaks of these adapters only. Where each seed has examples of its own (dset.test_subset), "
    "the same for both, by a t-test paired over seeds. Others by Welch's t-test over seeds, where a single seed is "
    "never significant; the base model, where no seed changes it, by a one-sample t-test. Rows marked (mean) are left "
    "out."
)
TEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "\\": r"\textbackslash{}",
        "|": r"\textbar{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "±": r"$\pm$",
    }
)
"""Signs that LaTeX reads otherwise."""
MARKDOWN = re.compile(r"[\\`*<>&|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=\()")
"""Signs that Markdown reads otherwise: an underscore within a word is none, nor are brackets that are no link."""
SCALED = {
    "nll_scaled": "NLL (nats) after temperature scaling",
    "ece_scaled": "ECE after temperature scaling",
    "temperature": "temperature",
}
SCALED_CAPTION = (
    "Every run's predictive distribution p becomes p^(1/T), normalised; T has the lowest NLL on the run's validation "
    "split (Guo et al., 2017). Mean ± standard deviation over seeds."
)


@dataclass
class Table:
    """A title, a caption, and cells as (text, bold), the first row being the head."""

    title: str
    caption: str
    cells: list[list[tuple[str, bool]]]


Column = dict[str, list[Row]]  # for each method of one task its rows, one per seed


def columns(rows: Iterable[Row], model: str, split: str) -> dict[str, Column]:
    """For each task of a model the own predictions of each method."""
    found: dict[str, Column] = {}
    for row in own_predictions([row for row in rows if row.model == model and row.split == split]):
        found.setdefault(row.column, {}).setdefault(row.label, []).append(row)
    return dict(sorted(found.items()))


def values(rows: Iterable[Row], metric: str) -> list[float]:
    """The values of a metric that are known."""
    return [value for row in rows if (value := getattr(row, metric)) is not None]


def best(column: Column, metric: str) -> str | None:
    """The method with the best mean, of those with all seeds; the first of equal ones, None if nobody has a value."""
    losses = _losses(column, metric)
    return min(losses, key=lambda name: losses[name]) if losses else None


def has_best_mean(column: Column, metric: str, name: str) -> bool:
    """Whether a method has the best mean, alone or as others do."""
    losses = _losses(column, metric)
    return name in losses and losses[name] - min(losses.values()) <= TIE


def _losses(column: Column, metric: str) -> dict[str, float]:
    """Means of the methods with all seeds, the least being the best."""
    sign = -1.0 if metric == "acc" else 1.0
    whole = {name: rows for name, rows in column.items() if has_all_seeds(column, name)}
    return {name: sign * fmean(found) for name, rows in whole.items() if (found := values(rows, metric))}


def has_all_seeds(column: Column, name: str) -> bool:
    """Whether a method was run with as many seeds as any of its column, or is a base model that no seed changes."""
    most = max((len(rows) for other, rows in column.items() if other != ZERO_SHOT), default=0)
    return (name == ZERO_SHOT and is_constant(column)) or len(column[name]) >= most


def is_constant(column: Column) -> bool:
    """Whether the base model's values are those of every seed.

    Not where each seed draws its examples, as with ``dset.test_subset`` and where validation data is set aside: of a
    base model run once the examples of the others tell, and where none are known, whether these are test data.
    """
    rows = column[ZERO_SHOT]
    if len(rows) == 1:
        examples = {row.examples for of_seeds in column.values() for row in of_seeds if row.examples}
        return len(examples) == 1 if examples else rows[0].split == "test"
    known = [found for metric in METRICS if (found := values(rows, metric))]
    return all(max(found) - min(found) <= ROUNDING for found in known)


def mark_significant(column: Column, predictions: Mapping[str, Mapping[int, Prediction]]) -> None:
    """Write to the rows of the best method of a column its largest p value against the others, and the test's name.

    Args:
        column: All methods of one task.
        predictions: For each method and seed the prediction, as far as there are files.
    """
    for rows in column.values():
        for row in rows:
            row.p_acc = row.p_nll = row.p_ece = row.p_brier = None
            row.test_acc = row.test_nll = row.test_ece = row.test_brier = ""
    for metric in METRICS:
        winner = best(column, metric)
        p_values = {}
        for name, rows in column.items():
            if winner is None or name == winner or not values(rows, metric):
                continue
            p, test = _compared(column, winner, name, predictions, metric)
            p_values[p] = test
        if winner is not None and p_values:
            for row in column[winner]:
                setattr(row, f"p_{metric}", max(p_values))
                setattr(row, f"test_{metric}", p_values[max(p_values)])


def _compared(
    column: Column, winner: str, name: str, predictions: Mapping[str, Mapping[int, Prediction]], metric: str
) -> tuple[float, str]:
    """The p value of the best method against another, and the name of the test."""
    found = [p for method in (winner, name) for p in predictions.get(method, {}).values()]
    constant = ZERO_SHOT in (winner, name) and is_constant(column) and same_examples(found)
    one, other = _of_common_seeds(column, winner, name, predictions, constant)
    tests = {"paired": (pairable, paired_p), "by seed": (pairable_by_seed, by_seed_p)}
    for test, (fits, p_of) in tests.items():
        if fits(one, other):
            ahead = _favours(one, other, metric)  # all seeds favour the winner, the common ones need not
            return p_of(one, other, metric) if ahead else 1.0, test
    if constant:
        trained = winner if name == ZERO_SHOT else name
        return constant_p(values(column[trained], metric), values(column[ZERO_SHOT], metric)[0]), "one-sample"
    return welch_p(values(column[winner], metric), values(column[name], metric)), "welch"


def _of_common_seeds(
    column: Column, first: str, second: str, predictions: Mapping[str, Mapping[int, Prediction]], constant: bool
) -> tuple[Mapping[int, Prediction], Mapping[int, Prediction]]:
    """Predictions of two methods for all seeds of the one that was run with fewer; none where they are not all there.

    Where one of the two is a ``constant`` base model, which no seed changes, one prediction of it stands for all.
    """
    one, other = predictions.get(first, {}), predictions.get(second, {})
    needed = [len(column[name]) for name in (first, second) if not (constant and name == ZERO_SHOT)]
    if constant and first == ZERO_SHOT and one:
        one = dict.fromkeys(other, next(iter(one.values())))
    if constant and second == ZERO_SHOT and other:
        other = dict.fromkeys(one, next(iter(other.values())))
    common = sorted(one.keys() & other.keys())
    if len(common) < min(needed, default=1):
        return {}, {}
    return {seed: one[seed] for seed in common}, {seed: other[seed] for seed in common}


def _favours(one: Mapping[int, Prediction], other: Mapping[int, Prediction], metric: str) -> bool:
    """Whether the mean of a metric over these predictions is better for ``one``."""
    means = [fmean(score(prediction, metric) for prediction in own.values()) for own in (one, other)]
    return means[0] > means[1] if metric == "acc" else means[0] < means[1]


def significant(column: Column, metric: str, name: str) -> bool:
    """Whether a method is the best of a column and its difference from every other is significant."""
    p = getattr(column[name][0], f"p_{metric}")
    return name == best(column, metric) and p is not None and p < ALPHA


def tables(rows: Sequence[Row], split: str) -> list[Table]:
    """All tables: per model one for each metric, what was not run, a summary, and one out of distribution."""
    found = []
    for model in sorted({row.model for row in rows}):
        of_model = columns(rows, model, split)
        means = columns([r for r in rows if r.method in SHOWN_AS_MEAN and r.mc == "mean"], model, split)
        names = sorted({name for column in of_model.values() for name in column})
        sizes = {len(found) for column in of_model.values() for found in column.values()}
        for metric in METRICS if of_model else ():
            cells = [[("method", False), *((task, False) for task in of_model)]]
            for name in names:
                cells.append([(name, False), *(_cell(c, name, metric, len(sizes) > 1) for c in of_model.values())])
                alone = {t: _mean_only(of_model[t], column, name) for t, column in means.items()}
                if any(alone.values()):
                    texts = [(spread(values(alone.get(task, []), metric), len(sizes) > 1), False) for task in of_model]
                    cells.append([(f"{name} (mean)", False), *texts])
            found.append(Table(f"{model}: {TITLES[metric]} on {split}", CAPTION, cells))
        missing = [f"{name} on {task}" for name in names for task, c in of_model.items() if name not in c]
        if missing:
            found[-1].caption += f" Not run: {'; '.join(missing)}."
        if of_model:
            found.append(_summary(f"{model}: summary on {split}", of_model, names))
            trained = {task: _that_train(column) for task, column in of_model.items()}
            fewer = [name for name in names if any(name in column for column in trained.values())]
            if 1 < len(fewer) < len(names):
                found.append(_summary(f"{model}: summary on {split}, methods that train", trained, fewer))
            found += _scaled(model, of_model, names, split)
        if any(row.model == model and row.split.startswith("ood:") for row in rows):
            found.append(_shifted(rows, model))
    return found


def spread(found: Sequence[float], count: bool = False) -> str:
    """Mean ± sd with four decimals; empty without values, no sd for one."""
    if not found:
        return ""
    text = f"{fmean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")
    return f"{text} ({len(found)})" if count else text


def markdown(table: Table) -> str:
    """A heading, the table and its caption."""
    head, *lines = [[f"**{_md(t)}**" if b and t else _md(t) for t, b in row] for row in table.cells]
    return f"## {_md(table.title)}\n\n{markdown_table(head, lines)}\n{_md(table.caption)}\n"


def latex(table: Table) -> str:
    """A booktabs table."""
    lines = [
        " & ".join(f"\\textbf{{{_tex(t)}}}" if b and t else _tex(t) for t, b in row) + r" \\" for row in table.cells
    ]
    body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
    columns_ = "l" + "c" * (len(table.cells[0]) - 1)
    caption = f"\\caption{{{_tex(table.title)}. {_tex(table.caption)}}}"
    tabular = f"\\begin{{tabular}}{{{columns_}}}\n{body}\n\\end{{tabular}}"
    return f"\\begin{{table}}\n\\centering\n{caption}\n{tabular}\n\\end{{table}}\n"


def aggregates_csv(rows: Sequence[Row], split: str) -> str:
    """Every cell of the metric tables as a line: mean, sd, number of seeds, p value and test of the best."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "task", "method", "metric", "mean", "sd", "seeds", "p", "test", "bold"])
    for model in sorted({row.model for row in rows}):
        for task, column in columns(rows, model, split).items():
            for name, of_seeds in sorted(column.items()):
                for metric in METRICS:
                    if found := values(of_seeds, metric):
                        p, sd = getattr(of_seeds[0], f"p_{metric}"), stdev(found) if len(found) > 1 else ""
                        test, bold = getattr(of_seeds[0], f"test_{metric}"), significant(column, metric, name)
                        head = [model, task, name, metric, fmean(found), sd, len(found)]
                        writer.writerow([*head, "" if p is None else p, test, int(bold)])
    return text.getvalue()


def _cell(column: Column, name: str, metric: str, count: bool) -> tuple[str, bool]:
    if name not in column:
        return "", False
    return spread(values(column[name], metric), count), significant(column, metric, name)


def _mean_only(own: Column, means: Column, name: str) -> list[Row]:
    """Rows of the posterior mean of a method whose own prediction is another."""
    return [row for row in means.get(name, []) if all(row is not other for other in own.get(name, []))]


def _that_train(column: Column) -> Column:
    """Without the base model and what is only fitted to a trained adapter: no step of training."""
    return {name: rows for name, rows in column.items() if any(row.steps for row in rows)}


def _summary(title: str, of_model: Mapping[str, Column], names: Sequence[str]) -> Table:
    head = ["method", "tasks", *(f"{m.upper()} best / within 1 se" for m in METRICS[:3])]
    head += ["NLL reduction against mle", "ECE reduction against mle"]
    cells = [[(text, False) for text in head]]
    for name in names:
        ran = [column for column in of_model.values() if name in column]
        line = [name, str(len(ran))]
        for metric in METRICS[:3]:
            near = sum(_within(column, metric, name) for column in ran)
            line.append(f"{sum(has_best_mean(column, metric, name) for column in ran)} / {near}")
        for metric in ("nll", "ece"):
            pairs = [_by_common_seed(c, name, metric) for c in ran if "mle" in c and name != "mle"]
            cuts = [1 - fmean(b) / fmean(a) for a, b in pairs if a and b and fmean(a) > 0]
            line.append(f"{100 * fmean(cuts):.1f} %" if cuts else "")
        cells.append([(text, False) for text in line])
    caption = (
        "Number of tasks on which a method has the best mean (all that tie do) / lies within one standard error of the "
        "best (that of the best method over its seeds; 0 for one seed); where it has fewer seeds than others it does "
        "neither. Reductions relative to mle with the same seeds, averaged over the tasks of both."
    )
    return Table(title, caption, cells)


def _scaled(model: str, of_model: Mapping[str, Column], names: Sequence[str], split: str) -> list[Table]:
    """What temperature scaling makes of every method, as far as it is known."""
    found = []
    for metric, title in SCALED.items():
        cells = [[("method", False), *((task, False) for task in of_model)]]
        for name in names:
            cells.append(
                [(name, False), *((spread(values(c.get(name, []), metric)), False) for c in of_model.values())]
            )
        if any(text for line in cells[1:] for text, _ in line[1:]):
            found.append(Table(f"{model}: {title} on {split}", SCALED_CAPTION, cells))
    return found


def _within(column: Column, metric: str, name: str) -> bool:
    winner, own = best(column, metric), values(column[name], metric)
    if winner is None or not own or not has_all_seeds(column, name):
        return False
    top = values(column[winner], metric)
    error = stdev(top) / math.sqrt(len(top)) if len(top) > 1 else 0.0
    return abs(fmean(own) - fmean(top)) <= error + TIE


def _by_common_seed(column: Column, name: str, metric: str) -> tuple[list[float], list[float]]:
    """Values of ``mle`` and of another method for the seeds of both; all where no seed changes the base model."""
    base, own = column["mle"], column[name]
    if name != ZERO_SHOT or not is_constant(column):
        seeds = {row.seed for row in base} & {row.seed for row in own}
        base, own = ([row for row in rows if row.seed in seeds] for rows in (base, own))
    return values(base, metric), values(own, metric)


def _shifted(rows: Sequence[Row], model: str) -> Table:
    known = [metric for metric in (*METRICS, *AUROCS) if metric in METRICS or values(rows, metric)]
    cells = [[(text, False) for text in ("trained on", "set", "method", *(TITLES[metric] for metric in known))]]
    for split in sorted({row.split for row in rows if row.model == model and row.split.startswith("ood:")}):
        for task, column in columns(rows, model, split).items():
            for name, of_seeds in sorted(column.items()):
                line = [task, split[4:], name, *(spread(values(of_seeds, metric)) for metric in known)]
                cells.append([(text, False) for text in line])
    return Table(f"{model}: out of distribution", "Mean ± standard deviation over seeds.", cells)


def _md(text: str) -> str:
    return MARKDOWN.sub(r"\\\g<0>", text)


def _tex(text: str) -> str:
    return text.translate(TEX)
