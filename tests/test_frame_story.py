"""Boards, tasks and the frame and story branches: the formulas, whatever the model."""

import random
from itertools import product

import pytest
import torch
from storyweft.attention.branches import Branch, attend_branches
from storyweft.attention.core import attend
from storyweft.attention.frame_story import (
    frame_index,
    frame_story_branches,
    joint_constraint,
    masked_noising,
    merge_board,
    split_board,
    target_mask,
)
from storyweft.attention.masked import ANY, Constraint, masked_attention, partition
from storyweft.models.story_board import ContextExtractor, FrameStoryAttention, Join, prior_board
from storyweft.story.board import (
    ORDERS,
    BoardShape,
    captions_of,
    draw_targets,
    frames_of,
    target_sets,
    task_of,
)

HEADS, DIM, WORDS = 2, 8, 5
CELL = (3, 4)


def random_tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Scene:
    """Queries of one board and keys, values of its captions."""

    def __init__(self, rows=2, columns=3, order=ORDERS[0], n=2):
        self.shape = BoardShape(rows, columns, order)
        self.grid = torch.tensor(self.shape.grid)
        self.cells = frame_index(self.grid, *CELL).flatten()
        self.labels = torch.arange(self.shape.frames).repeat_interleave(WORDS)
        self.q = random_tensor(n, HEADS, len(self.cells), DIM, seed=1)
        self.k, self.v = (random_tensor(n, HEADS, len(self.labels), DIM, seed=seed) for seed in (2, 3))

    def out(self, blend, q=None, k=None, v=None, story=None, labels=None):
        q, k, v = (own if given is None else given for own, given in ((self.q, q), (self.k, k), (self.v, v)))
        labels = self.labels if labels is None else labels
        branches = frame_story_branches(slice(0, len(q)), k, v, self.cells[None], labels, blend, story)
        return attend_branches(q, branches, attend)

    def words(self, frame):
        return slice(frame * WORDS, (frame + 1) * WORDS)


@pytest.mark.parametrize(("rows", "columns", "order"), list(product(range(1, 5), range(1, 5), ORDERS)))
def test_split_and_merge_are_inverse_and_follow_the_order(rows, columns, order):
    grid = torch.tensor(BoardShape(rows, columns, order).grid)
    frames = random_tensor(2, rows * columns, 3, 5, *CELL)
    board = merge_board(frames, grid)
    assert board.shape == (2, 3, 5, rows * CELL[0], columns * CELL[1])
    assert torch.equal(split_board(board, grid), frames)
    assert torch.equal(merge_board(split_board(board, grid), grid), board)
    numbered = torch.arange(rows * columns).view(1, -1, 1, 1, 1).expand(1, -1, 1, *CELL)
    assert torch.equal(merge_board(numbered, grid)[0, 0], frame_index(grid, *CELL))
    second = (0, 1) if columns > 1 and (order == ORDERS[0] or rows == 1) else (1, 0)
    if rows * columns > 1:
        assert grid[second] == 1


def test_published_drawings_go_down_the_first_column():
    assert BoardShape(2, 2, "column by column").grid == ((0, 2), (1, 3))
    assert BoardShape(2, 3, "row by row").grid == ((0, 1, 2), (3, 4, 5))


def test_masks_are_counted_by_task():
    assert {task: len(sets) for task, sets in target_sets(4).items()} == {
        "visualisation": 1,
        "continuation": 3,
        "completion": 11,
    }
    for frames in range(1, 7):
        sets = [one for part in target_sets(frames).values() for one in part]
        assert len(sets) == len(set(sets)) == 2**frames - 1
    assert [len(part) for part in target_sets(1).values()] == [1, 0, 0]


def test_a_task_has_a_name():
    assert task_of((True, True, True)) == "visualisation"
    assert task_of((False, False, True)) == "continuation"
    assert task_of((True, False, True)) == "completion"
    assert task_of((False, True, False), pictured=(0, 1, 2)) == "replace"
    assert task_of((False, True, True), pictured=(0,)) == "continuation"
    with pytest.raises(ValueError, match="no frame is to be drawn"):
        task_of((False, False))


