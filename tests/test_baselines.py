"""Every baseline keeps the promises of the interface: nothing at strength 0, rows apart, hooks gone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from steered import SCALABLE, evidence, hooks_of, ids, logits
from tiny import ARCHITECTURES, VALUES, random_map, tiny_reader, tiny_tokenizer
from transformers import PreTrainedModel

from neva_hf import NeVAError, NeVAModel
from neva_hf.baselines import METHODS, Evidence, Method, from_model, random_neurons, system_prompt
from neva_hf.baselines.hooks import Edit, edited
from neva_hf.measure import encode, reply_log_probs

each_method = pytest.mark.parametrize("name", SCALABLE)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def shared() -> Evidence:
    return evidence()


@pytest.fixture(scope="module")
def model(shared: Evidence) -> PreTrainedModel:
    assert isinstance(shared.model, PreTrainedModel)
    return shared.model


@pytest.fixture(scope="module")
def fitted(shared: Evidence) -> dict[str, Method]:
    """All methods on one evidence, whose pass is shared."""
    return {name: fit(shared) for name, fit in METHODS.items()}


@each_method
def test_strength_zero_is_bit_identical(model: PreTrainedModel, fitted: dict[str, Method], name: str) -> None:
    given = ids()
    base = logits(model, given)
    assert torch.equal(logits(model, given, fitted[name], {}), base)
    assert torch.equal(logits(model, given, fitted[name], {"power": 0.0}, {}, {"security": 0}), base)


@each_method
def test_a_row_at_zero_keeps_every_bit_beside_rows_that_are_steered(
    model: PreTrainedModel, fitted: dict[str, Method], name: str
) -> None:
    given = ids()
    found = logits(model, given, fitted[name], {"power": 4.0}, {}, {"security": -4.0})
    base = logits(model, given)
    assert torch.equal(found[1], base[1])
    assert not torch.equal(found[0], base[0])
    assert not torch.equal(found[2], base[2])


@each_method
def test_rows_do_not_influence_each_other(model: PreTrainedModel, fitted: dict[str, Method], name: str) -> None:
    given = ids()
    rows = [{"power": 2.0}, {"security": -1.0, "power": 0.5}, {"benevolence": 1.0}]
    together = logits(model, given, fitted[name], *rows)
    for number, row in enumerate(rows):
        alone = logits(model, given[number : number + 1], fitted[name], row)
        torch.testing.assert_close(together[number], alone[0], atol=1e-5, rtol=1e-4)


@each_method
def test_one_mapping_serves_all_rows(model: PreTrainedModel, fitted: dict[str, Method], name: str) -> None:
    given, row = ids(), {"power": 1.0}
    torch.testing.assert_close(
        logits(model, given, fitted[name], row), logits(model, given, fitted[name], row, {**row}, {"power": 1})
    )


@each_method
def test_the_hooks_are_gone_afterwards_also_after_an_exception(
    model: PreTrainedModel, fitted: dict[str, Method], name: str
) -> None:
    assert hooks_of(model) == 0
    with fitted[name].at([{"power": 1.0}]):
        assert hooks_of(model) > 0
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError, match="stop"), fitted[name].at([{"power": 1.0}]):
        raise RuntimeError("stop")
    assert hooks_of(model) == 0


def test_hooks_are_gone_when_one_of_them_could_not_be_installed() -> None:
    model = tiny_reader()
    with (
        pytest.raises(AttributeError),
        edited(model, [Edit("lm_head", lambda x, _: x), Edit("nowhere", lambda x, _: x)]),
    ):
        pass
    assert hooks_of(model) == 0


@each_method
def test_an_unknown_value_and_a_strength_that_is_no_number_are_refused(
    model: PreTrainedModel, fitted: dict[str, Method], name: str
) -> None:
    for row, message in (({"pover": 1.0}, "power"), ({"power": float("nan")}, "finite")):
        with pytest.raises(NeVAError, match=message), fitted[name].at([row]):
            pass
    assert hooks_of(model) == 0


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused(model: PreTrainedModel, fitted: dict[str, Method]) -> None:
    with pytest.raises(NeVAError, match="2 rows"):
        logits(model, ids(3), fitted["CAA"], {"power": 1.0}, {})
    assert hooks_of(model) == 0


@each_architecture
def test_every_method_fits_and_steers_every_architecture(architecture: str) -> None:
    shared = evidence(tiny_reader(architecture), dev=())
    base = logits(shared.model, ids())
    for name in SCALABLE:
        method = METHODS[name](shared)
        moved = logits(shared.model, ids(), method, {"power": 3.0}, {}, {"security": -3.0})
        assert torch.isfinite(moved).all(), name
        assert torch.equal(moved[1], base[1]), name
        assert not torch.allclose(moved[0], base[0], atol=1e-6), name
    assert hooks_of(shared.model) == 0


@each_method
def test_a_model_with_a_neuron_map_at_strength_zero_is_steered_as_the_base_is(name: str) -> None:
    model = tiny_reader()
    plain = logits(model, ids())
    with_map = tiny_reader()
    mapped = NeVAModel.from_map(with_map, random_map(with_map))
    method = METHODS[name](evidence(with_map))
    rows: tuple[dict[str, float], ...] = ({"power": 1.0}, {}, {"security": -1.0})
    found = logits(mapped, ids(), method, *rows)
    on_base = METHODS[name](evidence(model))
    torch.testing.assert_close(found, logits(model, ids(), on_base, *rows))
    assert torch.equal(found[1], plain[1])
    assert method.notes.keys() == on_base.notes.keys()


def test_a_map_put_on_the_model_later_leaves_a_method_as_it_was() -> None:
    model = tiny_reader()
    method = METHODS["CNA"](evidence(model))
    before = logits(model, ids(), method, {"power": 1.0})
    mapped = NeVAModel.from_map(model, random_map(model))
    torch.testing.assert_close(logits(mapped, ids(), method, {"power": 1.0}), before)


@each_method
def test_generation_with_beams_steers_each_row_by_its_own_dials(
    model: PreTrainedModel, fitted: dict[str, Method], name: str
) -> None:
    given = ids(2)
    rows: list[dict[str, float]] = [{"power": 3.0}, {"security": -3.0}]
    options = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    with fitted[name].at(rows):
        together = model.generate(given, attention_mask=torch.ones_like(given), **options)
    for number, row in enumerate(rows):
        one = given[number : number + 1]
        with fitted[name].at([row]):
            alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(together[number], alone[0])


# (ConVA's shift is that of the prompt, so it differs where the whole text is the prompt)
@pytest.mark.parametrize("name", [name for name in SCALABLE if name != "ConVA"])
def test_decoding_with_a_cache_is_steered_as_the_whole_text_is(
    model: PreTrainedModel, fitted: dict[str, Method], name: str
) -> None:
    given = ids(1)
    with torch.no_grad(), fitted[name].at([{"power": 1.0}]):
        whole = model(input_ids=given, use_cache=False).logits
        first = model(input_ids=given[:, :5], use_cache=True)
        rest = model(input_ids=given[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-5, rtol=1e-4)


def test_the_map_itself_is_a_method() -> None:
    model = tiny_reader()
    mapped = NeVAModel.from_map(model, random_map(model, units={"power": [2.0, 3.0]}))
    method = from_model(mapped)
    rows: tuple[dict[str, float], ...] = ({"power": 1.0}, {}, {"security": -1.0})
    with mapped.strengths(list(rows)):
        wanted = logits(mapped, ids())
    assert torch.equal(logits(mapped, ids(), method, *rows), wanted)
    assert method.values == VALUES
    assert method.notes["units"]["power"] == [2.0, 3.0]  # type: ignore[index]
    mapped.set_strengths(power=1.0)
    assert torch.equal(logits(mapped, ids(), method, {}), logits(tiny_reader(), ids()))


def test_a_system_prompt_says_high_or_low_and_leaves_the_model_alone() -> None:
    method = system_prompt(evidence(values=["power", "self_direction", "security"]))
    assert not method.scalable
    assert method.system({"power": 0.5}) == "You have a high level of power."
    both = "You have a high level of power. You have a low level of self-direction."
    assert method.system({"self_direction": -2.0, "power": 1.0, "security": 0.0}) == both
    assert method.system({}) is None
    defined = system_prompt(evidence(values=["power"]), definitions=True).system({"power": 1.0})
    assert defined is not None
    assert defined.startswith("You have a high level of power (Standing above others")
    model = tiny_reader()
    with method.at([{"power": 1.0}]):
        assert hooks_of(model) == 0
    with pytest.raises(NeVAError, match="power"):
        method.system({"pover": 1.0})


def test_random_neurons_are_as_many_and_as_large_as_those_of_a_map() -> None:
    shared = evidence()
    neuron_map = random_map(shared.model, units={"power": [1.0, 2.0]})  # type: ignore[arg-type]
    method = random_neurons(shared, neuron_map=neuron_map)
    counts = {value: sum(found.values()) for value, found in neuron_map.neuron_counts().items()}
    assert method.notes["neurons"] == counts
    name, edits = next(iter(neuron_map.modules.items()))
    seen = []
    module = shared.model.get_submodule(name)
    given = ids(1)
    for row in ({}, {"power": 1.0}):
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        with method.at([row]):
            handle.remove()
            # (behind the method's own hook, to see what it did)
            handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
            with torch.no_grad():
                shared.model(input_ids=given)
        handle.remove()
    moved = (seen[1] - seen[0])[0, 0]
    wanted = 2 * edits.shift[neuron_map.values.index("power")].abs()
    torch.testing.assert_close(
        moved[moved.abs() > 1e-4].abs().sort().values, wanted.sort().values, atol=1e-4, rtol=1e-4
    )


def test_random_neurons_take_the_gains_of_a_map_along() -> None:
    shared = evidence()
    neuron_map = random_map(shared.model, gain=True, units={"power": [1.0, 2.0]})  # type: ignore[arg-type]
    name, edits = next(iter(neuron_map.modules.items()))
    assert edits.gain is not None
    edits.shift[1, 0], edits.gain[1, 1] = 0, 0
    method = random_neurons(shared, neuron_map=neuron_map)
    counts = {value: sum(found.values()) for value, found in neuron_map.neuron_counts().items()}
    assert method.notes["neurons"] == counts
    module = shared.model.get_submodule(name)
    # Of inputs 0 and 1 the module reads the shift, and the shift with the gain.
    seen = []
    with method.at([{"power": 1.0}]):
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for given in (torch.zeros(1, 1, module.in_features), torch.ones(1, 1, module.in_features)):
            module(given)
        handle.remove()
    shift = seen[0][0, 0]
    gain = seen[1][0, 0] - 1 - shift
    for found, part in ((shift, edits.shift), (gain, edits.gain)):
        wanted = 2 * part[1][part[1] != 0].abs()
        torch.testing.assert_close(
            found[found.abs() > 1e-4].abs().sort().values, wanted.sort().values, atol=1e-4, rtol=1e-4
        )
    assert int(((shift != 0) | (gain.abs() > 1e-4)).sum()) == edits.index.numel()


def test_random_neurons_follow_the_seed() -> None:
    model = tiny_reader()
    found = [random_neurons(evidence(model, seed=seed)) for seed in (0, 0, 1)]
    one, same, other = (logits(model, ids(), method, {"power": 1.0}) for method in found)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_replies_go_on_from_a_prompts_cache_under_every_method(
    model: PreTrainedModel, fitted: dict[str, Method]
) -> None:
    encoded = encode(tiny_tokenizer(), evidence().train[0])
    for name in SCALABLE:
        with torch.no_grad(), fitted[name].at([{"power": 1.0}]):
            found = reply_log_probs(model, encoded)
        assert torch.isfinite(found).all(), name


def test_importing_the_package_imports_neither_sklearn_nor_matplotlib() -> None:
    heavy = ["sklearn", "matplotlib", "datasets", "evaluate", "gradio"]
    code = f"import sys, neva_hf.baselines; print([one for one in {heavy} if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
