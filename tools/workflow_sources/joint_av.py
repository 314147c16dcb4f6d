"""Pictures with sound: drawn together, one from the other, parts of a clip anew, and larger frames."""

from .graph import Graph

STEPS = 50
SWAP = "For real clips put **Load Joint Audio-Video Model** with a published MM-Diffusion checkpoint in the demo model's place."


def sampled(graph: Graph, model, latent, task: str, seed: int, title: str, **changes):
    options = {"steps": STEPS, "method": "ddpm", "guidance": "replacement", "strength": 16.0} | changes
    return graph.add(
        "StoryweftRandomShiftAVSampler", title, model=model, latent=latent, task=task, seed=seed, **options
    )


def decoded(graph: Graph, latent, title="Decode"):
    return graph.add("StoryweftDecodeJointLatent", title, latent=latent, fps=0.0, sample_rate=0)


def saved(graph: Graph, made, name: str, title="Save Clip"):
    """One clip, its frames made larger, with its sound."""
    larger = graph.add("ImageScaleBy", "Larger", image=made(0), upscale_method="lanczos", scale_by=8.0)
    video = graph.add("CreateVideo", "Frames and Sound", images=larger(), fps=made(3), audio=made(1), bit_depth=8)
    save_video(graph, video(), name, title)


def save_video(graph: Graph, video, name: str, title="Save Clip"):
    graph.add("SaveVideo", title, video=video, filename_prefix=f"storyweft/{name}", format="auto", codec="auto")


def encoded(graph: Graph, model, keep: str, title: str, **given):
    options = {"fps": 10.0, "start": 0.0, "batch_size": 1, "antialias": False} | given
    return graph.add("StoryweftEncodeJointLatent", title, model=model, keep=keep, **options)


def first_clip(graph: Graph, seed: int):
    """The demo model and a clip that it draws, in place of a file."""
    loader = graph.add("StoryweftDemoJointAVLoader", "Demo Joint Audio-Video Model")
    empty = graph.add(
        "StoryweftEmptyJointLatent", "Empty Clip", model=loader(), batch_size=1, frames=0, width=0, height=0
    )
    drawn = sampled(
        graph, loader(), empty(), "video and sound", seed, "Draw a Clip to Start From", method="ddim", steps=25
    )
    return loader, decoded(graph, drawn(), "Decode the First Clip")


def joint_av() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoJointAVLoader", "Demo Joint Audio-Video Model")
    empty = graph.add(
        "StoryweftEmptyJointLatent", "Two Empty Clips", model=loader(), batch_size=2, frames=0, width=0, height=0
    )
    drawn = sampled(graph, loader(), empty(), "video and sound", 3, "Draw Both Together", method="ddim", steps=25)
    made = decoded(graph, drawn())
    save_video(graph, made(2), "joint_av", "Save Every Clip")
    return graph.nodes, (
        "## Pictures with sound\nOne model draws a short clip and its sound from the same noise (MM-Diffusion, CVPR 2023). The "
        "latent holds both halves; the decoder gives one video with sound for every clip of the batch.\n\nThere is no prompt: a "
        f"seed is a clip. {SWAP} There *dpm_solver* with 20 steps is fast and *ddpm* with 1000 steps best."
    )


def video_to_sound() -> tuple[dict, str]:
    graph = Graph()
    loader, first = first_clip(graph, 4)
    latent = encoded(graph, loader(), "video", "Keep the Pictures", images=first(0))
    drawn = sampled(
        graph, loader(), latent(), "video to sound", 9, "Draw the Sound", steps=25, guidance="gradient", strength=16.0
    )
    saved(graph, decoded(graph, drawn()), "video_to_sound")
    return graph.nodes, (
        "## Sound for a video\nThe pictures are given, the sound is drawn. So that nothing has to be downloaded the pictures come "
        "from a clip that is drawn first; put **Load Video** on *video* of *Keep the Pictures* for your own.\n\n*replacement* "
        "puts the given half in at every step; *gradient* also moves the sound to fit it and takes two to three times as long (16 is "
        "the authors' strength). "
        f"The pictures come back bit for bit. {SWAP}"
    )


def sound_to_video() -> tuple[dict, str]:
    graph = Graph()
    loader, first = first_clip(graph, 4)
    latent = encoded(graph, loader(), "sound", "Keep the Sound", audio=first(1))
    drawn = sampled(
        graph,
        loader(),
        latent(),
        "sound to video",
        9,
        "Draw the Pictures",
        guidance="gradient",
        strength=123.0,
    )
    saved(graph, decoded(graph, drawn()), "sound_to_video")
    return graph.nodes, (
        "## Pictures for a sound\nThe sound is given, the pictures are drawn. So that nothing has to be downloaded the sound comes "
        "from a clip that is drawn first; put **Load Audio** on *audio* of *Keep the Sound* for your own (its left channel is "
        "used, from *start* seconds on).\n\nPut in at every step alone (*replacement*) the sound says little to the demo model; "
        "*gradient* guidance of the authors' strength, 123, moves the pictures towards what fits it. Measured: "
        f"`docs/joint_av_effects.md`.\n\nThe sound comes back bit for bit. {SWAP}"
    )


