"""Runners for golden/sound_to_image: captioner, weights of words, optimisation, AudioCLIP, ImageBind, bind network, mapping."""

import json
import zlib

import numpy as np
import torch
import torchaudio
from comfy.sd1_clip import SDTokenizer
from conformance_consistent import read
from storyweft.attention.sound import NOUN, token_weights, word_weights
from storyweft.host.imagebind import see, tokenize
from storyweft.host.sound_words import place, word_tokens
from storyweft.metrics.mapping import diagnose
from storyweft.models import (
    act,
    act_frontend,
    audioclip,
    bind_network,
    fbsp,
    imagebind,
    imagebind_frontend,
    joint_embedding,
)
from storyweft.sampling.sound_optimise import Terms, disagreement, objective, optimise, prepare, spherical
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize


def weights_of(data: dict, prefix: str = "w.") -> dict:
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def stream(name: str, shape, seed: int) -> torch.Tensor:
    """The procedural numbers of the README for a tensor."""
    state = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    return torch.from_numpy(state.standard_normal(tuple(shape)))


def noun_rows(owners: list, nouns: list[float]) -> torch.Tensor:
    """Which rows the authors put in their group of nouns: those of word 1 where there is none."""
    named = [noun > NOUN for noun in nouns]
    if not any(named) and len(named) > 1:
        named[1] = True
    return torch.tensor([owner is not None and named[owner] for owner in owners])


def act_frontend_file(path, report) -> None:
    data, _ = read(path)
    report.close(path.name, "mel_basis", act_frontend.slaney_mel().float(), data["mel_basis"], 5e-9)
    wave = data["wave"][None]
    report.close(path.name, "feature_reflect", act_frontend.log_mel(wave)[0], data["feature_reflect"], 1.5e-5)
    zeros = act_frontend.log_mel(wave, "constant")[0, :1]
    report.close(path.name, "feature_constant_frame0", zeros, data["feature_constant_frame0"], 1e-5)


@torch.no_grad()
def act_tiny(path, report) -> None:
    data, meta = read(path)
    dims = json.loads(meta["dims"])
    heads = dims["heads"], dims["nhead"]
    network = act.build(weights_of(data), json.loads(meta["words"]), path.name, heads)
    features, name = data["in.feature"], path.name
    normalised = network.encoder.normalised(features)
    report.close(name, "mid.after_bn", normalised[:, : data["mid.after_bn"].shape[1]], data["mid.after_bn"], 2.5e-5)
    patches = network.encoder.patches(normalised)[:, : data["mid.patch_embed"].shape[1]]
    report.close(name, "mid.patch_embed", patches, data["mid.patch_embed"], 1e-4)
    encoded = network.encoder(features)[:, : data["mid.encoder_out"].shape[1]]
    report.close(name, "mid.encoder_out", encoded, data["mid.encoder_out"], 1.5e-5)
    memory = network.remember(features)
    report.close(name, "mid.memory", memory.transpose(0, 1), data["mid.memory"], 2e-5)
    table = data["mid.pos_enc_first5"]
    report.close(name, "mid.pos_enc_first5", act.sinusoid(0, *table.shape), table, 2.5e-7)
    steps = data["out.greedy_tokens"].shape[1] - 1
    tokens, probability = network.greedy(memory, steps, stop=False)
    report.close(name, "out.greedy_tokens", tokens, data["out.greedy_tokens"], 0)
    report.close(name, "out.greedy_prob", probability, data["out.greedy_prob"], 1.5e-6)
    logits = network.logits(tokens, network.prepare(memory))[0]
    report.close(name, "out.teacher_logits", logits.transpose(0, 1), data["out.teacher_logits"], 3.5e-5)
    forced = logits.softmax(-1).gather(2, tokens[:, 1:, None].expand(-1, -1, 1))[..., 0]
    report.close(name, "cached is teacher-forced", probability[:, 1:], forced, 1e-6)
    early, sure = network.greedy(memory, steps)
    for row, caption in enumerate(early):
        length = caption.tolist().index(network.end) + 1 if network.end in caption else len(caption)
        report.close(name, f"early stop, row {row}", caption[:length], data["out.greedy_tokens"][row, :length], 0)
        report.close(name, f"its probabilities, row {row}", sure[row, :length], probability[row, :length], 1e-6)
    for key in sorted(key for key in data if key.startswith("out.beam")):
        found = network.search(memory[:1], int(key.removeprefix("out.beam")))
        report.close(name, key, torch.tensor([found]), data[key], 0)


