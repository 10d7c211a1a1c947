"""What two maps have in common, and several maps in one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from scipy.stats import spearmanr
from test_edit_against_reference import KINDS, assert_near
from test_safe_loading_base import changed, named
from tiny import add_map, batch, random_map, tiny_model
from typer.testing import CliRunner

from neva_hf import NeuronMap, NeVAConfig, NeVAError
from neva_hf.cli import app
from neva_hf.cli_maps import parse_renames
from neva_hf.compare_maps import compare_maps, spearman
from neva_hf.merge_maps import merge_maps
from neva_hf.neuron_map import ModuleEdits


def edits(index: list[int], *shifts: list[float]) -> ModuleEdits:
    return ModuleEdits(index=torch.tensor(index, dtype=torch.int32), shift=torch.tensor(shifts))


def small(values: list[str], modules: dict[str, ModuleEdits], **config: Any) -> NeuronMap:
    return NeuronMap(NeVAConfig(values=values, **config), modules)


FIRST = small(
    ["power", "security"],
    {"layers.2": edits([9, 5, 7, 1], [1.0, 2.0, 3.0, -4.0], [3.0, 0, 0, 0]), "layers.10": edits([2], [0.0], [4.0])},
)
SECOND = small(
    ["hedonism", "power"],
    {"layers.2": edits([1, 5, 9, 3], [1.0, 0, 0, 0], [-1.0, 4.0, 2.0, 2.0]), "layers.3": edits([0], [0.0], [6.0])},
)


def neva(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "120"})


# Comparing.


def test_neurons_are_counted_and_shifts_compared_per_value() -> None:
    found = compare_maps(FIRST, SECOND)
    (power,) = found.values
    assert (power.value_a, power.value_b) == ("power", "power")
    assert (power.together.neurons_a, power.together.neurons_b, power.together.shared) == (4, 5, 3)
    assert power.together.overlap == 3 / 6
    # Shared are 1 (-4 and -1), 5 (2 and 4), 9 (1 and 2), in the same order.
    assert power.together.spearman == 1.0
    product, sizes = 4.0 + 8.0 + 2.0, (1 + 4 + 9 + 16) ** 0.5 * (1 + 16 + 4 + 4 + 36) ** 0.5
    assert power.together.cosine == pytest.approx(product / sizes)
    assert (found.only_a, found.only_b) == (["security"], ["hedonism"])


def test_modules_are_compared_one_by_one_in_their_natural_order() -> None:
    found = compare_maps(FIRST, SECOND, {"power": "power", "security": "hedonism"})
    power, security = found.values
    assert list(power.modules) == ["layers.2", "layers.3"]
    assert list(security.modules) == ["layers.2", "layers.10"]
    assert list(found.modules) == ["layers.2", "layers.3", "layers.10"]
    only_second = power.modules["layers.3"]
    assert (only_second.neurons_a, only_second.neurons_b, only_second.overlap) == (0, 1, 0.0)
    assert (only_second.spearman, only_second.cosine) == (None, None)
    both = found.modules["layers.2"]
    assert (both.neurons_a, both.neurons_b, both.shared) == (4 + 1, 4 + 1, 3)
    assert both.overlap == 3 / 7


def test_a_map_agrees_fully_with_itself_at_any_strength_and_not_with_its_opposite() -> None:
    neuron_map = random_map(tiny_model(), gain=True)
    for factor in (1.0, 0.25, -2.0):
        modules = {name: replace(one, shift=one.shift * factor) for name, one in neuron_map.modules.items()}
        for one in compare_maps(neuron_map, NeuronMap(neuron_map.config, modules)).values:
            sign = 1 if factor > 0 else -1
            assert (one.together.overlap, one.together.spearman) == (1.0, sign)
            assert one.together.cosine == pytest.approx(sign)


def gained(index: list[int], shift: list[float], gain: list[float]) -> NeuronMap:
    parts = ModuleEdits(torch.tensor(index, dtype=torch.int32), torch.tensor([shift]), torch.tensor([gain]))
    return small(["power"], {"layers.2": parts}, use_gain=True)


def test_a_neuron_with_a_gain_alone_is_edited_and_gains_are_compared_beside_shifts() -> None:
    one = gained([9, 5, 7, 1, 4], [1.0, 2.0, 3.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0])
    two = gained([1, 5, 7, 2, 9], [1.0, 4.0, 6.0, 0.0, 2.0], [-0.4, -0.2, -0.3, 0.5, -0.1])
    (power,) = compare_maps(one, two).values
    # Neuron 4 is not edited; 1 (here) and 2 (there) are, by a gain alone.
    assert (power.together.neurons_a, power.together.neurons_b, power.together.shared) == (4, 5, 4)
    # Of 1, 5, 7 and 9: shifts of 0, 2, 3, 1 beside 1, 4, 6, 2, and gains with each sign changed.
    assert (power.together.spearman, power.together.gain_spearman) == (1.0, -1.0)
    product, sizes = -(0.01 + 0.04 + 0.09 + 0.16), 0.3**0.5 * (0.3 + 0.25) ** 0.5
    assert power.together.gain_cosine == pytest.approx(product / sizes)
    assert power.together.cosine == pytest.approx((2 + 8 + 18) / (14**0.5 * (1 + 16 + 36 + 4) ** 0.5))


def test_gains_are_compared_only_where_both_maps_have_some() -> None:
    base = tiny_model()
    with_gains, without = random_map(base, gain=True), random_map(base)
    for pair in ((with_gains, without), (without, with_gains), (without, without)):
        for one in compare_maps(*pair).values:
            assert (one.together.gain_spearman, one.together.gain_cosine) == (None, None)
    for one in compare_maps(with_gains, with_gains).values:
        assert (one.together.gain_spearman, one.together.gain_cosine) == (1.0, pytest.approx(1.0))


def test_maps_agree_the_other_way_round_as_well() -> None:
    base = tiny_model()
    one, two = random_map(base, seed=1, neurons=30), random_map(base, seed=2, neurons=20)
    there, back = compare_maps(one, two), compare_maps(two, one)
    for here, again in zip(there.values, back.values, strict=True):
        assert (here.together.neurons_a, here.together.neurons_b) == (
            again.together.neurons_b,
            again.together.neurons_a,
        )
        assert here.together.spearman == again.together.spearman
        assert here.together.cosine == pytest.approx(again.together.cosine)
        assert here.together.overlap == one.overlap(two)[here.value_a, here.value_a]


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for length in (3, 10, 200):
        first, second = torch.randn(2, length, generator=generator, dtype=torch.float64)
        if ties:
            first, second = first.round(), (second + first).round()
        found, wanted = spearman(first.tolist(), second.tolist()), spearmanr(first.numpy(), second.numpy()).statistic
        assert (found is None and wanted != wanted) or found == pytest.approx(wanted, abs=1e-10)


def test_ranks_that_say_nothing_are_none() -> None:
    assert spearman([1.0, 2.0], [2.0, 1.0]) is None
    assert spearman([1.0, 1.0, 1.0], [2.0, 1.0, 3.0]) is None


def test_maps_of_different_models_are_not_compared() -> None:
    one, two = random_map(tiny_model()), random_map(tiny_model(hidden_size=64, head_dim=16))
    with pytest.raises(NeVAError, match="for different models .*hidden_size is 64 in one and 32 in the other"):
        compare_maps(one, two)


def test_maps_without_a_value_in_common_say_which_they_have() -> None:
    other = random_map(tiny_model(), ["hedonism"])
    with pytest.raises(
        NeVAError, match="no value in common: the first has benevolence, power, security, the second hed"
    ):
        compare_maps(random_map(tiny_model()), other)


def test_a_comparison_says_whether_the_weights_were_the_same() -> None:
    base = tiny_model()
    maps = [random_map(model) for model in (base, changed(base, 0.3), tiny_model(seed=1))]
    assert [compare_maps(maps[0], one).weights for one in maps] == ["same", "different", "unrelated"]
    assert compare_maps(FIRST, SECOND).weights == "unknown"


# Merging.


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(), **kwargs).logits


@pytest.mark.parametrize("first_kind", KINDS)
@pytest.mark.parametrize("second_kind", KINDS)
def test_a_merged_map_does_what_its_parts_do_as_two_adapters(first_kind: str, second_kind: str) -> None:
    base = tiny_model()
    one = random_map(base, ["power", "security"], units={"power": [0.5, 2.0]}, **KINDS[first_kind])
    two = random_map(base, ["hedonism"], neurons=9, seed=7, units={"hedonism": [3.0, 0.7]}, **KINDS[second_kind])
    merged = merge_maps([one, two]).apply_to(tiny_model())
    apart = one.apply_to(tiny_model())
    add_map(apart, two, "second")
    apart.base_model.set_adapter(["default", "second"])
    for strengths in ({"power": 1.0}, {"hedonism": -1.5}, {"power": -1.0, "security": 0.5, "hedonism": 1.0}):
        assert_near(logits(merged, strengths=strengths), logits(apart, strengths=strengths))
    rows = [{"power": 1.0}, {}, {"hedonism": 1.0}]
    assert_near(logits(merged, strengths=rows), logits(apart, strengths=rows))


def calibrated(values: list[str], source: str, seed: int) -> NeuronMap:
    return random_map(
        named(tiny_model(), "someone/base"),
        values,
        seed=seed,
        base_model_name_or_path="someone/base",
        units={value: [seed, seed + 1] for value in values},
        ranges={value: [-seed, seed] for value in values},
        default_strengths={values[0]: seed / 2},
        provenance={"method": source},
        measurements={
            "calibration": {value: {"+1": {"kl": 0.05 * seed}} for value in values},
            "seconds": seed,
            "dose": {
                "strengths": [1.0],
                "curves": {value: {"kl": [seed], "margins": {value: [0.1], "x": [0.2]}} for value in values},
            },
        },
    )


def test_a_merged_map_keeps_what_was_known_of_every_value(tmp_path: Path) -> None:
    one, two = calibrated(["power", "security"], "first", 2), calibrated(["power"], "second", 3)
    merged = merge_maps([one, two], renamed=[{}, {"power": "power_b"}], sources=["maps/one", "maps/two"])
    merged = NeuronMap.from_pretrained(merged.save_pretrained(tmp_path))
    config = merged.config
    assert merged.values == ["power", "security", "power_b"]
    assert merged.base_model == "someone/base"
    assert config.units == {"power": [2, 3], "security": [2, 3], "power_b": [3, 4]}
    assert config.ranges == {"power": [-2, 2], "security": [-2, 2], "power_b": [-3, 3]}
    assert config.default_strengths == {"power": 1.0, "power_b": 1.5}
    assert config.measurements["calibration"]["power_b"] == {"+1": {"kl": pytest.approx(0.15)}}
    assert config.measurements["calibration"]["power"] == {"+1": {"kl": pytest.approx(0.1)}}
    assert config.measurements["dose"]["curves"]["power_b"] == {"kl": [3], "margins": {"power_b": [0.1], "x": [0.2]}}
    assert config.base == one.config.base
    first, second = config.provenance["maps"]
    assert (first["source"], first["values"]) == ("maps/one", {"power": "power", "security": "security"})
    assert (second["source"], second["values"]) == ("maps/two", {"power": "power_b"})
    assert (first["provenance"], second["provenance"]) == ({"method": "first"}, {"method": "second"})
    # What was measured of a map as a whole stays with that map.
    assert (first["measurements"], second["measurements"]) == ({"seconds": 2}, {"seconds": 3})


def test_a_value_cut_out_of_a_merged_map_is_the_one_that_was_put_in() -> None:
    one, two = calibrated(["power", "security"], "first", 2), calibrated(["power"], "second", 3)
    merged = merge_maps([one, two], renamed=[{}, {"power": "power_b"}])
    pairs = {"power_b": "power"}
    (found,) = compare_maps(merged.select(["power_b"]), two, pairs).values
    assert (found.together.overlap, found.together.spearman) == (1.0, 1.0)
    assert found.together.neurons_a == found.together.neurons_b == 12
    assert found.together.cosine == pytest.approx(1.0)


def test_dose_curves_over_other_strengths_stay_with_their_map() -> None:
    one, two = calibrated(["power"], "first", 2), calibrated(["security"], "second", 3)
    two.config.measurements["dose"]["strengths"] = [2.0]
    merged = merge_maps([one, two])
    assert "dose" not in merged.config.measurements
    assert [part["measurements"]["dose"]["strengths"] for part in merged.config.provenance["maps"]] == [[1.0], [2.0]]


def test_definitions_stay_where_all_maps_have_the_same() -> None:
    definitions = {"name": "mine", "values": []}
    one, two = (random_map(tiny_model(), [value], value_system=definitions) for value in ("power", "security"))
    assert merge_maps([one, two]).config.value_system == definitions
    merged = merge_maps([one, two], renamed=[{"power": "might"}, {}])
    assert merged.config.value_system is None
    assert merged.config.provenance["maps"][0]["value_system"] == definitions


def test_values_of_one_name_are_refused_with_the_way_out() -> None:
    one = random_map(tiny_model())
    with pytest.raises(
        NeVAError, match=r"a and b both have a value 'benevolence'\. Give one .*b:benevolence=benevolence_2"
    ):
        merge_maps([one, one], sources=["a", "b"])
    renamed = [{}, {name: f"{name}_b" for name in one.values}]
    assert len(merge_maps([one, one], renamed=renamed).values) == 6


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        ([{"powr": "x"}, {}], "no value 'powr' .did you mean 'power'"),
        ([{"power": "Power!"}, {}], "'Power!' cannot be the name of a value"),
        ([{"power": "hedonism"}, {}], "both have a value 'hedonism'"),
        ([{}], "2 maps, but 2 names and 1 sets of new names"),
    ],
)
def test_new_names_that_cannot_be_used_are_refused(renamed: list[dict[str, str]], message: str) -> None:
    with pytest.raises(NeVAError, match=message):
        merge_maps([random_map(tiny_model()), random_map(tiny_model(), ["hedonism"])], renamed=renamed)


def test_one_map_is_nothing_to_merge() -> None:
    with pytest.raises(NeVAError, match="takes two neuron maps or more, got 1"):
        merge_maps([random_map(tiny_model())])


def test_maps_of_different_bases_are_refused() -> None:
    base = named(tiny_model(), "someone/base")
    one = random_map(base, ["power"], base_model_name_or_path="someone/base")

    def of(model: Any, **config: Any) -> NeuronMap:
        return random_map(model, ["security"], base_model_name_or_path="someone/tuned", **config)

    with pytest.raises(NeVAError, match="for different models .*hidden_size is 64 in one"):
        merge_maps([one, of(tiny_model(hidden_size=64, head_dim=16))])
    with pytest.raises(NeVAError, match=r"different base models \(someone/base and someone/tuned\): .* are different"):
        merge_maps([one, of(changed(base, 0.3))])
    with pytest.raises(NeVAError, match="are unrelated"):
        merge_maps([one, of(tiny_model(seed=1))])
    with pytest.raises(NeVAError, match="no fingerprint that would tell"):
        merge_maps([one, of(base, base=None)])
    # Under another name, but of the same weights.
    assert merge_maps([one, of(base)]).values == ["power", "security"]


def test_gates_that_a_map_cannot_hold_together_are_refused() -> None:
    def gated(value: str, probability: float) -> NeuronMap:
        return random_map(tiny_model(), [value], gate=True, gate_probability=probability)

    with pytest.raises(NeVAError, match=r"different probabilities \(0\.8, 0\.9\)"):
        merge_maps([gated("power", 0.9), gated("security", 0.8)])
    with pytest.raises(NeVAError, match=r"probability of 0\.5 cannot be had beside values without"):
        merge_maps([gated("power", 0.5), random_map(tiny_model(), ["security"])])
    assert merge_maps([gated("power", 0.5), gated("security", 0.5)]).config.use_gate


# The command line.


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    base = named(tiny_model(), "someone/base")
    one = random_map(base, ["power", "security"], neurons=30, base_model_name_or_path="someone/base")
    two = random_map(base, ["power", "hedonism"], neurons=30, seed=2, base_model_name_or_path="someone/base")
    return one.save_pretrained(tmp_path / "one"), two.save_pretrained(tmp_path / "two")


def test_diff_shows_values_and_layers(folders: tuple[Path, Path]) -> None:
    shown = neva("diff", *folders)
    assert shown.exit_code == 0
    found = compare_maps(*(NeuronMap.from_pretrained(folder) for folder in folders))
    power = found.values[0].together
    row = next(line for line in shown.stdout.splitlines() if " power " in line and "│" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    numbers = [power.neurons_a - power.shared, power.shared, power.neurons_b - power.shared]
    assert cells[:4] == ["power", *map(str, numbers)]
    assert cells[4:] == [f"{power.overlap:.2f}", f"{power.spearman:+.2f}", f"{power.cosine:+.2f}"]
    assert "model.layers.1.mlp.down_proj" in shown.stdout
    assert f"A: {folders[0]} (not compared: security)" in " ".join(shown.stdout.split())


def test_diff_shows_gains_where_both_maps_have_some(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert "gains:" not in neva("diff", *folders).stdout
    folder = random_map(named(tiny_model(), "someone/base"), ["power"], gain=True).save_pretrained(tmp_path / "gained")
    assert "gains:" not in neva("diff", folder, folders[0]).stdout
    shown = neva("diff", folder, folder).stdout
    row = next(line for line in shown.splitlines() if " power " in line and "│" in line)
    assert "gains: rank corr." in shown
    assert [cell.strip() for cell in row.strip("│").split("│")][4:] == ["1.00", *["+1.00"] * 4]


def test_diff_writes_json_with_every_layer_of_every_value(folders: tuple[Path, Path]) -> None:
    shown = neva("diff", *folders, "--json", "--pair", "security=hedonism")
    told = json.loads(shown.stdout)
    maps = [NeuronMap.from_pretrained(folder) for folder in folders]
    assert told == compare_maps(*maps, {"power": "power", "security": "hedonism"}).to_dict()
    assert [one["value_b"] for one in told["values"]] == ["power", "hedonism"]
    assert len(told["values"][0]["modules"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pair", "power"], "'power' is no pair of values: write VALUE_OF_A=VALUE_OF_B"),
        (["--pair", "power=powr"], "no value 'powr'"),
        (["--value", "powr"], "no value 'powr'"),
        (["--value", "security"], "'security' is only in the first map"),
    ],
)
def test_diff_says_what_it_does_not_understand(folders: tuple[Path, Path], arguments: list[str], says: str) -> None:
    shown = neva("diff", *folders, *arguments)
    assert shown.exit_code == 1
    assert says in " ".join(shown.stderr.split())


def test_merge_maps_writes_one_map_and_never_over_another(folders: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "merged"
    refused = neva("merge-maps", output, *folders)
    assert refused.exit_code == 1
    assert "both have a value 'power'" in " ".join(refused.stderr.split())
    assert not output.exists()
    done = neva("merge-maps", output, *folders, "--rename", "B:power=power_b")
    assert done.exit_code == 0, done.stderr
    assert NeuronMap.from_pretrained(output).values == ["power", "security", "power_b", "hedonism"]
    again = neva("merge-maps", output, *folders, "--rename", f"{folders[0]}:power=might")
    assert again.exit_code == 1
    assert "use --overwrite" in " ".join(again.stderr.split())
    over = neva("merge-maps", output, *folders, "--rename", f"{folders[0]}:power=might", "--overwrite", "--json")
    assert list(json.loads(over.stdout)["values"]) == ["might", "security", "power", "hedonism"]
    assert NeuronMap.from_pretrained(output).values == ["might", "security", "power", "hedonism"]


def test_renames_name_a_map_as_it_was_written_or_by_its_letter() -> None:
    assert parse_renames(["maps/one:power=a", "B:x=b", "b:y=c"], ["maps/one", "B2"]) == [
        {"power": "a"},
        {"x": "b", "y": "c"},
    ]
    # A map that is called like a letter is meant before the letter.
    assert parse_renames(["A:x=y"], ["one", "A"]) == [{}, {"x": "y"}]
    assert parse_renames(["C:/maps/one:x=y"], ["C:/maps/one", "two"]) == [{"x": "y"}, {}]


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        ("power=x", "write MAP:VALUE=NAME"),
        ("A:power", "write MAP:VALUE=NAME"),
        ("A:=x", "write MAP:VALUE=NAME"),
        ("Z:power=x", "'Z' in 'Z:power=x' names 0 of the maps. Write A for one, B for one"),
        ("one:power=x", "names 2 of the maps"),
    ],
)
def test_renames_that_name_nothing_are_refused(rename: str, says: str) -> None:
    with pytest.raises(NeVAError, match=says):
        parse_renames([rename], ["one", "one"])
    with pytest.raises(NeVAError, match="renamed twice"):
        parse_renames(["A:x=y", "A:x=z"], ["one", "two"])
