"""CLIP and CLAP as judges: small weights in the layout that transformers publishes, strict loading, who judges what."""

import folder_paths
import numpy as np
import pytest
import torch
from storyweft.host import clap, judges, model_files
from storyweft.nodes import sound_prompt
from torch.nn.functional import cosine_similarity, normalize
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 12}
CAPTION = "a dog barks near a train"


def filled(network):
    generator = torch.Generator().manual_seed(0)
    for value in network.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.2
    return network.train(False)


def clip_model():
    return filled(CLIPModel(CLIPConfig(
        text_config={**TINY, "vocab_size": 49408}, vision_config={**TINY, "image_size": 32, "patch_size": 16},
        projection_dim=12,
    )))  # fmt: skip


def clap_model():
    audio = {
        "window_size": 2, "num_mel_bins": 16, "spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "depths": [1, 1],
        "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16, "projection_dim": 10,
    }  # fmt: skip
    text = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 40, "projection_dim": 10,
    }  # fmt: skip
    network = filled(ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=10)))
    network.logit_scale_a.data = torch.tensor(2.0)
    return network


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setitem(folder_paths.folder_names_and_paths, judges.FOLDER, ([str(tmp_path)], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    clip_model().save_pretrained(tmp_path / "clip-b32")
    clap_model().save_pretrained(tmp_path / "clap")
    ClapFeatureExtractor(feature_size=16, hop_length=9600, truncation="rand_trunc").save_pretrained(tmp_path / "clap")
    words = ["<s>", "<pad>", "</s>", "<unk>", *dict.fromkeys(f"This is a sound of . {CAPTION}".split())]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", model_max_length=30)
    fast.save_pretrained(tmp_path / "clap")
    return tmp_path


def load(judge, reader=judges.SAME):
    return sound_prompt.LoadSoundJudge.execute(judge, False, reader)[0]


def wave(seconds=1.0, rate=16000):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(round(seconds * rate))).float() * 0.1


def test_folders_and_files_are_listed_once(folder):
    torch.save({"x": torch.zeros(1)}, folder / "AudioCLIP-Full-Training.pt")
    assert sorted(judges.names()) == ["AudioCLIP-Full-Training.pt", "clap", "clip-b32", "demo"]


def test_clip_judges_captions_beside_another_judge_of_sounds(folder):
    """The paper's arrangement: spherical distance in ViT-B/32, the sound in a space of its own."""
    both, alone = load("demo", "clip-b32"), load("demo")
    reference = clip_model()
    from storyweft.host.imagebind import tokenize

    with torch.no_grad():
        expected = reference.text_projection(reference.text_model(input_ids=tokenize([CAPTION]))[1])
    torch.testing.assert_close(both.text(CAPTION), expected)
    torch.testing.assert_close(both.audio(wave(), 16000, CAPTION), alone.audio(wave(), 16000, CAPTION))
    picture = torch.rand(1, 3, 40, 40, requires_grad=True)
    seen, heard = both.see(picture)
    assert seen.shape == (1, 12) and heard.shape == (1, 96) and both.log_scale == alone.log_scale
    torch.testing.assert_close(heard, alone.see(picture)[1])
    cosine_similarity(seen, both.text(CAPTION)).sum().backward()
    assert picture.grad.abs().sum() > 0
    assert not any(value.requires_grad or value.grad is not None for value in both.reading.network.parameters())


def test_clap_hears_through_the_words_of_the_caption(folder):
    judge, reference = load("clap", "clip-b32"), clap_model()
    texts = [CAPTION, *(clap.HEARD.format(noun) for noun in ("dog", "train"))]
    given = judge.tokenizer(texts, padding=True, return_tensors="pt")
    sound = judge.features(wave(rate=48000).numpy(), sampling_rate=48000, return_tensors="pt")
    with torch.no_grad():
        out = reference(**given, input_features=sound["input_features"], is_longer=sound["is_longer"])
    chances = judge.probabilities(wave(rate=48000), 48000, texts)
    torch.testing.assert_close(chances, out.logits_per_audio[0].softmax(-1), atol=1e-5, rtol=0)
    places = torch.cat([judge.text(one) for one in (CAPTION, clap.SEEN.format("dog"), clap.SEEN.format("train"))])
    mixed = (chances[:, None] * normalize(places, dim=-1)).sum(0, keepdim=True)
    torch.testing.assert_close(judge.audio(wave(rate=48000), 48000, CAPTION), mixed, atol=1e-5, rtol=0)
    plain = judge.audio(wave(), 16000, "barking near")
    torch.testing.assert_close(plain, normalize(judge.text("barking near"), dim=-1))  # no noun: the caption alone
    assert [one.shape for one in judge.see(torch.rand(2, 3, 9, 9))] == [(2, 12), (2, 12)]


def test_clap_hears_long_and_short_sounds_the_same_each_time(folder):
    judge = load("clap", "clip-b32")
    long = wave(25)
    torch.testing.assert_close(judge.audio(long, 16000, CAPTION), judge.audio(long, 16000, CAPTION), atol=0, rtol=0)
    parts = torch.stack([judge.hear(long[start : start + 160000], 16000) for start in (0, 160000, 240000)])
    torch.testing.assert_close(judge.hear(long, 16000), normalize(parts.mean(0), dim=-1), atol=1e-3, rtol=0)
    assert judge.hear(torch.ones(1), 16000).isfinite().all()


def test_a_file_of_openais_size_is_clip_vit_b_32(monkeypatch, tmp_path):
    with torch.device("meta"):
        state = CLIPModel(CLIPConfig()).state_dict()
    assert len(state) == 398 and sum(value.numel() for value in state.values()) == 151_277_313
    state["text_model.embeddings.position_ids"] = torch.zeros(1, 77, device="meta")  # older files hold it
    monkeypatch.setattr(clap, "read", lambda path, node_id: state)
    network = clap.pretrained(tmp_path / "model.safetensors", "clip", "N")
    assert network.config.vision_config.patch_size == 32 and network.config.text_config.hidden_act == "quick_gelu"
    with torch.device("meta"):
        published = ClapModel(ClapConfig()).state_dict()
    (tmp_path / "laion").mkdir()
    ClapConfig().save_pretrained(tmp_path / "laion")
    monkeypatch.setattr(clap, "read", lambda path, node_id: published)
    assert sum(value.numel() for value in clap.pretrained(tmp_path / "laion", "clap", "N").parameters()) == 153_492_890


def spoilt(folder, name, change):
    state = model_files.read(folder / name, "N")
    change(state)
    (folder / name / "model.safetensors").unlink()
    torch.save(state, folder / name / "pytorch_model.bin")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("clap", lambda s: s.pop("audio_projection.linear2.bias"), "clap: the tensor audio_projection.linear2.bias is missing"),
        ("clap", lambda s: s.update(x=torch.zeros(1)), "clap: the tensor x is not known"),
        ("clip-b32", lambda s: s.update(logit_scale=torch.zeros(2)), r"clip-b32: the tensor logit_scale is \(2,\), not \(\)"),
        ("clip-b32", lambda s: (s.clear(), s.update(x=torch.zeros(1))), "clip-b32 is no CLIP model: it lacks logit_scale"),
    ],
)
def test_wrong_tensors_are_refused_by_name(folder, name, change, words):
    spoilt(folder, name, change)
    with pytest.raises(ValueError, match=f"StoryweftLoadSoundJudge: {words}"):
        load("clap", "clip-b32")


