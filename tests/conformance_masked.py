"""Runners for golden/masked_attention: words, blocks, several objects, the 3-D U-Net, sampling, metrics."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from comfy.sd1_clip import SDTokenizer
from conformance_consistent import read
from storyweft.attention.core import attend
from storyweft.attention.labels import MaskRegions, box_masks, paint
from storyweft.attention.masked import NOBODY, Constraint, masked_attention, partition
from storyweft.host.layout import Entry, Layer, Layout
from storyweft.host.masked import MaskedOptions, MaskedRule
from storyweft.host.override import Attention, make_plan
from storyweft.host.run import Run
from storyweft.host.words import KEY, Words, find_words
from storyweft.metrics.boxes import average_precision, centroid, centroid_distance, volume_iou
from storyweft.story.paths import resample_path
from unet3d import UNet3D, spatial, temporal, temporal_model, transformer_block

FAMILY = SimpleNamespace(model_class="UNet3DConditionModel", picture_only=True, layers=(), cross_layers=(), time_layers=(1,))


def weights(data: dict, dtype=torch.float32) -> dict:
    return {key[2:]: value.to(dtype) for key, value in data.items() if key.startswith("w.")}


def words_of(keep_mask) -> Words:
    """The recorded text mask as labels: the start token is in neither set."""
    return Words((NOBODY, *(0 if keep else 1 for keep in keep_mask[1:].tolist())), (0, 1), True)


class Hook:
    """The rule of the node, asked at every attention of a recorded block or network.

    Keeps the attentions' inputs and outputs in `calls`, and how many were masked.
    """

    def __init__(self, masks, words, frames, latent, steps=1, sigmas=(2.0, 1.0, 0.0), reference=False, **options):
        options = MaskedOptions(part=0.0, steps=steps, cross=words is not None, **options)
        self.rule = MaskedRule(MaskRegions(masks), options)
        self.reference, self.frames, self.calls = reference, frames, []
        self.run = Run((self.rule,), FAMILY, (frames, 4, *latent), list(sigmas))
        self.entries = (Entry("negative", 0), Entry("positive", 0, cond={} if words is None else {KEY: words}))
        self.run.entries = {number: [entry] for number, entry in enumerate(self.entries)}
        self.rule.begin(self.run)

    def options(self, place, kinds):
        return {"optimized_attention_override": self, "place": place, "kinds": iter(kinds)}

    def active(self, path: str) -> bool:
        return self.rule.wants(Layer(path, 0, 0, 0, "time"), self.run)

    def gate(self, path, grid):
        """The authors' foreground indicator [2·h·w, frames, 1] of a masked temporal layer, None for the paper's form."""
        if not (self.reference and self.active(path)):
            return None
        labels = self.run.state[self.rule].frame_labels(range(self.frames), *grid)
        return (labels.T > 0).float().repeat(2, 1)[..., None]

    def __call__(self, func, *args, **kwargs):
        attention = Attention(func, args, kwargs)
        (path, grid), kind = kwargs["transformer_options"]["place"], next(kwargs["transformer_options"]["kinds"])
        q, k, v = attention.tensors
        layer = Layer(path, 0, 0, 0, kind)
        items = tuple(range(self.frames))
        grid = (self.frames if kind == "time" else 1, *grid)
        layout = Layout(self.entries, items, layer, grid, slice(0, q.shape[2]), slice(0, k.shape[2]) if kind == "cross" else None)
        plan = None
        if self.rule.wants(layer, self.run):
            plan = make_plan(self.run, SimpleNamespace(window=None, shape=None), layout, [self.rule], attention)
        out = attention(q, k, v, attention.bias) if plan is None else plan.run(attention, self.run.divisions)
        self.calls.append((kind, q, k, v, out, plan))
        return attention.as_called(out)


def allowed(constraint: Constraint, rows: int):
    """Who sees whom, [rows, Q, K], as the partition has it."""
    out = torch.zeros(rows, constraint.query.shape[1], constraint.key.shape[1], dtype=torch.bool)
    for part in partition([constraint], rows, torch.device("cpu")):
        q = torch.arange(out.shape[1]).expand(len(part.rows), -1) if part.queries is None else part.queries
        k = torch.arange(out.shape[2]).expand(len(part.rows), -1) if part.keys is None else part.keys
        for row, queries, keys in zip(part.rows, q, k, strict=True):
            out[row, queries[:, None], keys] = True
    return out


def text(path: Path, report) -> None:
    data, meta = read(path)
    kept, own, other = [], [], []
    for number, (prompt, phrase, pad) in enumerate(json.loads(meta["cases"])):
        part = SDTokenizer(pad_with_end=pad != 0)
        clip = SimpleNamespace(
            tokenizer=SimpleNamespace(clip_l=part), tokenize=lambda text, part=part: {"l": part.tokenize_with_weights(text)}
        )
        ids = torch.tensor([token for token, _ in clip.tokenize(prompt)["l"][0]])
        report.close(path.name, f"prompt_ids {number}", ids, data["prompt_ids"][number], 0)
        matched = bool(data["allowed_for_fg_pixels"][number].any())
        try:
            labels = torch.tensor(find_words(clip, prompt, [phrase], 77, "test").labels)
        except ValueError as refusal:
            assert f"'{phrase}'" in str(refusal) and not matched  # a phrase without a token is refused, not unmasked
            labels = torch.tensor([NOBODY] + [0] * 76)
        kept.append(labels == 0)
        own.append(labels == 1)
        other.append(labels == 0)
    report.close(path.name, "keep_mask", torch.stack(kept), data["keep_mask"], 0)
    report.close(path.name, "allowed_for_fg_pixels", torch.stack(own), data["allowed_for_fg_pixels"], 0)
    report.close(path.name, "allowed_for_bg_pixels", torch.stack(other), data["allowed_for_bg_pixels"], 0)


class Block:
    """A recorded spatial block with its inputs, run with the rule on (masks, words)."""

    def __init__(self, path: Path):
        self.data, meta = read(path)
        self.frames, self.grid, self.latent = int(meta["frames"]), json.loads(meta["token_hw"]), json.loads(meta["mask_hw"])
        self.block = transformer_block(weights(self.data), int(meta["heads"]))

    def hook(self, masks, words, steps=1, **options) -> Hook:
        return Hook(masks, words, self.frames, self.latent, steps, **options)

    def __call__(self, hook: Hook):
        return spatial(self.block, self.data["hidden"], self.data["context"], hook, ("output", self.grid))


def spatial_block(path: Path, report) -> None:
    one = Block(path)
    data, frames = one.data, one.frames
    hook = one.hook(data["frozen_mask"][None], words_of(data["keep_mask"]))
    labels = hook.run.state[hook.rule].frame_labels(range(frames), *one.grid)
    report.close(path.name, "token_mask", labels.repeat(2, 1) > 0, data["token_mask"], 0)
    report.close(path.name, "attn1_allowed", allowed(Constraint(labels, labels), frames), data["attn1_allowed"], 0)
    keys = torch.tensor(words_of(data["keep_mask"]).labels)[None]
    report.close(path.name, "attn2_allowed", allowed(Constraint(labels, keys), frames), data["attn2_allowed"], 0)
    report.close(path.name, "out_masked", one(hook), data["out_masked"], 2e-5)
    for (_, q, k, v, out, plan), name in zip(hook.calls, ("attn1", "attn2"), strict=True):
        assert plan is not None
        report.close(path.name, f"{name}_out", out, data[f"{name}_out"], 2e-5)
        for tensor, part in ((q, "q"), (k, "k"), (v, "v")):
            report.close(path.name, f"{name}_{part}", tensor, data[f"{name}_{part}"], 2e-5)
    off = one.hook(data["frozen_mask"][None], words_of(data["keep_mask"]))
    off.run.sigma = 1.0  # the second step
    report.close(path.name, "out_unmasked", one(off), data["out_unmasked"], 2e-5)


def spatial_quirks(path: Path, report) -> None:
    data, _ = read(path)
    one = Block(path.with_name(path.name.replace("spatial_quirks", "spatial_block")))
    masks = one.data["frozen_mask"][None]
    nothing = Words((NOBODY, *[0] * (len(one.data["keep_mask"]) - 1)), (0, 1), True)
    hook = one.hook(masks, nothing)
    report.close(path.name, "out_empty_word_set", one(hook), data["out_empty_word_set"], 1e-3)
    report.close(path.name, "attn2_out_empty_word_set", hook.calls[1][4], data["attn2_out_empty_word_set"], 1e-3)
    report.apart(path.name, "out_no_words_given", one(one.hook(masks, None)), data["out_no_words_given"], 1e-3)


def temporal_block(path: Path, report) -> None:
    data, meta = read(path)
    frames, heads = int(meta["frames"]), int(meta["heads"])
    grid, stride = data["hidden"].shape[2:], int(meta["stride"])
    latent = data["frozen_mask"].shape[1:]
    assert tuple(-(-side // stride) for side in latent) == tuple(grid)

    def run(hook, dtype=torch.float32):
        own = weights(data, dtype)
        block = transformer_block({k.partition("blocks.0.")[2]: v for k, v in own.items() if "blocks.0." in k}, heads, dtype)
        gate = hook.gate("output", grid)
        return temporal_model(
            own,
            data["hidden"].to(dtype),
            frames,
            int(meta["norm_groups"]),
            float(meta["norm_eps"]),
            heads,
            lambda z: temporal(block, z, hook, ("output", grid), None if gate is None else gate.to(dtype)),
        )

    masks = data["frozen_mask"][None]
    hook = Hook(masks, None, frames, latent, reference=True)
    labels = hook.run.state[hook.rule].frame_labels(range(frames), *grid).T
    report.close(path.name, "allowed", allowed(Constraint(labels, labels), len(labels)), data["allowed"], 0)
    report.close(path.name, "out_masked_reference", run(hook), data["out_masked_reference"], 2e-5)
    for tensor, name in zip(hook.calls[0][1:5], ("q", "k", "v", "out"), strict=True):
        report.close(path.name, f"attn1_{name}", tensor, data[f"attn1_{name}"], 2e-5)
    paper = Hook(masks, None, frames, latent)
    report.close(path.name, "out_masked_paper_f64", run(paper, torch.float64), data["out_masked_paper_f64"], 2e-5)
    report.apart(path.name, "reference form", run(Hook(masks, None, frames, latent)), data["out_masked_reference"], 0.1)
    off = Hook(masks, None, frames, latent)
    off.run.sigma = 1.0
    report.close(path.name, "out_unmasked", run(off), data["out_unmasked"], 2e-5)


def multi(path: Path, report) -> None:
    data, _ = read(path)
    one = Block(path.with_name(path.name.replace("multi", "spatial_block")))
    masks, grid, frames = data["object_masks"], one.grid, one.frames
    groups = [[frame] for frame in range(frames)]
    alone = torch.stack([MaskRegions(masks[k : k + 1]).labels(groups, *grid) for k in range(len(masks))])
    bits = (alone << torch.arange(len(masks)).view(-1, 1, 1)).sum(0)
    report.close(path.name, "label", bits, data["label"], 0)
    highest = torch.tensor([[int(label).bit_length() for label in row] for row in data["label"]])
    labels = MaskRegions(masks).labels(groups, *grid)
    report.close(path.name, "topmost object", labels, highest, 0)
    report.close(path.name, "paint", paint(alone), highest, 0)
    frames_seen = allowed(Constraint(bits.T, bits.T), bits.shape[1])
    report.close(path.name, "temporal_allowed_label", frames_seen, data["temporal_allowed_label"], 0)
    report.apart(path.name, "temporal_allowed_ref", frames_seen, data["temporal_allowed_ref"], 0.5)
    spaces = allowed(Constraint(labels, labels), frames)
    single = (bits & (bits - 1)) == 0  # tokens in at most one object: there both rules agree
    both = single[:, :, None] & single[:, None]
    report.close(path.name, "spatial_allowed_ref, one object", spaces & both, data["spatial_allowed_ref"] & both, 0)
    owner = data["object_words"].long().argmax(0) + 1
    shared = data["object_words"].sum(0) > 1
    word_labels = [
        NOBODY if place == 0 or shared[place] else int(owner[place]) if data["object_words"][:, place].any() else 0
        for place in range(data["object_words"].shape[1])
    ]
    hook = one.hook(masks, Words(tuple(word_labels), tuple(range(len(masks) + 1)), True))
    report.apart(path.name, "spatial_out_ref", one(hook), data["spatial_out_ref"], 1e-3)
    # the authors' cross rule is ours with all objects taken as one
    anything = torch.tensor([NOBODY] + data["object_words"].any(0)[1:].long().tolist())[None]
    crossed = allowed(Constraint((labels > 0).long(), anything), frames)
    report.close(path.name, "cross_allowed_ref", crossed, data["cross_allowed_ref"], 0)


def unet(path: Path, report) -> None:
    data, meta = read(path)
    _, _, frames, *latent = data["sample"].shape
    hook = Hook(data["frozen_mask"][None], words_of(data["keep_mask"]), frames, latent, reference=True)
    network = UNet3D(weights(data), json.loads(meta["config"]), hook)
    out = network(data["sample"], data["timestep"], data["context"])
    report.close(path.name, "out_masked", out, data["out_masked"], 1e-5)
    wanted = json.loads(meta["attention_calls"])
    shapes = [[list(q.shape), list(k.shape)] for _, q, k, *_ in hook.calls]
    odd = sum(got != call[1:3] for got, call in zip(shapes, wanted, strict=True))
    report.line(path.name, "attention calls' shapes", odd, "<= 0", not odd)
    masked = torch.tensor([plan is not None for *_, plan in hook.calls])
    report.close(path.name, "masked calls", masked, torch.tensor([call[3] for call in wanted]), 0)
    hook.run.sigma = 1.0
    out = network(data["sample"], data["timestep"], data["context"])
    report.close(path.name, "out_unmasked", out, data["out_unmasked"], 1e-5)


def sampling(path: Path, report) -> None:
    """The authors' DDIM loop; whether a step is masked is decided by the rule from its sigma."""
    data, meta = read(path)
    network_data, network_meta = read(path.with_name(f"{path.name[0]}_unet.safetensors"))
    alphas, times, guidance = data["alphas_cumprod"], data["timesteps"].tolist(), float(meta["guidance_scale"])
    sigmas = [float(((1 - alphas[t]) / alphas[t]) ** 0.5) for t in times] + [0.0]
    gap = times[0] - times[1]
    _, _, frames, *latent = data["initial_latents"].shape
    for steps in sorted(int(key[len("latents_frozen") :]) for key in data if key.startswith("latents_frozen")):
        hook = Hook(data["frozen_mask"][None], words_of(data["keep_mask"]), frames, latent, steps, sigmas, reference=True)
        network = UNet3D(weights(network_data), json.loads(network_meta["config"]), hook)
        x, states = data["initial_latents"], []
        for t, sigma in zip(times, sigmas, strict=False):
            hook.run.sigma = sigma
            uncond, cond = network(x.repeat(2, 1, 1, 1, 1), torch.tensor(t), data["prompt_embeds_uncond_cond"])
            eps = uncond + guidance * (cond - uncond)
            alpha, before = alphas[t], alphas[max(t - gap, 0)]
            x = before.sqrt() * (x - (1 - alpha).sqrt() * eps) / alpha.sqrt() + (1 - before).sqrt() * eps
            states.append(x[0])
        report.close(path.name, f"latents_frozen{steps}", torch.stack(states), data[f"latents_frozen{steps}"], 1e-4)


