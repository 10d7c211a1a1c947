"""The pictures of an evaluation: what is written in them fits, what they say in words is what they show."""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neva_hf.errors import NeVAError
from neva_hf.evaluation import plot_style as style
from neva_hf.evaluation.plots import (
    Measure,
    MethodPoint,
    control_against_damage,
    dose_curves,
    leakage_matrix,
    method_bars,
    value_circle,
)
from neva_hf.values import Value, ValueSystem, load_value_system

matplotlib = pytest.importorskip("matplotlib")

SIZE = struct.Struct(">8x8xII")
STRENGTHS = [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]

# Machado, Oliveira & Fernandes 2009, severity 1.0, on linear RGB.
BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def long_names(count: int) -> ValueSystem:
    values = tuple(
        Value(f"v{place}", f"Readiness to be helped, number {place}", "Long.", angle=360.0 * place / count)
        for place in range(count)
    )
    names = tuple(value.name for value in values)
    groups = {"a_rather_long_name_of_a_group": names[: count // 2 + 1], "the_other": names[count // 2 :]}
    return ValueSystem("long_names", "Long names", "To see what does not fit.", values, groups=groups)


SYSTEMS = {
    "ten": load_value_system("schwartz10"),
    "nineteen": load_value_system("schwartz19"),
    "big five": load_value_system("big_five"),
    "two": long_names(2),
    "long": long_names(7),
}


def shifts(system: ValueSystem, seed: int = 0) -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(seed).normal(0, 0.03, (len(system), len(system)))
    return np.asarray(noise * (1 - np.eye(len(system))) + 0.4 * np.eye(len(system)))


def dose(system: ValueSystem) -> dict[str, Any]:
    table = shifts(system)
    curves = {
        target: {
            "kl": [0.05 * at * at for at in STRENGTHS],
            "leakage": [None, 0.06, 0.05, 0.05, 0.07, 0.11 + place / 100],
            "margins": {seen: [at * shift for at in STRENGTHS] for seen, shift in zip(system.names, row, strict=True)},
        }
        for place, (target, row) in enumerate(zip(system.names, table, strict=True))
    }
    return {"strengths": STRENGTHS, "curves": curves}


def methods(names: Sequence[str] = ("neuron map", "CAA", "ConVA", "CNA", "NPTI", "DPN-LE", "system prompt")) -> Any:
    random = np.random.default_rng(1)
    found = []
    for strength, (place, name) in itertools.product((1.0, -1.0), enumerate(names)):
        target, nlr, ratio = 0.4 - 0.04 * place, 0.04 + 0.05 * place, 1.05 + 0.01 * random.random()
        measures = {
            "target": [target, target - 0.03, target + 0.03],
            "nlr": [nlr, nlr * 1.02, nlr * 1.3],
            "own_over_other": [9.0 - place, 7.0 - place, 10.0 - place],
            "perplexity_ratio": ratio,
        }
        found.append(MethodPoint(name, strength, measures))
    return found


def circle(path: Path, system: ValueSystem, target: Any = None, strength: float = 1.0) -> str:
    target = list(system.names) if target is None else target
    table = shifts(system)
    rows = table if not isinstance(target, str) else table[system.names.index(target)]
    angles = [value.angle for value in system]
    return value_circle(path, system.names, angles, strength * rows, target, system=system, strength=strength)


PICTURES: dict[str, Callable[[Path], str]] = {}
for key, one in SYSTEMS.items():
    PICTURES[f"matrix of {key}"] = lambda path, one=one: leakage_matrix(  # type: ignore[misc]
        path, shifts(one), one.names, one.names, system=one, subtitle="A long line about the model. " * 6
    )
    PICTURES[f"doses of {key}"] = lambda path, one=one: dose_curves(  # type: ignore[misc]
        path, dose(one), ranges={name: [-2.7, 2.5] for name in one.names}, system=one
    )
    if one.has_circle:
        PICTURES[f"circles of {key}"] = lambda path, one=one: circle(path, one)  # type: ignore[misc]
        PICTURES[f"circle of {key}"] = lambda path, one=one: circle(path, one, one.names[1], -1.0)  # type: ignore[misc]
PICTURES["control"] = lambda path: control_against_damage(path, methods())
PICTURES["bars"] = lambda path: method_bars(path, methods())
PICTURES["control, long names"] = lambda path: control_against_damage(
    path, methods(["neuron map", "a method with quite a long name", "random neurons of the same number and size"])
)
PICTURES["bars, long names"] = lambda path: method_bars(
    path, methods(["neuron map", "a method with quite a long name", "random neurons of the same number and size"])
)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All figures that are saved, as they were saved."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    savefig = Figure.savefig

    def keep(self: Any, *args: Any, **options: Any) -> None:
        savefig(self, *args, **options)
        self.canvas.draw()  # saving has its own resolution; places are asked for at that of the figure
        self.boxes = [(text, text.get_window_extent()) for text in texts(self)]
        kept.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def texts(figure: Any) -> list[Any]:
    from matplotlib.text import Text

    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
    beyond = set()  # labels of ticks outside the limits of their axis are there, but never drawn
    for tick in ticks:
        low, high = sorted(tick.get_view_interval())
        if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
            beyond |= {tick.label1, tick.label2}
    found = figure.findobj(Text)
    return [text for text in found if text.get_text().strip() and text.get_visible() and text not in beyond]


DRAWN: dict[str, tuple[Any, str, bytes]] = {}


@pytest.fixture(params=PICTURES)
def drawn(request: pytest.FixtureRequest, tmp_path: Path, figures: list[Any]) -> tuple[str, Any, str, bytes]:
    """Name, figure, alt text and file of every picture, each of them drawn once."""
    name = request.param
    if name not in DRAWN:
        path = tmp_path / "new folder" / "picture.png"
        alt = PICTURES[name](path)
        DRAWN[name] = figures[0], alt, path.read_bytes()
    return (name, *DRAWN[name])


def test_a_picture_is_a_png_1600_wide_with_its_alt_text_inside(drawn: tuple[str, Any, str, bytes]) -> None:
    _, figure, alt, data = drawn
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    wide, high = SIZE.unpack(data[:24])
    assert wide == 1600
    assert high == pytest.approx(figure.get_size_inches()[1] * 200, abs=1)
    assert alt.endswith(".")
    assert alt.replace("−", "-").encode("latin-1") in data


def test_all_that_is_written_is_inside_the_picture(drawn: tuple[str, Any, str, bytes]) -> None:
    figure = drawn[1]
    assert len(figure.boxes) >= 4
    for text, box in figure.boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text


def test_no_text_covers_another(drawn: tuple[str, Any, str, bytes]) -> None:
    # The boxes of slanted texts overlap where the texts do not.
    boxes = [(text.get_text(), box) for text, box in drawn[1].boxes if text.get_rotation() % 90 == 0]
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        wide = min(first.x1, second.x1) - max(first.x0, second.x0)
        high = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert wide <= 1 or high <= 1, (a, b)


def test_no_word_of_a_label_is_broken(drawn: tuple[str, Any, str, bytes]) -> None:
    written = {word for text, _ in drawn[1].boxes for word in text.get_text().split()}
    for system in SYSTEMS.values():
        words = [word for value in system for word in value.label.split()]
        words += [word for group in system.groups for word in style.label(group).split()]
        assert not written & {word[:-1] for word in words if len(word) > 4 and word[-1].isalpha()}


def test_no_text_is_smaller_than_ten_pixels_in_a_picture_800_wide(drawn: tuple[str, Any, str, bytes]) -> None:
    cells = "nineteen" in drawn[0]  # 361 numbers do not fit in any larger type
    assert min(text.get_size() for text, _ in drawn[1].boxes) * 100 / 72 >= (7 if cells else 10)


def test_the_alt_text_of_a_matrix_names_the_largest_leak_the_way_the_dial_was_turned(tmp_path: Path) -> None:
    system = SYSTEMS["ten"]
    table = np.zeros((10, 10))
    names = list(system.names)
    table[names.index("power"), names.index("security")] = 0.21
    table[names.index("power"), names.index("tradition")] = -0.37
    np.fill_diagonal(table, 0.5)
    up = leakage_matrix(tmp_path / "up.png", table, names, names, system=system)
    assert "largest leak: dialling Power moves Security by +0.21" in up
    np.fill_diagonal(table, -0.5)
    down = leakage_matrix(tmp_path / "down.png", table, names, names, system=system, strength=-1)
    assert "largest leak: dialling Power moves Tradition by −0.37" in down
    assert "dialled to −1" in down


def test_the_alt_text_of_a_matrix_without_leaks_says_so(tmp_path: Path) -> None:
    alt = leakage_matrix(tmp_path / "a.png", [[0.4, -0.1], [0.0, 0.3]], ["a", "b"], ["a", "b"])
    assert "No other value moves the way" in alt


def test_the_alt_text_of_a_circle_names_the_largest_leak_of_all_targets(tmp_path: Path) -> None:
    system, table = SYSTEMS["ten"], shifts(SYSTEMS["ten"])
    names = list(system.names)
    table[names.index("hedonism"), names.index("conformity")] = 0.31
    angles = [value.angle for value in system]
    alt = value_circle(tmp_path / "a.png", names, angles, table, names, system=system)
    assert "Most leak: Conformity +0.31 when Hedonism is dialled." in alt
    row = table[names.index("hedonism")]
    alt = value_circle(tmp_path / "b.png", names, angles, row, "hedonism", system=system)
    assert "The dialled value: Hedonism +0.40. Most leak: Conformity +0.31." in alt


def test_the_alt_text_of_dose_curves_names_the_largest_leakage(tmp_path: Path) -> None:
    alt = dose_curves(tmp_path / "a.png", dose(SYSTEMS["ten"]), system=SYSTEMS["ten"])
    assert "The largest leakage is 0.20, of Universalism at +2." in alt
    assert "Power: margin −0.40 at −1 and +0.40 at +1." in alt


def test_the_alt_text_of_methods_says_who_is_best_for_either_sign(tmp_path: Path) -> None:
    points = [
        MethodPoint("ours", 1, {"target": 0.3, "nlr": 0.1}),
        MethodPoint("theirs", 1, {"target": 0.2, "nlr": 0.05}),
        MethodPoint("ours", -1, {"target": 0.1, "nlr": 0.01}),
        MethodPoint("theirs", -1, {"target": 0.4, "nlr": None}),
    ]
    for alt in (
        control_against_damage(tmp_path / "a.png", points, highlight="ours", against=["nlr"]),
        method_bars(tmp_path / "b.png", points, highlight="ours", columns=["target", "nlr"]),
    ):
        assert "Dialled to +1: Most control: ours 0.30 (theirs 0.20). Least leakage (NLR): theirs 0.05" in alt
        assert "Dialled to −1: Most control: theirs 0.40 (ours 0.10). Least leakage (NLR): ours 0.01." in alt


def test_a_cell_that_was_not_measured_is_empty_and_counted(tmp_path: Path, figures: list[Any]) -> None:
    table = shifts(SYSTEMS["big five"])
    table[1, 3] = np.nan
    table[2, 4] = np.inf
    names = SYSTEMS["big five"].names
    alt = leakage_matrix(tmp_path / "a.png", table, names, names)
    axes = figures[0].axes[0]
    assert len(axes.texts) == 23
    assert not any(text.get_position() in ((3.5, 1.5), (4.5, 2.5)) for text in axes.texts)
    assert axes.collections[0].get_array().mask.sum() == 2
    assert "Empty, since nothing was measured there: 2 of 25 cells." in alt


def test_nothing_measured_at_all_is_drawn_without_a_number(tmp_path: Path, figures: list[Any]) -> None:
    nothing = np.full((2, 2), np.nan)
    alt = leakage_matrix(tmp_path / "a.png", nothing, ["a", "b"], ["a", "b"])
    assert "4 of 4 cells" in alt
    value_circle(tmp_path / "b.png", ["a", "b"], [0, 180], nothing, ["a", "b"])
    gaps = {"kl": [None], "leakage": [None], "margins": {"a": [None]}}
    dose_curves(tmp_path / "c.png", {"strengths": [1.0], "curves": {"a": gaps}})
    point = [MethodPoint("a", 1.0, {})]
    control_against_damage(tmp_path / "d.png", point)
    method_bars(tmp_path / "e.png", point)
    assert [len(figure.axes[0].texts) for figure in figures[:1]] == [0]


def test_numbers_of_a_matrix_stand_where_the_circle_puts_them(tmp_path: Path, figures: list[Any]) -> None:
    system = SYSTEMS["ten"]
    rows, columns = ["power", "hedonism"], ["universalism", "power", "hedonism"]
    leakage_matrix(tmp_path / "a.png", [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], rows, columns, system=system)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Hedonism", "Power"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Hedonism", "Power", "Universalism"]
    cells = {text.get_position(): text.get_text() for text in axes.texts if text.get_text().startswith("+")}
    assert [cells[x + 0.5, 0.5] for x in range(3)] == ["+0.60", "+0.50", "+0.40"]
    outlined = {patch.get_xy() for patch in axes.patches}
    assert outlined == {(0, 0), (1, 1)}


def test_a_number_whose_interval_holds_0_is_grey(tmp_path: Path, figures: list[Any]) -> None:
    ends = [[[0.3, 0.5], [-0.05, 0.09]], [[0.01, 0.03], [0.2, 0.4]]]
    leakage_matrix(tmp_path / "a.png", [[0.4, 0.02], [0.02, 0.3]], ["a", "b"], ["a", "b"], intervals=ends)
    colours = {text.get_position(): text.get_color() for text in figures[0].axes[0].texts}
    assert colours[1.5, 0.5] == style.SOFT
    assert colours[0.5, 1.5] == style.INK


@pytest.mark.parametrize("name", ["ten", "big five"])
def test_every_number_has_the_contrast_that_wcag_asks_for(name: str, tmp_path: Path, figures: list[Any]) -> None:
    system = SYSTEMS[name]
    steps = np.linspace(-1, 1, len(system) ** 2).reshape(len(system), -1)
    ends = np.stack([steps - 9, steps + 9], axis=-1)
    leakage_matrix(tmp_path / "a.png", steps, system.names, system.names, intervals=ends)
    axes = figures[0].axes[0]
    mesh = axes.collections[0]
    for text in axes.texts:
        x, y = text.get_position()
        under = style.luminance(mesh.cmap(mesh.norm(steps[int(y), int(x)])))
        bright, dark = sorted((under, style.luminance(text.get_color())), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5


def test_pictures_leave_pyplot_and_the_settings_as_they_were(tmp_path: Path) -> None:
    from matplotlib import pyplot

    with matplotlib.rc_context({"font.size": 31.0, "axes.facecolor": "red", "backend": "agg"}):
        figure, axes = pyplot.subplots()
        before = dict(matplotlib.rcParams)
        leakage_matrix(tmp_path / "a.png", np.eye(2), ["a", "b"], ["a", "b"])
        with pytest.raises(NeVAError):
            leakage_matrix(tmp_path / "a.jpg", np.eye(2), ["a", "b"], ["a", "b"])
        assert dict(matplotlib.rcParams) == before
        assert pyplot.get_fignums() == [figure.number]
        assert pyplot.gca() is axes
        assert pyplot.get_backend().lower() == "agg"
        pyplot.close(figure)


@pytest.mark.parametrize("name", ["matrix of ten", "circles of ten", "doses of two", "control", "bars"])
def test_the_same_numbers_give_the_same_bytes_whatever_the_settings(name: str, tmp_path: Path) -> None:
    PICTURES[name](tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 31.0, "axes.facecolor": "red", "savefig.dpi": 50, "text.color": "red"}):
        PICTURES[name](tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_pictures_drawn_by_several_threads_are_as_those_drawn_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    threads = [
        threading.Thread(target=PICTURES["matrix of big five"], args=(tmp_path / f"{place}.png",))
        for place in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    PICTURES["matrix of big five"](tmp_path / "alone.png")
    alone = (tmp_path / "alone.png").read_bytes()
    assert [(tmp_path / f"{place}.png").read_bytes() == alone for place in range(4)] == [True] * 4
    assert dict(matplotlib.rcParams) == before


def test_importing_the_plots_does_not_import_matplotlib() -> None:
    code = "import sys, neva_hf.evaluation.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def lab(colour: Any, blind: Any = None) -> np.ndarray[Any, Any]:
    """CIELAB (D65) of a colour, as an eye sees it."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear if blind is None else np.array(blind) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", [None, *BLIND])
def test_colours_that_mean_different_things_look_different_to_every_eye(eye: str | None) -> None:
    blind = BLIND[eye] if eye else None
    pairs = [
        (style.RISE, style.FALL),
        (style.RISE, "#fafafa"),
        (style.FALL, "#fafafa"),
        (style.FOCUS, style.OTHERS),
        (style.FOCUS, "#b9b9b9"),
        (style.FOCUS, style.FLUENT),
    ]
    colours = matplotlib.colormaps[style.DIVERGING]
    pairs += [(colours(0.5 - away), colours(0.5 + away)) for away in (0.15, 0.25, 0.35, 0.5)]
    for a, b in pairs:
        assert np.linalg.norm(lab(a, blind) - lab(b, blind)) >= 25, (a, b)
    # What is larger is darker, on both sides.
    for side in (np.linspace(0.5, 1, 20), np.linspace(0.5, 0, 20)):
        light = [lab(colours(place), blind)[0] for place in side]
        assert light == sorted(light, reverse=True)


def test_bars_of_a_circle_are_as_long_as_their_shifts_and_as_wide_as_each_other(
    tmp_path: Path, figures: list[Any]
) -> None:
    from matplotlib.patches import Polygon

    value_circle(tmp_path / "a.png", ["a", "b", "c"], [0, 120, 240], [0.4, 0.1, -0.2], "a")
    bars = [patch.get_xy()[:4] for patch in figures[0].axes[0].patches if type(patch) is Polygon]
    lengths = [float(np.linalg.norm(bar[1] - bar[0])) for bar in bars]
    assert np.array(lengths) / lengths[0] == pytest.approx([1, 0.25, 0.5])
    assert [np.linalg.norm(bar[2] - bar[1]) for bar in bars] == pytest.approx([0.16] * 3)
    outward = [np.linalg.norm(bar[1] + bar[2]) > np.linalg.norm(bar[0] + bar[3]) for bar in bars]
    assert outward == [True, True, False]
    assert max(np.linalg.norm(bar, axis=1).max() for bar in bars) < 1.01


def test_groups_meet_in_the_middle_of_a_value_that_is_in_both() -> None:
    system = SYSTEMS["ten"]
    assert style.runs_of_groups(system.names, system.groups) == [
        ("openness_to_change", -0.5, 2.0),
        ("self_enhancement", 2.0, 4.5),
        ("conservation", 4.5, 7.5),
        ("self_transcendence", 7.5, 9.5),
    ]


def test_a_value_without_an_angle_has_no_circle_but_a_matrix(tmp_path: Path) -> None:
    system = SYSTEMS["big five"]
    angles = [value.angle for value in system]
    with pytest.raises(NeVAError, match="draw `leakage_matrix`"):
        value_circle(tmp_path / "a.png", system.names, angles, shifts(system), system.names)
    assert not (tmp_path / "a.png").exists()


def test_a_dose_curve_is_open_where_nothing_was_measured_and_passes_through_zero(
    tmp_path: Path, figures: list[Any]
) -> None:
    one = dose(SYSTEMS["two"])
    dose_curves(tmp_path / "a.png", one, ranges={"v0": [-2.7, 2.5]})
    margin, leakage, kl = (figures[0].axes[place].lines[-1].get_xydata() for place in range(3))
    assert margin.tolist() == [[at, pytest.approx(0.4 * at)] for at in [-2, -1, -0.5, 0, 0.5, 1, 2]]
    assert np.isnan(leakage[:, 1]).tolist() == [True, False, False, True, False, False, False]
    assert kl[3].tolist() == [0, 0]
    shaded = figures[0].axes[0].patches
    assert len(shaded) == 1
    assert figures[0].axes[3].patches[:] == []
    assert sorted({x for x, _ in shaded[0].get_path().vertices * 1.0}) in ([-2.7, 2.5], [0.0, 1.0])


def test_an_interval_is_drawn_where_it_is_even_beside_its_number(tmp_path: Path, figures: list[Any]) -> None:
    points = [MethodPoint("a", 1, {"nlr": [0.04, 0.05, 0.07], "target": 0.3}), MethodPoint("b", 1, {"nlr": 0.1})]
    method_bars(tmp_path / "a.png", points, columns=["nlr"], highlight="a")
    axes = figures[0].axes[0]
    assert [0.05, 0.07] in [list(line.get_xdata()) for line in axes.lines]
    assert axes.patches[0].get_width() == pytest.approx(0.04)
    control_against_damage(tmp_path / "b.png", points[:1], against=["nlr"], highlight="a")
    assert [0.05, 0.07] in [list(line.get_xdata()) for line in figures[1].axes[0].lines]


def test_a_bar_is_cut_only_where_longer_is_worse(tmp_path: Path, figures: list[Any]) -> None:
    leak, control = [0.04, 0.05, 0.06, 5.0], [1.0, 1.1, 1.2, 90.0]
    points = [MethodPoint(str(place), 1, {"nlr": leak[place], "target": control[place]}) for place in range(len(leak))]
    method_bars(tmp_path / "a.png", points, columns=["target", "nlr"])
    kept, cut = figures[0].axes
    assert max(bar.get_width() for bar in kept.patches) == 90.0
    assert max(bar.get_width() for bar in cut.patches) == pytest.approx(4 * 0.055)
    assert "5.00 →" in [text.get_text() for text in cut.texts]


def test_a_method_without_a_number_is_named_and_not_dropped_in_silence(tmp_path: Path, figures: list[Any]) -> None:
    points = [*methods(["neuron map", "CAA"]), MethodPoint("random", 1.0, {"target": 0.0, "perplexity_ratio": 1.05})]
    control_against_damage(tmp_path / "a.png", points)
    written = " ".join(text.get_text() for text in figures[0].texts)
    assert "random at +1 (leakage (NLR))" in written
    method_bars(tmp_path / "b.png", points)
    assert "n/a" in [text.get_text() for text in figures[1].axes[1].texts]


def test_every_method_is_named_at_its_point(tmp_path: Path, figures: list[Any]) -> None:
    points = methods()
    control_against_damage(tmp_path / "a.png", points)
    for axes in figures[0].axes:
        names = {text.get_text().replace("\n", " "): text for text in axes.texts if "better" not in text.get_text()}
        assert set(names) == {point.method for point in points}
        for text in names.values():
            point = np.array(axes.transData.transform(text.xy))
            box = text.get_window_extent()
            nearest = np.clip(point, [box.x0, box.y0], [box.x1, box.y1])
            assert np.linalg.norm(point - nearest) <= 62 * figures[0].dpi / 72


def test_a_measure_of_ones_own_can_be_drawn_and_an_unknown_one_cannot(tmp_path: Path) -> None:
    points = [MethodPoint("a", 1, {"mirth": 3.0}), MethodPoint("b", 1, {"mirth": 2.0})]
    with pytest.raises(NeVAError, match="'mirth' is not described"):
        method_bars(tmp_path / "a.png", points, columns=["mirth"])
    own = {"mirth": Measure("mirth: laughs per minute", "less", digits=0)}
    assert "Least mirth: b 2 (a 3)." in method_bars(tmp_path / "a.png", points, columns=["mirth"], measures=own)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: leakage_matrix(path, np.eye(3), ["a", "b"], ["a", "b"]), "a row per target"),
        (lambda path: leakage_matrix(path, np.eye(2), ["a", "b"], ["a", "b"], intervals=np.eye(2)), "two ends"),
        (lambda path: value_circle(path, ["a", "b"], [0, 90], [1.0], "a"), "must be"),
        (lambda path: value_circle(path, ["a", "b"], [0], [1.0, 2.0], "a"), "one angle"),
        (lambda path: dose_curves(path, {"strengths": [1.0], "curves": {}}), "no curve to draw"),
        (
            lambda path: dose_curves(
                path, {"strengths": [1.0, 2.0], "curves": {"a": {"kl": [1.0], "leakage": [1, 2], "margins": {}}}}
            ),
            "a, KL divergence must hold 2 numbers",
        ),
        (lambda path: method_bars(path, []), "nothing to draw"),
        (lambda path: method_bars(path, [MethodPoint("a", 1, {"target": [1.0, 2.0]})]), "two ends of its interval"),
        (lambda path: leakage_matrix(path.with_suffix(".svg"), np.eye(1), ["a"], ["a"]), "must end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_reason(draw: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=message):
        draw(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (0.384, 2, "+0.38"),
        (-0.05, 2, "−0.05"),
        (-0.004, 2, "0.00"),
        (0.0, 3, "0.000"),
        (12.6, 0, "+13"),
        (-0.4, 0, "0"),
    ],
)
def test_numbers_have_a_sign_unless_they_round_to_nothing(number: float, digits: int, text: str) -> None:
    assert style.signed(number, digits) == text


@pytest.mark.parametrize(
    ("bound", "digits"), [(0.4, 2), (0.1, 2), (0.05, 3), (1.0, 2), (9.0, 2), (40.0, 0), (0.0, 2), (float("nan"), 2)]
)
def test_small_shifts_get_more_decimals(bound: float, digits: int) -> None:
    assert style.digits_for(bound) == digits
