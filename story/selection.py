"""Panel selections as a user types them: "all", "1-4", "5, 7-9", "id", "id:Ana", "rest"."""
from .script import Story

MAX_TEXT = 10_000


class SelectionError(ValueError):
    """A selection of panels that names none or a missing one."""


def select_panels(story: Story, text: str) -> tuple[int, ...]:
    """Panel indices (from 0) in the order they are named; numbers in `text` count from 1, a repeated panel counts once.

    `id` is every id panel, `id:Name` those of one character, `rest` all panels that are nobody's id panel. Raises
    SelectionError.
    """
    if len(text) > MAX_TEXT or "\0" in text:
        raise SelectionError(f"panels must be a list such as '1-4, 7' of at most {MAX_TEXT} plain characters.")
    chosen: dict[int, None] = {}
    for part in text.split(","):
        if part.strip():
            chosen.update(dict.fromkeys(_part(story, part.strip())))
    if not chosen:
        count = len(story.panels)
        raise SelectionError(f"panels {text.strip()!r} selects none of the {count} panels; write 'all' or '1-4'.")
    return tuple(chosen)


def _part(story: Story, part: str) -> list[int]:
    word = part.lower()
    ids = sorted({index for indices in story.id_panels.values() for index in indices})
    if word == "all":
        return [panel.index for panel in story.panels]
    if word == "id":
        return ids
    if word == "rest":
        return [panel.index for panel in story.panels if panel.index not in ids]
    if word.startswith("id:"):
        return _of_character(story, part[3:].strip().strip("[]"))
    first, dash, last = part.partition("-")
    numbers = [_number(story, first, part), _number(story, last, part)] if dash else [_number(story, first, part)] * 2
    if numbers[0] > numbers[1]:
        raise SelectionError(f"panels {part!r} runs backwards; write '{numbers[1]}-{numbers[0]}'.")
    return list(range(numbers[0] - 1, numbers[1]))


def _of_character(story: Story, name: str) -> list[int]:
    if name not in story.id_panels:
        known = ", ".join(f"id:{known}" for known in story.id_panels if known) or "id"
        raise SelectionError(f"panels 'id:{name}' names no character of the story; write one of: {known}.")
    return list(story.id_panels[name])


def _number(story: Story, text: str, part: str) -> int:
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise SelectionError(f"panels {part[:50]!r} is not understood; use numbers, 'all', 'id', 'id:Name', 'rest'.")
    if not 1 <= int(text) <= len(story.panels):
        raise SelectionError(f"panel {int(text)} does not exist; the story has panels 1 to {len(story.panels)}.")
    return int(text)
