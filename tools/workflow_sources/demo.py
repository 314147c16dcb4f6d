"""The demo models by themselves."""

from .graph import Graph, sampler


def demo_video() -> tuple[dict, str]:
    graph = Graph()
    loader = graph.add("StoryweftDemoVideoLoader", "Demo Video Loader")
    positive = graph.add("CLIPTextEncode", "Prompt", clip=loader(1), text="a fox in the forest by day")
    negative = graph.add("CLIPTextEncode", "Negative", clip=loader(1), text="")
    latent = graph.add("EmptyLatentImage", "Size: batch = frames", width=128, height=128, batch_size=8)
    drawn = sampler(graph, loader(), positive(), negative(), latent(), 3, 20)
    frames = graph.add("VAEDecode", "Decode", samples=drawn(), vae=loader(2))
    larger = graph.add("ImageScaleBy", "Larger", image=frames(), upscale_method="lanczos", scale_by=3.0)
    graph.add(
        "SaveAnimatedWEBP",
        "Save Clip",
        images=larger(),
        filename_prefix="storyweft/demo_video",
        fps=8.0,
        lossless=False,
        quality=90,
        method="default",
    )
    return graph.nodes, (
        "## Demo video\nEight frames of the picture-book world in one batch: **Demo Video Loader** gives a text-to-video U-Net of "
        "ComfyUI's own kind (SVD's temporal layers), so the latent batch is the clip. The prompt says who, where and when; the "
        "model is undertrained, so the character jitters instead of walking.\n\nFor a video file with sound put *Create "
        "Video* and *Save Video* behind the decoder; for real clips use your own video model here."
    )


WORKFLOWS = (demo_video,)
