"""Stories drawn in passes: three ways to remember are one result, nothing drawn is lost, a character can travel."""

from dataclasses import replace
from pathlib import Path

import comfy.sample
import pytest
import tiny
import torch
from storyweft.attention.consistent import ConsistentOptions
from storyweft.attention.style import StyleOptions
from storyweft.host import bank, override
from storyweft.host.consistent import ConsistentRule
from storyweft.host.panel_store import PanelStore
from storyweft.host.story_sampling import Settings, StorySampler, plan
from storyweft.host.style import StyleRule
from storyweft.story.script import parse_script

STORY = parse_script(
    "[Ana] a fox\n[Ben] a bear",
    "[Ana] runs\n[Ana] sits\n[Ben] runs\n[Ben] eats\n[Ana] meets [Ben]\n[NC] a tree\n[Ana] sleeps",
    id_count=2,
)
COUNT = len(STORY.panels)
OPTIONS = ConsistentOptions(share_early=1.0, share_late=1.0)
SETTINGS = Settings(5, 4, 3.0, "euler", "normal", 1.0)


@pytest.fixture(scope="module")
def patcher():
    return tiny.build("sd15")


@pytest.fixture()
def store(tmp_path, monkeypatch):
    store = PanelStore()
    monkeypatch.setattr(store, "folder", str(tmp_path))
    return store


def marked(panels, story=STORY, seed=1):
    everything = tiny.conditioning("sd15", COUNT, seed)[0][0]
    return [[everything[list(panels)], {"storyweft_panels": tuple(panels), "storyweft_story": story}]]


def sampler(patcher, panels=range(COUNT), store=None, options=OPTIONS, characters=(), **changes):
    model = override.register(patcher, ConsistentRule(options, "output path", characters=characters))
    latent = {"samples": tiny.latent("sd15", 1)}
    return StorySampler(
        "StoryweftStorySampler",
        model,
        marked(panels),
        tiny.conditioning("sd15", 1, 2),
        latent,
        replace(SETTINGS, **changes),
        store,
    )


