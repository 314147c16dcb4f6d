"""Runners for golden/story_gen: the authors' transformer block, U-Net and whole sampling loops, through ComfyUI's classes.

The tiny U-Net is ComfyUI's UNetModel; its weights come in the published names and go through the loader's own functions.
"""

from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.patcher_extension import WrappersMP
from safetensors.torch import load_file
from storyweft.host import override
from storyweft.host import story_gen_weights as weights
from storyweft.host.reference_pass import Capture, Reference
from storyweft.host.story_gen import ImagePatches, ImageSites, ReferenceRule, make_guider
from storyweft.models.story_gen import ImageAttention, split
from storyweft.sampling.story_gen import STAGES, reference_timesteps

STAGE_OF = {"autoregressive": STAGES[0], "multi": STAGES[1], "no": STAGES[2]}
BLOCK, UNET, LOOP = 2e-5, 3e-5, 3e-4
PLACES = {"down": ("input", (1, 2, 4, 5, 7, 8)), "up": ("output", (3, 4, 5, 6, 7, 8, 9, 10, 11))}


def at(key: str) -> tuple[str, int, int]:
    """The place of a recorded feature, such as down_2_1."""
    if key == "mid":
        return "middle", 0, 0
    side, level, number = key.split("_")
    path, blocks = PLACES[side]
    return path, blocks[(int(level) - 1) * (2 if side == "down" else 3) + int(number) - 1], 0


