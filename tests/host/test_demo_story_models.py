"""The demo weights of motion predictor, trained board and MagDiff belong to the demo models and are as small as agreed."""

import pytest
import torch
from safetensors import safe_open
from storyweft.host import demo, families, magdiff, motion, trained_board
from storyweft.host.image_adapter import load_demo as demo_adapter
from storyweft.nodes.board import StoryBoard
from storyweft.nodes.magdiff import DEMO, LoadMagDiff
from storyweft.nodes.motion import DEMO as DEMO_MOTION
from storyweft.nodes.motion import LoadMotionPredictor, SemanticMotionPredictor
from storyweft.nodes.trained_board import DEMO as DEMO_BOARD
from storyweft.nodes.trained_board import LoadTrainedBoard, TrainedBoardBlock

import nodes


@pytest.fixture(scope="module")
def loaded():
    return demo.load_demo_video()


@pytest.fixture(scope="module")
def pictures():
    return demo.load_demo()


@pytest.mark.parametrize("name, limit", [("motion", 0.5e6), ("board", 0.6e6), ("magdiff", 0.3e6)])
def test_files_keep_their_limit_and_say_how_they_were_made(name, limit):
    path = demo.WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= limit
    with safe_open(path, "pt") as file:
        told = file.metadata()
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())
    assert {"format", "steps", "minutes", "seed", "loss", "base_model"} <= set(told) and len(told["base_model"]) == 64


def prompts(clip):
    return [nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a fox in the snow by day", "")]


def test_the_demo_predictor_fits_the_demo_video_model(loaded):
    model, clip, _, vision = loaded
    predictor = LoadMotionPredictor.execute(DEMO_MOTION).args[0]
    assert predictor.metadata["encoder"] == motion.encoder_name(vision)
    given = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    made, _, _, seen, frames = SemanticMotionPredictor.execute(
        model, *prompts(clip), vision, given, 8, motion_predictor=predictor
    ).args
    (rule,) = made.model_options["transformer_options"]["storyweft_rules"]
    assert isinstance(rule, motion.AdapterRows) and frames == 8 and not rule.neutral
    keys = vision.encode_image(given)["image_embeds"]
    assert torch.equal(seen.image_embeds[[0, -1]], keys.float())


def test_the_demo_board_fits_the_demo_model(pictures):
    model, clip, _, _ = pictures
    found = LoadTrainedBoard.execute(DEMO_BOARD).args[0]
    _, positive, _, _ = StoryBoard.execute(
        clip, "a fox in the snow\na fox in the city", 1, 2, 128, 128, "row by row"
    ).args
    made, *_ = TrainedBoardBlock.execute(model, found, positive, prompts(clip)[1], 1.0, "clean").args
    (rule,) = made.model_options["transformer_options"]["storyweft_rules"]
    assert isinstance(rule, trained_board.TrainedBoardRule)
    assert all(float(site.gate) for site in found.network.sites)


def test_the_demo_alignment_fits_the_demo_model_and_adapter(pictures):
    found, adapter = LoadMagDiff.execute(DEMO, demo_adapter()).args
    magdiff.check_family(found, pictures[0])
    assert len(adapter.alphas) == len(families.find(pictures[0], "test").cross_layers)
    assert found.network.conv_in.any()
