"""Frames of a film whose keyframes are story pictures: neighbouring transitions share a keyframe, which is written once."""


def total_frames(keyframes: int, length: int) -> int:
    """Frames of a film of `keyframes` pictures with `length` frames from one to the next, both ends counted."""
    return (keyframes - 1) * (length - 1) + 1


def keyframe_positions(keyframes: int, length: int) -> list[int]:
    return [index * (length - 1) for index in range(keyframes)]


def places(keyframes: int, length: int) -> list[tuple[int, float]]:
    """(transition, relative time in it from 0 to 1) of every frame; a shared keyframe opens the later transition."""
    found = []
    for frame in range(total_frames(keyframes, length)):
        segment = min(frame // (length - 1), keyframes - 2)
        found.append((segment, (frame - segment * (length - 1)) / (length - 1)))
    return found


def latent_frames(total: int, stride: int = 4) -> list[range]:
    """Pictures that each latent frame of a causal video VAE holds: the first one alone, then `stride` each.

    Pictures beyond the last full group belong to none.
    """
    return [range(1), *(range(start, start + stride) for start in range(1, total - stride + 1, stride))]


def held(total: int, stride: int = 4) -> bool:
    """Whether a causal video VAE can hold exactly so many pictures."""
    return total % stride == 1


def nearest_lengths(keyframes: int, length: int, stride: int = 4) -> list[int]:
    """The nearest lengths of a transition, shorter and longer, whose film such a VAE can hold."""
    fitting = [n for n in range(2, length + stride + 1) if held(total_frames(keyframes, n), stride)]
    return [*[n for n in fitting if n < length][-1:], *[n for n in fitting if n > length][:1]]
