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
