# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from lidc_phantom import outline
from scipy.ndimage import binary_dilation

from custom.data.dicom import Series, find_studies
from custom.data.dicom_header import Instance
from custom.data.dicom_series import CTVolume, read_series
from custom.data.lidc import LidcAnnotation, LidcContour, read_annotations
from custom.data.lidc_consensus import cluster_annotations, draw_nodules, find_nodules

SIZE = (40, 50)  # columns, rows
HEIGHTS = (10.0, 12.0, 14.0, 16.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def make_volume(heights=HEIGHTS, orientation=AXIAL, thickness=2.0):
    instances = tuple(
        Instance(
            file="",
            uid=f"1.{k}",
            number=k,
            image_type=(),
            frame_of_reference_uid="",
            shape=(SIZE[1], SIZE[0]),
            frames=1,
            samples=1,
            position=(0.0, 0.0, z),
            orientation=orientation,
            pixel_spacing=(0.5, 0.5),
            thickness=thickness,
            slope=1.0,
            intercept=0.0,
            rescale_type="",
        )
        for k, z in enumerate(heights)
    )
    step = heights[1] - heights[0]
    affine = np.diag([-0.5, -0.5, step, 1.0])
    return CTVolume(np.zeros((*SIZE, len(heights)), np.int16), affine, Series("1", "2", 1, "CT", instances))


def square(low, high, z=12.0, inclusion=True, sop_uid=""):
    """Outline through the corners (low, low) and (high, high), given by these corners alone."""
    points = np.array([(low, low), (high, low), (high, high), (low, high), (low, low)])
    return LidcContour(z, sop_uid, inclusion, points)


def annotation(reader, *contours):
    return LidcAnnotation(reader, f"{reader}", contours)


def test_the_mask_is_what_lies_strictly_inside_of_the_outline():
    (nodule,) = find_nodules([annotation(0, square(10, 14))], make_volume())
    mask = draw_nodules([nodule], (*SIZE, 4))
    assert mask.dtype == np.uint8 and mask.sum() == 9 and nodule.voxels == 9
    assert mask[11:14, 11:14, 1].all()
    assert (nodule.readers, nodule.slices) == ((0,), (1,))


def test_columns_come_before_rows():
    points = np.array([(3, 20), (9, 20), (9, 23), (3, 23)])  # x from 3 to 9, y from 20 to 23
    (nodule,) = find_nodules([annotation(0, LidcContour(16.0, "", True, points))], make_volume())
    assert np.argwhere(draw_nodules([nodule], (*SIZE, 4))).min(axis=0).tolist() == [4, 21, 3]
    assert nodule.voxels == 5 * 2


def test_exclusions_are_subtracted_whatever_the_order_and_outlines_of_one_slice_united():
    hole = square(11, 14, inclusion=False)  # takes 2 x 2 pixels out of 7 x 7
    for contours in ((hole, square(9, 17), square(20, 23)), (square(20, 23), square(9, 17), hole)):
        (nodule,) = find_nodules([annotation(0, *contours)], make_volume())
        assert nodule.voxels == 49 - 4 + 4


@pytest.mark.parametrize(
    ("readers", "wide", "half", "two_of_four"),
    [
        (1, 1, "wide", "nothing"),  # 1 of 1
        (2, 1, "wide", "narrow"),  # 1 of 2
        (3, 1, "narrow", "narrow"),  # 1 of 3
        (3, 2, "wide", "wide"),  # 2 of 3
        (4, 1, "narrow", "narrow"),  # 1 of 4
        (4, 2, "wide", "wide"),  # 2 of 4
    ],
)
def test_half_of_the_annotations_or_two_of_four_readers(readers, wide, half, two_of_four):
    voxels = {"wide": 25, "narrow": 9, "nothing": 0}
    drawn = [annotation(r, square(9, 15) if r < wide else square(10, 14)) for r in range(readers)]
    (nodule,) = find_nodules(drawn, make_volume())
    assert nodule.voxels == voxels[half]
    (nodule,) = find_nodules(drawn, make_volume(), four_readers=True)
    assert nodule.voxels == voxels[two_of_four]


def test_one_reader_who_outlines_a_nodule_in_two_parts_is_one_of_the_readers():
    parts = [annotation(0, square(10, 13)), annotation(0, square(14, 17))]
    (nodule,) = find_nodules(parts, make_volume(), four_readers=True)
    assert nodule.voxels == 0 and nodule.readers == (0,)
    (nodule,) = find_nodules([*parts, annotation(1, square(10, 17))], make_volume(), four_readers=True)
    assert nodule.voxels == 4 + 4


def test_clusters_are_chains_within_the_tolerance_from_bottom_to_top():
    # At 0.5 mm pixels the corners of the low ones are 1.41 mm apart, the next is 4.24 mm off in the plane.
    low = [annotation(r, square(x, x + 3, 12.0)) for r, x in enumerate((2, 7, 12))]
    apart = annotation(3, square(21, 24, 12.0))
    high = annotation(0, square(2, 5, 16.0))
    drawn = [high, apart, *low]
    assert cluster_annotations(drawn, (0.5, 0.5), 1.5) == [(apart,), tuple(low), (high,)]
    assert [len(c) for c in cluster_annotations(drawn, (0.5, 0.5), 1.4)] == [1, 1, 1, 1, 1]
    assert [len(c) for c in cluster_annotations(drawn, (0.5, 0.5), 4.1)] == [1, 4]
    # All five in one are too many, and at 0.9 * 4.3 mm two of them are on their own.
    assert cluster_annotations(drawn, (0.5, 0.5), 4.3) == [(apart,), tuple(low), (high,)]
    assert cluster_annotations([], (0.5, 0.5), 2.0) == []


def test_the_tolerance_shrinks_until_no_cluster_has_more_than_four():
    # Two nodules, 3 px = 1.5 mm apart, each outlined by three readers.
    points = {n: np.array([(x, 5), (x + 6, 5), (x + 6, 9), (x, 9)]) for n, x in (("left", 4), ("right", 13))}
    drawn = [annotation(r, LidcContour(12.0, "", True, points[n])) for r in range(3) for n in points]
    clusters = cluster_annotations(drawn, (0.5, 0.5), 2.5)
    assert sorted(len(cluster) for cluster in clusters) == [3, 3]
    assert all(len({c.contours[0].points[0, 0] for c in cluster}) == 1 for cluster in clusters)


def test_where_neighbours_touch_each_reader_has_one_vote():
    # Each of three readers outlines two nodules that share a border: six annotations that cannot be parted.
    points = {n: np.array([(x, 5), (x + 4, 5), (x + 4, 9), (x, 9)]) for n, x in (("left", 4), ("right", 8))}
    drawn = [annotation(r, LidcContour(12.0, "", True, points[n])) for r in range(3) for n in points]
    (nodule,) = find_nodules(drawn, make_volume())
    assert len(nodule.annotations) == 6
    assert nodule.voxels == 2 * 9  # by annotations each voxel would have 3 of 6 as well ...
    (nodule,) = find_nodules(drawn[:-1], make_volume())
    assert nodule.voxels == 2 * 9  # ... and here the right ones 2 of 5, though 2 of 3 readers have them


def test_default_tolerance_is_the_slice_thickness():
    drawn = [annotation(0, square(4, 8)), annotation(1, square(11, 15))]  # sqrt(2) * 1.5 = 2.1 mm apart
    assert len(find_nodules(drawn, make_volume(thickness=2.0))) == 2
    assert len(find_nodules(drawn, make_volume(thickness=2.2))) == 1
    assert len(find_nodules(drawn, make_volume(thickness=None))) == 2  # then the slice distance, 2 mm
    assert len(find_nodules(drawn, make_volume(thickness=2.0), tolerance=2.2)) == 1


@pytest.mark.parametrize(
    ("contour", "message"),
    [
        (square(36, 40), r"has the point \(40, 36\) outside the image of 40 x 50"),
        (square(-1, 6), r"has the point \(-1, -1\) outside"),
        (square(4, 8, 18.0), "lies at z 18 mm, where there is no slice; the slices reach from 10 to 16 mm"),
        (square(4, 8, 13.0), "lies at z 13 mm, where there is no slice"),
        (square(4, 8, 12.0, sop_uid="1.2"), "names the image of another slice, at 14 mm"),
    ],
)
def test_outlines_that_do_not_fit_the_volume_are_refused(contour, message):
    with pytest.raises(ValueError, match=message):
        find_nodules([annotation(0, contour)], make_volume())


def test_heights_may_be_rounded_and_image_uids_foreign():
    drawn = [annotation(0, square(4, 8, 12.4, sop_uid="9.9"), square(4, 8, 14.0, sop_uid="1.2"))]
    (nodule,) = find_nodules(drawn, make_volume())
    assert nodule.slices == (1, 2)


def test_only_axial_series_have_outlines():
    with pytest.raises(ValueError, match="the series is coronal"):
        find_nodules([], make_volume(orientation=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0)))


