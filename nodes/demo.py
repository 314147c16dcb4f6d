"""The demo models as loader nodes."""

from comfy_api.latest import io

from ..host.demo import load_demo, load_demo_video


class DemoLoader(io.ComfyNode):
    """Loads the small picture-book models that come with the pack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftDemoLoader",
            display_name="Demo Loader",
            category="Storyweft/Demo",
            description="The pack's own small models of a picture-book world, 128 x 128 pixels: no download needed. "
            "They know a fox, bear, rabbit, robot, owl, elephant, snail and dinosaur, in the forest, snow, "
            "city, desert or meadow or on the beach, by day, at sunset or at night. For other pictures put "
            "your checkpoint loader here.",
            search_aliases=["demo checkpoint", "picture book", "tiny model", "storyweft demo"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="Diffusion model, SD1.5-shaped; latents 16 x 16."),
                io.Clip.Output(display_name="CLIP", tooltip="Text encoder for prompts."),
                io.Vae.Output(display_name="VAE", tooltip="Picture autoencoder, 8 times smaller."),
                io.ClipVision.Output(display_name="CLIP_VISION", tooltip="Image encoder that shares the text's space."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo())


class DemoVideoLoader(io.ComfyNode):
    """Loads the small picture-book video model that comes with the pack."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StoryweftDemoVideoLoader",
            display_name="Demo Video Models (Storyweft)",
            category="Storyweft/Demo",
            description="The pack's own small text-to-video model of the picture-book world: the latent batch is the clip. Use "
            "Empty Latent Image with 128 x 128 and batch size 8, KSampler, VAE Decode. It knows the words of the "
            "Demo Loader; it has learnt no words for motion and is undertrained: characters jitter.",
            search_aliases=["demo video", "tiny video model", "text to video", "storyweft demo"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="Video U-Net: one row of the latent batch is one frame."),
                io.Clip.Output(display_name="CLIP", tooltip="Text encoder for prompts."),
                io.Vae.Output(display_name="VAE", tooltip="Picture autoencoder, 8 times smaller; frame by frame."),
                io.ClipVision.Output(display_name="CLIP_VISION", tooltip="Image encoder that shares the text's space."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_video())


NODES = [DemoLoader, DemoVideoLoader]
