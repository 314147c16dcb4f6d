"""The board nodes as a user meets them: known frames kept to the bit, refusals in one sentence."""

import logging
import math

import pytest
import tiny
import tiny_clip
import torch
from storyweft.host.board import MARK, Board
from storyweft.host.demo import load_demo
from storyweft.nodes.board import BoardFrames, FrameStoryCrossAttention, StoryBoard
from storyweft.story.script import parse_script

import nodes

FOUR = "a fox\na bear\na robot\na snail"


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@pytest.fixture(scope="module")
def clip(demo):
    return demo[1]


def made(clip, captions=FOUR, rows=2, columns=2, width=64, height=64, order="row by row", **more):
    return StoryBoard.execute(clip, captions, rows, columns, width, height, order, **more).args


def pictures(count, height=64, width=64, seed=0):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))


def latents(count, seed=1):
    return {"samples": torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))}


def drawn(demo, latent, conditioning, blend=0.0, steps=2, known="renoise", **more):
    model, positive = FrameStoryCrossAttention.execute(demo[0], conditioning, blend, known, **more).args
    negative = nodes.CLIPTextEncode().encode(demo[1], "")[0]
    with torch.inference_mode():
        return nodes.KSampler().sample(model, 3, steps, 4.0, "euler", "normal", positive, negative, latent)[0]


def test_captions_are_joined_and_the_block_gives_the_sampler_one_prompts_length(demo, clip):
    latent, conditioning, board, report = made(clip)
    assert latent["samples"].shape == (1, 4, 16, 16) and "noise_mask" not in latent
    text = conditioning[0][0]
    alone = torch.cat([nodes.CLIPTextEncode().encode(clip, caption)[0][0][0] for caption in FOUR.splitlines()], 1)
    assert torch.equal(text, alone)
    assert torch.equal(conditioning[0][1][MARK].labels, torch.arange(4).repeat_interleave(77))
    assert report.startswith("task: visualisation")
    positive = FrameStoryCrossAttention.execute(demo[0], conditioning, 0.0, "renoise").args[1]
    torch.testing.assert_close(positive[0][0], alone.unflatten(1, (4, 77)).mean(1))


def test_sdxl_pooled_vectors_are_the_mean_of_the_frames():
    clip = tiny_clip.sdxl()
    conditioning = made(clip)[1]
    pooled = [clip.encode_from_tokens_scheduled(clip.tokenize(c))[0][1]["pooled_output"] for c in FOUR.splitlines()]
    torch.testing.assert_close(conditioning[0][1]["pooled_output"], torch.cat(pooled).mean(0, keepdim=True))


