"""Sound on the host: AUDIO, captioners of files, words of prompts, weighted keys, tuned weights."""

import json

import comfy.samplers
import folder_paths
import pytest
import tiny
import tiny_clip
import torch
from storyweft.attention.sound import token_weights
from storyweft.host import captioners, core_captioner, override, sound_prompt, sound_sampling, sounds, taggers
from storyweft.host.sound_words import place, row_owners, row_weights, word_tokens
from storyweft.models import act
from storyweft.sampling.sound_optimise import Terms, optimise
from storyweft.story.heard import Caption, typed_caption

SIZES = {
    "width": 24, "positions": 126, "mels": 64, "patch": 256, "inner": 64, "heads": 1, "feed": 32, "depth": 1, "classes": 20,
    "memory": 16, "decoder_heads": 8, "decoder_feed": 24, "decoder_depth": 1,
}  # fmt: skip
WORDS = ["<sos>", "a", "dog", "barks", "bird", "sings", "<eos>", "and"]


def tone(seconds=2.0, rate=16000, rows=1, channels=1):
    wave = torch.sin(torch.arange(round(seconds * rate)) * 0.2) * 0.3
    return {"waveform": wave.expand(rows, channels, -1).clone(), "sample_rate": rate}


# AUDIO


def test_sounds_are_mixed_to_mono_and_left_alone():
    audio = tone(channels=2)
    audio["waveform"][:, 1] *= 0.5
    before = audio["waveform"].clone()
    wave, rate = sounds.checked(audio, "N")
    assert rate == 16000 and wave.shape == (1, 32000)
    torch.testing.assert_close(wave, before.mean(1))
    assert torch.equal(audio["waveform"], before)


@pytest.mark.parametrize(
    "harm, words",
    [
        ({"waveform": torch.zeros(1, 1, 100)}, "sound 1 of audio is all zeros"),
        ({"waveform": torch.zeros(1, 1, 0)}, "holds no samples"),
        ({"waveform": torch.full((1, 1, 9), float("nan"))}, "no numbers"),
        ({"waveform": torch.full((1, 1, 9), float("inf"))}, "no numbers"),
        ({"sample_rate": 0}, "sample rate of 0 Hz"),
        ({"sample_rate": -5}, "sample rate of -5 Hz"),
    ],
)
def test_what_is_no_sound_is_refused(harm, words):
    with pytest.raises(ValueError, match=f"N: .*{words}"):
        sounds.checked({**tone(), **harm}, "N")
    with pytest.raises(ValueError, match="N: audio is NoneType"):
        sounds.checked(None, "N")


def test_a_long_sound_is_heard_in_windows_that_end_with_it():
    wave = tone(25)["waveform"][0, 0]
    parts = sounds.windows(wave, 16000, 10, 10, "N")
    assert [(part.start, part.end) for part in parts] == [(0, 10), (10, 20), (15, 25)]
    assert len(sounds.windows(wave[:1], 16000, 10, 10, "N")) == 1
    hour = torch.zeros(3600 * 100)
    assert len(sounds.windows(hour, 100, 10, 10, "N")) == 360
    with pytest.raises(ValueError, match="N: the sound is 3600 s long, which makes 3591 windows at a hop of 1 s; .* at least 6 s"):
        sounds.windows(hour, 100, 10, 1, "N")
    assert sounds.windows(wave * 1e-5, 16000, 30, 30, "N")[0].silent


# captioners of files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in (captioners.FOLDER, taggers.FOLDER):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path)], set()))
    return tmp_path


def published(seed=0):
    generator = torch.Generator().manual_seed(seed)
    network = act.ActCaptioner(SIZES, WORDS)
    for value in network.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.3
    return network.state_dict()