def apart(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_bank_recompute_and_together_draw_the_same_story(patcher):
    drawn = {mode: sampler(patcher, memory=mode).draw()[0] for mode in ("bank", "recompute", "together")}
    assert apart(drawn["bank"], drawn["together"]) < 2e-5
    assert apart(drawn["recompute"], drawn["together"]) < 2e-5


def test_panels_at_once_changes_nothing(patcher):
    assert (
        apart(sampler(patcher, memory="bank", panels_at_once=3).draw()[0], sampler(patcher, memory="bank").draw()[0])
        < 2e-5
    )


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_the_bank_fits_samplers_with_other_evaluations(patcher, name):
    assert (
        apart(
            sampler(patcher, memory="bank", sampler=name).draw()[0],
            sampler(patcher, memory="together", sampler=name).draw()[0],
        )
        < 2e-5
    )


def test_a_panel_without_character_is_the_plain_picture(patcher):
    plain = comfy.sample.sample(
        patcher,
        comfy.sample.prepare_noise(tiny.latent("sd15", 1), 5, [5]),
        4,
        3.0,
        "euler",
        "normal",
        marked([5]),
        tiny.conditioning("sd15", 1, 2),
        tiny.latent("sd15", 1),
        disable_pbar=True,
        seed=5,
    )
    assert apart(sampler(patcher, memory="bank").draw()[0][5:6], plain) < 2e-5


def test_a_character_is_kept_apart_from_the_other(patcher):
    """Ben's prompts do not reach Ana's panels."""
    other = parse_script("[Ana] a fox\n[Ben] a bear", "\n".join(panel.text for panel in STORY.panels), id_count=2)
    first = sampler(patcher, memory="together")
    second = sampler(patcher, memory="together")
    second.positive = marked(range(COUNT), other)
    second.positive[0][0][2:4] += 30.0
    a, b = first.draw()[0], second.draw()[0]
    assert apart(a[[0, 1, 5, 6]], b[[0, 1, 5, 6]]) < 1e-6
    assert apart(a[4], b[4]) > 5e-6


def test_bank_memory_in_ram_does_not_grow_with_the_story(patcher):
    sizes = []
    for count in (4, 12):
        story = parse_script("[Ana] a fox", "\n".join(["[Ana] runs"] * count), id_count=2)
        made = sampler(patcher, range(4), memory="bank")
        made.story, made.panels = story, tuple(range(count))
        made.positive = [
            [torch.randn(count, 7, 16), {"storyweft_panels": tuple(range(count)), "storyweft_story": story}]
        ]
        made.latent = tiny.latent("sd15", 1).expand(count, -1, -1, -1)
        sizes.append(made.draw()[1]["Ana"].bytes)
    assert sizes[0] == sizes[1]


def test_the_plan_writes_each_character_once_and_keeps_every_panel_once():
    passes = plan(STORY, tuple(range(COUNT)), set(), "recompute", 2)
    assert sorted(panel for part in passes for panel in part.kept) == list(range(COUNT))
    assert [part.writes for part in passes[:2]] == ["Ana", "Ben"]
    assert passes[2].panels == (0, 1, 2, 3, 4, 5)
    assert plan(STORY, tuple(range(COUNT)), {"Ana"}, "bank", 1)[0].writes == "Ben"


def test_finished_panels_are_not_drawn_again_and_one_can_be_redone(patcher, store, monkeypatch):
    first = sampler(patcher, memory="bank", store=store).draw()[0]
    runs = []
    monkeypatch.setattr(
        comfy.sample, "sample", lambda *a, real=comfy.sample.sample, **k: runs.append(1) or real(*a, **k)
    )
    assert torch.equal(first, sampler(patcher, memory="bank", store=store).draw()[0])
    assert not runs
    redone, _, report = sampler(patcher, memory="bank", store=store, panel_seeds=((6, 99),)).draw()
    assert torch.equal(redone[:6], first[:6])
    assert apart(redone[6], first[6]) > 1e-3
    assert len(runs) == 2, report  # Ana's id panels, for her bank, and the panel itself


def fail_at_run(monkeypatch, number: int) -> None:
    """Makes the `number`-th sampling run from now on fail."""
    real, runs = comfy.sample.sample, []

    def failing(*args, **kwargs):
        runs.append(1)
        if len(runs) == number:
            raise RuntimeError("no more room")
        return real(*args, **kwargs)

    monkeypatch.setattr(comfy.sample, "sample", failing)


def test_panels_drawn_before_a_failure_are_kept(patcher, store, monkeypatch):
    real = comfy.sample.sample
    fail_at_run(monkeypatch, 4)
    with pytest.raises(
        RuntimeError, match=r"StoryweftStorySampler: drawing panel 6 failed: no more room \(panels 1, 2, 3, 4, 5 kept"
    ):
        sampler(patcher, memory="recompute", store=store).draw()
    monkeypatch.setattr(comfy.sample, "sample", real)
    report = sampler(patcher, memory="recompute", store=store).draw()[2]
    assert "kept panel 5 from an earlier run" in report
    assert "drew panel 6" in report


def test_id_panels_between_others_come_back_in_story_order(patcher):
    mixed = parse_script(
        "[Ana] a fox\n[Ben] a bear", "[Ben] runs\n[NC] a tree\n[Ana] runs\n[Ana] meets [Ben]\n[Ben] eats\n[NC] a lake\n[Ana] sits",
        id_count=1,
    )
    drawn = []
    for mode in ("bank", "recompute", "together"):
        made = sampler(patcher, memory=mode)
        made.story, made.positive = mixed, marked(range(COUNT), mixed)
        drawn.append(made.draw()[0])
    assert apart(drawn[0], drawn[2]) < 2e-5
    assert apart(drawn[1], drawn[2]) < 2e-5


def test_characters_come_although_every_panel_is_stored_when_somebody_reads_them(patcher, store):
    first, characters, _ = sampler(patcher, memory="bank", store=store).draw()
    assert sampler(patcher, memory="bank", store=store).draw()[1] == {}
    again = sampler(patcher, memory="auto", store=store)
    again.wanted = True
    latents, same, report = again.draw()
    assert torch.equal(latents, first)
    assert {name: one.digest for name, one in same.items()} == {name: one.digest for name, one in characters.items()}
    assert "kept panel 5 from an earlier run" in report


@pytest.mark.parametrize("mode", ["recompute", "together"])
def test_a_mode_without_bank_is_refused_when_somebody_reads_the_characters(patcher, mode):
    made = sampler(patcher, memory=mode)
    made.wanted = True
    with pytest.raises(ValueError, match=f"StoryweftStorySampler: memory is '{mode}', which keeps no character"):
        made.draw()


def test_a_damaged_stored_panel_is_named(patcher, store):
    made = sampler(patcher, memory="bank", store=store)
    made.draw()
    Path(store.path(made._key(4))).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"the stored panel .*\.safetensors is damaged .*; delete it and run again"):
        sampler(patcher, memory="bank", store=store).draw()


