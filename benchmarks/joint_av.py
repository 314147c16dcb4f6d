"""Random-shift attention as rolled windows against the form with index tables and a loop over the frames.

`python -m benchmarks.joint_av` writes docs/joint_av_speed.md. The loop form is written for this benchmark after the authors'
description: tables of which key every token sees, shifted at every call, and one attention a frame and direction with
scores and softmax apart. Times are medians taken in turn: processor time of one thread on a CPU, which does not count what
other programs take, and wall time on a GPU. Kernels and memory are counted operator by operator (views are free).
"""

import argparse
import platform
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import pack  # noqa: F401
from .consistent import in_turn

from storyweft.host.joint_av import JointDenoiser, Media, build  # isort: skip
from storyweft.host.joint_media import empty  # isort: skip
from storyweft.host.joint_sampling import DDPM, DPM, JOINT, REPLACEMENT, run_joint  # isort: skip
from storyweft.models.joint_unet import CrossModalBlock, JointUNet  # isort: skip

HEAD_CHANNELS = 64
# frames, height, width, samples, channels, window, blocks of the published network
LEVELS = (
    ("1/2", 16, 32, 32, 6400, 256, 1, 5),
    ("1/4", 16, 16, 16, 1600, 384, 4, 5),
    ("1/8", 16, 8, 8, 400, 512, 8, 5),
    ("middle", 16, 8, 8, 400, 512, 16, 1),
)


class LoopForm(torch.nn.Module):
    """The same block with tables of int64 and a loop; the tables are kept, and shifted anew by every call."""

    def __init__(self, block: CrossModalBlock):
        super().__init__()
        self.block, self.tables = block, None

    def make_tables(self, frames: int, places: int, samples: int, device):
        each, window = samples // frames, self.block.window
        reach = torch.arange(window * each, device=device)
        start = torch.arange(frames, device=device).repeat_interleave(places)[:, None] * each
        of_video = (start + reach) % samples
        reach = torch.arange(window * places, device=device)
        start = torch.arange(frames, device=device).repeat_interleave(each)[:, None] * places
        self.tables = of_video, (start + reach) % (frames * places)

    def attention(self, q, k, v):
        heads, wide = self.block.heads, q.shape[1] // self.block.heads
        q, k, v = (x.reshape(len(x) * heads, wide, -1) for x in (q, k, v))
        scores = torch.einsum("bct,bcs->bts", q * wide**-0.25, k * wide**-0.25)
        return torch.einsum("bts,bcs->bct", scores.softmax(-1), v).reshape(-1, heads * wide, q.shape[-1])

    def forward(self, video, audio, shifts):
        block, (frames, height, width) = self.block, video.shape[2:]
        places, samples = height * width, audio.shape[-1]
        each = samples // frames
        if self.tables is None:
            self.make_tables(frames, places, samples, video.device)
        q_v, k_v, v_v = block.v_qkv(block.v_norm(video).flatten(2).transpose(1, 2)).transpose(1, 2).chunk(3, 1)
        q_a, k_a, v_a = block.a_qkv(block.a_norm(audio).transpose(1, 2)).transpose(1, 2).chunk(3, 1)
        shift = shifts(frames, block.window)
        to_audio = (self.tables[0] + shift * each) % samples
        to_video = (self.tables[1] + shift * places) % (frames * places)
        of_audio, of_video = [], []
        for frame in range(frames):
            seen = to_audio[frame * places]
            own = slice(frame * places, (frame + 1) * places)
            of_audio.append(self.attention(q_v[..., own], k_a[..., seen], v_a[..., seen]))
            seen = to_video[frame * each]
            own = slice(frame * each, (frame + 1) * each)
            of_video.append(self.attention(q_a[..., own], k_v[..., seen], v_v[..., seen]))
        video = video + block.video_proj_out(torch.cat(of_audio, 2).unflatten(2, (frames, height, width)))
        return video, audio + block.audio_proj_out(torch.cat(of_video, 2))