def core_f64(path: Path, report) -> None:
    data, meta = read(path)
    for name, *_ in json.loads(meta["cases_name_Nq_Nk_flop_fraction"]):
        part = {key.partition(".")[2]: value for key, value in data.items() if key.startswith(name + ".")}
        parts = partition([Constraint(part["label_q"][None], part["label_k"][None])], 1, torch.device("cpu"))
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-6)):
            got = masked_attention(*(part[key].to(dtype) for key in "qkv"), parts, attend)
            report.close(path.name, f"{name}.out {str(dtype)[6:]}", got, part["out"], tolerance)


def boxes_metrics(path: Path, report) -> None:
    data, meta = read(path)
    height, width = json.loads(meta["mask_hw"])
    for name in sorted({key.partition(".")[0] for key in data}):
        part = {key.partition(".")[2]: value for key, value in data.items() if key.startswith(name + ".")}
        if name.startswith("path"):
            got = resample_path(part["points"].tolist(), len(part["out"]))
            report.close(path.name, f"{name}.out", torch.tensor(got), part["out"], 0)
            continue
        drawn = {side: box_masks(part[f"boxes_{side}"][None], height, width)[0] for side in ("gt", "pred")}
        for side, mask in drawn.items():
            report.close(path.name, f"{name}.mask_{side}", mask, part[f"mask_{side}"].bool(), 0)
            report.close(path.name, f"{name}.centroid_{side}", centroid(mask), part[f"centroid_{side}"], 1e-9)
        got = [measure(drawn["gt"], drawn["pred"]) for measure in (volume_iou, average_precision, centroid_distance)]
        report.close(path.name, f"{name}.iou_ap50_cd", torch.tensor(got, dtype=torch.float64), part["iou_ap50_cd"], 1e-9)


KINDS = {
    "text": text,
    "spatial_block": spatial_block,
    "spatial_quirks": spatial_quirks,
    "temporal": temporal_block,
    "multi": multi,
    "unet": unet,
    "sampling": sampling,
    "core_f64": core_f64,
    "boxes_metrics": boxes_metrics,
}
RUNNERS = {("masked_attention", kind): runner for kind, runner in KINDS.items()}
