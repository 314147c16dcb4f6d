"""Sound as mathematics: captioner, weights of words, samplers with gradients, ImageBind, mapping networks."""

import math

import pytest
import torch
from storyweft.attention.sound import positional, reweight, token_weights, word_weights
from storyweft.metrics.mapping import collapsed, diagnose
from storyweft.models import act, act_frontend, audioclip, bind_network, imagebind, imagebind_frontend, sound_mapping
from storyweft.models.joint_embedding import add, renormed, shift, slerp
from storyweft.sampling.multistep import calls, walk
from storyweft.sampling.sound_optimise import Terms, best, disagreement, optimise, spherical, views
from storyweft.story.heard import (
    Caption,
    group,
    noun_probability,
    read_vocabulary,
    typed_caption,
    vocabulary,
)

WORDS = ["<sos>", "a", "dog", "barks", "bird", "sings", "<eos>", "and"]
SIZES = {
    "width": 24, "positions": 12, "mels": 64, "patch": 256, "inner": 16, "heads": 2, "feed": 32, "depth": 2, "classes": 20,
    "memory": 16, "decoder_heads": 2, "decoder_feed": 24, "decoder_depth": 2,
}  # fmt: skip


def seeded(module, seed=0, size=0.3):
    generator = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=generator) * size
    return module.train(False)


def captioner(seed=0):
    return seeded(act.ActCaptioner(SIZES, WORDS), seed)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# weights of words


def test_a_noun_weighs_what_it_is_and_another_word_what_was_heard():
    code = word_weights([0.5, 0.5, 0.5], [0.9, 0.1, 0.7], position=False)
    assert code == pytest.approx([0.95, 0.5, 0.5])  # 0.7 itself is no noun
    assert word_weights([0.5], [0.9], "paper", False) == pytest.approx([1.4])
    assert word_weights([0.5, 0.5], [0.0, 0.0])[1] == pytest.approx(0.5 + positional(1))
    assert [round(positional(t), 4) for t in range(10)] == [
        0.1065, 0.1543, 0.2119, 0.2741, 0.3333, 0.3837, 0.4223, 0.4498, 0.4683, 0.4803,
    ]  # fmt: skip


def test_weights_of_one_leave_the_prompt_bit_for_bit():
    z = random(1, 77, 8)
    w = token_weights(word_weights([1.0, 1.0], [0.0, 0.0], position=False), [None, 0, 1] + [None] * 74)
    assert reweight(z, w)[0] is z


def test_the_mean_comes_back_whatever_the_scale_of_the_weights():
    z = random(77, 8, seed=1, dtype=torch.float64) + 0.5
    w = token_weights([0.4, 1.7], [None, 0, 1] + [None] * 74)
    moved, guarded = reweight(z, w)
    assert not guarded
    assert moved.mean().item() == pytest.approx(z.mean().item(), rel=1e-9)
    torch.testing.assert_close(reweight(z, 3.7 * w)[0], moved)
    first = moved[0] / z[0]
    torch.testing.assert_close(first, first[:1].expand(8))
    torch.testing.assert_close(moved[1] / first, z[1] * 0.4)


def test_a_lost_mean_is_met_by_the_norm_and_said():
    z = torch.zeros(4, 2, dtype=torch.float64)
    z[0], z[1] = 1.0, -0.5
    moved, guarded = reweight(z, torch.tensor([0.4, 1.0, 1.0, 1.0], dtype=torch.float64))  # the mean changes its sign
    assert guarded and moved.isfinite().all()
    assert moved.norm().item() == pytest.approx(z.norm().item())
    by_norm, told = reweight(z + 1, torch.tensor([2.0, 1.0, 1.0, 1.0]).double(), "norm")
    assert not told and by_norm.norm().item() == pytest.approx((z + 1).norm().item())


# words


def test_a_word_of_several_tokens_has_the_product_or_the_geometric_mean():
    pieces, chances = ["a", " mot", "or", "boat", " runs."], [0.9, 0.5, 0.8, 0.5, 0.25]
    words, product = group(pieces, chances)
    assert words == ["a", "motorboat", "runs."]
    assert product == pytest.approx([0.9, 0.2, 0.25])
    assert math.prod(product) == pytest.approx(math.prod(chances))
    assert group(pieces, chances, True)[1][1] == pytest.approx(0.2 ** (1 / 3))


