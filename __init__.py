"""Storyweft: story, box, motion and sound control for diffusion models in ComfyUI."""
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import StoryweftExtension  # the host's modules exist only once ComfyUI has started

    return StoryweftExtension()
