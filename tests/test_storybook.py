"""The picture-book world: same seed same page, captions that never name the identity, facts that match the picture."""

import numpy as np
import pytest
from storyweft.training import storybook


def page(seed: int, form: str | None = None, **known):
    return storybook.sample(np.random.default_rng((41, seed)), form, **known)


def test_same_seed_same_page():
    one, other = page(3), page(3)
    assert one.caption == other.caption and one.facts == other.facts
    assert np.array_equal(one.image, other.image)
    assert not np.array_equal(one.image, page(4).image)


def test_captions_never_name_the_identity():
    banned = {*storybook.COLOURS, *(word for hat in storybook.HATS for word in hat.split())}
    for seed in range(300):
        assert not banned & set(page(seed).caption.replace(",", "").split())


def test_captions_name_kind_place_and_time():
    for seed in range(100):
        drawn = page(seed)
        for facts in drawn.facts:
            assert facts.kind in drawn.caption
            assert storybook.PLACES[facts.place] in drawn.caption and storybook.TIMES[facts.time] in drawn.caption


@pytest.mark.parametrize("form, count", [("one", 1), ("twice", 2), ("panels", 2)])
def test_pictures_of_one_page_share_the_identity(form, count):
    for seed in range(30):
        facts = page(seed, form).facts
        assert len(facts) == count
        assert len({(one.kind, *one.identity) for one in facts}) == 1


def test_box_holds_the_body_colour():
    """Most pixels of the body colour lie inside the box, and the box is full of them compared with the rest."""
    for kind in storybook.KINDS:
        drawn = page(5, "one", kind=kind, colour="purple", hat="none", place="beach", time="day")
        near = np.abs(drawn.image.astype(int) - storybook.COLOURS["purple"]).max(2) < 24
        x0, y0, x1, y1 = (round(edge * storybook.SIZE) for edge in drawn.facts[0].box)
        inside = near[y0:y1, x0:x1].sum()
        assert inside > 40, kind
        assert inside >= 0.98 * near.sum(), kind


def test_half_of_the_pages_show_the_character_twice():
    share = np.mean([len(page(seed).facts) == 2 for seed in range(400)])
    assert 0.4 < share < 0.7


def test_known_facts_are_kept():
    drawn = page(8, "one", kind="owl", colour="green", hat="crown", place="city", time="night")
    facts = drawn.facts[0]
    assert (facts.kind, facts.colour, facts.hat, facts.place, facts.time) == ("owl", "green", "crown", "city", "night")


def clip(seed: int, motion: str | None = None, **known):
    return storybook.sample_clip(np.random.default_rng((43, seed)), motion, **known)


def boxes(drawn):
    return np.array([facts.box for facts in drawn.facts])


def test_same_seed_same_clip_and_its_caption_is_a_pages():
    one, other = clip(3), clip(3)
    assert one.caption == other.caption and one.facts == other.facts and np.array_equal(one.frames, other.frames)
    assert one.frames.shape == (storybook.FRAMES, 128, 128, 3)
    facts = one.facts[0]
    assert facts.kind in one.caption and storybook.PLACES[facts.place] in one.caption
    assert not {*storybook.MOTIONS, *storybook.COLOURS, *storybook.HATS[1:]} & set(one.caption.replace(",", "").split())


@pytest.mark.parametrize("motion", ["right", "left", "near", "away", "still", "hop"])
def test_box_of_a_clip_follows_the_motion(motion):
    for seed in range(12):
        box = boxes(clip(seed, motion))
        x, height = (box[:, 0] + box[:, 2]) / 2, box[:, 3] - box[:, 1]
        moves, grows = np.diff(x), np.diff(height)
        if motion in ("right", "left"):
            assert ((moves if motion == "right" else -moves) > 0).all() and np.abs(grows).max() < 1e-6
        elif motion in ("near", "away"):
            assert ((grows if motion == "near" else -grows) >= 0).all() and abs(height[-1] - height[0]) > 0.06
        elif motion == "still":
            assert (box == box[0]).all()
        else:
            assert box[0, 3] - box[:, 3].min() > 0.08  # off the ground on the way
        assert box.min() >= 0 and box.max() <= 1


def test_character_of_a_clip_fills_its_box_in_every_frame():
    """Pixels of the body colour lie inside the frame's box; the identity is one for all frames."""
    for seed, motion in enumerate(storybook.MOTIONS):
        drawn = clip(seed, motion, colour="purple", hat="none", place="beach", time="day")
        assert len({(facts.kind, *facts.identity, facts.place, facts.time) for facts in drawn.facts}) == 1
        for frame, facts in zip(drawn.frames, drawn.facts, strict=True):
            near = np.abs(frame.astype(int) - storybook.COLOURS["purple"]).max(2) < 24
            x0, y0, x1, y1 = (round(edge * storybook.SIZE) for edge in facts.box)
            assert near[y0:y1, x0:x1].sum() > 20 and near[y0:y1, x0:x1].sum() >= 0.98 * near.sum()


def test_backdrop_of_a_clip_stands_still():
    drawn = clip(7, "right")
    outside = np.ones((storybook.SIZE, storybook.SIZE), bool)
    for box in (boxes(drawn) * storybook.SIZE).round().astype(int):
        outside[box[1] : box[3], box[0] : box[2]] = False
    assert outside.mean() > 0.2
    assert (drawn.frames[:, outside] == drawn.frames[0, outside]).all()


def test_clips_put_characters_everywhere():
    """Boxes touch or nearly touch all four edges, and sides reach from small to large."""
    all_boxes = np.concatenate([boxes(clip(seed)) for seed in range(120)])
    assert (all_boxes[:, :2].min(0) < 0.03).all() and (all_boxes[:, 2:].max(0) > 0.97).all()
    side = (all_boxes[:, 2:] - all_boxes[:, :2]).max(1)
    assert side.min() < 0.34 and side.max() > 0.58