@pytest.mark.parametrize("frames", [1, 2, 4, 7])
def test_drawn_targets_are_never_empty_and_cover_every_set(frames):
    rng = random.Random(5)
    drawn = [draw_targets(rng, frames) for _ in range(3000)]
    assert all(any(one) and len(one) == frames for one in drawn)
    if frames == 4:
        assert len(set(drawn)) == 15
        counts = {task: sum(task_of(one) == task for one in drawn) / 3000 for task in target_sets(4)}
        assert all(abs(share - 1 / 3) < 0.05 for share in counts.values())
    assert drawn[:20] == [draw_targets(random.Random(5), frames)] + drawn[1:20]


def test_only_targets_are_noised():
    grid = torch.tensor(BoardShape(2, 2).grid)
    known, noise = random_tensor(2, 4, 6, 8), random_tensor(2, 4, 6, 8, seed=1)
    mask = target_mask(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.float64), frame_index(grid, *CELL))
    out = masked_noising(known, noise, 0.25, mask)
    assert torch.equal(out[mask.expand_as(out) == 0], known[mask.expand_as(out) == 0])
    torch.testing.assert_close(out[0, :, :3, :4], 0.5 * known[0, :, :3, :4] + 0.75**0.5 * noise[0, :, :3, :4])
    assert torch.equal(out[1, :, :3], known[1, :, :3])


@pytest.mark.parametrize("order", ORDERS)
def test_the_frame_branch_is_cross_attention_of_each_cell_and_one_masked_attention(order):
    scene = Scene(order=order)
    out = scene.out(0.0)
    for frame in range(scene.shape.frames):
        on = scene.cells == frame
        alone = attend(scene.q[:, :, on], scene.k[:, :, scene.words(frame)], scene.v[:, :, scene.words(frame)])
        torch.testing.assert_close(out[:, :, on], alone, atol=1e-12, rtol=0)
    bias = torch.zeros(1, 1, len(scene.cells), len(scene.labels), dtype=torch.float64)
    bias[0, 0][scene.cells[:, None] != scene.labels] = -torch.inf
    torch.testing.assert_close(out, attend(scene.q, scene.k, scene.v, bias), atol=1e-12, rtol=0)


def test_blend_0_and_1_are_the_branches_bit_for_bit_and_between_them_it_is_linear():
    scene = Scene()
    frame, story = scene.out(0.0), scene.out(1.0)
    assert torch.equal(story, attend(scene.q, scene.k, scene.v))
    by_cells = Constraint(scene.cells[None], scene.labels[None])
    parts = partition([by_cells], 2, scene.q.device)
    assert torch.equal(frame, masked_attention(scene.q, scene.k, scene.v, parts, attend))
    torch.testing.assert_close(scene.out(0.3), 0.7 * frame + 0.3 * story, atol=1e-12, rtol=0)


def test_a_summary_is_read_by_the_story_branch_alone():
    scene = Scene()
    told = random_tensor(2, HEADS, 3, DIM, seed=9)
    k, v = torch.cat([scene.k, told], 2), torch.cat([scene.v, told * 2], 2)
    labels = torch.cat([scene.labels, torch.full((3,), scene.shape.frames)])
    assert torch.equal(scene.out(0.0, k=k, v=v, labels=labels, story=6), scene.out(0.0))
    story = scene.out(1.0, k=k, v=v, labels=labels, story=6)
    torch.testing.assert_close(story, attend(scene.q, told, told * 2), atol=1e-12, rtol=0)


def test_equal_captions_without_story_are_ordinary_cross_attention():
    scene = Scene()
    k, v = (x[:, :, :WORDS].repeat(1, 1, scene.shape.frames, 1) for x in (scene.k, scene.v))
    plain = attend(scene.q, k[:, :, :WORDS], v[:, :, :WORDS])
    torch.testing.assert_close(scene.out(0.0, k=k, v=v), plain, atol=1e-12, rtol=0)


