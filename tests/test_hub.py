"""Push and pull through the real client of the Hub, against a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, USER, Fault, Hub, Stored, a_hub
from huggingface_hub import constants
from tiny import VALUES, random_map, tiny_model, tiny_pair
from typer.testing import CliRunner

from neva_hf import NeuronMap, NeVAError, NeVAModel
from neva_hf.cli import app
from neva_hf.hub import pull, push_to_hub

REPO = f"{USER}/neva-map"
CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with a_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as running:
        yield running


@pytest.fixture
def neuron_map() -> NeuronMap:
    return random_map(tiny_model(), base_model_name_or_path="someone/tiny-llama")


@pytest.fixture
def folder(neuron_map: NeuronMap, tmp_path: Path) -> Path:
    return neuron_map.save_pretrained(tmp_path / "map")


def other_map() -> NeuronMap:
    return random_map(tiny_model(), seed=9, base_model_name_or_path="someone/tiny-llama")


def same(one: NeuronMap, other: NeuronMap) -> bool:
    return one.modules == other.modules and one.config.to_dict() == other.config.to_dict()


# There and back.


def test_a_map_comes_back_from_the_hub_as_it_went(hub: Hub, neuron_map: NeuronMap) -> None:
    done = neuron_map.push_to_hub(REPO)
    assert done.oid == hub.repositories["models", REPO].refs["main"]
    assert hub.files(REPO).keys() == {".gitattributes", CONFIG, TENSORS, CARD}
    assert same(NeuronMap.from_pretrained(REPO), neuron_map)


def test_a_pulled_folder_holds_the_very_bytes_that_were_pushed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push_to_hub(folder, REPO)
    pulled = pull(REPO, tmp_path / "pulled")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "pulled" / name).read_bytes() == (folder / name).read_bytes() == hub.files(REPO)[name]
    assert (tmp_path / "pulled" / CARD).read_bytes() == hub.files(REPO)[CARD]
    assert same(pulled, NeuronMap.from_pretrained(folder))


def test_tensors_are_large_files_and_the_config_is_not(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, REPO)
    stored = hub.repositories["models", REPO].commits[hub.repositories["models", REPO].refs["main"]]
    assert stored[TENSORS].large
    assert not stored[CONFIG].large
    assert hub.count("PUT", "/large/") == 1


def test_a_push_is_one_commit(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, REPO)
    assert hub.count("POST", "/commit/") == 1
    assert len(hub.repositories["models", REPO].commits) == 2


def test_pushing_the_same_again_makes_no_commit(hub: Hub, folder: Path) -> None:
    first = push_to_hub(folder, REPO)
    assert push_to_hub(folder, REPO).oid == first.oid
    assert hub.count("POST", "/commit/") == 1


def test_a_second_push_is_what_is_loaded_and_the_first_is_there_by_its_commit(hub: Hub, neuron_map: NeuronMap) -> None:
    first = neuron_map.push_to_hub(REPO)
    second = other_map().push_to_hub(REPO, commit_message="another")
    assert same(NeuronMap.from_pretrained(REPO), other_map())
    assert same(NeuronMap.from_pretrained(REPO, revision=first.oid), neuron_map)
    assert same(NeuronMap.from_pretrained(REPO, revision=second.oid), other_map())


def test_a_model_pushes_the_map_that_is_on_it(hub: Hub) -> None:
    _, model, neuron_map = tiny_pair(base_model_name_or_path="someone/tiny-llama")
    model.push_to_hub(REPO)
    assert NeuronMap.from_pretrained(REPO).modules == neuron_map.modules
    assert model.get_strengths() == dict.fromkeys(VALUES, 0.0)


def test_a_model_takes_its_map_from_a_branch_and_a_subfolder(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO, revision="tryout", subfolder="maps/first")
    other_map().push_to_hub(REPO, revision="tryout", subfolder="maps/second")
    assert {f"maps/{one}/{name}" for one in ("first", "second") for name in (CONFIG, TENSORS, CARD)} < hub.files(
        REPO, "tryout"
    ).keys()
    assert hub.files(REPO).keys() == {".gitattributes"}
    model = NeVAModel.from_pretrained(tiny_model(), REPO, revision="tryout", subfolder="maps/second")
    assert NeuronMap.from_model(model).modules == other_map().modules
    with pytest.raises(
        NeVAError, match=r"no neuron map in the repository .* at its top \(a map in a folder of it needs sub"
    ):
        NeuronMap.from_pretrained(REPO, revision="tryout")


def test_a_pull_at_a_revision_into_a_folder(hub: Hub, neuron_map: NeuronMap, tmp_path: Path) -> None:
    first = neuron_map.push_to_hub(REPO)
    other_map().push_to_hub(REPO)
    assert same(pull(REPO, tmp_path / "old", revision=first.oid), neuron_map)
    assert same(NeuronMap.from_pretrained(tmp_path / "old"), neuron_map)


def test_a_map_without_a_network_comes_from_the_cache(hub: Hub, neuron_map: NeuronMap, monkeypatch: Any) -> None:
    neuron_map.push_to_hub(REPO)
    NeuronMap.from_pretrained(REPO)
    before = len(hub.requests)
    assert same(NeuronMap.from_pretrained(REPO, local_files_only=True), neuron_map)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(NeuronMap.from_pretrained(REPO), neuron_map)
    assert len(hub.requests) == before


def test_a_pull_without_a_network_comes_from_the_cache(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push_to_hub(folder, REPO)
    pull(REPO, tmp_path / "first")
    before = len(hub.requests)
    pull(REPO, tmp_path / "second", local_files_only=True)
    assert len(hub.requests) == before
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in (tmp_path / "second").iterdir()} == {CONFIG, TENSORS, CARD}


def test_a_map_that_is_not_in_the_cache_says_that_the_hub_was_not_asked(
    hub: Hub, tmp_path: Path, folder: Path
) -> None:
    push_to_hub(folder, REPO)
    with pytest.raises(
        NeVAError, match=r"not all of it is in the cache, and the Hub was not asked\. Drop local_files_only"
    ):
        NeuronMap.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path / "empty")


def test_cache_dir_is_where_downloads_go(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push_to_hub(folder, REPO)
    NeuronMap.from_pretrained(REPO, cache_dir=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.name.startswith("models")] == [
        "models--tester--neva-map"
    ]


# What goes along, and what does not.


def test_pictures_and_a_license_go_along_and_nothing_else_does(hub: Hub, folder: Path, tmp_path: Path) -> None:
    for name in ("circle.png", "NOTICE", ".env", "notes.txt", "train.py"):
        (folder / name).write_bytes(b"x")
    (folder / ".identify").mkdir()
    (folder / ".identify" / "state.json").write_text("{}")
    (folder / "images").mkdir()
    (folder / "images" / "dials.png").write_bytes(b"y")
    push_to_hub(folder, REPO)
    pushed = {".gitattributes", CONFIG, TENSORS, CARD, "circle.png", "NOTICE", "images/dials.png"}
    assert hub.files(REPO).keys() == pushed
    hub.commit(REPO, {"handler.py": b"import os", "adapter_model.bin": b"pickle", "../up.png": b"z"})
    pull(REPO, tmp_path / "pulled")
    found = {
        path.relative_to(tmp_path / "pulled").as_posix() for path in (tmp_path / "pulled").rglob("*") if path.is_file()
    }
    assert found == pushed - {".gitattributes"}
    assert not (tmp_path / "up.png").exists()


def test_files_that_others_put_there_stay_after_a_push(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)
    hub.commit(REPO, {"examples/answers.md": b"mine"})
    other_map().push_to_hub(REPO)
    assert hub.files(REPO)["examples/answers.md"] == b"mine"


def test_a_broken_map_is_not_pushed(hub: Hub, folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-8])
    with pytest.raises(NeVAError, match="safetensors"):
        push_to_hub(folder, REPO)
    assert hub.repositories == {}


def test_a_map_that_names_a_folder_as_its_base_is_pushed_only_under_a_name_that_others_have(
    hub: Hub, tmp_path: Path
) -> None:
    local = random_map(tiny_model(), base_model_name_or_path="/home/me/llama").save_pretrained(tmp_path / "map")
    with pytest.raises(NeVAError, match=r"names '/home/me/llama' as its base model, which others do not have\."):
        push_to_hub(local, REPO)
    assert hub.repositories == {}
    push_to_hub(local, REPO, base_model="someone/tiny-llama")
    assert NeuronMap.from_pretrained(REPO).base_model == "someone/tiny-llama"
    assert b"/home/me" not in b"".join(hub.files(REPO).values())
    assert NeuronMap.from_pretrained(local).base_model == "/home/me/llama"


# Who may do what.


def test_a_private_repository_opens_to_its_token_alone(hub: Hub, neuron_map: NeuronMap, monkeypatch: Any) -> None:
    neuron_map.push_to_hub(REPO, private=True)
    assert hub.repositories["models", REPO].private
    assert same(NeuronMap.from_pretrained(REPO, token=TOKEN), neuron_map)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{constants.HF_HUB_CACHE}-of-a-stranger")
    with pytest.raises(NeVAError, match=r"no such repository, or it is private and your token does not open it"):
        NeuronMap.from_pretrained(REPO, token=False)


def test_what_should_be_private_is_not_pushed_where_all_can_see_it(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)
    before = hub.files(REPO)
    with pytest.raises(NeVAError, match=r"is there already and is public; nothing was pushed"):
        other_map().push_to_hub(REPO, private=True)
    assert hub.files(REPO) == before


def test_a_wrong_token_is_told_to_log_in(hub: Hub, neuron_map: NeuronMap) -> None:
    with pytest.raises(NeVAError, match=rf"Nothing was pushed to '{REPO}': the Hub .*[Ll]og in with `hf auth login`"):
        neuron_map.push_to_hub(REPO, token="hf_wrong")
    assert hub.repositories == {}


def test_a_repository_that_is_not_there_says_so(hub: Hub) -> None:
    with pytest.raises(NeVAError, match=r"No neuron map was found at tester/none: .* the Hub has no such repository"):
        NeuronMap.from_pretrained("tester/none")
    with pytest.raises(NeVAError, match="the Hub has no such repository"):
        pull("tester/none", "somewhere")
    assert not Path("somewhere").exists()


def test_a_gated_repository_says_that_it_is(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)
    hub.repositories["models", REPO].gated = True
    with pytest.raises(NeVAError, match="the repository is gated. Accept its conditions"):
        NeuronMap.from_pretrained(REPO)


def test_a_revision_that_is_not_there_says_so(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)
    with pytest.raises(NeVAError, match="the repository has no such revision"):
        NeuronMap.from_pretrained(REPO, revision="v9")


def test_somebody_elses_repository_takes_a_pull_request(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)
    before = hub.files(REPO)
    done = other_map().push_to_hub(REPO, create_pr=True)
    assert done.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.files(REPO) == before
    assert same(NeuronMap.from_pretrained(REPO, revision="refs/pr/1"), other_map())


def test_a_name_space_of_others_is_refused_with_what_to_do(hub: Hub, neuron_map: NeuronMap) -> None:
    with pytest.raises(NeVAError, match=r"your token may not write there .*no rights to create.*--create-pr"):
        neuron_map.push_to_hub("others/neva-map")


@pytest.mark.parametrize("name", ["no spaces/allowed", "a/b/c", "", "../up", "a/b--c"])
def test_what_cannot_be_a_repository_is_refused_before_anything_is_asked(hub: Hub, folder: Path, name: str) -> None:
    with pytest.raises(NeVAError, match=r"cannot be the id of a repository on the Hub"):
        push_to_hub(folder, name)
    with pytest.raises(NeVAError, match=r"cannot be the id of a repository on the Hub"):
        pull(name, folder.parent / "pulled")
    assert hub.requests == []


# What goes wrong on the way.


def test_a_connection_cut_in_the_middle_of_an_upload_is_tried_again(hub: Hub, neuron_map: NeuronMap) -> None:
    cut = Fault("PUT", "/large/", cut="in")
    hub.faults.append(cut)
    neuron_map.push_to_hub(REPO)
    assert cut.times == 0
    assert hub.count("PUT", "/large/") == 2
    assert same(NeuronMap.from_pretrained(REPO), neuron_map)


def test_an_upload_that_never_gets_through_leaves_the_repository_as_it_was(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)
    before = hub.files(REPO)
    hub.faults.append(Fault("PUT", "/large/", cut="in", times=10**6))
    with pytest.raises(
        NeVAError, match=r"Nothing was pushed .* connection to the Hub failed or was lost .*run the same ag"
    ):
        other_map().push_to_hub(REPO)
    assert hub.files(REPO) == before
    assert same(NeuronMap.from_pretrained(REPO), neuron_map)
    hub.faults.clear()
    other_map().push_to_hub(REPO)
    assert same(NeuronMap.from_pretrained(REPO), other_map())


@pytest.mark.parametrize("cut", ["in", "after"])
def test_a_connection_cut_at_the_commit_makes_one_commit(hub: Hub, neuron_map: NeuronMap, cut: str) -> None:
    hub.faults.append(Fault("POST", "/commit/", cut=cut))
    done = neuron_map.push_to_hub(REPO)
    assert len(hub.repositories["models", REPO].commits) == 2
    assert hub.repositories["models", REPO].refs["main"] == done.oid
    assert same(NeuronMap.from_pretrained(REPO), neuron_map)


def test_a_lost_answer_never_opens_a_second_pull_request(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)
    hub.faults.append(Fault("POST", "/commit/", cut="after"))
    with pytest.raises(NeVAError, match="connection to the Hub failed or was lost"):
        other_map().push_to_hub(REPO, create_pr=True)
    assert [name for name in hub.repositories["models", REPO].refs if name.startswith("refs/pr")] == ["refs/pr/1"]


@pytest.mark.parametrize("status", [409, 412, 500, 503])
def test_a_commit_that_is_refused_for_now_is_tried_again(hub: Hub, neuron_map: NeuronMap, status: int) -> None:
    hub.faults.append(Fault("POST", "/commit/", status=status))
    neuron_map.push_to_hub(REPO)
    assert hub.count("POST", "/commit/") == 2
    assert same(NeuronMap.from_pretrained(REPO), neuron_map)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (409, "the repository was changed at the same time"),
        (403, "your token may not write there"),
        (413, "too large"),
        (429, "fewer requests"),
        (500, "the Hub is in trouble"),
    ],
)
def test_a_commit_that_is_always_refused_ends_in_a_sentence(
    hub: Hub, neuron_map: NeuronMap, status: int, words: str
) -> None:
    hub.faults.append(Fault("POST", "/commit/", status=status, times=10**6))
    with pytest.raises(NeVAError, match=rf"Nothing was pushed to '{REPO}': .*{words}.*made to fail with {status}"):
        neuron_map.push_to_hub(REPO)
    assert hub.files(REPO).keys() == {".gitattributes"}


def test_a_commit_of_somebody_else_in_between_is_kept(hub: Hub, neuron_map: NeuronMap) -> None:
    neuron_map.push_to_hub(REPO)

    def intrude(method: str, path: str) -> None:
        if "/commit/" in path:
            hub.before = None
            hub.commit(REPO, {CARD: hub.files(REPO)[CARD] + b"\nA sentence from the web.\n", "mine.txt": b"mine"})

    hub.before = intrude
    other_map().push_to_hub(REPO)
    assert hub.files(REPO)["mine.txt"] == b"mine"
    assert b"A sentence from the web." in hub.files(REPO)[CARD]
    assert same(NeuronMap.from_pretrained(REPO), other_map())


def test_a_push_in_between_does_not_mix_two_maps(hub: Hub, neuron_map: NeuronMap, tmp_path: Path) -> None:
    neuron_map.push_to_hub(REPO)
    other = other_map().save_pretrained(tmp_path / "other")
    new = {name: (other / name).read_bytes() for name in (CONFIG, TENSORS)}

    def intrude(method: str, path: str) -> None:
        if method == "GET" and path.endswith(TENSORS):
            hub.before = None
            hub.commit(REPO, new)

    hub.before = intrude
    loaded = NeuronMap.from_pretrained(REPO)
    assert hub.before is None
    assert same(loaded, other_map())


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_download_that_breaks_off_leaves_the_last_whole_map_in_the_cache(
    hub: Hub, neuron_map: NeuronMap, name: str
) -> None:
    neuron_map.push_to_hub(REPO)
    NeuronMap.from_pretrained(REPO)
    random_map(tiny_model(), VALUES[:2], base_model_name_or_path="someone/tiny-llama").push_to_hub(REPO)
    hub.faults.append(Fault("GET", f"/resolve/.*{name}", status=500, times=10**6))
    with pytest.raises(NeVAError, match=r"the Hub is in trouble"):
        NeuronMap.from_pretrained(REPO)
    assert same(NeuronMap.from_pretrained(REPO, local_files_only=True), neuron_map)
    hub.faults.clear()
    assert NeuronMap.from_pretrained(REPO).values == VALUES[:2]


def test_a_pull_that_breaks_off_leaves_the_folder_as_it_was(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "circle.png").write_bytes(b"x" * 1000)
    push_to_hub(folder, REPO)
    hub.faults.append(Fault("GET", r"/resolve/.*circle\.png", status=500, times=10**6))
    mine = other_map().save_pretrained(tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    with pytest.raises(NeVAError, match="the Hub is in trouble"):
        pull(REPO, mine, overwrite=True)
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_a_repository_with_half_a_map_is_refused(hub: Hub, neuron_map: NeuronMap, tmp_path: Path) -> None:
    neuron_map.push_to_hub(REPO)
    hub.commit(REPO, {TENSORS: None})
    with pytest.raises(NeVAError, match=r"There is no neuron map in the repository tester/neva-map"):
        NeuronMap.from_pretrained(REPO)
    other = other_map().select(VALUES[:1]).save_pretrained(tmp_path / "other")
    hub.commit(REPO, {TENSORS: (other / TENSORS).read_bytes()})
    with pytest.raises(NeVAError):
        NeuronMap.from_pretrained(REPO)
    with pytest.raises(NeVAError):
        pull(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_file_too_large_for_a_map_is_not_fetched(hub: Hub, neuron_map: NeuronMap, monkeypatch: Any) -> None:
    neuron_map.push_to_hub(REPO)
    size = len(hub.files(REPO)[TENSORS])
    monkeypatch.setattr("neva_hf.hub_files.MAX_TENSOR_BYTES", size - 1)
    with pytest.raises(NeVAError, match=rf"has {size:,} bytes, and may have at most {size - 1:,}; it was not fetched"):
        NeuronMap.from_pretrained(REPO)
    assert hub.count("GET", TENSORS) == 0


def test_a_pull_does_not_replace_a_map_unless_told_to(
    hub: Hub, folder: Path, neuron_map: NeuronMap, tmp_path: Path
) -> None:
    neuron_map.push_to_hub(REPO)
    mine = other_map().save_pretrained(tmp_path / "mine")
    with pytest.raises(NeVAError, match=r"There is a adapter_config\.json in .*mine already"):
        pull(REPO, mine)
    assert same(NeuronMap.from_pretrained(mine), other_map())
    pull(REPO, mine, overwrite=True)
    assert same(NeuronMap.from_pretrained(mine), neuron_map)


# The command line.


def test_push_and_pull_by_the_command_line(hub: Hub, folder: Path, tmp_path: Path) -> None:
    run = CliRunner()
    pushed = run.invoke(app, ["push", str(folder), REPO, "--private", "-m", "first", "--license", "mit", "--json"])
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["commit"] == hub.repositories["models", REPO].refs["main"]
    assert hub.repositories["models", REPO].private
    pulled = run.invoke(app, ["pull", REPO, str(tmp_path / "pulled"), "--json"])
    assert pulled.exit_code == 0, pulled.output
    assert list(json.loads(pulled.stdout)["values"]) == VALUES
    assert same(NeuronMap.from_pretrained(tmp_path / "pulled"), NeuronMap.from_pretrained(folder))


def test_errors_of_the_hub_are_one_line_and_exit_code_1(hub: Hub, folder: Path, tmp_path: Path) -> None:
    failed = CliRunner().invoke(app, ["push", str(folder), REPO, "--token", "hf_wrong"])
    assert failed.exit_code == 1
    assert [line for line in failed.stderr.splitlines() if line][-1].startswith("Error: Nothing was pushed to")
    assert "Traceback" not in failed.output


def test_a_fresh_process_pulls_loads_and_generates(hub: Hub, folder: Path, tmp_path: Path) -> None:
    push_to_hub(folder, REPO)
    tiny_model().save_pretrained(tmp_path / "base")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
from neva_hf import NeVAModel
from neva_hf.hub import pull
pull("tester/neva-map", sys.argv[1])
ids = torch.arange(3, 10)[None]
for source in ("tester/neva-map", sys.argv[1]):
    model = NeVAModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval(), source)
    print(model(input_ids=ids, strengths={"power": 1.0}).logits.double().sum().item())
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pulled"), str(tmp_path / "base")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = NeVAModel.from_pretrained(tiny_model(), folder)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 10)[None], strengths={"power": 1.0}).logits.double().sum().item()
    assert [float(line) for line in done.stdout.split()] == pytest.approx([expected] * 2, abs=1e-3)


def test_the_test_server_refuses_what_is_not_there(hub: Hub) -> None:
    assert Stored(b"x").oid != Stored(b"x", large=True).oid
    assert hub.count("GET", ".") == 0
