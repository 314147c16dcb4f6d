"""The example workflows as API graphs; tools/make_workflows.py turns them into what the page opens."""

from . import board, boxes, demo, joint_av, motion, sound, story, storygen, style, subject

PARTS = (story, style, boxes, board, subject, storygen, motion, sound, joint_av, demo)
WORKFLOWS = {made.__name__: made for part in PARTS for made in part.WORKFLOWS}