def test_a_region_comes_back_from_its_outline():
    columns, rows = np.mgrid[: SIZE[0], : SIZE[1]]
    rng = np.random.default_rng(0)
    for _ in range(10):
        x, y, a, b = rng.uniform((14, 14, 2, 2), (26, 30, 10, 10))
        region = ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 < 1
        points = np.array(outline(region))
        (nodule,) = find_nodules([annotation(0, LidcContour(12.0, "", True, points))], make_volume())
        assert np.array_equal(draw_nodules([nodule], (*SIZE, 4))[:, :, 1], region)


def strictly_inside(points, x, y):
    """Ray casting and an exact test for the edges."""
    inside, on_edge = np.zeros(x.shape, bool), np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        cross = (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)
        between = ((x - x0) * (x - x1) <= 0) & ((y - y0) * (y - y1) <= 0)
        on_edge |= (cross == 0) & between
        inside ^= ((y0 > y) != (y1 > y)) & ((cross > 0) == (y1 > y0))
    return inside & ~on_edge


def test_filling_agrees_with_ray_casting():
    rng = np.random.default_rng(1)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
        radii = rng.uniform(4, 15, 12)
        points = np.column_stack([19 + radii * np.cos(angles), 24 + radii * np.sin(angles)])
        points = np.rint(points).astype(int)
        expected = strictly_inside(points, *np.mgrid[: SIZE[0], : SIZE[1]])
        (nodule,) = find_nodules([annotation(0, LidcContour(12.0, "", True, points))], make_volume())
        assert expected.any()
        assert np.array_equal(draw_nodules([nodule], (*SIZE, 4))[:, :, 1], expected)


