"""Splices the NODES list of every node file into one extension."""

from comfy_api.latest import ComfyExtension, io

from . import board, boxes, consistent, demo, masked, sampler, story, storyboard, style

NODE_FILES = (demo, story, consistent, style, boxes, masked, board, sampler, storyboard)


class StoryweftExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for file in NODE_FILES for node in file.NODES]