def test_act_is_read_from_its_checkpoint_and_the_words_beside_it(folder):
    torch.save({"model": published(), "epoch": 3}, folder / "ACTm.pth")
    (folder / "ACTm.json").write_text(json.dumps(WORDS))
    assert captioners.names() == ["demo", "ACTm.pth"]
    listener = captioners.load("ACTm.pth", "N")
    assert listener.seconds == 10
    window = sounds.windows(tone()["waveform"][0, 0], 16000, 10, 10, "N")[0]
    with torch.inference_mode():
        words, chances = listener.caption(window, sounds.Asked())
        assert len(words) == len(chances) <= 29 and set(words) <= set(WORDS) and all(0 < one <= 1 for one in chances)
        listener.network.dec_fc.bias[6] += 2
        searched, numbers = listener.caption(window, sounds.Asked(width=3))
        assert len(searched) == len(numbers)
    (folder / "ACTm.json").unlink()
    (folder / "train.csv").write_text("caption\na dog barks bird sings\n")
    with pytest.raises(ValueError, match="N: .*words and word_emb.weight 8 rows"):
        captioners.load("ACTm.pth", "N")


@pytest.mark.parametrize(
    "content, words, match",
    [
        ({"state": {"x": torch.zeros(1)}, "b": 1}, WORDS, "ACT.pth has no captioner under the key 'model'; it holds state"),
        ({"model": {"unet": torch.zeros(1)}, "b": 1}, WORDS, "has no captioner under the key 'model'; it holds unet"),
        ({"model": {"encoder.pos_embedding": torch.zeros(1)}}, WORDS, "ACT.pth is no ACT captioner: it lacks encoder"),
        ({"model": published()}, WORDS[:-1], "7 words and word_emb.weight 8 rows"),
        ({"model": published()}, None, "needs its list of words .*words_list.p is not read"),
        ({"model": published()}, {"a": 1}, "ACT.json is no list of words"),
    ],
)
def test_wrong_captioner_files_are_refused_by_name(folder, content, words, match):
    torch.save(content, folder / "ACT.pth")
    (folder / "words_list.p").write_bytes(b"")
    if words is not None:
        (folder / "ACT.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=f"N: .*{match}"):
        captioners.load("ACT.pth", "N")


class Bomb:
    def __reduce__(self):
        return print, ("a pickle ran",)


def test_no_pickle_runs(folder, capsys):
    torch.save({"model": Bomb()}, folder / "bad.pth")
    (folder / "bad.json").write_text(json.dumps(WORDS))
    with pytest.raises(ValueError, match="N: bad.pth holds more than weights and is not opened"):
        captioners.load("bad.pth", "N")
    assert "a pickle ran" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="N: captioner 'none.pth' is not in models/audio_captioners"):
        captioners.load("none.pth", "N")