def test_nouns_of_the_built_in_list():
    caption = "a woman talks while a train's horn sounds near puppies, barking"
    assert [word for word in caption.split() if noun_probability(word)] == ["woman", "train's", "horn", "puppies,"]
    assert noun_probability("barks") == 0 and noun_probability("bark") == 1
    assert noun_probability("BIRD,") == 1 and noun_probability("собака") == 0  # other languages weigh by what was heard alone


def test_vocabulary_is_in_order_of_first_appearance(tmp_path):
    words = vocabulary(["A woman talks nearby , as water pours.", "Multiple clanging and clanking sounds"])
    assert words[:10] == ["<sos>", "a", "woman", "talks", "nearby", "as", "water", "pours", "<eos>", "multiple"]
    (tmp_path / "train.csv").write_text("audiocap_id,youtube_id,start,caption\n1,x,0,A woman talks\n2,y,0,A dog\n")
    assert read_vocabulary(tmp_path / "train.csv") == ["<sos>", "a", "woman", "talks", "<eos>", "dog"]
    with pytest.raises(ValueError, match="words_list.p .*can hold a program"):
        read_vocabulary(tmp_path / "words_list.p")
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'caption'"):
        read_vocabulary(tmp_path / "none.csv")


def test_typed_captions_and_what_is_refused():
    caption = typed_caption("a dog barks", "0.5 1, 0.25", "")
    assert caption.audio == (0.5, 1.0, 0.25) and caption.nouns is None
    assert typed_caption("a dog").audio == (1.0, 1.0)
    for given, word in (
        (("  ",), "empty"),
        (("a dog", "1"), "1 numbers for 2 words"),
        (("a dog", "1 x"), "'x'"),
        (("a dog", "1 -2"), "-2"),
        (("a dog", "1 nan"), "nan"),
    ):
        with pytest.raises(ValueError, match=word):
            typed_caption(*given)
    with pytest.raises(ValueError, match="empty"):
        Caption((), ())


# captioner


def test_the_front_end_has_no_level_of_its_own_and_moves_with_time():
    wave = random(1, 64000, seed=3) * 0.1
    plain = act_frontend.log_mel(wave, samples=64000)
    louder = act_frontend.log_mel(2 * wave, samples=64000)
    torch.testing.assert_close(louder - plain, torch.full_like(plain, 20 * math.log10(2)), atol=1e-3, rtol=0)
    later = act_frontend.log_mel(torch.cat([torch.zeros(1, 640), wave], 1), samples=64640)
    torch.testing.assert_close(later[:, 3:-2], plain[:, 2:-2], atol=1e-3, rtol=0)
    assert act_frontend.log_mel(torch.ones(1, 1)).shape == (1, 500, 64)


def test_the_cached_captioner_is_the_teacher_forced_one_and_stops_early():
    with torch.no_grad():
        for seed in range(4):
            network = captioner(seed)
            memory = network.remember(random(3, 40, 64, seed=seed) * 10 - 40)
            tokens, chances = network.greedy(memory, stop=False)
            scores = network.logits(tokens[:, :-1], network.prepare(memory))[0].softmax(-1)
            forced = scores.gather(2, tokens[:, 1:, None])[..., 0]
            assert tokens.shape == (3, 31)
            torch.testing.assert_close(chances[:, 1:], forced, atol=1e-6, rtol=0)
            early, _ = network.greedy(memory)
            assert torch.equal(early, tokens[:, : early.shape[1]])


def test_a_caption_ends_at_its_end_or_loses_its_last_word():
    network = captioner()
    end = network.end
    assert network.read([0, 1, 2, end, 3], [0, 0.5, 0.123456, 0.9, 0.9]) == (["a", "dog"], [0.5, 0.1235])
    words, chances = network.read([0] + [2] * 30, [0.0] + [0.5] * 30)
    assert len(words) == len(chances) == 29