def test_wrong_choices_are_refused_by_name(folder, monkeypatch):
    for chosen, words in (
        (("clip-b32",), "clip-b32 is CLIP, which hears nothing; choose it at caption_judge"),
        (("clap",), "clap is CLAP, which sees no pictures; choose a CLIP at caption_judge"),
        (("demo", "clap"), "clap is no CLIP model: its config.json says 'clap'"),
        (("none.pt",), "'none.pt' is not in models/sound_judges"),
    ):
        with pytest.raises(ValueError, match=f"StoryweftLoadSoundJudge: {words}"):
            load(*chosen)
    for gone, words in (("preprocessor_config.json", "lacks CLAP's tokenizer or preprocessor"), ("tokenizer.json", "holds no tokenizer")):
        (folder / "clap" / gone).unlink()
        with pytest.raises(ValueError, match=f"StoryweftLoadSoundJudge: clap {words}"):
            load("clap", "clip-b32")
    (folder / "clap" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="StoryweftLoadSoundJudge: clap holds no weights"):
        load("clap", "clip-b32")
    (folder / "clap" / "config.json").write_text("[")
    with pytest.raises(ValueError, match="clap is no CLAP model: its config.json says 'nothing that can be read'"):
        load("clap", "clip-b32")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match="clip-b32 needs the package transformers, which this ComfyUI lacks"):
        load("demo", "clip-b32")


class Bomb:
    def __reduce__(self):
        return print, ("a pickle ran",)


def test_no_pickle_runs(folder, capsys):
    (folder / "clip-b32" / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / "clip-b32" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than weights and is not opened"):
        load("demo", "clip-b32")
    assert "a pickle ran" not in capsys.readouterr().out
