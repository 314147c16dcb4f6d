"""Masked attention by labels: the invariants of the partition, labels of boxes and masks, words, measures, paths."""

import itertools
import math

import pytest
import torch
from storyweft.attention.core import attend
from storyweft.attention.labels import BoxRegions, MaskRegions, box_masks, causal_groups, paint
from storyweft.attention.masked import ANY, NOBODY, Constraint, masked_attention, partition
from storyweft.metrics.boxes import average_precision, centroid, centroid_distance, volume_iou
from storyweft.story.paths import resample_path

CPU = torch.device("cpu")
NAN = float("nan")


def tensors(rows=3, heads=2, queries=30, keys=30, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, n, dim, generator=generator, dtype=dtype) for n in (queries, keys, keys)]


def labels(rows=3, tokens=30, count=3, seed=1):
    return torch.randint(0, count, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def dense(q, k, v, constraints, bias=None):
    """The formula with a (Q x K) matrix: constraints narrow in order, one that leaves nothing is passed over."""
    out = torch.empty_like(q)
    for row, head, query in itertools.product(*(range(n) for n in q.shape[:3])):
        seen = torch.ones(k.shape[2], dtype=torch.bool)
        for c in constraints:
            label, key = c.query.expand(len(q), -1)[row, query], c.key.expand(len(q), -1)[row]
            if label != ANY and (seen & ((key == label) | (key == ANY))).any():
                seen = seen & ((key == label) | (key == ANY))
        scores = k[row, head] @ q[row, head, query] / math.sqrt(q.shape[3])
        if bias is not None:
            scores = scores + bias.expand(len(q), q.shape[1], q.shape[2], -1)[row, head, query]
        out[row, head, query] = scores[seen].softmax(0) @ v[row, head][seen]
    return out


def parted(q, k, v, constraints, bias=None):
    return masked_attention(q, k, v, partition(constraints, len(q), CPU), attend, bias)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_a_the_partition_equals_the_dense_mask(dtype, tolerance):
    q, k, v = tensors(dtype=dtype, keys=20)
    words = labels(1, 20, 4, 2)
    words[0, 0] = NOBODY
    words[0, 1] = ANY
    one = [Constraint(labels(), words)]
    assert (parted(q, k, v, one) - dense(q, k, v, one)).abs().max() < tolerance
    two = [*one, Constraint(labels(3, 30, 2, 5), labels(3, 20, 2, 6))]
    bias = tensors(3, 1, 30, 20, dtype=dtype)[0].new_zeros(3, 1, 30, 20).normal_(generator=torch.Generator().manual_seed(3))
    for offsets in (None, bias, bias[:, :, :1]):
        assert (parted(q, k, v, two, offsets) - dense(q, k, v, two, offsets)).abs().max() < tolerance


def test_a_rows_whose_parts_have_one_size_but_other_labels_keep_their_own_keys():
    """Rows 0 and 2 see the first half of the keys, row 1 the second: equal sizes, all queries, one part."""
    q, k, v = tensors(keys=8)
    query = torch.tensor([[0], [1], [0]]).expand(3, 30)
    key = torch.tensor([[0] * 4 + [1] * 4])
    assert len(partition([Constraint(query, key)], 3, CPU)) == 1
    assert (parted(q, k, v, [Constraint(query, key)]) - dense(q, k, v, [Constraint(query, key)])).abs().max() < 1e-12


def test_c_permuting_tokens_with_their_labels_permutes_the_output():
    q, k, v = tensors()
    own, order = labels(), torch.randperm(30, generator=torch.Generator().manual_seed(4))
    straight = parted(q, k, v, [Constraint(own, own)])
    mixed = parted(*(x[:, :, order] for x in (q, k, v)), [Constraint(own[:, order], own[:, order])])
    assert (mixed - straight[:, :, order]).abs().max() < 1e-12


def test_d_keys_and_values_of_another_label_never_reach_a_query():
    q, k, v = tensors(dtype=torch.float32)
    own = labels()
    before = parted(q, k, v, [Constraint(own, own)])
    other = (own == 2)[:, None, :, None]
    after = parted(q, k + 5 * other, v - 7 * other, [Constraint(own, own)])
    assert torch.equal(*(x.masked_fill(other, 0) for x in (before, after)))
    assert not torch.equal(before, after)


def test_e_the_names_of_labels_do_not_matter():
    q, k, v = tensors()
    own = labels(count=2)
    assert torch.equal(parted(q, k, v, [Constraint(own, own)]), parted(q, k, v, [Constraint(1 - own, 1 - own)]))


def test_f_one_label_is_unmasked_attention_bit_for_bit():
    q, k, v = tensors(dtype=torch.float32)
    own = torch.ones(1, 30, dtype=torch.long)
    assert torch.equal(parted(q, k, v, [Constraint(own, own)]), attend(q, k, v))


def test_g_a_label_does_not_notice_how_the_others_are_divided():
    q, k, v = tensors()
    own = labels(count=4)
    fine, coarse = (parted(q, k, v, [Constraint(x, x)]) for x in (own, (own == 1).long()))
    of_one = (own == 1)[:, None, :, None]
    assert (fine - coarse).mul(of_one).abs().max() < 1e-12
    assert (fine - coarse).abs().max() > 1e-3


def test_i_a_place_whose_label_never_changes_is_as_without_the_mask():
    """Time layers: rows are places, tokens frames."""
    q, k, v = tensors(rows=4, queries=6, keys=6)
    frames = torch.tensor([[0] * 6, [1] * 6, [0, 0, 1, 1, 0, 0], [2, 2, 2, 1, 1, 1]])
    out, plain = parted(q, k, v, [Constraint(frames, frames)]), attend(q, k, v)
    assert (out[:2] - plain[:2]).abs().max() < 1e-12
    assert (out[2:] - plain[2:]).abs().amax((1, 2, 3)).min() > 1e-3


def test_j_no_matrix_of_queries_by_keys_is_made():
    q, k, v = tensors(rows=2, queries=900, keys=900, dtype=torch.float32)
    own = labels(2, 900, 2)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x))
            return out

    with Watch():
        parted(q, k, v, [Constraint(own, own)])
    assert seen and max(seen) < 900 * 900 / 8