def test_the_search_finds_the_end_that_greedy_passes_by():
    network = captioner()
    with torch.no_grad():
        memory = network.remember(random(1, 40, 64) * 10 - 40)
        network.dec_fc.bias[network.end] += 2
        found = network.search(memory, 3)
    assert found[0] == network.begin and found[-1] == network.end and network.end not in found[:-1]


def test_a_published_captioner_loads_strictly_and_others_are_refused_by_name():
    state = dict(captioner().state_dict())
    state["pos_encoder.pe"] = torch.zeros(2000, 1, 16)
    loaded = act.build(state, WORDS, "ACT.pth", (2, 2))
    assert not any(value.requires_grad for value in loaded.parameters())
    with torch.no_grad():
        x = random(1, 16, 64)
        torch.testing.assert_close(loaded.remember(x), captioner().remember(x))
    with pytest.raises(ValueError, match="7 words and word_emb.weight 8 rows"):
        act.build(state, WORDS[:-1], "ACT.pth", (2, 2))
    with pytest.raises(ValueError, match="vocabulary has no <eos>"):
        act.build(state, [word.replace("<eos>", "end") for word in WORDS], "ACT.pth", (2, 2))
    with pytest.raises(ValueError, match="ACT.pth is no ACT captioner: it lacks encoder.pos_embedding"):
        act.build({"unet.weight": torch.zeros(1)}, WORDS, "ACT.pth")
    with pytest.raises(ValueError, match="encoder.cls_token is missing"):
        act.build({key: value for key, value in state.items() if key != "encoder.cls_token"}, WORDS, "A", (2, 2))
    with pytest.raises(ValueError, match="extra.weight is not known"):
        act.build({**state, "extra.weight": torch.zeros(1)}, WORDS, "A", (2, 2))


# AudioCLIP and ImageBind


def test_audioclip_takes_its_published_tensors_alone():
    with torch.device("meta"):
        state = audioclip.AudioClip().state_dict()
    assert len(state) == 861 and sum(value.numel() for value in state.values()) == 134_246_925
    audioclip.build(state, "full.pt")
    with pytest.raises(ValueError, match="full.pt is no AudioCLIP model: it lacks audio.fbsp.m"):
        audioclip.build({"visual.conv1.weight": torch.zeros(1)}, "full.pt")
    with pytest.raises(ValueError, match="audio.fc.bias is missing"):
        audioclip.build({key: value for key, value in state.items() if key != "audio.fc.bias"}, "full.pt")


def towers(seed=0):
    size = {"width": 24, "depth": 2, "heads": 2, "out": 16}
    sizes = {
        "audio": {**size, "tokens": 229, "patch": 16},
        "vision": {**size, "tokens": 257, "patch": 14},
        "text": {**size, "tokens": 77, "patch": 50},
    }
    network = seeded(imagebind.ImageBind(sizes), seed, 0.2)
    for modality, scale in (("audio", 20.0), ("text", 300.0)):
        network.modality_postprocessors[modality]["1"].log_logit_scale.data = torch.tensor(scale).log()
    return network


def test_imagebind_loads_one_tower_of_a_published_file():
    whole = towers()
    state = {**whole.state_dict(), "modality_trunks.depth.blocks.0.attn.in_proj_weight": torch.zeros(1)}
    state["modality_preprocessors.text.mask"] = torch.zeros(77, 77)
    heads = dict.fromkeys(imagebind.MODALITIES, 2)
    alone = imagebind.build(state, ["audio"], "huge.pth", heads)
    clips = random(2, 3, 1, 128, 204)
    with torch.no_grad():
        torch.testing.assert_close(alone.encode_audio(clips), whole.encode_audio(clips))
    assert "vision" not in alone.modality_trunks
    imagebind.build(state, imagebind.MODALITIES, "huge.pth", heads)
    gone = {key: value for key, value in state.items() if ".audio." not in key}
    with pytest.raises(ValueError, match="lacks modality_trunks.audio.blocks.0.attn.in_proj_weight"):
        imagebind.build(gone, ["audio"], "huge.pth", heads)
    with pytest.raises(ValueError, match="modality_trunks.audio.blocks.1.attn.bias_k is missing"):
        del state["modality_trunks.audio.blocks.1.attn.bias_k"]
        imagebind.build(state, ["audio"], "huge.pth", heads)


