"""The example workflows as API graphs; tools/make_workflows.py turns them into what the page opens."""

from . import board, boxes, demo, motion, story, style, subject

WORKFLOWS = {made.__name__: made for part in (story, style, boxes, board, subject, motion, demo) for made in part.WORKFLOWS}
from . import board, boxes, demo, joint_av, story, style, subject

WORKFLOWS = {made.__name__: made for part in (story, style, boxes, board, subject, joint_av, demo) for made in part.WORKFLOWS}
from . import board, boxes, demo, story, storygen, style, subject

WORKFLOWS = {made.__name__: made for part in (story, style, boxes, board, subject, storygen, demo) for made in part.WORKFLOWS}
from . import board, boxes, demo, sound, story, style, subject

WORKFLOWS = {made.__name__: made for part in (story, style, boxes, board, subject, sound, demo) for made in part.WORKFLOWS}