def test_changing_one_caption_changes_its_own_cell_only():
    scene = Scene()
    k = scene.k.clone()
    k[:, :, scene.words(4)] += 1
    changed = (scene.out(0.0, k=k) != scene.out(0.0)).any(1).any(-1)
    assert torch.equal(changed, (scene.cells == 4).expand(2, -1))


def test_swapping_two_frames_swaps_their_cells_and_nothing_else():
    scene = Scene()
    order = [0, 4, 2, 3, 1, 5]
    k, v = (torch.cat([x[:, :, scene.words(f)] for f in order], 2) for x in (scene.k, scene.v))
    size = (2 * CELL[0], 3 * CELL[1])
    frames = split_board(scene.q.transpose(2, 3).unflatten(-1, size), scene.grid)
    q = merge_board(frames[:, order], scene.grid).flatten(-2).transpose(2, 3)

    def cells(out):
        return split_board(out.transpose(2, 3).unflatten(-1, size), scene.grid)

    swapped = cells(scene.out(0.0, q=q, k=k, v=v))
    torch.testing.assert_close(swapped, cells(scene.out(0.0))[:, order], atol=1e-12, rtol=0)
    told = cells(scene.out(1.0, q=q, k=k, v=v))
    torch.testing.assert_close(told, cells(scene.out(1.0))[:, order], atol=1e-12, rtol=0)


def test_branches_over_some_rows_add_up_and_rows_without_any_are_zero():
    """Rows 0 and 1 get a board, 1 and 2 a second branch, 3 nothing; with and without a graph behind the queries."""
    scene = Scene(n=4)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            q = scene.q.clone().requires_grad_(grad)
            board = frame_story_branches(slice(0, 2), scene.k[:2], scene.v[:2], scene.cells[None], scene.labels, 0.25)
            extra = Branch(slice(1, 3), scene.k[1:3], scene.v[1:3], 0.5)
            out = attend_branches(q, [*board, extra], attend)
        expected = torch.zeros_like(out)
        expected[:2] = scene.out(0.25)[:2]
        expected[1:3] += 0.5 * attend(scene.q[1:3], scene.k[1:3], scene.v[1:3])
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        if grad:
            out.sum().backward()
            assert q.grad[:3].any() and not q.grad[3].any()


def test_the_split_form_scores_as_much_as_one_caption():
    scene, scored = Scene(), []

    def counting(q, k, v, bias=None):
        scored.append(q.shape[0] * q.shape[2] * k.shape[2])
        return attend(q, k, v, bias)

    branches = frame_story_branches(slice(0, 2), scene.k, scene.v, scene.cells[None], scene.labels, 0.0)
    attend_branches(scene.q, branches, counting)
    assert sum(scored) == 2 * len(scene.cells) * WORDS


def test_words_of_another_rule_narrow_a_frames_own_caption():
    """What masked attention adds: labels of words within captions, here 'first word only' in one place."""
    scene = Scene()
    (branch,) = frame_story_branches(slice(0, 2), scene.k, scene.v, scene.cells[None], scene.labels, 0.0)
    place = int((scene.cells == 3).nonzero()[0])
    query, words = torch.full((1, len(scene.cells)), ANY), torch.full((1, len(scene.labels)), 1)
    query[0, place], words[0, ::WORDS] = 0, 0
    branch.constraints.append(Constraint(query, words))
    out = attend_branches(scene.q, [branch], attend)
    first = scene.words(3).start
    torch.testing.assert_close(out[:, :, place], scene.v[:, :, first], atol=1e-12, rtol=0)
    rest = torch.arange(len(scene.cells)) != place
    torch.testing.assert_close(out[:, :, rest], scene.out(0.0)[:, :, rest], atol=1e-12, rtol=0)


