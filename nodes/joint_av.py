"""Joint audio-video models (MM-Diffusion, arXiv 2212.09478): loaders, settings, and the one node that draws a clip."""

import folder_paths
from comfy_api.latest import io

from ..host import joint_av as host
from ..host.joint_av import DTYPES, SHIFTS, load_demo_joint_av, load_joint_av
from ..host.joint_sampling import DDPM, DPM, GUIDANCE, METHODS, SAMPLER, TASKS, check_guidance, no_prompt, run_joint
from ..host.queueing import refusal

CATEGORY = "Storyweft/Audio-Video"
WINDOWS = "1, 4, 8"


def numbers(windows: str) -> list[int]:
    parts = [part.strip() for part in windows.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f'{host.LOADER}: windows "{windows}" must be whole numbers with commas, such as "{WINDOWS}"')
    return [int(part) for part in parts]


class JointAVLoader(io.ComfyNode):
    """Loads a published MM-Diffusion checkpoint."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=host.LOADER,
            display_name="Load Joint Audio-Video Model",
            category=CATEGORY,
            description="MM-Diffusion: one model draws 16 pictures of 64 x 64 pixels and their 1.6 s of sound together, "
            "without a prompt. Works with KSampler (cfg 1), SamplerCustom and Random-Shift AV Sampler.",
            search_aliases=["mm-diffusion", "audio video", "joint diffusion", "landscape", "AIST++"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="Landscape.pt or AIST++.pt of MM-Diffusion, or the same as .safetensors, in models/diffusion_models.",
                ),
                io.String.Input(
                    "windows",
                    default=WINDOWS,
                    advanced=True,
                    tooltip="Frames that cross-modal attention looks at on every level that has it; not stored in the file.",
                ),
                io.Int.Input(
                    "head_channels",
                    default=64,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Width of one head of cross-modal attention; not stored in the file.",
                ),
                io.Int.Input(
                    "heads",
                    default=4,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Heads of self-attention; not stored in the file.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="Number type of the weights; norms and time stay in float32. default: what ComfyUI picks.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="Joint model; clean estimates are clipped to -1 to 1.")],
        )

    @classmethod
    def validate_inputs(cls, windows=WINDOWS) -> bool | str:
        return refusal(cls, (numbers,), windows=windows)

    @classmethod
    def execute(cls, model_name, windows=WINDOWS, head_channels=64, heads=4, weight_dtype="default") -> io.NodeOutput:
        settings = {"windows": numbers(windows), "head_channels": head_channels, "heads": heads}
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        return io.NodeOutput(load_joint_av(path, settings, weight_dtype))


class DemoJointAVLoader(io.ComfyNode):
    """Loads the small joint model that comes with the pack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=host.DEMO_LOADER,
            display_name="Demo Joint Audio-Video Model",
            category="Storyweft/Demo",
            description="The pack's own small joint model of the picture-book world: a moving animal or robot with its voice, "
            "and the sound of the place. No download needed; in its place goes Load Joint Audio-Video Model.",
            search_aliases=["demo audio video", "tiny joint model", "storyweft demo"],
            inputs=[],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="Joint model of short, small clips.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_demo_joint_av())


class JointAVSettings(io.ComfyNode):
    """Changes how a joint model looks and whether it clips."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftJointAVSettings",
            display_name="Joint Audio-Video Settings",
            category=CATEGORY,
            description="How the windows of cross-modal attention are shifted, and whether clean estimates are clipped.",
            search_aliases=["random shift", "clip x0", "mm-diffusion settings"],
            inputs=[
                io.Model.Input("model", tooltip="Joint audio-video model."),
                io.Combo.Input(
                    "shift",
                    options=list(SHIFTS),
                    default=SHIFTS[0],
                    tooltip="random: drawn anew at every step from the seed, as the authors do. fixed per run: the same "
                    "shifts at every step. off: every frame looks at its own sound.",
                ),
                io.Boolean.Input(
                    "clip",
                    default=True,
                    tooltip="Keep clean estimates within -1 and 1 at every step, as the authors do in DDPM and DDIM.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with these settings.")],
        )

    @classmethod
    def execute(cls, model, shift, clip) -> io.NodeOutput:
        return io.NodeOutput(host.with_settings(model, shift, clip))


class NoPrompt(io.ComfyNode):
    """The conditioning of a model that takes none."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftNoPrompt",
            display_name="No Prompt",
            category=CATEGORY,
            description="Conditioning for KSampler and guiders with a model that reads no prompt.",
            search_aliases=["empty conditioning", "unconditional"],
            inputs=[],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="For positive and for negative.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(no_prompt())


class RandomShiftAVSampler(io.ComfyNode):
    """Draws a clip with sound, sound for a video, or a video for a sound."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=SAMPLER,
            display_name="Random-Shift AV Sampler",
            category=CATEGORY,
            description="Draws video and sound together, sound for a given video, or video for a given sound. What is given "
            "comes back unchanged; a noise mask over time keeps parts of either half.",
            search_aliases=["mm-diffusion sampler", "video to audio", "audio to video", "joint sampler", "foley"],
            inputs=[
                io.Model.Input("model", tooltip="Joint audio-video model."),
                io.Latent.Input("latent", tooltip="From Empty Joint Latent, Encode Joint Latent or Joint Time Mask."),
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default=TASKS[0],
                    tooltip="What is drawn: both, the sound of the latent's video, or the video of its sound.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise and of the shifts.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Evaluations of the model. The authors use 20 with dpm_solver and 1000 with ddpm, "
                    "which needs at least 100.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=DPM,
                    tooltip="dpm_solver: DPM-Solver-fast of order 3. ddim: without noise. ddpm: ancestral, the best with "
                    "many steps, and the one that gradient guidance needs.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=list(GUIDANCE),
                    default=GUIDANCE[0],
                    tooltip="replacement: the given half is put in at every step. gradient: the drawn half is also moved to "
                    f"fit it (method {DDPM}; two to three times slower).",
                ),
                io.Float.Input(
                    "strength",
                    default=16.0,
                    min=0.0,
                    max=100000.0,
                    step=0.5,
                    tooltip="Of gradient guidance, the same for any batch size. The authors' settings are 16 from video to "
                    "sound and 123 from sound to video.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="Video and sound; Decode Joint Latent shows them.")],
        )

    @classmethod
    def validate_inputs(cls, task=None, method=None, guidance=None) -> bool | str:
        return refusal(cls, (check_guidance,), task=task, method=method, guidance=guidance)

    @classmethod
    def execute(cls, model, latent, task, seed, steps, method, guidance, strength) -> io.NodeOutput:
        return io.NodeOutput(run_joint(model, latent, seed, steps, method, task, guidance, strength))


NODES = [JointAVLoader, DemoJointAVLoader, JointAVSettings, NoPrompt, RandomShiftAVSampler]