def av_inpaint() -> tuple[dict, str]:
    graph = Graph()
    loader, first = first_clip(graph, 4)
    latent = encoded(graph, loader(), "both", "The Whole Clip", images=first(0), audio=first(1))
    masked = graph.add(
        "StoryweftJointTimeMask", "Keep 0.8 s, Redo the Rest", latent=latent(), half="both", start=0.8, end=0.0
    )
    settings = graph.add("StoryweftJointAVSettings", "Settings", model=loader(), shift="random", clip=True)
    nothing = graph.add("StoryweftNoPrompt", "No Prompt")
    sigmas = graph.add("StoryweftRespacedSigmas", "Steps", model=loader(), respacing=str(STEPS))
    sampler = graph.add("StoryweftDDPMSampler", "DDPM of the Authors", strength=0.0)
    drawn = graph.add(
        "SamplerCustom", "SamplerCustom", model=settings(), add_noise=True, noise_seed=21, cfg=1.0, positive=nothing(),
        negative=nothing(), sampler=sampler(), sigmas=sigmas(), latent_image=masked(),
    )  # fmt: skip
    saved(graph, decoded(graph, drawn()), "av_inpaint")
    return graph.nodes, (
        "## Part of a clip anew\nThe first 0.8 seconds of pictures and sound are kept, the rest is drawn to follow them. **Joint "
        "Time Mask** can mark any span of either half; several of them add up. What is kept comes back bit for bit.\n\nThis "
        "workflow shows the parts for experts, sampler, steps and settings by themselves; **Random-Shift AV Sampler** obeys the "
        f"same mask. {SWAP}"
    )


def av_super_resolution() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add(
        "StoryweftJointAVLoader", "Load Joint Audio-Video Model", model_name="Landscape.pt", windows="1, 4, 8",
        head_channels=64, heads=4, weight_dtype="default",
    )  # fmt: skip
    upsampler = graph.add(
        "StoryweftFrameUpsamplerLoader", "Load Frame Upsampler", model_name="Landscape_SR.pt", weight_dtype="default"
    )
    nothing = graph.add("StoryweftNoPrompt", "No Prompt")
    empty = graph.add(
        "StoryweftEmptyJointLatent", "Empty Clip", model=loader(), batch_size=1, frames=0, width=0, height=0
    )
    solver = graph.add("StoryweftDPMSolverSampler", "DPM-Solver Fast 3")
    steps = graph.add("StoryweftRespacedSigmas", "20 Evaluations", model=loader(), respacing="dpm20")
    drawn = graph.add(
        "SamplerCustom", "Draw the Clip", model=loader(), add_noise=True, noise_seed=3, cfg=1.0, positive=nothing(),
        negative=nothing(), sampler=solver(), sigmas=steps(), latent_image=empty(),
    )  # fmt: skip
    small = decoded(graph, drawn())
    frames = graph.add("StoryweftUpscaleFrames", "Upscale Frames", images=small(0), factor=4, same_noise=True)
    euler = graph.add("KSamplerSelect", "Euler = DDIM", sampler_name="euler")
    ddim = graph.add("StoryweftRespacedSigmas", "25 Steps", model=upsampler(), respacing="ddim25")
    enlarged = graph.add(
        "SamplerCustom", "Draw Large Frames", model=upsampler(), add_noise=True, noise_seed=3, cfg=1.0,
        positive=frames(0), negative=frames(0), sampler=euler(), sigmas=ddim(), latent_image=frames(1),
    )  # fmt: skip
    large = graph.add("StoryweftFramesToImages", "Frames to Images", latent=enlarged())
    video = graph.add("CreateVideo", "Frames and Sound", images=large(), fps=small(3), audio=small(1), bit_depth=8)
    save_video(graph, video(), "av_super_resolution")
    return graph.nodes, (
        "## Clips of 256 x 256 pixels\nMM-Diffusion's two models one after the other: pictures of 64 x 64 with sound, then every "
        "frame four times as large. All frames start from the same noise, so that they stay alike.\n\nBoth files belong into "
        "`models/diffusion_models`: `Landscape.pt` and `Landscape_SR.pt` from github.com/researchmm/MM-Diffusion (or the two "
        "of AIST++). The second model takes most of the time: about twenty times the first."
    )


WORKFLOWS = (joint_av, video_to_sound, sound_to_video, av_inpaint, av_super_resolution)
