"""The Masked Attention node as a user meets it: words in real tokenizers, refusals in one sentence."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import tiny_clip
import torch
from storyweft.attention.masked import NOBODY
from storyweft.host import override
from storyweft.host.words import KEY, find_board_words, find_words, label_words
from storyweft.nodes.board import FrameStoryCrossAttention, StoryBoard
from storyweft.nodes.masked import MaskedAttention
from storyweft.story.boxes import Box, BoxTrack, TrackedObject

LEFT, RIGHT = Box(0.0, 0.1, 0.5, 0.9), Box(0.5, 0.1, 1.0, 0.9)
FOX = BoxTrack(1, (TrackedObject("fox", "a fox", (LEFT,)),))
TWO = BoxTrack(1, (TrackedObject("one", "a red fox", (LEFT,)), TrackedObject("two", "a robot", (RIGHT,))))


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


@pytest.fixture(scope="module")
def clip():
    return tiny_clip.sd1(16)


def labels(clip, prompt, phrases):
    length = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0].shape[1]
    return find_words(clip, prompt, phrases, length, "test")


def test_words_of_one_object_are_matched_as_a_set(clip):
    found = labels(clip, "A panda eating bamboo in a lush forest", ["a panda"])
    assert found.labels[:9] == (NOBODY, 1, 1, 0, 0, 0, 1, 0, 0) and len(found.labels) == 77 and found.both
    assert set(found.labels[9:]) == {0}


def test_every_chunk_of_a_long_prompt_has_a_start_token_for_nobody(clip):
    found = labels(clip, "a fox " + "very " * 80 + "red fox", ["fox"])
    assert len(found.labels) == 154
    assert [place for place, label in enumerate(found.labels) if label == NOBODY] == [0, 77]
    assert [place for place, label in enumerate(found.labels) if label == 1][0] == 2 and found.labels.count(1) == 2


def test_weights_in_brackets_keep_the_order(clip):
    assert labels(clip, "a (red fox:1.3) runs", ["fox"]).labels[:6] == (NOBODY, 0, 0, 1, 0, 0)


def test_words_that_two_objects_share_belong_to_each_where_its_phrase_stands(clip):
    found = labels(clip, "a red fox and a robot in a forest", ["a red fox", "a robot"])
    assert found.labels[:10] == (NOBODY, 1, 1, 1, 0, 2, 2, 0, 0, 0) and found.groups == (0, 1, 2)


def test_a_shorter_phrase_inside_a_longer_one_does_not_take_its_words(clip):
    found = labels(clip, "a red fox and a fox", ["fox", "red fox"])
    assert found.labels[:7] == (NOBODY, 0, 2, 2, 0, 0, 1)


def test_objects_with_the_same_words_share_them(clip):
    found = labels(clip, "two foxes and a fox", ["fox", "robot fox", "fox "][::2])
    assert found.groups == (0, 1, 1) and found.labels.count(1) == 1


def test_t5_matches_runs():
    t5, prompt = tiny_clip.ltxv(), "a fox in a forest with a fox"
    found = labels(t5, prompt, ["a fox"])
    ids = [token for token, *_ in t5.tokenize(prompt)["t5xxl"][0]]
    phrase = ids[: found.labels.index(0)]
    starts = [place for place in range(len(ids)) if ids[place : place + len(phrase)] == phrase]
    assert len(found.labels) == len(ids) and not found.both and len(starts) == 2
    marked = {place for start in starts for place in range(start, start + len(phrase))}
    assert {place for place, label in enumerate(found.labels) if label} == marked  # the "a" of "a forest" is background


@pytest.mark.parametrize("make", [tiny_clip.qwen_image, tiny_clip.z_image, tiny_clip.flux, tiny_clip.sdxl])
def test_the_marked_tokens_are_the_words_behind_any_template(make):
    clip, prompt = make(), "a small fox runs in a forest"
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0][0]
    found = find_words(clip, prompt, ["fox"], encoded.shape[1], "test")
    assert len(found.labels) == encoded.shape[1] and found.labels.count(1) >= 1
    changed = clip.encode_from_tokens_scheduled(clip.tokenize(prompt.replace("fox", "cat")))[0][0]
    if changed.shape == encoded.shape and not found.both and "t5xxl" not in clip.tokenize(prompt):
        moved = (changed - encoded).abs().amax((0, 2)).gt(1e-6).nonzero().flatten()
        assert int(moved[0]) == found.labels.index(1)  # in a causal model nothing changes in front of the word


def test_sd3_counts_clip_and_t5_one_after_the_other():
    parts = {"l": tiny_clip.sdxl().tokenizer.clip_l, "t5xxl": tiny_clip.flux().tokenizer.t5xxl}
    tokens = {key: part.tokenize_with_weights("a fox") for key, part in parts.items()}
    both = SimpleNamespace(
        tokenizer=SimpleNamespace(clip_l=parts["l"], t5xxl=parts["t5xxl"]), tokenize=lambda text: tokens
    )
    length = 77 + len(tokens["t5xxl"][0])
    found = find_words(both, "a fox", ["fox"], length, "test").labels
    assert found[:4] == (NOBODY, 0, 1, 0) and 1 in found[77:] and found[77] != NOBODY and len(found) == length


def test_pure_matching_of_ids():
    assert label_words([5, 6, 7, 5], [[[5, 6]]], anywhere=True) == [1, 1, 0, 1]
    assert label_words([5, 6, 7, 5], [[[5, 6]]], anywhere=False) == [1, 1, 0, 0]
    assert label_words([5, 6, 5, 8], [[[5, 6]], [[5, 8]]], anywhere=True) == [1, 1, 2, 2]


def execute(model, clip, boxes=FOX, prompt="a fox in the forest", **more):
    return MaskedAttention.execute(model, boxes, clip, prompt, **more).args


def test_the_node_gives_a_model_and_a_prompt_that_knows_its_words(sd15, clip):
    model, conditioning = execute(sd15, clip, masked_part=1.0)
    negative, start = tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 2)
    text, extras = conditioning[0]
    assert text.shape == (1, 77, 16) and extras[KEY].labels[:4] == (NOBODY, 1, 1, 0)
    plain = tiny.sample(sd15, conditioning, negative, start)
    assert (tiny.sample(model, conditioning, negative, start) - plain).abs().max() > 1e-3
    off, conditioning = execute(sd15, clip, masked_part=0.0)
    assert torch.equal(tiny.sample(off, conditioning, negative, start), plain)


def test_two_objects_and_every_option_run(sd15, clip):
    negative, start = tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 2)
    for options in ({}, {"sampling": "as the authors"}, {"frame_rule": "any"}, {"masked_steps": 2}, {"layers": "all"}):
        model, conditioning = execute(sd15, clip, TWO, "a red fox and a robot", **options)
        assert tiny.sample(model, conditioning, negative, start).isfinite().all()


def test_a_model_without_text_needs_no_clip():
    svd = tiny.build("svd")
    model, conditioning = execute(svd, None, prompt="")
    assert conditioning == [] and "cross" not in override.rules_of(model)[0].kinds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "a cat"}, "the words 'robot' of boxes match no token of prompt 'a cat'"),
        ({"prompt": "robots"}, "the words 'robot' of boxes match no token of prompt 'robots'"),
        ({"prompt": " "}, "prompt is empty"),
        ({"clip": None}, "prompt is .a robot. but no clip is connected"),
        ({"masked_part": float("nan")}, "masked_part is nan; give a number from 0 to 1"),
        ({"masked_part": 1.5}, "masked_part is 1.5"),
        ({"masked_steps": -1}, "masked_steps is -1"),
        ({"words": ""}, "object 1 of boxes has no words"),
    ],
)
def test_bad_inputs_are_refused_by_name(sd15, clip, change, message):
    change = {"clip": clip, "prompt": "a robot", "words": "robot"} | change
    boxes = BoxTrack(1, (replace(FOX.objects[0], words=change.pop("words")),))
    with pytest.raises(ValueError, match=f"StoryweftMaskedAttention: {message}"):
        execute(sd15, change.pop("clip"), boxes, **change)


def test_objects_without_words_are_fine_when_cross_is_off(sd15, clip):
    boxes = BoxTrack(1, (replace(FOX.objects[0], words=""),))
    model, conditioning = execute(sd15, clip, boxes, cross=False)
    assert KEY not in conditioning[0][1] and "cross" not in override.rules_of(model)[0].kinds


def test_an_encoder_whose_tokens_cannot_be_placed_is_refused(clip):
    with pytest.raises(ValueError, match="makes 50 tokens of prompt 'a fox'"):
        find_words(clip, "a fox", ["fox"], 50, "StoryweftMaskedAttention")


def test_a_second_block_is_refused(sd15, clip):
    with pytest.raises(ValueError, match="already carries a StoryweftMaskedAttention"):
        execute(execute(sd15, clip)[0], clip)


CAPTIONS = ("a red fox", "a small robot in a " + "very " * 20 + "large forest", "a fox and a robot")


@pytest.mark.parametrize("make", [tiny_clip.sd1, tiny_clip.ltxv, tiny_clip.qwen_image])
def test_a_boards_words_are_marked_in_every_caption(make):
    clip = make()
    conditioning = StoryBoard.execute(clip, "\n".join(CAPTIONS), 1, 3, 64, 64, "row by row").args[1]
    length = conditioning[0][0].shape[1] // 3
    found = find_board_words(clip, CAPTIONS, ["fox", "robot"], length, "test")
    assert len(found.labels) == 3 * length and not found.both
    mask = conditioning[0][1].get("attention_mask")
    for number, caption in enumerate(CAPTIONS):
        own = found.labels[number * length : (number + 1) * length]
        assert (1 in own, 2 in own) == ("fox" in caption, "robot" in caption)
        alone = clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0][0].shape[1]
        phrases = [phrase for phrase in ("fox", "robot") if phrase in caption]
        single = find_words(clip, caption, phrases, alone, "test").labels
        assert sum(label > 0 for label in own) == sum(label > 0 for label in single)
        if mask is not None:  # no word may be looked for in padding
            there = mask[0, number * length : (number + 1) * length].bool().tolist()
            assert all(kept for kept, label in zip(there, own, strict=True) if label > 0)
        elif alone < length:
            assert not any(label > 0 for label in own[alone:])
    with pytest.raises(ValueError, match="test: the words 'owl' of boxes match no token of captions a red fox; "):
        find_board_words(clip, CAPTIONS, ["owl"], length, "test")


def test_clip_captions_of_one_chunk_are_marked_in_each_repetition(clip):
    found = find_board_words(clip, ("a fox", "very " * 80 + "fox"), ["fox"], 154, "test").labels
    assert [place for place in range(154) if found[place] == 1] == [2, 79] and found[154:].count(1) == 1


def test_boxes_act_on_the_words_of_a_boards_captions(sd15, clip):
    conditioning = StoryBoard.execute(clip, "a fox\na forest", 1, 2, 64, 128, "row by row").args[1]
    model, positive = FrameStoryCrossAttention.execute(sd15, conditioning, 0.0, "renoise").args
    negative = tiny.conditioning("sd15", 1, 2)
    boxes = BoxTrack(1, (replace(FOX.objects[0], words="fox"),))

    def drawn(prompt="", board=positive, **more):
        out, marked = execute(model, clip, boxes, prompt, masked_part=1.0, board_conditioning=board, **more)
        return marked, tiny.sample(out, marked, negative, tiny.latent("sd15", 1, (16, 16)))

    marked, words = drawn(spatial=False)
    labels = marked[0][1][KEY].labels
    assert len(labels) == 154 and labels[2] == 1 and 1 not in labels[77:]
    assert torch.equal(marked[0][0], positive[0][0])
    plain = tiny.sample(model, positive, negative, tiny.latent("sd15", 1, (16, 16)))
    assert (words - plain).abs().max() > 1e-3
    unmarked, off = drawn(spatial=True, cross=False)
    assert KEY not in unmarked[0][1] and (off - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match="prompt is 'a fox' and board_conditioning brings its own captions"):
        drawn("a fox")
    with pytest.raises(ValueError, match="board_conditioning is no board's"):
        drawn(board=tiny.conditioning("sd15", 1, 2))
    with pytest.raises(ValueError, match="clip is needed to find the objects' words in board_conditioning"):
        execute(model, None, boxes, "", board_conditioning=positive)
    told = tiny.conditioning("sd15", 1, 2)
    summed = FrameStoryCrossAttention.execute(sd15, conditioning, 0.5, "renoise", summary=told).args[1]
    with pytest.raises(ValueError, match="board_conditioning has a summary"):
        drawn(board=summed)
