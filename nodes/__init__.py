"""Splices the NODES list of every node file into one extension."""

from comfy_api.latest import ComfyExtension, io

from . import (
    apa,
    board,
    boxes,
    consistent,
    demo,
    joint_av,
    joint_av_media,
    joint_av_parts,
    magdiff,
    masked,
    motion,
    sampler,
    sound,
    sound_joint,
    sound_prompt,
    story,
    story_gen,
    story_gen_story,
    storyboard,
    style,
    trained_board,
)

NODE_FILES = (
    demo,
    story,
    consistent,
    style,
    boxes,
    masked,
    board,
    trained_board,
    apa,
    magdiff,
    story_gen,
    story_gen_story,
    motion,
    sound,
    sound_prompt,
    sound_joint,
    joint_av,
    joint_av_media,
    joint_av_parts,
    sampler,
    storyboard,
)


class StoryweftExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for file in NODE_FILES for node in file.NODES]