def test_an_empty_set_of_keys_means_unmasked():
    q, k, v = tensors(keys=5)
    words = torch.tensor([[NOBODY, 0, 0, 0, 0]])
    query = labels(count=2)
    out, plain = parted(q, k, v, [Constraint(query, words)]), attend(q, k, v)
    of_one = (query == 1)[:, None, :, None]
    assert (out - plain).mul(of_one).abs().max() < 1e-12
    assert out.isfinite().all() and (out - plain).mul(~of_one).abs().max() > 1e-3


def test_ragged_frames_share_attentions_of_equal_size():
    """16 frames with boxes of one size need a few attentions, not two a frame."""
    boxes = torch.tensor([[(0.05 * f, 0.2, 0.05 * f + 0.25, 0.6) for f in range(0, 16, 1)]], dtype=torch.float64).clamp(0, 1)
    own = BoxRegions(boxes[:, :15]).labels([[f] for f in range(15)], 20, 20)
    assert len(partition([Constraint(own, own)], 15, CPU)) <= 6


def test_coverage_decides_by_half_and_small_boxes_keep_their_centre():
    grid = BoxRegions(torch.tensor([[[0.0, 0.0, 0.5, 0.5]]])).labels([[0]], 3, 4).view(3, 4)
    assert grid.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]  # the middle row is covered by exactly half
    assert BoxRegions(torch.tensor([[[0.6, 0.6, 0.62, 0.61]]])).labels([[0]], 4, 4).nonzero().tolist() == [[0, 10]]
    assert BoxRegions(torch.tensor([[[0.97, 0.97, 1.0, 1.0]]])).labels([[0]], 5, 7)[0, -1] == 1


def test_the_whole_picture_an_absent_object_and_the_topmost_box():
    everything, nothing = [0.0, 0.0, 1.0, 1.0], [NAN] * 4
    regions = BoxRegions(torch.tensor([[everything, everything], [nothing, [0.25, 0.25, 0.75, 0.75]]]))
    first, second = regions.labels([[0], [1]], 4, 4).view(2, 4, 4)
    assert first.unique().tolist() == [1]
    assert second.tolist() == [[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1]]
    assert BoxRegions(torch.tensor([[nothing]])).labels([[0]], 4, 4).max() == 0