def test_captions_of_different_length_meet_and_every_one_keeps_its_label():
    for clip in (tiny_clip.sd1(), tiny_clip.ltxv(), tiny_clip.qwen_image()):
        conditioning = made(clip, "a fox\n" + "a very long tale of a bear " * 30 + "\na robot\na snail")[1]
        text, extras = conditioning[0]
        counts = extras[MARK].labels.bincount()
        assert len(counts) == 4 and (counts == text.shape[1] // 4).all()
        assert "attention_mask" not in extras or extras["attention_mask"].shape == text.shape[:2]


def test_a_story_gives_its_prompts_and_typed_captions_come_first(clip):
    story = parse_script("[Ana] a fox", "[Ana] one\n[Ana] two\n[Ana] three\n[Ana] four", id_count=2)
    assert made(clip, "", story=story)[2].captions == tuple(panel.prompt for panel in story.panels)
    assert made(clip, FOUR, story=story)[2].captions == tuple(FOUR.splitlines())
    with pytest.raises(ValueError, match="StoryweftBoard: story holds 4 captions for 2 frames"):
        made(clip, "", 1, 2, story=story)
    with pytest.raises(ValueError, match="story is str; connect the story output of Story Script"):
        made(clip, story="text")


@pytest.mark.parametrize("order", ["row by row", "column by column"])
def test_known_frames_lie_in_their_cells_and_the_mask_leaves_them_alone(clip, order):
    given = latents(2)
    latent, _, board, report = made(clip, order=order, known_latents=given, known_frames="2, 4")
    place = {"row by row": [(0, 1), (1, 1)], "column by column": [(1, 0), (1, 1)]}[order]
    for number, (row, column) in enumerate(place):
        cell = (..., slice(row * 8, row * 8 + 8), slice(column * 8, column * 8 + 8))
        assert torch.equal(latent["samples"][0][cell], given["samples"][number])
        assert not latent["noise_mask"][0][cell].any()
    assert latent["noise_mask"].sum() == 2 * 64 and latent["noise_mask"].shape == (1, 16, 16)
    assert board.targets == (True, False, True, False) and report.startswith("task: completion")


def test_known_frames_come_back_exactly_as_latents_and_pixels(demo, clip):
    given = pictures(2)
    latent, conditioning, board, report = made(clip, vae=demo[2], known_images=given)
    assert report.startswith("task: continuation")
    alone = demo[2].encode(given[1:2])
    assert torch.equal(latent["samples"][0, :, :8, 8:], alone[0])  # encoded by itself: its neighbours do not matter
    for known in ("renoise", "clean"):
        out = drawn(demo, latent, conditioning, known=known)
        images, frames = BoardFrames.execute(out, board, demo[2]).args
        assert images.shape == (4, 64, 64, 3) and frames["samples"].shape == (4, 4, 8, 8)
        assert torch.equal(images[:2], given)
        assert torch.equal(out["samples"][0, :, :8, 8:], alone[0])
        assert torch.equal(frames["samples"][1], alone[0])
        assert (images[2:] - demo[2].decode(frames["samples"])[2:]).abs().max() == 0


def test_known_frames_come_back_exactly_from_a_sampler_without_the_block_too(demo, clip):
    given = latents(3)
    latent, conditioning, board, _ = made(clip, known_latents=given)
    negative = nodes.CLIPTextEncode().encode(clip, "")[0]
    with torch.inference_mode():
        out = nodes.KSampler().sample(demo[0], 3, 2, 4.0, "euler", "normal", conditioning, negative, latent)[0]
    assert torch.equal(BoardFrames.execute(out, board, demo[2]).args[1]["samples"][:3], given["samples"])


def test_one_frame_of_a_finished_board_is_replaced_and_the_others_are_kept_to_the_bit(demo, clip):
    latent, conditioning, board, _ = made(clip)
    images, frames = BoardFrames.execute(drawn(demo, latent, conditioning), board, demo[2]).args
    again = made(
        clip, "a fox\na bear\nan owl\na snail", known_images=images, known_latents=frames, draw_frames="3", vae=demo[2]
    )
    assert again[3].startswith("task: replace") and "frame 3 has a picture that is replaced" in again[3]
    out = drawn(demo, again[0], again[1], steps=3)
    images2, frames2 = BoardFrames.execute(out, again[2], demo[2]).args
    for kept in (0, 1, 3):
        assert torch.equal(images2[kept], images[kept]) and torch.equal(frames2["samples"][kept], frames["samples"][kept])
    assert (images2[2] - images[2]).abs().max() > 0.05
    other = made(clip, "a cat\na bear\nan owl\na snail", known_latents=frames, draw_frames="3")
    kept = BoardFrames.execute(drawn(demo, other[0], other[1], steps=3), other[2], demo[2]).args[1]["samples"]
    assert torch.equal(kept[[0, 1, 3]], frames["samples"][[0, 1, 3]])  # captions of known frames cannot move them


def test_when_every_frame_is_known_nothing_is_drawn_and_it_is_said(demo, clip, caplog):
    given = latents(4)
    with caplog.at_level(logging.WARNING):
        latent, conditioning, board, report = made(clip, known_latents=given)
        out = drawn(demo, latent, conditioning)
    assert report.startswith("nothing to draw") and "every frame has a picture" in caplog.text
    assert torch.equal(out["samples"], latent["samples"])
    assert torch.equal(BoardFrames.execute(out, board, demo[2]).args[1]["samples"], given["samples"])


def test_several_boards_keep_their_frames_in_order(demo, clip):
    captions = "\n".join(f"a fox {number}" for number in range(8))
    latent, conditioning, board, _ = made(clip, captions, boards=2, known_latents=latents(1), known_frames="2")
    assert latent["samples"].shape == (2, 4, 16, 16) and conditioning[0][0].shape == (2, 4 * 77, 96)
    out = drawn(demo, latent, conditioning)
    frames = BoardFrames.execute(out, board, demo[2]).args[1]["samples"]
    assert frames.shape == (8, 4, 8, 8)
    assert torch.equal(frames[1], frames[5]) and torch.equal(frames[1], latents(1)["samples"][0])
    assert torch.equal(frames[6], out["samples"][1, :, 8:, :8])


def test_an_empty_frame_of_another_model_sets_channels_and_size(clip):
    latent = made(clip, empty_frame={"samples": torch.zeros(1, 16, 2, 4, 6), "downscale_ratio_spacial": 16})[0]
    assert latent["samples"].shape == (1, 16, 2, 8, 12) and latent["downscale_ratio_spacial"] == 16


def test_other_sizes_are_stretched_only_when_asked_and_then_are_the_originals(demo, clip):
    given = pictures(1, 32, 64)
    with pytest.raises(ValueError, match=r"the picture of frame 1 is 64 x 32 pixels and frames are 64 x 64; resize it, or set "):
        made(clip, vae=demo[2], known_images=given)
    latent, _, board, _ = made(clip, vae=demo[2], known_images=given, other_sizes="stretch")
    assert board.pictures[0].shape == (64, 64, 3)
    torch.testing.assert_close(latent["samples"][0, :, :8, :8], demo[2].encode(board.pictures[0][None])[0])


REFUSALS = [
    ({"captions": "a\nb\nc"}, "captions holds 3 captions for 4 frames; write one a line, 4"),
    ({"captions": "a\n\nc\nd"}, "captions line 2 is blank"),
    ({"captions": ""}, "captions holds 0 captions for 4 frames"),
    ({"captions": "a\nb\nc", "boards": 2}, "captions holds 3 captions for 2 boards of 4 frames"),
    ({"known_frames": "5", "known_latents": latents(1)}, "known_frames: '5' names no frames of this board"),
    ({"known_frames": "1, 2", "known_latents": latents(1)}, "known_latents holds 1 pictures for 2 known frames .*'1, 2'"),
    ({"known_frames": "1, 2"}, "known_images holds 0 pictures for 2 known frames"),
    ({"known_latents": latents(5)}, "known_latents holds 5 pictures for 5 known frames of a board of 4"),
    ({"known_latents": latents(1), "draw_frames": "2"}, "draw_frames is '2' and frame 3, 4 has no picture to keep"),
    ({"draw_frames": "x"}, "draw_frames: 'x' is no frame number"),
    ({"known_images": pictures(1)}, "known_images needs the vae"),
    ({"known_images": pictures(1), "known_latents": latents(2)}, "known_images holds 1 pictures and known_latents 2"),
    ({"known_latents": {"samples": torch.zeros(1, 4, 8, 6)}}, r"the latent of frame 1 is \(4, 8, 6\) and frames are \(4, 8, 8\)"),
    ({"width": 60}, "a frame of 60 x 64 pixels is no multiple of 8; use 56 x 64 or 64 x 64"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSALS, ids=[sentence[:40] for _, sentence in REFUSALS])
def test_a_board_that_does_not_add_up_is_refused(clip, change, sentence):
    with pytest.raises(ValueError, match=f"StoryweftBoard: {sentence}"):
        made(clip, **change)


def test_a_checkpoint_without_text_encoder_is_refused():
    with pytest.raises(ValueError, match="StoryweftBoard: clip is empty"):
        made(None)


def test_fewer_captions_are_allowed_by_an_explicit_choice(clip):
    board = made(clip, "a fox", missing_captions="leave empty")[2]
    assert board.captions == ("a fox", "", "", "")


@pytest.mark.parametrize(("name", "value"), [("blend", math.nan), ("blend", -0.1), ("blend", 1.5), ("start_percent", math.inf),
                                             ("end_percent", -1.0)])  # fmt: skip
def test_numbers_outside_0_to_1_are_refused(demo, clip, name, value):
    settings = {"blend": 0.0, "known_frames": "renoise", name: value}
    with pytest.raises(ValueError, match=f"StoryweftFrameStoryCrossAttention: {name} is {value}; give a number from 0 to 1"):
        FrameStoryCrossAttention.execute(demo[0], made(clip)[1], **settings)


def test_what_the_block_cannot_work_with_is_refused(demo, clip):
    conditioning = made(clip)[1]
    plain = nodes.CLIPTextEncode().encode(clip, "a fox")[0]

    def execute(given, model=demo[0], blend=0.0, **more):
        return FrameStoryCrossAttention.execute(model, given, blend, "renoise", **more)

    with pytest.raises(ValueError, match="start_percent 0.8 lies after end_percent 0.2"):
        execute(conditioning, start_percent=0.8, end_percent=0.2)
    with pytest.raises(ValueError, match="conditioning is not from StoryweftBoard"):
        execute(plain)
    with pytest.raises(ValueError, match="conditioning is empty"):
        execute([])
    joined = nodes.ConditioningConcat().concat(conditioning, plain)[0]
    with pytest.raises(ValueError, match="conditioning was changed after StoryweftBoard"):
        execute(joined)
    with pytest.raises(ValueError, match="already carries a StoryweftFrameStoryCrossAttention"):
        execute(conditioning, execute(conditioning).args[0])
    with pytest.raises(ValueError, match="blend is 0.5 and Flux reads text and picture in one sequence"):
        execute(conditioning, tiny.build("flux"), 0.5)
    with pytest.raises(ValueError, match="frames of 72 x 64 pixels are not a multiple of 32, .* use 64 x 64 or 96 x 64"):
        execute(made(clip, width=72)[1])


def test_frames_of_something_else_than_this_board_are_refused(demo, clip):
    board = made(clip)[2]
    with pytest.raises(ValueError, match=r"StoryweftBoardFrames: samples are \(8, 8\) latent cells and the board is \(16, 16\)"):
        BoardFrames.execute({"samples": torch.zeros(1, 4, 8, 8)}, board, demo[2])
    with pytest.raises(ValueError, match="StoryweftBoardFrames: board is str"):
        BoardFrames.execute({"samples": torch.zeros(1, 4, 16, 16)}, "board", demo[2])


def test_a_summary_moves_the_story_branch_only(demo, clip):
    latent, conditioning, *_ = made(clip)
    told = nodes.CLIPTextEncode().encode(clip, "animals in the snow")[0]
    frame, summed = (drawn(demo, latent, conditioning, summary=one)["samples"] for one in (None, told))
    torch.testing.assert_close(frame, summed, atol=1e-4, rtol=1e-4)
    blended = [drawn(demo, latent, conditioning, 0.5, summary=one)["samples"] for one in (None, told)]
    assert (blended[0] - blended[1]).abs().max() > 1e-3


def test_the_board_keeps_what_belongs_to_its_frames(clip):
    given = latents(2)
    board = made(clip, known_latents=given, known_frames="4, 1")[2]
    assert isinstance(board, Board) and board.captions == tuple(FOUR.splitlines())
    assert torch.equal(board.latents[3], given["samples"][0]) and torch.equal(board.latents[0], given["samples"][1])