def wild_attention(path, report) -> None:
    data, meta = read(path)
    tokenizer, name = SDTokenizer(), path.name
    for index, caption in enumerate([*json.loads(meta["captions"]), None]):
        key, words = ("uncond", []) if caption is None else (f"cap{index}", caption.split())
        weights = []
        if words:
            given = data[f"{key}.decoder_prob"].tolist(), data[f"{key}.noun_prob"].tolist()
            weights = word_weights(*given)
            found = torch.tensor(weights, dtype=torch.float64)
            report.close(name, f"{key}.attention", found, data[f"{key}.attention"], 1e-12)
        tokens = word_tokens(tokenizer, words)
        ids = [token for token, *_ in tokenizer.tokenize_with_weights(" ".join(words))[0]]
        report.close(name, f"{key}.token_ids", torch.tensor(ids), data[f"{key}.token_ids"], 0)
        if words:
            owners = torch.tensor([word for _, word in tokens])
            report.close(name, f"{key}.word_of_token", owners, data[f"{key}.word_of_token"], 0)
        w = token_weights(weights, place(ids, tokens, tokenizer.pad_to_max_length))
        report.close(name, f"{key}.w_init", w, data[f"{key}.w_init"].double(), 1e-12)


def wild_optimise(path, report) -> None:
    data, meta = read(path)
    tokenizer, name = SDTokenizer(), path.name
    words = json.loads(meta["captions"])[0].split()
    heard, nouns = (json.loads(meta[key])[0] for key in ("decoder_prob", "noun_prob"))
    ids = [token for token, *_ in tokenizer.tokenize_with_weights(" ".join(words))[0]]
    owners = place(ids, word_tokens(tokenizer, words), True)
    group = noun_rows(owners, nouns)
    w = token_weights(word_weights(heard, nouns), owners).float()
    report.close(name, "opt.w_group0_init", w[~group], data["opt.w_group0_init"], 2.5e-7)
    report.close(name, "opt.n_group_init", w[group], data["opt.n_group_init"], 2.5e-7)

    def draw(c):
        x = (data["toy.U"].T @ c @ data["toy.V"]).reshape(data["opt.noise"].shape) + 0.3 * data["opt.noise"]
        pixels = torch.einsum("oc,nchw->nohw", data["toy.C"], interpolate(x.tanh(), scale_factor=8))
        return ((pixels + 1) / 2).clamp(0, 1)

    def judge(picture):
        f = adaptive_avg_pool2d(prepare(picture), 7).flatten(1)
        text = spherical(f @ data["toy.P2"], data["toy.text"])
        return text, disagreement(f @ data["toy.P1"], data["toy.audio"][:1], data["opt.logit_scale_ai"])

    z = data["opt.z"]
    rate = json.loads(meta["lrs"])[0]
    rounds, after = optimise(z, w, draw, judge, Terms(), len(data["opt.loss"]), rate)
    losses = torch.tensor([one.loss for one in rounds])
    report.close(name, "opt.loss", losses, data["opt.loss"], 6.5e-5)
    report.close(name, "opt64.terms", torch.tensor([one.terms for one in rounds]), data["opt64.terms"], 1e-4)
    for key in sorted(key for key in data if key.startswith("opt.new_z_step")):
        step = int(key.removeprefix("opt.new_z_step"))
        report.close(name, key, rounds[step].prompt, data[key], 2.5e-6)
    report.close(name, "opt.w_group0_final", after[~group], data["opt.w_group0_final"], 1.7e-4)
    report.close(name, "opt.n_group_final", after[group], data["opt.n_group_final"], 1.7e-4)
    start = w[:, None].repeat(1, z.shape[1]).requires_grad_(True)
    sum(objective(z, start, draw, judge, Terms())[0]).backward()
    report.close(name, "opt.grad_w_step0", start.grad[~group], data["opt.grad_w_step0"], 4e-7)
    report.close(name, "opt.grad_n_step0", start.grad[group], data["opt.grad_n_step0"], 4e-7)
    fallen = 1 - float(losses[-1] / losses[0])
    report.line(name, "part the loss fell by", fallen, "> 0.2", fallen > 0.2)