def test_panels_under_something_that_cannot_be_told_apart_are_not_kept(patcher, store, monkeypatch):
    strange = patcher.clone()
    strange.model_options["transformer_options"]["somebody"] = object()
    report = sampler(strange, memory="bank", store=store).draw()[2]
    assert "not kept for later runs: the content of object on the model or the conditioning cannot be told apart" in report
    assert not list(Path(store.folder).glob("*"))
    fail_at_run(monkeypatch, 4)
    with pytest.raises(RuntimeError, match=r"drawing panel 6 failed: no more room \(no panel kept: the content of object"):
        sampler(strange, memory="recompute", store=store).draw()


def test_two_recalled_characters_that_differ_only_in_their_tokens_are_two_panels(patcher, store):
    keys = set()
    for seed in (5, 6):
        characters = list(sampler(patcher, memory="bank", seed=seed).draw()[1].values())
        made = recalled(patcher, characters, panels=(4,))
        made.store = store
        keys.add(made._key(4))
    assert len(keys) == 2


def test_another_prompt_model_or_setting_is_another_panel(patcher, store):
    keys = {
        sampler(patcher, store=store, **change)._key(6)
        for change in ({}, {"cfg": 4.0}, {"steps": 5}, {"seed": 6}, {"sampler": "ddim"})
    }
    keys.add(sampler(patcher, store=store, options=ConsistentOptions(rate=0.4))._key(6))
    other = sampler(patcher, store=store)
    other.positive = marked(range(COUNT), seed=9)
    keys.add(other._key(6))
    assert len(keys) == 7


def recalled(patcher, characters, panels=(4, 6), **changes):
    return sampler(patcher, panels, characters=characters, **changes)


def test_a_saved_character_draws_the_same_later_panels_in_another_graph(patcher, tmp_path):
    drawn, characters, _ = sampler(patcher, memory="bank").draw()
    for name, character in characters.items():
        bank.save(character, str(tmp_path / f"{name}.safetensors"))
    loaded = [bank.load(str(tmp_path / f"{name}.safetensors")) for name in characters]
    assert loaded[0].description == "a fox"
    assert apart(recalled(patcher, loaded).draw()[0], drawn[[4, 6]]) < 2e-5


def test_reading_in_any_order_leaves_the_bank_as_it_was(patcher):
    characters = list(sampler(patcher, memory="bank").draw()[1].values())
    before = {key: tensor.clone() for key, tensor in characters[0].tensors.items()}
    forth, back = recalled(patcher, characters, (4, 6)).draw()[0], recalled(patcher, characters, (6, 4)).draw()[0]
    assert apart(forth, back.flip(0)) < 2e-5
    assert all(torch.equal(before[key], tensor) for key, tensor in characters[0].tensors.items())


def test_bank_tokens_are_projected_once_for_all_readers(patcher):
    characters = list(sampler(patcher, memory="bank").draw()[1].values())
    counts = []
    layer = patcher.model.diffusion_model.output_blocks[0][1].transformer_blocks[0].attn1
    handle = layer.to_k.register_forward_hook(lambda module, args, out: counts.append(out.shape[0]))
    try:
        recalled(patcher, characters[:1], (6, 6, 6), panels_at_once=3, steps=4).draw()
    finally:
        handle.remove()
    assert counts == [6, *([6, 1, 1] * 3)], "own rows of both parts, then one projection for each part of the bank"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 5}, r"4 steps .* and this run has 5"),
        ({"scheduler": "karras"}, r"use the same steps, scheduler and denoise"),
        ({"denoise": 0.5}, r"use the same steps, scheduler and denoise"),
    ],
)
def test_reading_under_another_schedule_is_refused(patcher, change, sentence):
    characters = list(sampler(patcher, memory="bank").draw()[1].values())
    with pytest.raises(ValueError, match=f"character 'Ana' was made with .*{sentence}"):
        recalled(patcher, characters, **change).draw()


