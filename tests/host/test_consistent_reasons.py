"""What the log and the refusals of Consistent Self-Attention say is true: the reason given is the one that holds."""

import logging

import pytest
import tiny
from storyweft.nodes.consistent import ConsistentSelfAttention
from storyweft.nodes.sampler import StorySamplerNode
from storyweft.story.script import parse_script


def block(model, **changes):
    return ConsistentSelfAttention.execute(model, **{"sampling_ratio": 0.5, "draw_seed": 0, "layers": "output path"} | changes).args[0]


def marked(story, panels):
    return tiny.conditioning("sd15", len(panels), 1, marks={"storyweft_panels": panels, "storyweft_story": story})


@pytest.fixture(scope="module")
def sd15():
    return tiny.build("sd15")


def test_a_bank_of_one_id_panel_is_no_idle_block(sd15, caplog):
    story = parse_script("[Ana] a fox", "[Ana] runs\n[Ana] sits", id_count=1)
    with caplog.at_level(logging.WARNING):
        drawn = StorySamplerNode.execute(
            block(sd15), marked(story, (0, 1)), tiny.conditioning("sd15", 1, 2), {"samples": tiny.latent("sd15", 1)}, 1, 4, 3.0,
            "euler", "normal", 1.0, "bank", keep_panels=False,
        )
    assert drawn.args[1][0].tensors
    assert "never acted" not in caplog.text


def test_panels_without_their_id_panels_in_the_batch_are_told_apart_from_rates_of_0(sd15, caplog):
    story = parse_script("[Ana] a fox", "[Ana] runs\n[Ana] sits\n[Ana] eats\n[Ana] naps", id_count=2)
    with caplog.at_level(logging.WARNING):
        tiny.sample(block(sd15), marked(story, (2, 3)), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 2))
    assert "never acted" in caplog.text
    assert "rates are 0" not in caplog.text
    assert "id panel" in caplog.text


def test_few_steps_are_said(sd15, caplog):
    """Step thresholds are absolute: at 4 steps the published numbers leave little to share (specs, part 7: warn)."""
    with caplog.at_level(logging.WARNING):
        tiny.sample(block(sd15), tiny.conditioning("sd15", 2, 1), tiny.conditioning("sd15", 1, 2), tiny.latent("sd15", 2), steps=4)
    assert "4 steps" in caplog.text