@torch.no_grad()
def audioclip_frontend(path, report) -> None:
    data, meta = read(path)
    n_fft, hop, name = int(meta["n_fft"]), int(meta["hop"]), path.name
    bank = fbsp.BSplineBank(n_fft)
    for part in ("m", "fb", "fc"):
        getattr(bank, part).data = data[f"fe.{part}"]
    report.close(name, "fe.window", fbsp.blackman_harris(int(meta["win"])), data["fe.window"], 1e-7)
    wavelets = torch.stack(bank.bank(), -1)
    report.close(name, "fe.bank", wavelets, data["fe.bank"], 3.5e-6)
    report.close(name, "fe.loss_ttf", (wavelets.norm(dim=(-1, -2)) - 1).square().mean(), data["fe.loss_ttf"], 1e-6)
    cut = fbsp.frames(fbsp.scaled(data["fe.wave_float"])[:, 0], data["fe.window"], hop)
    report.close(name, "fe.frames", cut, data["fe.frames"], 5e-7)
    spectrum = bank(cut)
    report.close(name, "fe.spec", spectrum, data["fe.spec"], 2.5e-6)
    report.close(name, "fe.db_int16", fbsp.decibels(spectrum)[:, None], data["fe.db_int16"], 3.5e-2)
    quiet = bank(fbsp.frames(fbsp.scaled(data["fe.wave_float"], True)[:, 0], data["fe.window"], hop))
    report.close(name, "fe.db_float", fbsp.decibels(quiet)[:, None], data["fe.db_float"], 1.0)
    weights = weights_of(data, "att.w.")
    inside, out = weights["conv_depth.weight"].shape[0], weights["conv_point.weight"].shape[0]
    gate = audioclip.Gate(inside, out, tuple(weights["conv_depth.weight"].shape[2:]), torch.nn).train(False)
    gate.load_state_dict(weights, strict=False)
    report.close(name, "att.out", gate(data["att.in"], data["att.out"].shape[-2:]), data["att.out"], 1e-5)


