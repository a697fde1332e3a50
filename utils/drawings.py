"""The project's logo and the drawing of its graphical model: `python -m utils.drawings` makes both anew."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

INK = "#1f2a44"
BLUE = "#2f6fb7"
ORANGE = "#e2762b"
SHADE = "#d9dde6"
IMAGES = Path(__file__).resolve().parents[1] / "images"


def draw_logo() -> Figure:
    """The name beside its sign: the factors B (tall) and A (wide), and the density that makes them Bayesian."""
    figure, axes = _canvas(10.0, 2.6)
    _matrix(axes, x=0.35, y=0.3, width=0.62, height=2.0, color=BLUE)
    _matrix(axes, x=1.22, y=1.68, width=2.0, height=0.62, color=ORANGE)
    grid = np.linspace(-3.0, 3.0, 200)
    density = np.exp(-0.5 * grid**2)
    for scale, alpha in ((1.0, 0.20), (0.62, 0.45)):
        x = 2.22 + 0.333 * scale * grid
        curve = 0.3 + 1.12 * density
        axes.add_patch(Polygon(np.column_stack([x, curve]), closed=True, facecolor=BLUE, alpha=alpha, edgecolor="none"))
    axes.plot(2.22 + 0.333 * grid, 0.3 + 1.12 * density, color=INK, linewidth=2.2, solid_capstyle="round")
    axes.plot([1.22, 3.22], [0.3, 0.3], color=INK, linewidth=2.2, solid_capstyle="round")
    font: dict[str, Any] = {"fontsize": 51, "fontweight": "bold"}
    name = axes.text(3.62, 1.3, "Bayesian", color=INK, va="center", ha="left", **font)
    axes.annotate("-LoRA", (1.0, 0.0), xycoords=name, color=ORANGE, va="bottom", ha="left", **font)
    return figure


def draw_graphical_model() -> Figure:
    """Both factors of an adapter with their inducing matrices, inside the plates of layers and data."""
    figure, axes = _canvas(9.0, 5.1)
    _plate(axes, 0.3, 0.35, 5.6, 4.4, "adapted layers")
    _plate(axes, 6.35, 0.35, 2.35, 4.4, "data  $n = 1 \\ldots N$")
    for y, factor, color in ((3.65, "A", ORANGE), (1.65, "B", BLUE)):
        inducing, weight = (2.55, y), (4.95, y)
        dots = {"Z": (1.0, y + 0.52), "D": (1.0, y - 0.52)}
        for name, dot in dots.items():
            _dot(axes, dot, f"${name}_{factor}$")
            _arrow(axes, dot, inducing, 0.07, 0.42)
            _arrow(axes, dot, weight, 0.07, 0.42, bend=-0.17 if name == "Z" else 0.17)
        noise = (4.95, y - 0.88)
        _dot(axes, noise, f"$\\lambda_{factor}$")
        _arrow(axes, noise, weight, 0.07, 0.42)
        _node(axes, inducing, f"$U_{factor}$", color)
        _node(axes, weight, f"$W_{factor}$", color)
        _arrow(axes, inducing, weight, 0.42, 0.42)
        _arrow(axes, weight, (7.5, 1.65), 0.42, 0.42)
    _node(axes, (7.5, 3.65), "$x_n$", INK, observed=True)
    _node(axes, (7.5, 1.65), "$y_n$", INK, observed=True)
    _arrow(axes, (7.5, 3.65), (7.5, 1.65), 0.42, 0.42)
    return figure


def main() -> None:
    """Write images/logo.png and images/graphical_model.png."""
    IMAGES.mkdir(exist_ok=True)
    for name, figure in (("logo", draw_logo()), ("graphical_model", draw_graphical_model())):
        figure.savefig(IMAGES / f"{name}.png", dpi=160, facecolor="white")
        plt.close(figure)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose data units are inches."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0.0, width), ylim=(0.0, height))
    axes.axis("off")
    return figure, axes


def _matrix(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    """A rounded block of cells whose shades vary as the entries of a sample would."""
    cell = 0.31
    columns, rows = round(width / cell), round(height / cell)
    shades = np.random.default_rng(3).uniform(0.30, 1.0, size=(rows, columns))
    for row in range(rows):
        for column in range(columns):
            corner = (x + column * width / columns + 0.02, y + row * height / rows + 0.02)
            axes.add_patch(
                FancyBboxPatch(
                    corner,
                    width / columns - 0.04,
                    height / rows - 0.04,
                    boxstyle="round,pad=0,rounding_size=0.05",
                    facecolor=color,
                    edgecolor="none",
                    alpha=float(shades[row, column]),
                )
            )


def _plate(axes: Axes, x: float, y: float, width: float, height: float, label: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=INK, linewidth=1.3))
    axes.text(x + 0.14, y + 0.12, label, fontsize=14, color=INK, ha="left", va="bottom")


def _node(axes: Axes, at: tuple[float, float], label: str, color: str, observed: bool = False) -> None:
    fill = SHADE if observed else "white"
    axes.add_patch(Circle(at, 0.42, facecolor=fill, edgecolor=color, linewidth=2.2, zorder=3))
    axes.text(*at, label, fontsize=20, color=INK, ha="center", va="center", zorder=4)


def _dot(axes: Axes, at: tuple[float, float], label: str) -> None:
    """A parameter: a dot with its name to the left."""
    axes.add_patch(Circle(at, 0.07, color=INK, zorder=3))
    axes.text(at[0] - 0.16, at[1], label, fontsize=18, color=INK, ha="right", va="center")


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    start_gap: float,
    end_gap: float,
    bend: float = 0.0,
) -> None:
    """An arrow between two circles of the given radii (inches), bent to one side by `bend`."""
    points_per_inch = 72.0
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=16,
            linewidth=1.5,
            color=INK,
            shrinkA=start_gap * points_per_inch,
            shrinkB=end_gap * points_per_inch,
            zorder=2,
        )
    )


if __name__ == "__main__":
    main()
