"""Runners for golden/magdiff: one cross-attention layer, subject cut-out, latent pyramid, miniature IP-Adapter files.

A tiny adapter file is written again as .safetensors and read by the node's loader, so names and strictness are covered.
"""

from pathlib import Path

import torch
from conformance_consistent import read
from storyweft.attention.apa import image_branch, scale_text
from storyweft.attention.branches import Branch, attend_branches
from storyweft.attention.core import attend, merge_heads, split_heads
from storyweft.host import image_adapter
from storyweft.models import magdiff
from torch.nn.functional import linear

ROUNDING = 2e-5


class Layer:
    """The recorded cross-attention layer around the pack's branches, in float32 or float64."""

    def __init__(self, data: dict, dtype):
        self.heads, self.dtype = int(data["heads"]), dtype
        self.weights = {key[2:]: value.to(dtype) for key, value in data.items() if key.startswith("w.")}
        self.q = linear(data["x"].to(dtype), self.weights["to_q.weight"])
        self.rows = slice(0, len(self.q))
        self.text = self.project(data["ctx_text"], "")
        self.image = self.project(data["ctx_img"], "_ip")

    def project(self, context, ending):
        return [linear(context.to(self.dtype), self.weights[f"to_{name}{ending}.weight"]) for name in "kv"]

    def split(self, pair):
        return [split_heads(x, self.heads) for x in pair]

    def branches(self, alpha_text, alpha_image, mask=None, text=None, image=None):
        words = [Branch(self.rows, *self.split(text or self.text))]
        scale_text(words, alpha_text)
        return [*words, image_branch(self.rows, *self.split(image or self.image), alpha_image, mask)]

    def answer(self, branches):
        return merge_heads(attend_branches(*self.split([self.q]), branches, attend))

    def __call__(self, *args, **kwargs):
        out = self.answer(self.branches(*args, **kwargs))
        return linear(out, self.weights["to_out.0.weight"], self.weights["to_out.0.bias"])


def apa(path: Path, report) -> None:
    data, _ = read(path)
    single, exact = Layer(data, torch.float32), Layer(data, torch.float64)
    projected = zip(("q", "k", "v", "k_ip", "v_ip"), (single.q, *single.text, *single.image), strict=True)
    for name, got in projected:
        report.close(path.name, name, got, data[name], ROUNDING)
    report.close(path.name, "text_branch64", exact.answer(exact.branches(1.0, 0.0)), data["text_branch64"], 1e-9)
    report.close(path.name, "image_branch64", exact.answer(exact.branches(0.0, 1.0)), data["image_branch64"], 1e-9)
    outputs = []
    for key in sorted(key for key in data if key.startswith("alpha.")):
        name, (text, image) = key.removeprefix("alpha."), data[key].tolist()
        report.close(path.name, f"out.{name}", single(text, image), data[f"out.{name}"], ROUNDING)
        outputs.append((name, image, exact(text, image)))
        report.close(path.name, f"out64.{name}", outputs[-1][2], data[f"out64.{name}"], 1e-9)
    alphas = [torch.tensor(value, requires_grad=True) for value in data["alpha.0.3_0.7"].tolist()]
    single(*alphas).mul(data["R"]).sum().backward()
    for number, alpha in enumerate(alphas, 1):
        want = data[f"grad_alpha{number}"]
        error = ((alpha.grad - want) / want.abs().clamp(min=1)).abs().max().item()
        report.line(path.name, f"grad_alpha{number}", error, f"<= {ROUNDING:g}", error <= ROUNDING)
    items = [data[f"alpha{number}_per_item"].to(torch.float64)[..., None] for number in (1, 2)]
    report.close(path.name, "out64.per_item", exact(*items), data["out64.per_item"], 1e-9)
    mask = data["image_mask"][..., 0].to(torch.float64)
    report.close(path.name, "out64.masked_1_1", exact(1.0, 1.0, mask), data["out64.masked_1_1"], 1e-9)
    for key in (key for key in data if key.startswith("dynamicrafter_gate.")):
        name = key.removeprefix("dynamicrafter_gate.alpha_")
        gate = torch.tanh(torch.tensor(float(name), dtype=torch.float64)) + 1
        report.close(path.name, key[:28], gate.view(1), data[key].to(torch.float64).view(1), 1e-9)
        got = exact(1.0, gate.item())
        report.close(path.name, f"dynamicrafter {name}", got, data[f"out64.dynamicrafter_alpha_{name}"], 1e-9)
    for name, _, got in outputs:
        report.apart(path.name, f"contrast {name}", got, data["out64.contrast_concat_kv"], 1e-4)
    twice = exact(1.0, 1.0, text=[torch.cat([x, x], 1) for x in exact.text])
    report.close(path.name, "154 text rows", twice, data["out64.1_1"], 1e-9)
    report.apart(path.name, "trap 154 rows cut at 77", twice, data["out64.trap_fixed_split_on_154_text_rows"], 1e-4)