def procedural(state: dict, seed: int) -> dict:
    """Weights by the README's rule."""
    made = {}
    for name, tensor in state.items():
        if not tensor.ndim or not tensor.is_floating_point():
            made[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        n = stream(name, tensor.shape, seed)
        if name.endswith("running_var"):
            n = 1 + 0.5 * n.abs()
        elif name.endswith("running_mean"):
            n = 0.1 * n
        elif n.ndim == 1:
            n = 1 + 0.1 * n if name.endswith("weight") else 0.1 * n
        else:
            n = n / (n.numel() / len(n)) ** 0.5
        made[name] = n.float()
    return made


@torch.no_grad()
def audioclip_full(path, report) -> None:
    data, _ = read(path)
    seed = int(data["image_seed"])
    with torch.device("meta"):
        state = audioclip.AudioClip().state_dict()
    made = procedural(state, seed)
    made["audio.fbsp.m"].fill_(0.5)
    made["audio.fbsp.fb"].fill_(1.25)
    made["audio.fbsp.fc"] = torch.arange(len(made["audio.fbsp.fc"])).float()
    made["audio.window"] = fbsp.blackman_harris(len(made["audio.window"]))
    network, wave, name = audioclip.build(made, path.name), data["audio_wave_float"][:, 0], path.name
    found = {
        "audio_raw_int16": network.audio(wave),
        "audio_embed_int16": network.encode_audio(wave),
        "audio_embed_float": network.encode_audio(wave, authors_scale=True),
        "image_embed_raw": network.encode_image(stream("image", (1, 3, 224, 224), seed).float()),
        "text_embed_raw": network.encode_text(data["text_tokens"]),
    }
    for key, value in found.items():
        report.close(name, key, value, data[key], 1e-4 * float(data[key].abs().max()))


def imagebind_audio(path, report) -> None:
    data, meta = read(path)
    name, fe = path.name, imagebind_frontend
    report.close(name, "mel.bank", fe.kaldi_bank(), data["mel.bank"], 7e-5)
    for key in sorted(key for key in data if key.startswith("mel.wave_")):
        out = key.replace("wave", "out")
        report.close(name, out, fe.log_mel(data[key])[0], data[out], 2e-3)
    for key in sorted(key for key in data if key.startswith("clips.start_")):
        starts = fe.clip_starts(float(key.removeprefix("clips.start_")), len(data[key]))
        report.close(name, key, torch.tensor(starts, dtype=torch.float64), data[key], 1e-9)
    for key in sorted(key for key in data if key.startswith("load.") and key.endswith(".wave")):
        case = key.removesuffix(".wave")
        rate = int(meta[f"{case.removeprefix('load.')}.sr"])
        wave = torchaudio.functional.resample(data[key], rate, fe.RATE)[:1]  # the authors hear the first channel alone
        want = data[f"{case}.out_no_leak"]
        report.close(name, f"{case}.out_no_leak", fe.hear(wave, want.shape[1]), want, 4e-4)


def imagebind_vision_text(path, report) -> None:
    data, meta = read(path)
    seen = see(data["vision.image_u8"][None] / 255)[0]
    report.close(path.name, "vision.out", seen, data["vision.out"], 0.02)
    report.close(path.name, "text.tokens", tokenize(json.loads(meta["texts"])), data["text.tokens"], 0)


@torch.no_grad()
def imagebind_tiny(path, report) -> None:
    data, meta = read(path)
    sizes, seed, name = json.loads(meta["cfg"]), int(meta["input_seed"]), path.name
    heads = {modality: sizes[f"{modality}_num_heads"] for modality in imagebind.MODALITIES}
    network = imagebind.build(weights_of(data), imagebind.MODALITIES, name, heads)
    clips = data["mid.audio.head_prenorm"].shape[0] // data["out.audio"].shape[0]
    given = {
        "audio": 0.8 * stream("audio", (len(data["out.audio"]), clips, 1, 128, 204), seed).float(),
        "vision": stream("vision", (len(data["out.vision"]), 3, 224, 224), seed).float(),
        "text": data["in.text"],
    }
    for modality, x in given.items():
        x = x.flatten(0, 1) if modality == "audio" else x
        tokens = network.tokens(modality, x)
        key = f"mid.{modality}.tokens_first4"
        report.close(name, key, tokens[:, : data[key].shape[1]], data[key], 1e-4)
        trunk = network.modality_trunks[modality]
        first = trunk.pre_transformer_layer(tokens) if modality == "vision" else tokens
        first = trunk.blocks[0](first, imagebind.causal(first) if modality == "text" else None)
        key = f"mid.{modality}.block0_first4"
        report.close(name, key, first[:, : data[key].shape[0]].transpose(0, 1), data[key], 1e-4)
        key = f"mid.{modality}.head_prenorm"
        report.close(name, key, network.raw(modality, x), data[key], 1e-4)
    report.close(name, "out.audio", network.encode_audio(given["audio"]), data["out.audio"], 1.5e-5)
    report.close(name, "out.vision", network.encode_vision(given["vision"]), data["out.vision"], 1.5e-5)
    report.close(name, "out.text", network.encode_text(given["text"]), data["out.text"], 1e-4)
    video = network.encode_vision(given["vision"][None])
    report.close(name, "out.vision_video_mean", video, data["out.vision_video_mean"], 1.5e-5)


@torch.no_grad()
def bindnet(path, report) -> None:
    data, meta = read(path)
    network = bind_network.build(weights_of(data), path.name)
    f = bind_network.mixed([data["in.audio"], data["in.image"]], json.loads(meta["mix_weights"]))
    cached = {"out.cache": (), "out.cache_w08_k3": (3, 7.0, 0.8)}
    report.close(path.name, "out.no_cache", network(f), data["out.no_cache"], 6e-6)
    for key, numbers in cached.items():
        moved = bind_network.visual_cache(f, data["bank"], *numbers)
        report.close(path.name, key, network(moved), data[key], 6e-6)


def mapping(path, report) -> None:
    data, _ = read(path)
    for case in ("good", "collapsed"):
        for key, value in diagnose(data[f"pred_{case}"], data["target"]).items():
            want = data[f"{case}.{key}"]
            report.close(path.name, f"{case}.{key}", torch.tensor(value, dtype=torch.float64), want, 1e-9)
    a, b = data["arith.a"], data["arith.b"]
    means = (normalize(x, dim=-1).mean(0) for x in (a, b))
    mixed = joint_embedding.add([a, b], [0.3, 0.7])
    found = {
        "sum_half": joint_embedding.add([a, b], [0.5, 0.5]),
        "mix_0.3_renorm20": joint_embedding.renormed(mixed, 20.0),
        "slerp_0.3": joint_embedding.slerp(a, b, 0.3),
        "modality_shift": joint_embedding.shift(a, *means),
    }
    for key, value in found.items():
        report.close(path.name, f"arith.{key}", value, data[f"arith.{key}"], 1e-9)


RUNNERS = {
    "act_frontend": act_frontend_file,
    "act_tiny": act_tiny,
    "wild_attention": wild_attention,
    "wild_optimise": wild_optimise,
    "audioclip_frontend": audioclip_frontend,
    "audioclip_full": audioclip_full,
    "imagebind_audio": imagebind_audio,
    "imagebind_vision_text": imagebind_vision_text,
    "imagebind_tiny": imagebind_tiny,
    "bindnet": bindnet,
    "mapping_f64": mapping,
}