def block(path: Path, report) -> None:
    data = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    heads, channels = int(data["meta_heads"]), data["x"].shape[1]
    base, own = split({key[2:]: value for key, value in data.items() if key.startswith("w.")})
    network = SpatialTransformer(
        channels, heads, channels // heads, 1, context_dim=data["text"].shape[2], use_linear=False, operations=torch.nn
    )
    network.load_state_dict(base)
    ((_, tensors),) = own.items()
    module = ImageAttention(channels, channels)
    module.load_state_dict(tensors)
    site = ("input", 1, 0)

    def run(part, x, image=None, **more):
        capture, options = Capture(), {"block": site[:2], "block_index": 0}
        options["patches"] = {"middle_patch": [capture]}
        if image is not None:
            sites = ImageSites(dict, {site: channels // heads})
            ImagePatches({site: module}, sites, [(slice(0, len(x)), {site: image}.get)], 1.0).add_to(options)
        with torch.no_grad():
            return part(x, data["text"], transformer_options=options), capture.features[site]

    inner = network.transformer_blocks[0]
    for x, part, names in (
        ("x", network, ("y_noimage", "y_image", "feature")),
        ("block_in", inner, ("block_out_noimage", "block_out_image", "block_feature")),
    ):
        plain, feature = run(part, data[x])
        with_image, same = run(part, data[x], data["image"])
        for name, got in zip(names, (plain, with_image, feature), strict=True):
            report.close(path.name, name, got, data[name], BLOCK)
        report.close(path.name, f"{names[2]} with image", same, data[names[2]], BLOCK)


def tiny(folder: Path, letter: str):
    """A MODEL of ComfyUI's classes with the recorded weights, its own ones inside, as the loader makes it."""
    state = {key: value.float() for key, value in load_file(folder / f"{letter}_storygen_unet_weights.safetensors").items()}
    heads = int(load_file(folder / f"{letter}_storygen_unet.safetensors")["meta_heads"])
    base, own = split(state)
    level = [sorted(k for k in state if k.startswith(f"down_blocks.{i}.resnets.") and k.endswith("conv1.weight")) for i in range(9)]
    level = [names for names in level if names]
    attention = [any(k.startswith(f"down_blocks.{i}.attentions.") for k in state) for i in range(len(level))]
    channels = len(state["conv_in.weight"])
    settings = {
        "image_size": 32,
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": len(state["conv_out.weight"]),
        "model_channels": channels,
        "num_res_blocks": [len(names) for names in level],
        "channel_mult": [len(state[names[0]]) // channels for names in level],
        "transformer_depth": [int(has) for names, has in zip(level, attention, strict=True) for _ in names],
        "transformer_depth_output": [int(has) for names, has in zip(level, attention, strict=True) for _ in (*names, None)],
        "transformer_depth_middle": 1,
        "context_dim": state["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "legacy": False,
        "num_heads": heads,
        "num_head_channels": -1,
    }
    config = comfy.supported_models.SD15(dict(settings))
    config.unet_config |= settings
    config.set_inference_dtype(torch.float32, None)
    base = weights.renamed(base, settings, letter)
    model = config.get_model(base, device=torch.device("cpu"))
    missing, unexpected = model.diffusion_model.load_state_dict(base, strict=False)
    model.diffusion_model.train(False)
    device = comfy.model_management.get_torch_device()
    patcher = comfy.model_patcher.CoreModelPatcher(model, device, device)
    return weights.graft(patcher, own, letter, letter), [*missing, *unexpected]


def unet_weights(path: Path, report) -> None:
    letter = path.name.split("_")[0]
    state = load_file(path)
    patcher, lost = tiny(path.parent, letter)
    kept = patcher.model.diffusion_model.state_dict()
    report.line(path.name, "tensors lost", len(lost) + len(state) - len(kept), "<= 0", not lost and len(state) == len(kept))
    total = sum(value.double().abs().sum().item() for value in state.values())
    kept = sum(value.double().abs().sum().item() for value in kept.values())
    report.line(path.name, "sum of all", abs(kept - total) / total, "<= 1e-12", abs(kept - total) <= 1e-12 * total)


def unet(path: Path, report) -> None:
    data = load_file(path)
    patcher, _ = tiny(path.parent, path.name.split("_")[0])
    model = patcher.model.diffusion_model
    sites = patcher.get_attachment(weights.KEY).sites
    kept = []
    with torch.no_grad():
        for number in range(len(data["ref_t"])):
            capture = Capture()
            t = data["ref_t"][number].repeat(len(data["x"]))
            options = {"patches": {"middle_patch": [capture]}}
            eps = model(data["ref_latents"][number], t, context=data["ref_text"][number], transformer_options=options)
            kept.append(capture.features)
            if number == 0:
                report.close(path.name, "ref0_eps", eps, data["ref0_eps"], UNET)
        features = {site: torch.cat([found[site] for found in kept], 1) for site in kept[0]}
        for key in (key for key in data if key.startswith("feat.")):
            report.close(path.name, key, features[at(key[5:])], data[key], UNET)
        t = data["t"].repeat(len(data["x"]))
        plain = model(data["x"], t, context=data["text"], transformer_options={})
        options = {}
        rows = slice(0, len(data["x"]))
        ImagePatches(sites.modules(model), sites, [(rows, features.get)], 1.0).add_to(options)
        with_image = model(data["x"], t, context=data["text"], transformer_options=options)
    report.close(path.name, "y_noimage", plain, data["y_noimage"], UNET)
    report.close(path.name, "y_image", with_image, data["y_image"], UNET)
    again = reference_timesteps(int(data["t"]), len(data["ref_t"]), STAGES[0])
    report.close(path.name, "ref_t", torch.tensor(again), data["ref_t"], 0)


class Recorder:
    """Keeps what each branch predicted, and all inputs of the U-Net before the first main pass."""

    def __init__(self, patcher, numbers: dict[int, int]):
        self.numbers, self.branches, self.references, self.main = numbers, [], [], False
        patcher.add_wrapper(WrappersMP.DIFFUSION_MODEL, self.network)
        patcher.add_wrapper(WrappersMP.PREDICT_NOISE, self.predict)
        self.hook = patcher.model.diffusion_model.register_forward_pre_hook(self.before)

    def predict(self, executor, x, timestep, model_options, seed):
        self.branches.append({})
        return executor(x, timestep, model_options, seed)

    def before(self, network, args):
        if not self.main:
            self.references.append(args[:2])

    def network(self, executor, x, t, context, y, control, transformer_options, **kwargs):
        if not self.main:
            self.references.pop()  # the main pass itself
            self.main = True
        out = executor(x, t, context, y, control, transformer_options, **kwargs)
        chunks = transformer_options["cond_or_uncond"]
        for chunk, eps in zip(chunks, out.chunk(len(chunks)), strict=True):
            self.branches[-1][self.numbers[chunk]] = eps
        return out

    def noisy(self, t: int, wanted: torch.Tensor) -> torch.Tensor:
        """The reference pass input [pictures, 4, h, w] at timestep t that is nearest to the wanted one."""
        rows = torch.cat([x for x, _ in self.references])[torch.cat([ts for _, ts in self.references]) == t]
        passes = rows.unflatten(0, (-1, len(wanted)))
        return passes[(passes - wanted).abs().flatten(1).amax(1).argmin()]


def loop(path: Path, report) -> None:
    data = load_file(path)
    letter, name = path.stem.split("_", 1)
    stage = STAGE_OF[name.rsplit("_", 1)[1]]
    patcher, _ = tiny(path.parent, letter)
    sigmas = patcher.get_model_object("model_sampling").sigmas
    raw = patcher.model.latent_format.process_out  # recorded latents are scaled already
    negative, prompt = [[data["emb_empty"][None], {}]], [[data["emb_prompt"][None], {}]]
    previous = tuple(
        Reference(raw(latent[None]), [text[None], {}])
        for latent, text in zip(data["ref_latents"], data["emb_prev"], strict=True)
    )
    alone, rule = stage == STAGES[2], None
    if not alone:
        blank = Reference(raw(data["zero_latent"][None]), negative[0])

        def noise(shape):
            return data["ref_noise"]

        rule = ReferenceRule(patcher.get_attachment(weights.KEY).sites, previous, blank, stage, noise)
        patcher = override.register(patcher, rule)
    recorder = Recorder(patcher, {0: 2, 1: 0} if alone else {0: 0, 1: 1, 2: 2})  # list numbers -> u, v, a
    guider = make_guider(patcher, rule, prompt, negative, *data["guidance"].tolist())
    schedule = torch.cat([sigmas[data["timesteps"]], sigmas[:1]])  # the authors end at the table's first entry
    states = []

    def follow(step, denoised, x, steps):
        states.append(x / (1 + schedule[step] ** 2) ** 0.5)

    start = data["init_latents"] * (1 + schedule[0] ** 2) ** 0.5 / schedule[0]
    sampler = comfy.samplers.sampler_object("ddim")
    out = guider.sample(start, torch.zeros_like(start), sampler, schedule, callback=follow, disable_pbar=True, seed=0)
    recorder.hook.remove()
    out = patcher.model.process_latent_in(out) / (1 + schedule[-1] ** 2) ** 0.5
    report.close(path.name, "latents_trace", torch.stack([*states[1:], out]), data["latents_trace"], LOOP)
    for tensor, found in (("eps_first", recorder.branches[0]), ("eps_last", recorder.branches[-1])):
        got = torch.stack([found[0 if alone and number == 1 else number] for number in range(3)])
        report.close(path.name, tensor, got, data[tensor], LOOP)
    if not alone:
        steps = [reference_timesteps(t, len(previous), stage) for t in data["timesteps"].tolist()]
        report.close(path.name, "ref_timesteps", torch.tensor(steps), data["ref_timesteps"], 0)
        wanted = data["noisy_ref_first"].unflatten(1, (3, -1))
        got = [torch.stack([recorder.noisy(t, w) for w in ws]) for t, ws in zip(steps[0], wanted, strict=True)]
        report.close(path.name, "noisy_ref_first", torch.stack(got), wanted, BLOCK)
        passes = sum(len(x) for x, _ in recorder.references)
        expected = len(rule.passes(int(data["timesteps"][0]))) * len(data["init_latents"])
        report.line(path.name, "latents in passes", passes, f"<= {expected}", passes == expected)


RUNNERS = {
    "storygen_block": block,
    "storygen_unet_weights": unet_weights,
    "storygen_unet": unet,
    **{f"storygen_loop_{name}": loop for name in STAGE_OF},
}