class Counted(TorchDispatchMode):
    """Operators that are not views, and the most bytes of results that were alive at once."""

    def __init__(self):
        super().__init__()
        self.kernels = self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
        self.kernels += not view
        for value in tree_leaves(out):
            if torch.is_tensor(value):
                self.keep(value.untyped_storage())
        return out

    def keep(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            size = storage.nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.alive -= size


def counted(form) -> Counted:
    with Counted() as count:
        form()
    return count


def level(frames, height, width, samples, channels, window, dtype, device, repeats):
    """(seconds of the loop and of the windows, kernels of both, peak bytes of both, bytes of tables)."""
    torch.manual_seed(0)
    block = CrossModalBlock(channels, HEAD_CHANNELS, window).to(device, dtype)
    for norm in (block.v_norm, block.a_norm):
        norm.float()
    loop = LoopForm(block)
    video = torch.randn(1, channels, frames, height, width, device=device, dtype=dtype)
    audio = torch.randn(1, channels, samples, device=device, dtype=dtype)
    shift = (frames - window) // 2
    forms = [lambda: loop(video, audio, lambda *_: shift), lambda: block(video, audio, lambda *_: shift)]
    theirs, ours = (form() for form in forms)  # also makes the tables
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert all((a - b).abs().max() < tolerance * (1 + b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    del theirs, ours
    counts = [counted(form) for form in forms]
    if device != "cpu":
        forms = [waiting(form) for form in forms]
    times = in_turn(forms, repeats, time.process_time if device == "cpu" else time.perf_counter)
    return times, counts, sum(table.nbytes for table in loop.tables)


def waiting(form):
    def run():
        form()
        torch.cuda.synchronize()

    return run


def clips(dtype) -> list[str]:
    """Seconds of one clip of the published network with random weights on this machine's GPU."""
    torch.manual_seed(0)
    settings = {"windows": [1, 4, 8], "head_channels": HEAD_CHANNELS}
    weights = dict(JointDenoiser(operations=torch.nn).state_dict())
    model = build(weights, "published", Media(), dtype, **settings)
    lines = []
    for name, method, steps in (("DPM-Solver, 20 evaluations", DPM, 20), ("DDPM, 1000 steps", DDPM, 1000)):
        latent = empty(model, 1, 0, 0, 0)
        run_joint(model, latent, 0, 2, method, JOINT, REPLACEMENT, 0.0)
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run_joint(model, latent, 0, steps, method, JOINT, REPLACEMENT, 0.0)
        seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**20
        lines.append(f"- {name}: {seconds:.2f} s a clip, peak {peak:.0f} MiB")
    return lines


def kept_for_gradients(lean: bool) -> int:
    """Bytes that the way back through the published network keeps for one clip in float32, counted without computing."""
    network = JointUNet(device="meta").requires_grad_(False)
    network.lean, own, kept = lean, {value.untyped_storage()._cdata for value in network.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x
        return x

    media, place = Media(), {"device": "meta", "requires_grad": True}
    clip = [
        torch.empty(1, 3, media.frames, media.height, media.width, **place), torch.empty(1, 1, media.samples, **place)
    ]  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = network(*clip, torch.zeros(1, device="meta"))  # noqa: F841 holds what is kept
        return sum(x.untyped_storage().nbytes() for storage, x in kept.items() if storage not in own)


def gradient_lines() -> list[str]:
    whole, parts = (kept_for_gradients(lean) / 1e9 for lean in (False, True))
    return [
        "",
        f"Gradient guidance: the way back through the published network keeps {whole:.1f} GB a clip in float32, {parts:.2f} GB where "
        "the network is computed in parts a second time (one forward pass more beside a forward and a backward pass).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default="docs/joint_av_speed.md")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    lines = [
        "# Speed and memory of random-shift attention",
        "",
        f"`python -m benchmarks.joint_av`, torch {torch.__version__}, {platform.machine()}, {args.device}, {args.dtype}, "
        f"{torch.get_num_threads()} threads. One block at the sizes of the published network, batch 1, norms and projections "
        "included; results of both forms agree.",
        "",
        "| level | frames x h x w x channels, samples, window | loop s | windows s | windows / loop | loop kernels | windows "
        "kernels | loop peak MiB | windows peak MiB | loop tables MB | windows tables |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    kernels, tables = [0, 0], 0
    with torch.inference_mode():
        for name, frames, height, width, samples, channels, window, blocks in LEVELS:
            times, counts, held = level(frames, height, width, samples, channels, window, dtype, args.device, args.repeats)
            kernels = [total + blocks * count.kernels for total, count in zip(kernels, counts, strict=True)]
            tables += blocks * held
            lines.append(
                f"| {name} | {frames} x {height} x {width} x {channels}, {samples}, {window} | {times[0]:.3f} | {times[1]:.3f} | "
                f"**{times[1] / times[0]:.2f}** | {counts[0].kernels} | {counts[1].kernels} | {counts[0].peak / 2**20:.0f} | "
                f"{counts[1].peak / 2**20:.0f} | {held / 1e6:.0f} | 0 |"
            )
            print(lines[-1], flush=True)
        lines += [
            "",
            f"All 16 blocks of one forward pass: {kernels[0]} kernels in the loop form, {kernels[1]} as windows, "
            f"**{kernels[0] / kernels[1]:.1f} times fewer**; resident tables {tables / 1e6:.0f} MB against 0.",
            "",
            "A kernel is an operator that is not a view; a fused attention counts as one. Peak is the memory of the results of "
            "operators that are alive at once in a call, without weights, inputs and resident tables.",
        ]
        if args.device != "cpu":
            lines += ["", "Whole clips of the published network, random weights:", "", *clips(dtype)]
    Path(args.out).write_text("\n".join([*lines, *gradient_lines(), ""]))


if __name__ == "__main__":
    main()