@pytest.mark.parametrize(
    ("case", "voxels", "readers"),
    [
        ("LIDC-IDRI-0001", [5428], [4]),
        ("LIDC-IDRI-0003", [2542, 3241, 261, 704], [1, 4, 4, 4]),
    ],
)
def test_real_scans_agree_with_pylidc_voxel_by_voxel(ct_data, case, voxels, readers):
    folder = ct_data / "lidc" / case
    (study,) = find_studies(folder)
    volume = read_series(study.series[0])
    readings = read_annotations(next(folder.glob("*.xml")))
    nodules = find_nodules(readings.annotations, volume)
    assert [nodule.voxels for nodule in nodules] == voxels
    assert [len(nodule.readers) for nodule in nodules] == readers
    for nodule in nodules:  # they lie on what is denser than the lung around it
        slices = slice(nodule.slices[0], nodule.slices[-1] + 1)
        mask = draw_nodules([nodule], volume.hu.shape).astype(bool)[:, :, slices]
        around = binary_dilation(mask, np.ones((7, 7, 1))) & ~binary_dilation(mask, np.ones((3, 3, 1)))
        hu = volume.hu[:, :, slices]
        assert np.median(hu[mask]) > np.median(hu[around]) + 150
    seen = [nodule.voxels for nodule in find_nodules(readings.annotations, volume, four_readers=True)]
    assert seen == [v if r > 1 else 0 for v, r in zip(voxels, readers, strict=True)]
