"""Stories in each layout, the mix of tasks, and the board trainer as it is started from the command line."""

import json
import pickle

import numpy as np
import pytest
import torch
from loading import ROOT
from PIL import Image
from safetensors.torch import load_file
from storyweft.host import trained_board
from storyweft.training import stories
from training_runs import outputs

STEPS = ["--steps", "2", "--minutes", "0", "--batch", "2", "--cpu", "--side", "64"]


def painted(folder, count, size=(40, 30)):
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", size, (20 * index, 10, 0)).save(folder / f"{index}.png")


def test_folders_of_pictures_and_captions(tmp_path):
    painted(tmp_path / "a", 5)
    painted(tmp_path / "deep" / "b", 2)
    (tmp_path / "a" / "captions.txt").write_text("zero\none\ntwo\nthree\nfour\n")
    (tmp_path / "deep" / "b" / "captions.txt").write_text("left\nright\n")
    found = stories.folder_stories(tmp_path, 2)
    assert [[picture.caption for picture in story] for story in found] == [
        ["zero", "one"],
        ["two", "three"],
        ["left", "right"],
    ]
    assert found[1][1].read()[0, 0].tolist() == [60, 10, 0]
    with pytest.raises(ValueError, match="no folder with captions.txt and as many pictures of 6 pictures in"):
        stories.folder_stories(tmp_path, 6)
    (tmp_path / "a" / "captions.txt").write_text("zero\n")
    with pytest.raises(ValueError, match="has 1 captions and its folder 5 pictures"):
        stories.folder_stories(tmp_path, 2)


def test_the_published_layout_of_pororo(tmp_path):
    """Each file holds several frames one below the other; a story is a first picture and the four that follow it."""
    names = [f"Pororo_1/{index}.png" for index in range(6)]
    (tmp_path / "Pororo_1").mkdir()
    for index, name in enumerate(names):
        whole = np.zeros((3 * 20, 20, 3), np.uint8)
        whole[:, :, 0], whole[:, :, 1] = index, np.arange(3).repeat(20)[:, None]
        Image.fromarray(whole).save(tmp_path / name)
    np.save(tmp_path / "descriptions.npy", {name[:-4]: [f"text {index}", "other"] for index, name in enumerate(names)})
    np.save(tmp_path / "img_cache4.npy", np.array([names[0].encode(), names[1].encode()]))
    np.save(
        tmp_path / "following_cache4.npy", np.array([[name.encode() for name in names[1 + i : 5 + i]] for i in (0, 1)])
    )
    np.save(tmp_path / "train_seen_unseen_ids.npy", np.array([[1], [0], [0]], dtype=object), allow_pickle=True)
    (story,) = stories.pororo_stories(tmp_path, 5)
    assert [picture.caption for picture in story] == [f"text {index}" for index in range(1, 6)]
    shown = story[0].read()
    assert shown.shape == (20, 20, 3) and shown[0, 0].tolist() == [1, 1, 0] and shown[-1, 0].tolist() == [1, 1, 0]


def test_the_published_layout_of_flintstones(tmp_path):
    shots = tmp_path / "video_frames_sampled"
    shots.mkdir()
    for index in range(4):
        np.save(shots / f"s{index}.npy", np.full((2, 8, 8, 3), index, np.uint8))
    told = [{"globalID": f"s{index}", "description": f"text {index}"} for index in range(4)]
    (tmp_path / "flintstones_annotations_v1-0.json").write_text(json.dumps(told))
    (tmp_path / "train-val-test_split.json").write_text(json.dumps({"train": ["s0", "s3"], "val": ["s1"], "test": []}))
    (tmp_path / "following_cache4.pkl").write_bytes(pickle.dumps({"s0": ["s1", "s2"]}))
    (story,) = stories.flintstones_stories(tmp_path, 3)
    assert [picture.caption for picture in story] == ["text 0", "text 1", "text 2"]
    assert story[2].read().mean() == 2


def test_the_demo_storys_character_keeps_its_look():
    story = stories.demo_story(np.random.default_rng(3), 4)
    kinds = {word for picture in story for word in picture.caption.split() if word in stories.KINDS}
    assert len(kinds) == 1 and len({picture.read().tobytes() for picture in story}) == 4


def test_tasks_are_a_third_each():
    """All frames; the rest after the first k, each k as often; every other subset, with at least one known and one target."""
    found = stories.draw_targets(3000, 4, torch.Generator().manual_seed(1))
    words = ["".join(map(str, row)) for row in found.tolist()]
    counts = {word: words.count(word) for word in set(words)}
    tails = ["0111", "0011", "0001"]
    assert set(counts) == {f"{number:04b}" for number in range(1, 16)}
    assert abs(counts["1111"] - 1000) < 120 and abs(sum(counts[word] for word in tails) - 1000) < 120
    assert all(abs(counts[word] - 333) < 80 for word in tails)
    assert all(abs(counts[word] - 91) < 45 for word in set(counts) - {"1111", *tails})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boards")
    for name in ("one", "two", "three", "four"):
        painted(folder / "stories" / name, 3)
        (folder / "stories" / name / "captions.txt").write_text("a fox in the snow\na fox\n\n"[:-1] + "at night\n")
    base = ["--folder", str(folder), *STEPS]
    options = {
        "demo": [*base, "--count", "6", "--frames", "4"],
        "again": [*base, "--count", "6", "--start", str(folder / "board.safetensors"), "--name", "second"],
        "stories": [*base, "--stories", str(folder / "stories"), "--frames", "3", "--dry-run"],
        "side": [*base, "--side", "50"],
        "missing": [*base, "--checkpoint", str(folder / "no.safetensors")],
    }
    return dict(zip(options, outputs("training.story_board", list(options.values())), strict=True)), folder


def test_a_trained_module_is_what_the_node_loads(runs):
    told, folder = runs
    assert told["demo"].endswith("done") and told["again"].endswith("done"), told
    loaded = trained_board.load(str(folder / "board.safetensors"), "Test")
    assert loaded.metadata["known_frames"] == "clean" and len(loaded.metadata["base_model"]) == 64
    assert len(loaded.network.sites) == 7 and loaded.network.width == 96
    moved = [float(site.gate) for site in loaded.network.sites]
    assert all(moved) and loaded.network.sites[0].lora_frame["to_q"].up.any()
    assert loaded.network.ctx.prior_mlp[2].weight.any()
    unet = load_file(ROOT / "weights" / "unet.safetensors")
    assert not set(unet) & set(load_file(folder / "board.safetensors"))
    second = trained_board.load(str(folder / "second.safetensors"), "Test")
    assert not torch.equal(second.network.ctx.query, loaded.network.ctx.query)
    assert (folder / "board_samples.png").exists()


def test_a_folder_of_stories_is_checked_without_training(runs):
    told, folder = runs
    assert "2 stories of 3 pictures, 2 more for samples" in told["stories"]
    assert "no.safetensors and there is no such file" in told["missing"]
    assert "--side is 50" in told["side"] or told["side"] == "2"
