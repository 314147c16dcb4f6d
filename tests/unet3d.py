"""The 3-D U-Net of the recordings (ModelScope's layout) around ComfyUI's transformer blocks, for conformance only.

ComfyUI has no such model. Convolutions are plain torch; every attention goes through a hook that is told where it is.
"""

import re

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ops import disable_weight_init
from torch.nn.functional import conv2d, conv3d, group_norm, interpolate, linear, silu


def transformer_block(weights: dict, heads: int, dtype=torch.float32) -> BasicTransformerBlock:
    """ComfyUI's block with recorded weights; strict, so that a missing name shows."""
    width = weights["norm1.weight"].shape[0]
    text = weights["attn2.to_k.weight"].shape[1]
    block = BasicTransformerBlock(width, heads, width // heads, context_dim=text, dtype=dtype, operations=disable_weight_init)
    block.load_state_dict({key: value.to(dtype) for key, value in weights.items()})
    return block.train(False)


def spatial(block, x, context, hook, place):
    """One spatial block; the hook hears (place, "self") and (place, "cross")."""
    return block(x, context, hook.options(place, ("self", "cross")))


def temporal(block, z, hook, place, gate=None):
    """One temporal block with its two self-attentions.

    gate [rows, frames, 1]: the authors' second attention reads and writes foreground tokens only; without it the hook
    decides about both alike.
    """
    options = hook.options(place, ("time", "time" if gate is None else "gated"))
    z = z + block.attn1(block.norm1(z), transformer_options=options)
    if gate is None:
        z = z + block.attn2(block.norm2(z), transformer_options=options)
    else:
        z = z + gate * block.attn2(block.norm2(gate * z), transformer_options=options)
    return z + block.ff(block.norm3(z))


def temporal_model(weights, x, frames, groups, eps, heads, run):
    """x [rows·frames, C, h, w] through GroupNorm, proj_in, `run(z)` on [rows·h·w, frames, C], proj_out, residual."""
    total, width, h, w = x.shape
    video = x.unflatten(0, (-1, frames)).transpose(1, 2)  # [rows, C, frames, h, w]
    z = group_norm(video, groups, weights["norm.weight"], weights["norm.bias"], eps)
    z = z.permute(0, 3, 4, 2, 1).flatten(0, 2)
    z = run(linear(z, weights["proj_in.weight"], weights["proj_in.bias"]))
    z = linear(z, weights["proj_out.weight"], weights["proj_out.bias"])
    return z.unflatten(0, (-1, h, w)).permute(0, 3, 4, 1, 2).reshape(total, width, h, w) + x


class UNet3D:
    """The whole network; masked says whether the hook may act in mid and up blocks."""

    def __init__(self, weights: dict, config: dict, hook):
        self.w, self.config, self.hook = weights, config, hook
        self.groups, self.head = config["norm_num_groups"], config["attention_head_dim"]

    def part(self, prefix: str) -> dict:
        return {key[len(prefix) + 1 :]: value for key, value in self.w.items() if key.startswith(prefix + ".")}

    def resnet(self, prefix, x, emb):
        w = self.part(prefix)
        h = silu(group_norm(x, self.groups, w["norm1.weight"], w["norm1.bias"], 1e-5))
        h = conv2d(h, w["conv1.weight"], w["conv1.bias"], padding=1)
        h = h + linear(silu(emb), w["time_emb_proj.weight"], w["time_emb_proj.bias"])[:, :, None, None]
        h = silu(group_norm(h, self.groups, w["norm2.weight"], w["norm2.bias"], 1e-5))
        h = conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1)
        if "conv_shortcut.weight" in w:
            x = conv2d(x, w["conv_shortcut.weight"], w["conv_shortcut.bias"])
        return x + h

    def temp_conv(self, prefix, x):
        w = self.part(prefix)
        h = video = x.unflatten(0, (-1, self.frames)).transpose(1, 2)
        for number in range(1, 5):
            last = 2 if number == 1 else 3  # behind a dropout
            h = silu(group_norm(h, 32, w[f"conv{number}.0.weight"], w[f"conv{number}.0.bias"], 1e-5))
            h = conv3d(h, w[f"conv{number}.{last}.weight"], w[f"conv{number}.{last}.bias"], padding=(1, 0, 0))
        return (video + h).transpose(1, 2).flatten(0, 1)

    def attention(self, prefix, x, place):
        w, h = self.part(prefix), x.shape[2]
        tokens = group_norm(x, self.groups, w["norm.weight"], w["norm.bias"], 1e-6).flatten(2).transpose(1, 2)
        tokens = linear(tokens, w["proj_in.weight"], w["proj_in.bias"])
        block = transformer_block(self.part(f"{prefix}.transformer_blocks.0"), tokens.shape[2] // self.head)
        tokens = spatial(block, tokens, self.context, self.hook, (place, x.shape[2:]))
        tokens = linear(tokens, w["proj_out.weight"], w["proj_out.bias"])
        return tokens.transpose(1, 2).unflatten(2, (h, -1)) + x

    def temp_attention(self, prefix, x, place, groups=None):
        heads = self.w[f"{prefix}.proj_in.weight"].shape[0] // self.head
        block = transformer_block(self.part(f"{prefix}.transformer_blocks.0"), heads)
        gate = self.hook.gate(place, x.shape[2:])
        return temporal_model(
            self.part(prefix),
            x,
            self.frames,
            groups or self.groups,
            1e-6,
            heads,
            lambda z: temporal(block, z, self.hook, (place, x.shape[2:]), gate),
        )

    def layers(self, prefix, place, x, emb, skips=None):
        """Resnet, temporal convolution and the two attentions, as often as the block has them."""
        passed = []
        for number in range(sum(bool(re.fullmatch(rf"{prefix}\.resnets\.\d+\.norm1\.bias", key)) for key in self.w)):
            if skips is not None:
                x = torch.cat([x, skips.pop()], 1)
            x = self.resnet(f"{prefix}.resnets.{number}", x, emb)
            x = self.temp_conv(f"{prefix}.temp_convs.{number}", x)
            if f"{prefix}.attentions.{number}.norm.bias" in self.w:
                x = self.attention(f"{prefix}.attentions.{number}", x, place)
                x = self.temp_attention(f"{prefix}.temp_attentions.{number}", x, place)
            passed.append(x)
        return x, passed

    def __call__(self, sample, timestep, context):
        """sample [rows, 4, frames, h, w], context [rows, 77, width] -> the same shape as sample."""
        rows, _, self.frames, *_ = sample.shape
        self.context = context.repeat_interleave(self.frames, 0)
        emb = self.time(timestep, rows)
        x = sample.transpose(1, 2).flatten(0, 1)
        x = conv2d(x, self.w["conv_in.weight"], self.w["conv_in.bias"], padding=1)
        x = self.temp_attention("transformer_in", x, "input", groups=32)
        skips = [x]
        for number in range(len(self.config["block_out_channels"])):
            prefix = f"down_blocks.{number}"
            x, passed = self.layers(prefix, "input", x, emb)
            skips += passed
            if f"{prefix}.downsamplers.0.conv.bias" in self.w:
                w = self.part(f"{prefix}.downsamplers.0.conv")
                x = conv2d(x, w["weight"], w["bias"], stride=2, padding=1)
                skips.append(x)
        x = self.temp_conv("mid_block.temp_convs.0", self.resnet("mid_block.resnets.0", x, emb))
        x = self.attention("mid_block.attentions.0", x, "middle")
        x = self.temp_attention("mid_block.temp_attentions.0", x, "middle")
        x = self.temp_conv("mid_block.temp_convs.1", self.resnet("mid_block.resnets.1", x, emb))
        for number in range(len(self.config["block_out_channels"])):
            prefix = f"up_blocks.{number}"
            x, _ = self.layers(prefix, "output", x, emb, skips)
            if f"{prefix}.upsamplers.0.conv.bias" in self.w:
                w = self.part(f"{prefix}.upsamplers.0.conv")
                x = conv2d(interpolate(x, scale_factor=2.0), w["weight"], w["bias"], padding=1)
        x = silu(group_norm(x, self.groups, self.w["conv_norm_out.weight"], self.w["conv_norm_out.bias"], 1e-5))
        x = conv2d(x, self.w["conv_out.weight"], self.w["conv_out.bias"], padding=1)
        return x.unflatten(0, (rows, self.frames)).transpose(1, 2)

    def time(self, timestep, rows):
        half = self.config["block_out_channels"][0] // 2
        angles = timestep.float() * torch.exp(torch.arange(half) * (-torch.log(torch.tensor(10000.0)) / half))
        emb = torch.cat([angles.cos(), angles.sin()])[None]
        w = self.part("time_embedding")
        emb = silu(linear(emb, w["linear_1.weight"], w["linear_1.bias"]))
        return linear(emb, w["linear_2.weight"], w["linear_2.bias"]).repeat(rows * self.frames, 1)