@torch.no_grad()
def test_a_sound_embedding_is_the_mean_over_clips_in_any_order_and_of_any_batch():
    network = towers()
    clips = random(2, 3, 1, 128, 204)
    both = network.encode_audio(clips)
    torch.testing.assert_close(network.encode_audio(clips.flip(1)), both)
    torch.testing.assert_close(torch.cat([network.encode_audio(clips[i : i + 1]) for i in range(2)]), both)
    assert (both.norm(dim=-1) < 20).all()
    sizes, raw = [], network.raw
    network.raw = lambda modality, x: sizes.append(len(x)) or raw(modality, x)
    same = network.encode_audio(clips[:, :1].expand(-1, 3, -1, -1, -1))
    network.raw = raw
    torch.testing.assert_close(same.norm(dim=-1), torch.full((2,), 20.0))
    assert sizes == [2]  # equal clips are computed once
    tokens = torch.randint(1, 48, (2, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 9] = 49
    assert network.encode_text(tokens).norm(dim=-1).tolist() == pytest.approx([100, 100], rel=1e-5)  # the scale is bounded
    image = random(1, 3, 224, 224)
    assert network.encode_vision(image).norm().item() == pytest.approx(1, rel=1e-5)
    twice = image[:, :, None].expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(network.encode_vision(twice[:, None]), network.encode_vision(image))
    with pytest.raises(ValueError, match="128 x 204, not \\(128, 100\\)"):
        network.encode_audio(clips[..., :100])


def test_imagebind_hears_no_offset_and_a_gain_as_a_shift():
    wave = random(1, 40000, seed=2) * 0.1
    plain = imagebind_frontend.hear(wave)
    torch.testing.assert_close(imagebind_frontend.hear(wave + 0.25), plain, atol=2e-3, rtol=0)
    louder = imagebind_frontend.hear(3 * wave)[..., :198]
    shift = 2 * math.log(3) / imagebind_frontend.STD
    heard = plain[..., :198] > plain.min() + 0.01  # one filter is too narrow for any bin and stays at the floor
    moved = (louder - plain[..., :198])[heard]
    torch.testing.assert_close(moved, torch.full_like(moved, shift), atol=1e-3, rtol=0)
    short = imagebind_frontend.hear(wave[:, :8000])
    assert torch.equal(short[:, 0], short[:, 1]) and torch.equal(short[:, 0], short[:, 2])
    assert not torch.equal(imagebind_frontend.hear(wave[:, :8000], short="loop"), short)
    assert imagebind_frontend.hear(torch.ones(1, 1), 5, "loop").shape == (1, 5, 1, 128, 204)
    kept = wave.clone()
    imagebind_frontend.hear(wave)
    assert torch.equal(kept, wave)


def test_arithmetic_of_embeddings():
    a, b = random(2, 6, dtype=torch.float64), random(2, 6, seed=1, dtype=torch.float64)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(renormed(add([a, b], [1, 0]), 20.0), 20 * unit(a, dim=-1))
    torch.testing.assert_close(slerp(a, b, 0), unit(a, dim=-1))
    torch.testing.assert_close(slerp(a, b, 1), unit(b, dim=-1))
    assert slerp(a, b, 0.3).norm(dim=-1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), unit(a, dim=-1))
    with pytest.raises(ValueError, match="cancel each other"):
        renormed(add([a, a], [1, -1]), 20.0)
    assert shift(a, unit(a, dim=-1).mean(0), unit(b, dim=-1).mean(0)).norm(dim=-1).tolist() == pytest.approx([1, 1])


def test_the_visual_cache_treats_each_sample_by_itself():
    f, bank = random(3, 8), torch.nn.functional.normalize(random(30, 8, seed=1), dim=-1)
    together = bind_network.visual_cache(f, bank, 4)
    torch.testing.assert_close(together, torch.cat([bind_network.visual_cache(f[i : i + 1], bank, 4) for i in range(3)]))
    assert bind_network.visual_cache(f, bank[:2]).isfinite().all()  # fewer than are asked for
    network = bind_network.BindNetwork(8, 12, 24)
    state = network.state_dict()
    bind_network.build({**state, "prefix_query.weight": torch.zeros(1)}, "7B.pth")
    with pytest.raises(ValueError, match="7B.pth holds no bind network"):
        bind_network.build({"x": torch.zeros(1)}, "7B.pth")


