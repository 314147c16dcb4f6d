"""The example workflows as API graphs; tools/make_workflows.py turns them into what the page opens."""

from . import board, boxes, demo, sound, story, style, subject

WORKFLOWS = {made.__name__: made for part in (story, style, boxes, board, subject, sound, demo) for made in part.WORKFLOWS}
