"""Splices the NODES list of every node file into one extension."""

from comfy_api.latest import ComfyExtension, io

from . import (
    apa,
    board,
    boxes,
    consistent,
    demo,
    masked,
    sampler,
    sound,
    sound_joint,
    sound_prompt,
    story,
    storyboard,
    style,
)

NODE_FILES = (demo, story, consistent, style, boxes, masked, board, apa, sampler, storyboard, sound, sound_prompt, sound_joint)


class StoryweftExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for file in NODE_FILES for node in file.NODES]