# samplers with gradients and the optimisation


@pytest.mark.parametrize("method", ["plms", "ddim"])
def test_constant_noise_is_taken_away_exactly(method):
    x, seen = torch.full((1,), 10.0), []
    out = walk(lambda x, sigma: seen.append(sigma) or torch.ones(1), x, [8.0, 4.0, 2.0, 0.0], method)  # noqa: B023
    assert out.item() == pytest.approx(2.0)
    assert len(seen) == calls(method, 3)


def test_plms_is_of_higher_order():
    def error(method, steps):
        sigmas = torch.linspace(3, 1, steps + 1).tolist()
        return abs(float(walk(lambda x, s: x / s - s, torch.tensor(3.0, dtype=torch.float64), sigmas, method)) - exact)

    exact = 1 * (3 / 3 + 3 - 1)  # dx/ds = x/s - s has x = s (c - s), c = 1 + 3
    assert error("plms", 40) < error("ddim", 40) / 50


@pytest.mark.parametrize("last", [1, 2, None])
def test_gradients_flow_through_the_last_calls_alone(last):
    w, on = torch.tensor(0.7, requires_grad=True), []

    def noise_of(x, sigma):
        on.append(torch.is_grad_enabled())
        return w * x / (1 + sigma)

    walk(noise_of, torch.ones(1), [4.0, 3.0, 2.0, 1.0], "ddim", last).sum().backward()
    assert on == ([True] * 3 if last is None else [False] * (3 - last) + [True] * last)
    assert w.grad is not None


def test_the_optimisation_follows_its_losses():
    z = random(1, 77, 6, dtype=torch.float64) + 0.3
    target = random(1, 6, seed=4, dtype=torch.float64)

    def draw(prompt):
        return prompt[:, 3:6].mean(1)[:, :, None, None]

    def judge(picture):
        return spherical(picture[..., 0, 0], target), disagreement(picture[..., 0, 0], target)

    seen = []
    rounds, after = optimise(
        z, torch.ones(77), draw, judge, Terms(0.0001), 30, 0.05, lambda index, one: seen.append(index)
    )
    assert seen == list(range(30)) and len(rounds) == 30 and after.shape == (77, 6)
    assert rounds[-1].loss < 0.8 * rounds[0].loss and best(rounds) == 29
    assert rounds[0].loss == pytest.approx(sum(rounds[0].terms))
    again, _ = optimise(z, torch.ones(77), draw, judge, Terms(0.0001), 30, 0.05, scale=1024.0)
    assert again[-1].loss == pytest.approx(rounds[-1].loss, rel=1e-6)
    with pytest.raises(RuntimeError, match="gradient of round 1 is no number"):
        optimise(z, torch.ones(77), lambda p: draw(p) / 0, judge, Terms(), 1)


def test_distances_of_embeddings():
    a = torch.tensor([[1.0, 0.0]])
    assert spherical(a, -a).item() == pytest.approx(math.pi**2 / 2)
    assert spherical(3 * a, a).item() == 0
    assert disagreement(a, a, math.log(60)).item() == pytest.approx(0.4, abs=1e-6)
    assert disagreement(a, a, math.log(180)).item() == pytest.approx(0, abs=1e-6)  # the scale is bounded by 100


def test_crops_are_judged_beside_the_picture_and_are_always_the_same():
    picture = random(1, 3, 20, 30, seed=8).requires_grad_(True)
    assert torch.equal(views(picture, 0, 5), picture)
    found = views(picture, 6, 5)
    assert found.shape == (7, 3, 20, 30) and torch.equal(found[:1], picture)
    assert torch.equal(found, views(picture, 6, 5)) and not torch.equal(found, views(picture, 6, 4))
    ramp = torch.linspace(0, 1, 30).expand(1, 3, 20, 30)
    rises = [bool(one[0, 0, -1] > one[0, 0, 0]) for one in views(ramp, 20, 5)]
    assert rises[0] and {*rises} == {True, False}
    spans = [float(one.max() - one.min()) for one in views(ramp, 20, 5)]
    assert 0.55 < min(spans) < 0.85 and max(spans) <= 1
    found.sum().backward()
    assert picture.grad.abs().min() > 0
    goal = random(1, 4)
    near, far = goal + 0.1, -goal
    assert disagreement(torch.cat([near, far]), goal).item() == pytest.approx(
        (disagreement(near, goal).item() + disagreement(far, goal).item()) / 2, abs=1e-6
    )