def sda(path: Path, report) -> None:
    data, _ = read(path)
    picture, side = data["image_u8"].movedim(-1, 0)[None].float() / 255, int(data["resolution"])
    subject = magdiff.cut_out(picture, data["mask_u8"][None], magdiff.GROUNDS["black"])
    report.close(path.name, "subject_u8", (subject * 255).round().byte()[0].movedim(0, -1), data["subject_u8"], 0)
    resized = magdiff.fit(subject * 255, side)[0].round()  # the authors resize bytes
    report.close(path.name, "vae_input", resized / 127.5 - 1, data["vae_input"], ROUNDING)
    fed = subject[0].flip(0) * 2 - 1
    report.close(path.name, "clip_input_as_fed_BGR_pm1", fed, data["clip_input_as_fed_BGR_pm1"], ROUNDING)
    want, found = data["clip_preprocessed_crop64_from_nearest448_RGB"], []
    for source in (subject, picture):  # the file does not say whether it shows the subject or the whole picture
        near = torch.nn.functional.interpolate(source * 2 - 1, size=(448, 448), mode="nearest")
        found.append(magdiff.clip_pixels(near)[0, :, 80:144, 80:144])
    nearest = min(found, key=lambda pixels: (pixels - want).abs().max())
    report.close(path.name, "clip_preprocessed", nearest, want, 1e-3)


def toy_vae(data: dict, picture):
    small = torch.nn.functional.avg_pool2d(picture, 8)
    return torch.einsum("oc,nchw->nohw", data["toy_vae_map"], small) * 0.18215


def hfa(path: Path, report) -> None:
    data, _ = read(path)
    scales = sorted((int(key[2:]) for key in data if key[2:].isdigit() and key.startswith("z_")), reverse=True)
    latents = [data[f"z_{scale}"] for scale in scales]
    got = toy_vae(data, data["subject"].double())
    report.close(path.name, f"z_{scales[0]} (toy VAE)", got, latents[0], 1e-9)
    report.close(path.name, "z_cat", magdiff.LatentPyramid.stacked(latents), data["z_cat"], 1e-9)
    channels = latents[0].shape[1]
    pyramid = magdiff.LatentPyramid(len(scales), channels).double().start()
    report.close(path.name, "conv_init.weight", pyramid.conv.weight, data["conv_init.weight"], 0)
    report.close(path.name, "conv_init.bias", pyramid.conv.bias, data["conv_init.bias"], 0)
    report.close(path.name, "z_s_init", pyramid(latents), data["z_s_init"], 1e-9)
    report.close(path.name, "z_s_init is the target scale", pyramid(latents), latents[-1], 0)
    pyramid.load_state_dict({f"conv.{name}": data[f"conv.{name}"] for name in ("weight", "bias")})
    report.close(path.name, "z_s", pyramid(latents), data["z_s"], 1e-9)
    black = pyramid([toy_vae(data, torch.full((1, 3, scale, scale), -1.0).double()) for scale in scales])
    report.close(path.name, "z_black", black, data["z_black"], 1e-9)
    noise, fed = data["noise"], data["unet_input"]
    frames = noise.shape[2]
    every = torch.equal(fed[:, channels:, 0], fed[:, channels:, -1])  # all frames hold the subject, or the first alone
    rest = data["z_s"] if every else data["z_black"]
    subject = torch.stack([data["z_s"], *[rest] * (frames - 1)], 2)
    report.close(path.name, "unet_input", magdiff.beside_noise(noise, subject), fed, 1e-9)
    old = data["conv_in_old"]
    wide = magdiff.widened(old, data["conv_in_new_zero_padded"].shape[1] - old.shape[1])
    report.close(path.name, "conv_in_new_zero_padded", wide, data["conv_in_new_zero_padded"], 0)
    for name, weight, x in (("widened", wide, fed[:, :, 0]), ("old on noise", old, noise[:, :, 0])):
        got = torch.nn.functional.conv2d(x, weight, padding=1)
        report.close(path.name, f"conv_in_out {name}", got, data["conv_in_out"], 1e-9)


def tiny_adapter(path: Path, report) -> None:
    """A miniature file must load strictly; its numbers are compared with the file of expectations."""
    adapter = image_adapter.load(str(path), "conformance")
    report.line(path.name, f"{adapter.feature}, {len(adapter.network.channels)} layers", 0, "loads", True)


def tiny_expected(path: Path, report) -> None:
    data, _ = read(path)
    source = path.with_name(path.name.replace("_expected", ""))
    network = image_adapter.load(str(source), "conformance").network
    tokens = network.image_proj(data["clip_features"])
    report.close(path.name, "tokens", tokens, data["tokens"], ROUNDING)
    blank = network.image_proj(data["clip_features_uncond"])
    report.close(path.name, "tokens_uncond", blank, data["tokens_uncond"], ROUNDING)
    for number in sorted(int(key[2:]) for key in data if key.startswith("k.")):
        k, v = network.project(number // 2, tokens)
        report.close(path.name, f"k.{number}", k, data[f"k.{number}"], ROUNDING)
        report.close(path.name, f"v.{number}", v, data[f"v.{number}"], ROUNDING)
        for key in (key for key in data if key.startswith("attn_out64_heads") and key.endswith(f".{number}")):
            heads = int(key.removeprefix("attn_out64_heads").split(".")[0])
            exact = network.project(number // 2, data["tokens"].double())
            q, k64, v64 = (split_heads(x.double(), heads) for x in (data[f"q.{number}"], *exact))
            got = attend_branches(q, [image_branch(slice(0, len(q)), k64, v64, 1.0)], attend)
            report.close(path.name, key, merge_heads(got), data[key], ROUNDING)


RUNNERS = {
    ("magdiff", "apa"): apa,
    ("magdiff", "sda"): sda,
    ("magdiff", "hfa"): hfa,
}
for _kind in ("standard", "plus"):
    RUNNERS["magdiff", f"ipadapter_tiny_{_kind}"] = tiny_adapter
    RUNNERS["magdiff", f"ipadapter_tiny_{_kind}_expected"] = tiny_expected
RUNNERS |= {kind: runner for (_, kind), runner in RUNNERS.items()}