def test_a_joint_sequence_keeps_captions_with_their_cells_and_leaves_the_rest_open():
    text, image, reference = 12, 24, 2
    cells = torch.stack([torch.arange(4).repeat_interleave(6), torch.full((24,), ANY)])
    captions = torch.stack([torch.arange(4).repeat_interleave(3), torch.full((12,), ANY)])
    found = joint_constraint(cells, captions, slice(12, 36), slice(0, 12), text + image + reference)
    seen = (
        (found.query[:, :, None] == ANY) | (found.key[:, None] == ANY) | (found.query[:, :, None] == found.key[:, None])
    )
    assert seen[1].all()
    assert seen[0, :12].all() and seen[0, 36:].all() and seen[0, :, 12:].all()
    assert torch.equal(seen[0, 12:36, :12], cells[0][:, None] == captions[0])


def test_the_context_extractor_starts_without_a_prior_and_sees_the_targets():
    torch.manual_seed(0)
    net = ContextExtractor(16, 2, 1, 1, 2, 3, 6, 8, (2, 3))
    words = random_tensor(2, 6, 4, 16, dtype=torch.float32)
    drawn, kept = torch.ones(2, 6), torch.tensor([[1.0] * 6, [0.0] * 6])
    one, other = net(words, drawn), net(words, kept)
    assert one.tokens.shape == (2, 6, 2, 16) and one.story.shape == (2, 3, 16) and not one.prior.any()
    assert torch.equal(one.story[0], other.story[0]) and not torch.allclose(one.story[1], other.story[1])
    grid = torch.tensor(BoardShape(2, 3).grid)
    assert prior_board(random_tensor(2, 6, 4, 2, 3), grid, (4, 6)).shape == (2, 4, 8, 18)


def test_untrained_lora_leaves_the_frozen_layer_and_joins_refuse_what_they_do_not_know():
    torch.manual_seed(0)
    layer = FrameStoryAttention(16, 8, 2, 4)
    x, captions, story = torch.randn(1, 24, 16), torch.randn(1, 2, 3, 8), torch.randn(1, 5, 8)
    cells = frame_index(torch.tensor([[0, 1]]), 4, 3).flatten()
    frame, told = layer(x, captions, story, cells)
    with torch.no_grad():
        for name in ("to_q", "to_out"):
            layer.lora_frame[name].up.fill_(0.5)
    moved, same = layer(x, captions, story, cells)
    assert torch.equal(told, same) and not torch.allclose(frame, moved)
    with pytest.raises(ValueError, match="cannot be joined by 'sum'"):
        Join(16)(frame, told, "sum")


@pytest.mark.parametrize(
    ("text", "frames"), [("", ()), ("1", (0,)), (" 3, 1-2 ", (2, 0, 1)), ("2,2\n4", (1, 3)), ("1-4", (0, 1, 2, 3))]
)
def test_frame_numbers_are_read(text, frames):
    assert frames_of(text, 4) == frames


@pytest.mark.parametrize("text", ["0", "5", "3-2", "a", "1;2", "-1", "1-", "²"])
def test_frame_numbers_that_are_none_are_quoted(text):
    with pytest.raises(ValueError, match=f"'{text}'.* 1 to 4"):
        frames_of(text, 4)


def test_captions_are_one_a_line_for_one_board_or_for_all():
    assert captions_of("a\r\nb\n\n", 2) == ("a", "b")
    assert captions_of("a\nb\nc\nd", 2, boards=2) == ("a", "b", "c", "d")
    assert captions_of("a\nb", 2, boards=2) == ("a", "b")
    assert captions_of("a\n\nb", 4, leave_empty=True) == ("a", "", "b", "")
    with pytest.raises(ValueError, match="holds 3 captions for 4 frames; write one a line, 4"):
        captions_of("a\nb\nc", 4)
    with pytest.raises(ValueError, match="holds 3 captions for 2 boards of 2 frames; write one a line, 2 or 4"):
        captions_of("a\nb\nc", 2, boards=2)
    with pytest.raises(ValueError, match="line 2 is blank"):
        captions_of("a\n\nb", 3)
    with pytest.raises(ValueError, match="holds 5 captions for 4 frames"):
        captions_of("a\nb\nc\nd\ne", 4, leave_empty=True)