# mapping networks


def config(arch, **more):
    return {"arch": arch, "inside": 12, "length": 9, "width": 10, "hidden": 16, "modalities": ["audio", "text"], **more}


@pytest.mark.parametrize("arch", sound_mapping.ARCHITECTURES)
def test_every_architecture_begins_at_the_mean_and_loads_strictly(arch):
    network = sound_mapping.PromptMapping(config(arch, residual=True, pooled=5, target="T5"))
    prompts, pooled = random(20, 9, 10), random(20, 5, seed=1)
    network.set_statistics(prompts, pooled)
    y, p = network(random(3, 12))
    assert torch.equal(y, prompts.mean(0).expand(3, -1, -1)) and p.shape == (3, 5)
    free = sound_mapping.PromptMapping(config(arch))
    assert free(random(3, 12))[0].shape == (3, 9, 10)
    about = {"config": sound_mapping.json.dumps(free.config)}
    state = free.state_dict()
    again = sound_mapping.build(state, about, "m.safetensors")
    x = random(2, 12)
    torch.testing.assert_close(again(5 * x)[0], free(x)[0])  # the length of an embedding says nothing
    with pytest.raises(ValueError, match="no statistics of its target \\(target_mean is missing\\)"):
        sound_mapping.build({key: value for key, value in state.items() if key != "target_mean"}, about, "m")
    with pytest.raises(ValueError, match="m is no prompt mapping"):
        sound_mapping.build(state, None, "m")


@pytest.mark.parametrize(
    "arch, millions", [("linear", 323.3), ("factored", 5.6), ("conv1d", 38.8), ("transformer", 79.9), ("bind", 608.8)]
)
def test_sizes_for_t5_are_those_of_the_plan(arch, millions):
    with torch.device("meta"):
        hidden = 4096 if arch == "bind" else 1024
        kind = sound_mapping.KINDS[arch](1024, 77, 4096, hidden, torch.nn)
    assert sum(value.numel() for value in kind.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_modality_is_moved_to_the_mean_of_texts():
    network = sound_mapping.PromptMapping(config("linear"))
    sounds, texts = random(50, 12) + 2, random(50, 12, seed=1) - 2
    network.set_modality("audio", sounds)
    network.set_modality("text", texts)
    moved = network.given(sounds, "audio").mean(0)
    assert torch.nn.functional.cosine_similarity(moved, texts.mean(0), dim=0) > 0.9
    torch.testing.assert_close(network.given(texts, "text"), network.given(texts))


def test_diagnostics_of_the_mean_and_of_a_copy():
    targets = random(64, 10, dtype=torch.float64) * torch.arange(1, 11) + 5
    mean = diagnose(targets.mean(0).expand(64, -1) + 1e-9 * random(64, 10, seed=1, dtype=torch.float64), targets)
    assert mean["mse_whitened"] == pytest.approx(1) and mean["r2_vs_mean"] == pytest.approx(0, abs=1e-6)
    assert mean["mi_lower_bound"] <= 0.1 and collapsed(mean)
    copy = diagnose(targets, targets)
    assert copy["r2_vs_mean"] == pytest.approx(1) and copy["retrieval_r1"] == 1 and not collapsed(copy)
    assert copy["var_ratio"] == pytest.approx(1)
    alike = diagnose(torch.ones(64, 10).double(), targets)
    assert alike["retrieval_r1"] == 1 / 64 and alike["retrieval_mean_rank"] == 32.5
    twice = diagnose(targets, targets.roll(1, 0)[torch.arange(64) // 2 * 2])
    assert twice["retrieval_r1"] == 0  # two equal goals: a tie counts against it