def test_labels_agree_between_a_batch_and_one_frame_at_any_grid():
    boxes = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0)).sort(2).values[..., [0, 1, 2, 3]]
    regions = BoxRegions(boxes)
    for height, width in ((1, 1), (3, 5), (16, 9)):
        together = regions.labels([[f] for f in range(5)], height, width)
        assert torch.equal(together, torch.cat([regions.labels([[f]], height, width) for f in range(5)]))


def test_pixel_frames_of_a_latent_frame_by_union_or_average():
    assert causal_groups(9, 3) == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert causal_groups(1, 3) == [[0]] * 3
    assert causal_groups(3, 3) == [[0], [1], [2]]
    for pixels, latents in ((8, 3), (5, 1)):
        with pytest.raises(ValueError, match=f"{pixels} pixel frames"):
            causal_groups(pixels, latents)
    left, right = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
    regions = BoxRegions(torch.tensor([[left, left, left, right]]))
    assert regions.labels([[0, 1, 2, 3]], 1, 2, union=False).tolist() == [[1, 0]]
    assert regions.labels([[0, 1, 2, 3]], 1, 2, union=True).tolist() == [[1, 1]]
    rarely = BoxRegions(torch.tensor([[left, [NAN] * 4, [NAN] * 4, [NAN] * 4]]))
    assert rarely.labels([[0, 1, 2, 3]], 1, 2, union=False).tolist() == [[0, 0]]
    assert rarely.labels([[0, 1, 2, 3]], 1, 2, union=True).tolist() == [[1, 0]]


def test_the_authors_sampling_takes_every_stride_th_place_and_loses_small_boxes():
    masks = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    masks[0, 0, 2, 4] = masks[0, 0, 3, 3] = True
    assert MaskRegions(masks).labels([[0]], 3, 4).view(3, 4).nonzero().tolist() == [[1, 2]]
    thin = torch.tensor([[[0.30, 0.30, 0.37, 0.37]]], dtype=torch.float64)
    assert box_masks(thin, 32, 32).any()
    assert BoxRegions(thin).sampled(32, 32).labels([[0]], 4, 4).max() == 0
    assert BoxRegions(thin).labels([[0]], 4, 4).max() == 1
    assert paint(torch.tensor([[True, True], [False, True]])).tolist() == [1, 2]


def test_measures_of_a_perfect_a_shifted_and_a_missing_object():
    drawn = torch.zeros(2, 10, 10, dtype=torch.bool)
    drawn[:, 2:6, 2:6] = True
    shifted = drawn.roll(2, 2)
    assert volume_iou(drawn, drawn) == pytest.approx(1, abs=1e-5)
    assert volume_iou(drawn, shifted) == pytest.approx(8 / 24, abs=1e-5)
    assert average_precision(drawn, shifted) == 0 and average_precision(drawn, drawn) == 1
    half = drawn.clone()
    half[1] = False
    assert average_precision(drawn, half) == 1  # a frame without a detection does not count
    assert average_precision(drawn, drawn & False) == 0
    assert centroid_distance(drawn, shifted) == pytest.approx(2)
    assert centroid(drawn)[0].tolist() == [3.5, 3.5]


def test_a_path_keeps_its_ends_and_stands_still_when_it_is_done():
    assert resample_path([(0, 0), (10, 0)], 5) == [(0, 0), (2, 0), (5, 0), (8, 0), (10, 0)]
    assert resample_path([(0, 0), (10, 0), (10, 9)], 6) == [(0, 0), (5, 0), (10, 0), (10, 4), (10, 9), (10, 9)]
    assert resample_path([(3, 4)], 3) == [(3, 4)] * 3
    assert resample_path([(n, 0) for n in range(9)], 3) == [(0, 0), (4, 0), (8, 0)]
    for points, frames in (([], 3), ([(1, 1)], 0)):
        with pytest.raises(ValueError, match="cannot be spread"):
            resample_path(points, frames)