def test_reading_at_another_size_is_refused(patcher):
    made = recalled(patcher, list(sampler(patcher, memory="bank").draw()[1].values()))
    made.latent = torch.zeros(2, 4, 16, 12)
    with pytest.raises(
        ValueError, match=r"latents of \(8, 12\) and this run has \(16, 12\); use the same picture size"
    ):
        made.draw()


def test_reading_with_guidance_a_bank_made_without_it_is_refused(patcher):
    characters = list(sampler(patcher, memory="bank", cfg=1.0).draw()[1].values())
    with pytest.raises(
        ValueError, match=r"holds no tokens for the guidance part negative.0; make it with a cfg above 1"
    ):
        recalled(patcher, characters).draw()


@pytest.mark.parametrize(("change", "sentence"), [
    ({"model_channels": 64}, "with 64 channels in self-attention layer 3 and this UNetModel has 128 channels there"),
    ({"transformer_depth_output": [0, 0, 1, 1]}, "with 32 channels in self-attention layer 5 and this UNetModel has only 5 of them"),
])
def test_reading_with_another_model_of_the_same_class_is_refused(patcher, monkeypatch, change, sentence):
    characters = list(sampler(patcher, memory="bank").draw()[1].values())
    other = tiny.FAMILIES["sd15"]._replace(settings=tiny.UNET | change)
    monkeypatch.setitem(tiny.FAMILIES, "sd15", other)
    with pytest.raises(ValueError, match=f"character 'Ana' was made {sentence}"):
        recalled(tiny.build("sd15"), characters).draw()


def test_reading_with_another_family_is_refused(patcher):
    characters = list(sampler(patcher, memory="bank").draw()[1].values())
    flux = tiny.build("flux")
    model = override.register(flux, ConsistentRule(OPTIONS, "output path", characters=characters))
    with pytest.raises(ValueError, match="was made with a UNetModel model and cannot be read by Flux"):
        tiny.sample(model, tiny.conditioning("flux", 2, 1), tiny.conditioning("flux", 1, 2), tiny.latent("flux", 2))


@pytest.mark.parametrize("family", tiny.EXPERIMENTAL)
def test_transformers_remember_too(family):
    patcher = tiny.build(family)
    model = override.register(patcher, ConsistentRule(OPTIONS, "output path"))
    story = parse_script("[Ana] a fox", "[Ana] runs\n[Ana] sits\n[Ana] sleeps", id_count=2)
    positive = tiny.conditioning(family, 3, 1, marks={"storyweft_panels": (0, 1, 2), "storyweft_story": story})
    negative, latent = tiny.conditioning(family, 1, 2), {"samples": tiny.latent(family, 1)}
    settings = replace(SETTINGS, denoise=0.5 if family == "cogvideox" else 1.0)  # its first sigma leaves float32 few digits
    drawn = [
        StorySampler(
            "StoryweftStorySampler", model, positive, negative, latent, replace(settings, memory=mode), None
        ).draw()[0]
        for mode in ("bank", "together")
    ]
    assert apart(*drawn) < 2e-5


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: data[: len(data) // 2], "not a whole .safetensors file"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1", "not a whole .safetensors file"),
        (lambda data: b"", "not a whole .safetensors file"),
    ],
)
def test_a_damaged_character_file_is_refused(patcher, tmp_path, spoil, sentence):
    path = tmp_path / "ana.safetensors"
    bank.save(sampler(patcher, memory="bank").draw()[1]["Ana"], str(path))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=f"'ana.safetensors' is {sentence}"):
        bank.load(str(path))


