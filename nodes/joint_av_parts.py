"""Samplers and sigmas of MM-Diffusion's authors for SamplerCustom, and the frame upsampler."""

import comfy.samplers
import folder_paths
from comfy_api.latest import io

from ..host import frame_upsampler
from ..host.joint_av import DTYPES
from ..host.joint_sampling import check_respacing, respaced_sigmas, sample_ddpm, sample_dpm_solver
from ..host.queueing import refusal

CATEGORY = "Storyweft/Audio-Video"


class DDPMSampler(io.ComfyNode):
    """The authors' ancestral sampler, with guidance by what is given."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftDDPMSampler",
            display_name="DDPM Sampler (MM-Diffusion)",
            category=CATEGORY,
            description="Ancestral sampling with the authors' large variance; core's ddpm uses the small one. With a noise "
            "mask, strength moves what is drawn to fit what is given.",
            search_aliases=["fixed large", "ancestral", "gradient guidance"],
            inputs=[
                io.Float.Input(
                    "strength", default=0.0, min=0.0, max=100000.0, step=0.5,
                    tooltip="Gradient guidance by the given part; 0: it is only put in at every step (replacement). "
                    "The authors' settings are 16 from video to sound and 123 from sound to video.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustom, with Respaced Sigmas.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, strength) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_ddpm, {"strength": strength}))


class DPMSolverSampler(io.ComfyNode):
    """The authors' fast solver."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftDPMSolverSampler",
            display_name="DPM-Solver Fast 3 (MM-Diffusion)",
            category=CATEGORY,
            description="DPM-Solver-fast of order 3 on the authors' grid; core's dpm_fast spaces its steps differently.",
            search_aliases=["dpm solver", "dpm fast"],
            inputs=[],
            outputs=[
                io.Sampler.Output(display_name="SAMPLER", tooltip='For SamplerCustom, with Respaced Sigmas set to "dpm20".')
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_dpm_solver))


class RespacedSigmas(io.ComfyNode):
    """The authors' ways to leave steps out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftRespacedSigmas",
            display_name="Respaced Sigmas",
            category=CATEGORY,
            description="Noise levels as the authors pick them: ddim25 is every 40th of 1000, starting from the cleanest.",
            search_aliases=["ddim sigmas", "timestep respacing", "mm-diffusion scheduler"],
            inputs=[
                io.Model.Input("model", tooltip="Model whose noise levels are used."),
                io.String.Input(
                    "respacing", default="ddim25",
                    tooltip='"ddim25": even stride. "1000" or "10,15,20": so many steps, or so many in equal sections. '
                    '"dpm20": knots of DPM-Solver Fast for 20 evaluations.',
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="SIGMAS", tooltip="Falling noise levels.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, respacing=None) -> bool | str:
        return refusal(cls, (cls._checked,), respacing=respacing)

    @classmethod
    def execute(cls, model, respacing) -> io.NodeOutput:
        return io.NodeOutput(cls._named(respaced_sigmas, model, respacing))

    @classmethod
    def _checked(cls, respacing) -> None:
        cls._named(check_respacing, respacing)

    @staticmethod
    def _named(read, *values):
        try:
            return read(*values)
        except ValueError as error:
            raise ValueError(f"StoryweftRespacedSigmas: {error}") from error


class FrameUpsamplerLoader(io.ComfyNode):
    """Loads MM-Diffusion's super-resolution model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=frame_upsampler.LOADER,
            display_name="Load Frame Upsampler",
            category=CATEGORY,
            description="MM-Diffusion's second model: draws frames of 256 x 256 pixels from those of 64 x 64.",
            search_aliases=["super resolution", "mm-diffusion sr", "64 to 256"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="Landscape_SR.pt or AIST++_SR.pt of MM-Diffusion, or the same as .safetensors.",
                ),
                io.Combo.Input(
                    "weight_dtype", options=list(DTYPES), default="default", advanced=True,
                    tooltip="Number type of the weights; norms and time stay in float32. default: what ComfyUI picks.",
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="Frame upsampler, for Upscale Frames.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_name, weight_dtype="default") -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        return io.NodeOutput(frame_upsampler.load_frame_upsampler(path, weight_dtype))


class UpscaleFrames(io.ComfyNode):
    """Small frames as conditioning and latent of the frame upsampler."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=frame_upsampler.CONDITION,
            display_name="Upscale Frames",
            category=CATEGORY,
            description="Prepares frames for a frame upsampler: conditioning, and an empty latent in which all frames of a clip "
            "get the same noise, so that they stay alike. Sample with SamplerCustom at cfg 1, then Frames to Images.",
            search_aliases=["super resolution", "upscale clip"],
            inputs=[
                io.Image.Input("images", tooltip="Frames of a clip, such as Decode Joint Latent gives."),
                io.Int.Input(
                    "factor", default=frame_upsampler.FACTOR, min=1, max=8, advanced=True,
                    tooltip="How much larger frames become; the published models were trained for 4.",
                ),
                io.Boolean.Input(
                    "same_noise", default=True, advanced=True,
                    tooltip="The same noise for every frame, as the authors do. Off: frames flicker.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="For positive and negative."),
                io.Latent.Output(display_name="LATENT", tooltip="Empty large frames."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, images, factor=frame_upsampler.FACTOR, same_noise=True) -> io.NodeOutput:
        return io.NodeOutput(*frame_upsampler.prepare(images, factor, same_noise))


class FramesToImages(io.ComfyNode):
    """Drawn frames as pictures."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=frame_upsampler.IMAGES,
            display_name="Frames to Images",
            category=CATEGORY,
            description="Pixels that a frame upsampler has drawn, as pictures.",
            search_aliases=["pixel latent to image"],
            inputs=[io.Latent.Input("latent", tooltip="Frames [n, 3, H, W] of a frame upsampler.")],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="Pictures, for Create Video.")],
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        return io.NodeOutput(frame_upsampler.images_of(latent))


NODES = [DDPMSampler, DPMSolverSampler, RespacedSigmas, FrameUpsamplerLoader, UpscaleFrames, FramesToImages]
