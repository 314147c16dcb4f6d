"""Splices the NODES list of every node file into one extension."""

from comfy_api.latest import ComfyExtension, io

from . import boxes, consistent, demo, masked, sampler, story, storyboard

NODE_FILES = (demo, story, consistent, sampler, storyboard, boxes, masked)


class StoryweftExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for file in NODE_FILES for node in file.NODES]