def test_a_character_with_values_that_are_not_numbers_is_refused(patcher, tmp_path):
    character = sampler(patcher, memory="bank").draw()[1]["Ana"]
    next(iter(character.tensors.values())).view(-1)[0] = float("nan")
    bank.save(character, str(tmp_path / "ana.safetensors"))
    with pytest.raises(ValueError, match="values that are not numbers"):
        bank.load(str(tmp_path / "ana.safetensors"))


def test_conditioning_from_elsewhere_is_refused(patcher):
    model = override.register(patcher, ConsistentRule(OPTIONS, "output path"))
    with pytest.raises(ValueError, match="positive is not from StoryweftPanelConditioning"):
        StorySampler(
            "StoryweftStorySampler",
            model,
            tiny.conditioning("sd15", 2, 1),
            tiny.conditioning("sd15", 1, 2),
            {"samples": tiny.latent("sd15", 1)},
            SETTINGS,
            None,
        )


def test_a_model_without_the_block_is_refused(patcher):
    with pytest.raises(ValueError, match="model carries no StoryweftConsistentSelfAttention"):
        StorySampler(
            "StoryweftStorySampler",
            patcher,
            marked(range(COUNT)),
            tiny.conditioning("sd15", 1, 2),
            {"samples": tiny.latent("sd15", 1)},
            SETTINGS,
            None,
        )


def test_too_little_memory_for_a_bank_recomputes_or_says_so(patcher, monkeypatch):
    monkeypatch.setattr("comfy.model_management.get_free_memory", lambda device=None, **more: 1000)
    assert sampler(patcher, memory="auto").memory()[0] == "recompute"
    with pytest.raises(ValueError, match="set memory to recompute"):
        sampler(patcher, memory="bank").memory()


def test_a_recalled_character_that_no_panel_names_is_refused(patcher):
    characters = list(sampler(patcher, memory="bank").draw()[1].values())
    with pytest.raises(ValueError, match=r"the recalled character 'Ben' is named by no panel; the panels name Ana"):
        recalled(patcher, characters, panels=(6,))


def test_a_character_without_id_panels_or_bank_is_refused(patcher):
    story = parse_script("[Ana] a fox", "[Ana] runs\n[Ana] sits", id_count=0)
    model = override.register(patcher, ConsistentRule(OPTIONS, "output path"))
    positive = tiny.conditioning("sd15", 2, 1, marks={"storyweft_panels": (0, 1), "storyweft_story": story})
    with pytest.raises(ValueError, match="character 'Ana' has no id panels and was not recalled"):
        StorySampler("StoryweftStorySampler", model, positive, tiny.conditioning("sd15", 1, 2), {"samples": tiny.latent("sd15", 1)},
                     SETTINGS, None)


def test_another_checkpoint_reads_layer_inputs_but_not_keys_and_values(patcher, caplog):
    character = sampler(patcher, memory="bank").draw()[1]["Ana"]
    bank.check_model(character, tiny.build("sd15", seed=5), "StoryweftRecallCharacter")
    assert "made with another checkpoint" in caplog.text
    flux = tiny.build("flux")
    keyed = replace(character, tensors={key: tensor.expand(2, 1, *tensor.shape) for key, tensor in character.tensors.items()})
    with pytest.raises(ValueError, match="holds keys and values of another UNetModel checkpoint"):
        bank.check_model(keyed, flux, "StoryweftRecallCharacter")


def test_under_style_every_panel_depends_on_all_others(patcher, store):
    """A picture drawn beside another first panel is not taken for one drawn beside this one."""
    styled = override.register(patcher, StyleRule(StyleOptions()))
    first = sampler(styled, memory="together", store=store).draw()[0]
    other = sampler(styled, memory="together", store=store, panel_seeds=((0, 99),)).draw()[0]
    again = sampler(styled, memory="together", store=store).draw()[0]
    assert apart(other, first) > 1e-3 and torch.equal(again, first)


def test_characters_that_a_whole_batch_cannot_keep_are_refused(patcher):
    drawing = sampler(override.register(patcher, StyleRule(StyleOptions())), memory="auto")
    drawing.wanted = True
    with pytest.raises(ValueError, match="output character is connected and StoryweftStyleAligned needs all panels"):
        drawing.draw()
