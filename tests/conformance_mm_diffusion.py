"""Runners for golden/mm_diffusion: attention, blocks and network of the coupled U-Net with the recorded shifts."""

from pathlib import Path

import torch
from conformance_consistent import read
from storyweft.attention.cross_modal import rolled_windows
from storyweft.models.joint_unet import CoupledBlock, CrossModalBlock, JointUNet, configuration, sinusoid

HEAD_WIDTHS = (64, 32, 16, 8)  # the files do not hold it: the one whose unshifted output is nearest is taken


def relative(path: Path, report, name: str, got, want, tolerance: float) -> None:
    """Error as a share of the greatest recorded value."""
    scale = want.double().abs().max().clamp(min=1e-30)
    report.close(path.name, name, got.detach().double() / scale, want.double() / scale, tolerance)


def both(path: Path, report, name: str, got, data: dict, tolerance: float) -> None:
    """A (video, audio) pair against `name`.video [B, F, C, H, W] and `name`.audio."""
    relative(path, report, f"{name}.video", got[0].transpose(1, 2), data[f"{name}.video"], tolerance)
    relative(path, report, f"{name}.audio", got[1], data[f"{name}.audio"], tolerance)


def part(data: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value.float() for key, value in data.items() if key.startswith(prefix)}


def given(data: dict, name: str = "in") -> tuple[torch.Tensor, torch.Tensor]:
    return data[f"{name}.video"].transpose(1, 2), data[f"{name}.audio"]


@torch.no_grad()
def rsmma(path: Path, report) -> None:
    data, _ = read(path)
    frames, height, width, samples, head_channels = data["meta.f_h_w_l_headchannels"].tolist()
    video, audio = given(data)
    for name in sorted({key.split(".")[0] for key in data if key.startswith("win")}):
        window, shift = name.removeprefix("win").split("_shift")
        window, shift = int(window), 0 if shift == "off" else int(shift)
        block = CrossModalBlock(video.shape[1], head_channels, window)
        block.load_state_dict(part(data, "w."))
        both(path, report, name, block(video, audio, lambda *_, shift=shift: shift), data, 1e-5)
        for kind, total, length in (
            ("audio_keys_of_frame", samples, samples // frames),
            ("video_keys_of_segment", frames * height * width, height * width),
        ):
            got = rolled_windows(torch.arange(total).view(1, -1, 1), frames, length, window, shift)[..., 0]
            report.close(path.name, f"{name}.{kind}", got, data[f"{name}.{kind}"], 0)


@torch.no_grad()
def resblock(path: Path, report) -> None:
    data, _ = read(path)
    video, audio = given(data)
    for name in sorted(key.split(".")[0] for key in data if key.endswith(".dilation")):
        weights = part(data, f"{name}.w.")
        block = CoupledBlock(
            video.shape[1],
            weights["emb_layers.1.weight"].shape[0] // 2,
            data["in.emb"].shape[1],
            int(data[f"{name}.dilation"]),
            resample=name if name in ("down", "up") else "",
            video_attention="spatial_attention_block.qkv.weight" in weights,
            audio_attention="audio_attention_block.qkv.weight" in weights,
        )
        block.load_state_dict(weights)
        both(path, report, name, block(video, audio, data["in.emb"]), data, 1e-5)


def joint_unet(path: Path, windows=None, head_channels: int = 0) -> JointUNet:
    """The network of the weight file that stands beside `path` under the same letter."""
    weights = part(read(path.with_name(path.name.split("_", 1)[0] + "_unet_sd.safetensors"))[0], "")
    config = configuration(weights)
    factors = config["cross_attention_resolutions"]
    width = config["model_channels"] * config["channel_mult"][0]
    net = JointUNet(**config, windows=windows or [1] * len(factors), head_channels=head_channels or width)
    net.load_state_dict(weights)
    return net.train(False)


@torch.no_grad()
def unet_of_io(path: Path) -> tuple[JointUNet, dict]:
    """The network with the windows of the recorded call and the head width that explains its unshifted output."""
    data, _ = read(path.with_name(path.name.split("_", 1)[0] + "_unet_io.safetensors"))
    config, blocks = joint_unet(path), data["rsmma_windows"].tolist()
    per_level = len(config.output_blocks) // config.levels - 1
    windows = [blocks[number * per_level] for number in range(len(config.windows))]
    nets = [joint_unet(path, windows, width) for width in HEAD_WIDTHS if config.model_channels % width == 0]
    errors = [
        (net(*given(data), data["in.t"])[0].transpose(1, 2) - data["out_shift0.video"]).abs().max() for net in nets
    ]
    return nets[int(torch.stack(errors).argmin())], data


def unet_sd(path: Path, report) -> None:
    """Strict loading, and every parameter is in the file."""
    weights, _ = read(path)
    net = joint_unet(path)
    missing = set(net.state_dict()) ^ set(weights)
    report.line(path.name, "state dict", len(missing), "<= 0", not missing)


def fingerprint(pair) -> torch.Tensor:
    """Mean, deviation, first and last element of the video [B, F, C, H, W] and the audio."""
    flat = (pair[0].transpose(1, 2).flatten(), pair[1].flatten())
    return torch.stack([value for x in flat for value in (x.mean(), x.std(), x[0], x[-1])])


@torch.no_grad()
def unet_io(path: Path, report) -> None:
    net, data = unet_of_io(path)
    video, audio = given(data)
    relative(path, report, "time_sinusoid", sinusoid(data["in.t"], net.model_channels), data["time_sinusoid"], 1e-4)
    emb = net.time_embed(sinusoid(data["in.t"], net.model_channels))
    relative(path, report, "time_emb", emb, data["time_emb"], 1e-4)
    seen, windows = {}, []
    names = {
        f"fp.{kind}.{n}": stage
        for kind in ("input_blocks", "output_blocks")
        for n, stage in enumerate(getattr(net, kind))
    } | {"fp.middle_blocks": net.middle_blocks}
    hooks = [
        stage.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: fingerprint(out)}))
        for name, stage in names.items()
    ]

    def shifts(frames, window):
        windows.append(window)
        return data["rsmma_shifts"].tolist()[len(windows) - 1]

    both(path, report, "out", net(video, audio, data["in.t"], shifts), data, 1e-4)
    report.close(path.name, "rsmma_windows", torch.tensor(windows), data["rsmma_windows"], 0)
    entry = net.input_blocks[0][0]
    seen["fp.input_blocks.0"] = fingerprint((entry.video_conv(video), entry.audio_conv(audio)))
    for name in sorted(key for key in data if key.startswith("fp.")):
        relative(path, report, name, seen[name], data[name], 1e-4)
    for hook in hooks:
        hook.remove()
    both(path, report, "out_shift0", net(video, audio, data["in.t"]), data, 1e-4)


RUNNERS = {
    ("mm_diffusion", "rsmma"): rsmma,
    ("mm_diffusion", "resblock"): resblock,
    ("mm_diffusion", "unet_sd"): unet_sd,
    ("mm_diffusion", "unet_io"): unet_io,
}
RUNNERS |= {kind: runner for (_, kind), runner in RUNNERS.items()}
