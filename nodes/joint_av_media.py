"""Pictures, sound and clips of joint audio-video models."""

from fractions import Fraction

from comfy_api.latest import InputImpl, Types, io

from ..host.joint_media import BOTH, DECODE, EMPTY, ENCODE, KEEP, MASK, VIDEO, decode, empty, encode, time_mask

CATEGORY = "Storyweft/Audio-Video"


class EmptyJointLatent(io.ComfyNode):
    """A pair of empty latents in the sizes of a model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=EMPTY,
            display_name="Empty Joint Latent",
            category=CATEGORY,
            description="Video and sound to be drawn, in the sizes that the model was trained on.",
            search_aliases=["empty audio video latent", "mm-diffusion latent"],
            inputs=[
                io.Model.Input("model", tooltip="Joint audio-video model, for its sizes."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Clips drawn at once."),
                io.Int.Input(
                    "frames", default=0, min=0, max=256, advanced=True,
                    tooltip="Pictures of a clip; 0: as the model was trained. Other numbers are possible but untrained.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=1024, step=8, advanced=True,
                    tooltip="Width in pixels; 0: as the model was trained.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=1024, step=8, advanced=True,
                    tooltip="Height in pixels; 0: as the model was trained.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="Pair of empty video and sound.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, batch_size, frames=0, width=0, height=0) -> io.NodeOutput:
        return io.NodeOutput(empty(model, batch_size, frames, width, height))


class EncodeJointLatent(io.ComfyNode):
    """A video, pictures or a sound as a joint latent."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=ENCODE,
            display_name="Encode Joint Latent",
            category=CATEGORY,
            description="Cuts one clip out of a video, or of pictures and a sound, in the sizes and rates of the model: "
            "pictures fitted between black bars, left channel of the sound.",
            search_aliases=["video to latent", "audio to latent", "mm-diffusion encode"],
            inputs=[
                io.Model.Input("model", tooltip="Joint audio-video model, for its sizes."),
                io.Combo.Input(
                    "keep", options=list(KEEP), default=BOTH,
                    tooltip="What is encoded; the other half stays empty, to be drawn.",
                ),
                io.Video.Input("video", optional=True, tooltip="Clip with or without sound, from Load Video."),
                io.Image.Input("images", optional=True, tooltip="Pictures in place of a video."),
                io.Audio.Input("audio", optional=True, tooltip="Sound in place of the video's own."),
                io.Float.Input(
                    "fps", default=10.0, min=0.0, max=1000.0, step=0.01, optional=True,
                    tooltip="Pictures a second of images; a video brings its own.",
                ),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=100000.0, step=0.01, optional=True,
                    tooltip="Seconds into video and sound at which the clip starts.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, optional=True, tooltip="How often the clip is given, for so many answers."
                ),
                io.Boolean.Input(
                    "antialias", default=False, optional=True, advanced=True,
                    tooltip="Shrink pictures with antialiasing. Off: as the published models were trained.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="Pair of video and sound.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, keep, video=None, images=None, audio=None, fps=10.0, start=0.0, batch_size=1, antialias=False
    ) -> io.NodeOutput:
        if video is not None:
            if images is not None:
                raise ValueError(f"{ENCODE}: video and images are both connected: connect one of them")
            parts = video.get_components()
            images, fps = parts.images, float(parts.frame_rate)
            audio = parts.audio if audio is None else audio
        return io.NodeOutput(encode(model, images, fps, audio, start, keep, antialias, batch_size))


class DecodeJointLatent(io.ComfyNode):
    """A joint latent as pictures, sound and clips."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=DECODE,
            display_name="Decode Joint Latent",
            category=CATEGORY,
            description="Pictures, sound, and one video with sound for every clip of the batch.",
            search_aliases=["latent to video", "latent to audio", "mm-diffusion decode"],
            inputs=[
                io.Latent.Input("latent", tooltip="Pair of video and sound."),
                io.Float.Input(
                    "fps", default=0.0, min=0.0, max=1000.0, step=0.01, advanced=True,
                    tooltip="Pictures a second; 0: what the latent says.",
                ),
                io.Int.Input(
                    "sample_rate", default=0, min=0, max=192000, advanced=True,
                    tooltip="Samples of sound a second; 0: what the latent says, raised where video files cannot hold it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="Frames of all clips, one clip after the other."),
                io.Audio.Output(display_name="AUDIO", tooltip="Mono sound of all clips, one row a clip."),
                io.Video.Output(display_name="VIDEO", is_output_list=True, tooltip="Every clip with its sound."),
                io.Float.Output(display_name="fps", tooltip="Pictures a second."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, fps=0.0, sample_rate=0) -> io.NodeOutput:
        images, audio, fps = decode(latent, fps, sample_rate)
        clips = images.chunk(len(audio["waveform"]))
        videos = [
            InputImpl.VideoFromComponents(
                Types.VideoComponents(
                    images=clip,
                    audio={**audio, "waveform": audio["waveform"][number : number + 1]},
                    frame_rate=Fraction(fps).limit_denominator(1000),
                )
            )
            for number, clip in enumerate(clips)
        ]
        return io.NodeOutput(images, audio, videos, fps)


class JointTimeMask(io.ComfyNode):
    """Which seconds of which half are drawn anew."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=MASK,
            display_name="Joint Time Mask",
            category=CATEGORY,
            description="Marks seconds of the video, the sound or both that are drawn anew; everything else is kept. Several "
            "of these nodes mark several spans.",
            search_aliases=["inpaint audio", "outpaint video in time", "mm-diffusion mask"],
            inputs=[
                io.Latent.Input("latent", tooltip="Pair of video and sound, from Encode Joint Latent."),
                io.Combo.Input("half", options=list(KEEP), default=VIDEO, tooltip="What is drawn anew in this span."),
                io.Float.Input("start", default=0.8, min=0.0, max=1000.0, step=0.01, tooltip="Start of the span in seconds."),
                io.Float.Input(
                    "end", default=0.0, min=0.0, max=1000.0, step=0.01, tooltip="End of the span in seconds; 0: end of the clip."
                ),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="The latent with its mask.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, half, start, end) -> io.NodeOutput:
        return io.NodeOutput(time_mask(latent, half, start, end))


NODES = [EmptyJointLatent, EncodeJointLatent, DecodeJointLatent, JointTimeMask]