def whisper(folder):
    """A tiny Whisper with a byte-level tokenizer, saved as transformers does."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    hidden = [byte for byte in range(256) if byte not in shown]
    vocabulary = {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    tokenizer = WhisperTokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=128, eos_token_id=end,
        pad_token_id=end, bos_token_id=end, decoder_start_token_id=end, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    network = WhisperForConditionalGeneration(config)
    for value in network.parameters():
        value.data = torch.randn(value.shape) * 0.3
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def test_whisper_reads_raw_probabilities_through_its_cache(folder):
    whisper(folder / "whisper-tiny")
    assert "whisper-tiny" in captioners.names()
    listener = captioners.load("whisper-tiny", "N")
    window = sounds.windows(tone()["waveform"][0, 0], 16000, 30, 30, "N")[0]
    with torch.inference_mode():
        encoded = listener.encode(window)
        prefix = listener.prefix(sounds.STYLES[0])
        assert listener.tokenizer.decode(prefix[4:]) == sounds.STYLES[0]
        ids, chances = listener.greedy(encoded, prefix)
        assert len(ids) == len(chances) > 1
        given = torch.tensor([prefix + ids])
        out = listener.network.model.decoder(input_ids=given, encoder_hidden_states=encoded, use_cache=False)
        scores = listener.network.proj_out(out.last_hidden_state)[0].softmax(-1)
    forced = [scores[len(prefix) - 1 + place, token].item() for place, token in enumerate(ids)]
    torch.testing.assert_close(torch.tensor(chances), torch.tensor(forced), atol=1e-6, rtol=0)
    words, numbers = listener.caption(window, sounds.Asked())
    assert len(words) == len(numbers)


def test_a_folder_that_is_no_whisper_is_refused(folder):
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="N: other is no Whisper model"):
        captioners.load("other", "N")
    whisper(folder / "mute")
    (folder / "mute" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="N: mute holds no tokenizer"):
        captioners.load("mute", "N")


def test_core_models_that_cannot_hear_are_refused():
    with pytest.raises(ValueError, match="N: the clip \\(SD1ClipModel\\) generates no text"):
        core_captioner.CoreCaptioner(tiny_clip.sd1(), "N")
    listener = core_captioner.CoreCaptioner(tiny_clip.z_image(), "N")
    window = sounds.windows(tone()["waveform"][0, 0], 16000, 30, 30, "N")[0]
    with pytest.raises(ValueError, match="N: .*takes no sound"):
        listener.caption(window, sounds.Asked())


def test_a_language_models_numbers_come_from_one_teacher_forced_pass(monkeypatch):
    """On a model without ears: the tokens stand for those with a sound in them."""
    listener = core_captioner.CoreCaptioner(tiny_clip.z_image(), "N")
    monkeypatch.setattr(listener, "tokens", lambda window, prompt: listener.clip.tokenize(prompt))
    tokens = listener.clip.tokenize("name the sounds")
    with torch.inference_mode():
        ids = listener.clip.generate(tokens, do_sample=False, max_length=4, seed=0)
        chances = listener.probabilities(tokens, ids)
        row = [one[0] for one in next(iter(tokens.values()))[0]]
        for count, (token, chance) in enumerate(zip(ids, chances, strict=True)):
            alone = listener.probabilities({"k": [[(one,) for one in row + ids[:count]]]}, [token])
            assert alone[0] == pytest.approx(chance, rel=1e-3)
        words, numbers = listener.caption(None, sounds.Asked())
    assert len(words) == len(numbers)


def test_a_tagger_is_read_by_place_and_pieces_of_a_word_together(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[UNK]", "a", "dog", "man", "'", "s", "barks"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / "tagger")
    labels = {0: "NN", 1: "VBZ", 2: "NNS", 3: "POS"}
    config = BertConfig(
        vocab_size=7, hidden_size=8, num_hidden_layers=0, num_attention_heads=1, intermediate_size=8, id2label=labels,
        label2id={tag: number for number, tag in labels.items()},
    )  # fmt: skip
    network = BertForTokenClassification(config)
    network.save_pretrained(folder / "tagger")
    caption = typed_caption("a man's dog, barks")
    found = taggers.load("tagger", "N")(caption)
    with torch.no_grad():
        given = torch.tensor([[1, 3, 4, 5, 2, 6]])
        chances = network.train(False)(given).logits[0].softmax(-1)[:, [0, 2]].sum(-1).tolist()
    assert found == pytest.approx([chances[0], max(chances[1:4]), chances[4], chances[5]])
    network.config.id2label = {0: "X", 1: "Y"}
    network.config.save_pretrained(folder / "tagger")
    assert taggers.names() == [taggers.BUILT_IN, "nltk", "spaCy", "tagger"]
    with pytest.raises(ValueError, match="N: tagger 'none' is not in models/pos_taggers"):
        taggers.load("none", "N")


# words of prompts


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux", "ltxv", "qwen_image", "z_image"])
def test_every_word_finds_its_tokens(name):
    clip = getattr(tiny_clip, name)()
    words = ["a", "motorboat", "accelerates,", "loudly"]
    length = clip.encode_from_tokens(clip.tokenize(" ".join(words))).shape[1]
    owners = row_owners(clip, " ".join(words), words, length, "N")
    assert len(owners) == length
    assert [word for word in dict.fromkeys(owners) if word is not None] == [0, 1, 2, 3]
    assert owners == sorted(owners, key=lambda word: -1 if word is None else word) or owners.count(None) > 0
    named = [word for word in owners if word is not None]
    assert named == sorted(named) and named.count(1) >= 1


def test_a_long_caption_runs_over_several_blocks():
    clip = tiny_clip.sd1()
    words = ["motorboat"] * 60
    length = clip.encode_from_tokens(clip.tokenize(" ".join(words))).shape[1]
    assert length == 154
    w = row_weights(clip, " ".join(words), words, [2.0] * 60, length, "N")
    assert w[0] == w[77] == 1 and w[76] == 1 and (w == 2).sum() == 120


def test_syntax_of_the_host_means_nothing_in_a_caption():
    clip = tiny_clip.sd1()
    words = ["a", "(loud:1.9)", "embedding:bad", "dog"]
    made, rows, _ = sound_prompt.encode(clip, [Caption(tuple(words), (1.0,) * 4)], [[1.0] * 4], False)
    ids = clip.tokenizer.clip_l.tokenizer("a (loud:1.9) embedding :bad dog")["input_ids"]
    plain = clip.encode_from_tokens({"l": [[(token, 1.0) for token in ids + [49407] * (77 - len(ids))]]})
    assert torch.equal(made[0][0], plain)


def test_a_word_map_that_does_not_fit_is_refused():
    tokens = word_tokens(tiny_clip.sd1().tokenizer.clip_l, ["a", "dog"])
    assert place([5, 6, 7], tokens, True) == [None] * 3
    with pytest.raises(ValueError, match="N: the text encoder makes 70 tokens of the caption 'a dog'"):
        row_owners(tiny_clip.sd1(), "a dog", ["a", "dog"], 70, "N")
    assert token_weights([2.0], [None, 0]).tolist() == [1, 2]


def test_captions_of_different_length_share_one_conditioning():
    clip = tiny_clip.sd1()
    captions = [typed_caption("a dog barks", nouns="0 1 0"), typed_caption("motorboat " * 50, nouns="1 " * 50)]
    words = [[1.0, 1.5, 0.5], [1.2] * 50]
    made, rows, _ = sound_prompt.encode(clip, captions, words, False, "photo of", "at night")
    assert made[0][0].shape == (2, 154, 64) and "pooled_output" in made[0][1]
    alone, own, _ = sound_prompt.encode(clip, captions[:1], words[:1], False, "photo of", "at night")
    torch.testing.assert_close(made[0][0][:1, :77], alone[0][0], atol=1e-5, rtol=0)
    assert torch.equal(rows[0][:77], own[0]) and torch.equal(rows[0][77:], own[0])
    assert own[0][:6].tolist() == [1, 1, 1, 1.0, 1.5, 0.5]


# weighted keys

EXACT = ("wan", "flux", "sd3", "ltxv", "qwen_image")


def sampled(model, text, marks=None, name="flux"):
    (_, extras), *_ = tiny.conditioning(name, 1, 3)
    extras = {key: value for key, value in extras.items() if key != "attention_mask"}
    if name == "ltxv":
        extras["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.long)
    positive = [[text, {**extras, **(marks or {})}]]
    with torch.inference_mode():
        return tiny.sample(model, positive, positive, tiny.latent(name, 1), steps=2, cfg=1.0)


@pytest.mark.parametrize("name", EXACT)
def test_a_key_of_weight_two_is_a_token_that_stands_twice(name):
    """Where tokens of the prompt have no place of their own."""
    model = tiny.build(name)
    (text, _), *_ = tiny.conditioning(name, 1, 3)
    twice = torch.cat([text[:, :-1], text[:, -1:], text[:, -1:]], 1)
    weights = torch.ones(1, text.shape[1], dtype=torch.float64)
    weights[0, -1] = 2
    ruled = sound_prompt.weight_rule(model)
    got = sampled(ruled, text, {sound_prompt.MARK: weights}, name)
    assert not torch.allclose(got, sampled(model, text, None, name), atol=1e-4)
    if name != "qwen_image":  # it counts its text tokens to place the picture
        torch.testing.assert_close(got, sampled(model, twice, None, name), atol=5e-5, rtol=0)
    same = sampled(ruled, text, {sound_prompt.MARK: torch.ones(1, text.shape[1], dtype=torch.float64)}, name)
    torch.testing.assert_close(same, sampled(model, text, None, name), atol=2e-6, rtol=0)


def test_a_scaled_row_means_nothing_where_a_norm_comes_first():
    """What the key form is for."""
    model = tiny.build("qwen_image")
    (text, _), *_ = tiny.conditioning("qwen_image", 1, 3)
    louder = text.clone()
    louder[:, 3] *= 1.5
    torch.testing.assert_close(
        sampled(model, louder, None, "qwen_image"), sampled(model, text, None, "qwen_image"), atol=2e-5, rtol=0
    )
    assert sound_prompt.cancels(model) and not sound_prompt.cancels(tiny.build("sd15"))


def test_unmarked_prompts_are_left_alone_and_repeats_follow():
    model = sound_prompt.weight_rule(tiny.build("wan"))
    (text, _), *_ = tiny.conditioning("wan", 1, 3)
    plain = sampled(tiny.build("wan"), text, None, "wan")
    torch.testing.assert_close(sampled(model, text, None, "wan"), plain)
    weights = torch.ones(1, 9, dtype=torch.float64)
    weights[0, 2] = 3
    repeated = sampled(model, text.repeat(1, 2, 1), {sound_prompt.MARK: weights}, "wan")
    torch.testing.assert_close(repeated, sampled(model, text, {sound_prompt.MARK: weights}, "wan"), atol=5e-5, rtol=0)
    with pytest.raises(RuntimeError, match="sees 9 tokens of a prompt of 5"):
        sampled(model, text, {sound_prompt.MARK: torch.ones(1, 5)}, "wan")


# tuned weights


class Judge:
    """Linear features of the picture, so that a gradient is easy to follow."""

    log_scale = 4.0

    def __init__(self, size=3):
        generator = torch.Generator().manual_seed(7)
        self.maps = [torch.randn(3 * 16, size, generator=generator) for _ in range(2)]
        self.goals = [torch.randn(1, size, generator=generator) for _ in range(2)]

    def text(self, caption):
        return self.goals[0]

    def audio(self, wave, rate, caption):
        return self.goals[1]

    def see(self, picture):
        small = torch.nn.functional.adaptive_avg_pool2d(picture, 4).flatten(1)
        return tuple(small @ one for one in self.maps)


class Vae:
    """A one-layer decoder in the place of an autoencoder."""

    def __init__(self, inference=False):
        import comfy.model_patcher

        with torch.inference_mode(inference):
            network = torch.nn.Module()
            network.layer = torch.nn.Conv2d(4, 3, 1).requires_grad_(False)
            network.layer.weight.copy_(torch.randn(3, 4, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.2)
        network.decode = lambda z: network.layer(z)
        self.patcher = comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))


def prompts(rows=77):
    generator = torch.Generator().manual_seed(3)
    text, empty = (torch.randn(1, rows, 16, generator=generator) + 0.2 for _ in range(2))
    return [[text, {}]], [[empty, {}]]


def tuned(model, vae, judge=None, **more):
    chosen = {"steps": 3, "method": "ddim", "cfg": 3.0, "rounds": 3, "rate": 0.02, "terms": Terms(1e-4)}
    settings = sound_sampling.Settings(**{**chosen, **more})
    positive, negative = prompts()
    w, judge = torch.ones(77, dtype=torch.float64), judge or Judge()
    return sound_sampling.run(
        model, vae, positive, negative, w, judge, "a dog", (torch.zeros(9), 1), (1, 4, 8, 8), 5, settings
    )


def in_inference_mode(model):
    """The model with weights as a core loader makes them."""
    with torch.inference_mode():
        for part in model.model.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = torch.nn.Parameter(value.detach().clone(), False)
    return model


def test_weights_are_tuned_under_inference_mode_and_nothing_is_left_on_the_models():
    model = in_inference_mode(tiny.build("sd15"))
    vae, judge = Vae(True), Judge()
    assert next(model.model.parameters()).is_inference()
    before = {name: value.clone() for name, value in model.model.named_parameters()}
    with torch.inference_mode():
        found = tuned(model, vae, judge=judge, rounds=6, rate=0.05)
    losses = [one.loss for one in found.rounds]
    assert losses[-1] < losses[0]
    assert found.latents.shape == (6, 4, 8, 8) and found.after.shape == (1, 77, 16)
    for name, value in model.model.named_parameters():
        assert value.grad is None and not value.requires_grad
        assert torch.equal(value, before[name])
    assert not model.model_options["transformer_options"].get("optimized_attention_override")
    with torch.inference_mode():
        again = tuned(model, vae, judge=judge, rounds=2, rate=0.05)
    assert [one.loss for one in again.rounds] == losses[:2]  # the same noise, and no state is left


def test_the_gradient_agrees_with_finite_differences(monkeypatch):
    """In float64, through all calls of the model, the decoder and the judge."""
    seen = {}

    def watched(z, w, draw, judge, terms, *rest):
        w = w.double()[:, None].repeat(1, z.shape[-1]).requires_grad_(True)

        def loss(weights):
            picture = draw((z * weights).float())
            return sum(judge(picture))

        value = loss(w)
        value.backward()
        row, channel = divmod(int(w.grad.abs().argmax()), w.shape[1])
        step, ends = 0.02, []
        for sign in (1, -1):
            moved = w.detach().clone()
            moved[row, channel] += sign * step
            with torch.no_grad():
                ends.append(float(loss(moved)))
        seen.update(analytic=float(w.grad[row, channel]), numeric=(ends[0] - ends[1]) / (2 * step))
        return optimise(z, torch.ones(77), draw, judge, terms, 1)

    monkeypatch.setattr(sound_sampling, "optimise", watched)
    tuned(tiny.build("sd15"), Vae())
    assert seen["numeric"] == pytest.approx(seen["analytic"], rel=0.02)


@pytest.mark.parametrize("method", ["plms", "ddim"])
def test_a_gradient_of_few_calls_draws_the_same_first_picture(method):
    model, vae = tiny.build("sd15"), Vae()
    whole, one = (tuned(model, vae, method=method, last=last) for last in (None, 1))
    torch.testing.assert_close(one.latents[0], whole.latents[0])
    assert not torch.equal(one.rounds[1].prompt, whole.rounds[1].prompt)


@pytest.mark.parametrize("last, most", [(None, 3.2), (1, 1.4)])
def test_a_round_costs_few_forward_passes(last, most):
    """Operations of one round over those of its model calls alone; with all gradients a call is made, made again and followed back."""
    from torch.utils.flop_counter import FlopCounterMode

    model, vae = tiny.build("sd15"), Vae()
    positive, negative = prompts()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", 8)
    noise = torch.randn(1, 4, 8, 8)
    with FlopCounterMode(display=False) as forward, torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    with FlopCounterMode(display=False) as counter:
        tuned(model, vae, steps=8, rounds=1, last=last)
    assert counter.get_total_flops() <= most * forward.get_total_flops()


def test_crops_change_what_is_judged_and_not_what_is_drawn():
    model, vae = tiny.build("sd15"), Vae()
    alone, cropped, again = (tuned(model, vae, augment=count, rounds=2) for count in (0, 3, 3))
    torch.testing.assert_close(cropped.latents[0], alone.latents[0])
    assert cropped.rounds[0].loss != alone.rounds[0].loss
    assert [one.loss for one in cropped.rounds] == [one.loss for one in again.rounds]


def test_the_first_round_is_what_the_sampler_draws():
    """DDIM on the host's guider, the weights not yet tuned."""
    model, vae = tiny.build("sd15"), Vae()
    found = tuned(model, vae, steps=4)
    positive, negative = prompts()
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "ddim_uniform", 4)
    with torch.inference_mode():
        drawn = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    torch.testing.assert_close(found.latents[:1], drawn, atol=2e-4, rtol=0)


def test_models_that_a_gradient_cannot_follow_are_refused():
    text = torch.zeros(1, 77, 16)
    for name, words in (("flux", "Flux is no picture U-Net"), ("svd", "UNetModel is no picture U-Net")):
        with pytest.raises(ValueError, match=f"N: {words}"):
            sound_sampling.check(tiny.build(name), text, Vae(), "N")
    with pytest.raises(ValueError, match="N: the prompt has 70 rows, which is no CLIP text"):
        sound_sampling.check(tiny.build("sd15"), text[:, :70], Vae(), "N")
    ruled = override.register(tiny.build("sd15"), sound_prompt.KeyWeightRule(False))
    with pytest.raises(ValueError, match="N: this MODEL carries StoryweftAudioCaptionEmbedding"):
        sound_sampling.check(ruled, text, Vae(), "N")
