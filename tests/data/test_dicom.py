# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.uid import EnhancedCTImageStorage

from custom.data.dicom import find_studies, group_studies
from custom.data.dicom_series import choose_series, read_series
from custom.data.dicom_writer import write_dicom_series
from tests import dicom_faults as faults

AFFINE = np.array([[-0.7, 0, 0, 90], [0, -0.9, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1]])
real_data = pytest.mark.skipif(
    "CT_DATA" not in os.environ, reason="CT_DATA does not name a folder of real scans"
)


def write(folder, slices=6, **options):
    hu = np.random.default_rng(0).integers(-1000, 1000, (5, 4, slices)).astype(np.int16)
    return write_dicom_series(
        folder, hu, AFFINE, **{"patient_name": "Doe^Jane", "patient_id": "ID4711"} | options
    )


def read(folder):
    (study,) = find_studies(folder)
    return read_series(choose_series(study)[0])


def refusal(folder, series=0):
    """The one line that reading a series of the only study in a folder is refused with."""
    (study,) = find_studies(folder)
    with pytest.raises(ValueError) as caught:
        read_series(study.series[series])
    text = str(caught.value)
    assert "\n" not in text
    assert "Doe" not in text and "ID4711" not in text and str(folder) not in text
    assert study.series[series].uid in text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    return text


class TestFinding:
    def test_studies_and_series_by_uid_not_by_folder_or_name(self, tmp_path):
        first = write(tmp_path / "one", slices=3)
        write(tmp_path / "one" / "deep" / "er", slices=4, series_number=2)
        write(tmp_path / "two", slices=2, study_date="20200401")
        os.rename(first[0], tmp_path / "two" / "9")  # another folder, no suffix
        studies = find_studies(tmp_path)
        assert [study.date for study in studies] == ["20200301", "20200401"]
        assert [[len(s.instances) for s in study.series] for study in studies] == [[3, 4], [2]]
        assert str(tmp_path / "two" / "9") in studies[0].series[0].files
        assert len(studies[0].files) == 7

    def test_leaves_aside_what_is_not_dicom(self, tmp_path):
        files = write(tmp_path, slices=2)
        (tmp_path / "notes.txt").write_text("SeriesInstanceUID")
        (tmp_path / "072.xml").write_text("<LidcReadMessage/>")
        (tmp_path / "empty.xml").touch()
        (tmp_path / ".hidden.dcm").touch()
        (tmp_path / ".folder").mkdir()
        faults.copy_slice(files[0], tmp_path / ".folder" / "copy.dcm")
        (study,) = find_studies(tmp_path)
        (series,) = study.series
        assert sorted(series.all_files) == sorted(map(str, files))

    def test_follows_links_to_folders_and_ends_in_circles(self, tmp_path):
        files = write(tmp_path / "archive", slices=2)
        (tmp_path / "archive" / "again").symlink_to(tmp_path / "archive")
        chosen = tmp_path / "chosen"
        chosen.mkdir()
        for name in ("patient", "the_same"):
            (chosen / name).symlink_to(tmp_path / "archive")
        (study,) = find_studies(chosen)
        assert sorted(study.files) == [str(chosen / "patient" / file.name) for file in sorted(files)]

    def test_text_beside_files_without_suffix(self, tmp_path):
        files = [Path(file).rename(file.with_suffix("")) for file in write(tmp_path, slices=2)]
        (tmp_path / "README").write_text("Scans of the phantom")
        (study,) = find_studies(tmp_path)
        assert sorted(study.files) == sorted(map(str, files))

    def test_no_dicom_and_no_folder(self, tmp_path):
        assert find_studies(tmp_path) == []
        with pytest.raises(FileNotFoundError, match="nowhere"):
            find_studies(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="lost.dcm"):
            group_studies([str(tmp_path / "lost.dcm")])

    def test_name_is_stable_and_tells_nothing(self, tmp_path):
        write(tmp_path / "a")
        write(tmp_path / "b", study_date="20200401")
        names = [study.name for study in find_studies(tmp_path)]
        assert names == [study.name for study in find_studies(tmp_path)]
        assert len(set(names)) == 2
        for name in names:
            assert name.replace("-", "").isalnum() and len(name) < 40
            assert "Doe" not in name and "4711" not in name

    def test_malformed_values_are_missing_values(self, tmp_path):
        files = write(tmp_path, slices=2)
        raw = files[0].read_bytes()
        position = b"-90.0\\-120.0\\-300.0"
        assert raw.count(position) == 1
        files[0].write_bytes(raw.replace(position, b"-90.0\\-1x0.0\\-300.0"))
        (study,) = find_studies(tmp_path)
        assert [i.position is None for i in study.series[0].instances] == [True, False]
        assert "ImagePositionPatient" in refusal(tmp_path)


class TestChoosing:
    def choose(self, folder, series_uid=None):
        (study,) = find_studies(folder)
        return choose_series(study, series_uid)

    def test_most_slices(self, tmp_path):
        write(tmp_path, slices=3)
        write(tmp_path / "b", slices=5, series_number=2)
        series, reason = self.choose(tmp_path)
        assert series.number == 2
        assert (
            "most slices, 5 slices" in reason and "passed over: series 1" in reason and "3 slices" in reason
        )

    def test_softer_kernel_then_thinner_then_number(self, tmp_path):
        write(tmp_path / "1", series_number=1, kernel="LUNG")
        write(tmp_path / "2", series_number=2, kernel="STANDARD", slice_thickness=5)
        write(tmp_path / "3", series_number=3, kernel="STANDARD", slice_thickness=2.5)
        write(tmp_path / "4", series_number=4, kernel="STANDARD", slice_thickness=2.5)
        series, reason = self.choose(tmp_path)
        assert series.number == 3 and "lower series number" in reason
        for gone, chosen, why in (("3", 4, "thinner slices"), ("4", 2, "softer kernel")):
            for file in (tmp_path / gone).iterdir():
                file.unlink()
            series, reason = self.choose(tmp_path)
            assert series.number == chosen and why in reason

    @pytest.mark.parametrize("kernel", ["B70f", "BONEPLUS", "Br59d", "FC52", "I50f 2", "YB", "L"])
    def test_sharp_kernels(self, tmp_path, kernel):
        write(tmp_path / "1", series_number=1, kernel=kernel)
        write(tmp_path / "2", series_number=2, kernel="B31f")
        assert self.choose(tmp_path)[0].number == 2

    @pytest.mark.parametrize("kernel", ["B31f", "STANDARD", "Br40d", "FC17", "SOFT", "B", "I31f 3"])
    def test_soft_kernels(self, tmp_path, kernel):
        write(tmp_path / "1", series_number=1, kernel=kernel)
        write(tmp_path / "2", series_number=2, kernel="B40f")
        assert self.choose(tmp_path)[0].number == 1

    def test_passes_over_what_is_no_axial_ct(self, tmp_path):
        files = write(tmp_path / "ct", slices=2)
        write(tmp_path / "mr", slices=6, series_number=2)
        faults.set_tags((tmp_path / "mr").iterdir(), Modality="MR")
        write(tmp_path / "mip", slices=6, series_number=3)
        faults.set_tags((tmp_path / "mip").iterdir(), ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"])
        write(tmp_path / "coronal", slices=6, series_number=4)
        faults.set_tags(
            (tmp_path / "coronal").iterdir(), ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"]
        )
        write(tmp_path / "bare", slices=6, series_number=5)
        faults.set_tags((tmp_path / "bare").iterdir(), ImageOrientationPatient=None)
        faults.add_localizer(files[0], tmp_path / "scout.dcm")
        faults.add_secondary_capture(files[0], tmp_path / "capture.dcm")
        series, reason = self.choose(tmp_path)
        assert series.number == 1 and "the only axial CT series, 2 slices" in reason
        for why in (
            "modality MR",
            "projection",
            "coronal",
            "ImageOrientationPatient",
            "1 localizer",
            "Secondary Capture",
        ):
            assert why in reason

    def test_by_uid(self, tmp_path):
        write(tmp_path, slices=3)
        write(tmp_path / "b", slices=5, series_number=2)
        (study,) = find_studies(tmp_path)
        series, reason = choose_series(study, study.series[0].uid)
        assert series.number == 1 and "asked for" in reason
        with pytest.raises(ValueError, match=r"no series 1\.2\.3"):
            choose_series(study, "1.2.3")

    @pytest.mark.parametrize("degrees, axial", [(25, True), (35, False)])
    def test_oblique_slices_are_axial_up_to_30_degrees(self, tmp_path, degrees, axial):
        angle = np.deg2rad(degrees)
        turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
        affine = AFFINE.copy()
        affine[:3, :3] = turn @ AFFINE[:3, :3]
        write_dicom_series(tmp_path, np.zeros((4, 4, 3), np.int16), affine)
        if axial:
            assert self.choose(tmp_path)[0].orientation == "axial"
        else:
            with pytest.raises(ValueError, match="no axial CT series.*oblique"):
                self.choose(tmp_path)

    def test_no_ct(self, tmp_path):
        files = write(tmp_path, slices=2)
        faults.set_tags(files, SOPClassUID=EnhancedCTImageStorage)
        with pytest.raises(ValueError, match="no axial CT series.*enhanced"):
            self.choose(tmp_path)
        assert "enhanced" in refusal(tmp_path)


class TestReading:
    def test_geometry_and_origin(self, tmp_path):
        files = write(tmp_path, shuffle=True, kernel="B40f", patient_position="FFS")
        volume = read(tmp_path)
        np.testing.assert_allclose(volume.affine, AFFINE)
        assert volume.hu.dtype == np.int16 and volume.hu.shape == (5, 4, 6)
        np.testing.assert_allclose(volume.spacing, (0.7, 0.9, 2.5))
        assert volume.series.files == tuple(map(str, files))  # in the order of the slices
        headers = [dcmread(file) for file in files]
        assert volume.sop_instance_uids == tuple(h.SOPInstanceUID for h in headers)
        assert volume.frame_of_reference_uid == headers[0].FrameOfReferenceUID
        assert (volume.series.kernel, volume.series.patient_position) == ("B40f", "FFS")
        assert (volume.series.study_date, volume.series.study_time) == ("20200301", "120000")
        assert volume.series.manufacturer and volume.series.model and volume.notes == ()

    def test_order_is_that_of_positions_not_of_numbers(self, tmp_path):
        files = write(tmp_path)
        expected = read(tmp_path).hu
        for number, file in zip((4, 1, 6, 2, 5, 3), files, strict=True):
            faults.set_tags(file, InstanceNumber=number)
        np.testing.assert_array_equal(read(tmp_path).hu, expected)

    def test_rescaling_of_each_slice_by_its_own_tags(self, tmp_path):
        files = write(tmp_path, slices=3)
        before = read(tmp_path).hu.astype(int)
        faults.set_tags(files[1], RescaleSlope="0.5", RescaleIntercept="-10.2")
        after = read(tmp_path).hu
        np.testing.assert_array_equal(after[..., [0, 2]], before[..., [0, 2]])
        np.testing.assert_array_equal(after[..., 1], np.rint((before[..., 1] + 1024) * 0.5 - 10.2))

    def test_values_beyond_int16_are_at_its_limits(self, tmp_path):
        write_dicom_series(tmp_path, np.full((2, 2, 2), 40000), AFFINE, rescale_intercept=0)
        assert (read(tmp_path).hu == 32767).all()

    def test_padding_is_left_as_stored(self, tmp_path):
        hu = np.zeros((3, 3, 2), np.int16)
        hu[0, 0, 0] = -3024
        write_dicom_series(tmp_path, hu, AFFINE, signed=True)
        np.testing.assert_array_equal(read(tmp_path).hu, hu)

    def test_jitter_of_rounding_is_tolerated(self, tmp_path):
        files = write(tmp_path)
        for file, shift in zip(files, (0, 0.05, -0.05, 0.05, -0.05, 0), strict=True):
            faults.move_slice(file, (0, shift, shift * 4))  # 8 % of the slice distance
        np.testing.assert_allclose(read(tmp_path).affine, AFFINE)

    def test_uneven_distances(self, tmp_path):
        files = write(tmp_path)
        faults.move_slice(files[2], (0, 0, 0.5))
        assert "uneven, 2.000 to 3.000 mm: InstanceNumber 3" in refusal(tmp_path)

    @pytest.mark.parametrize("lost", [1, 2, 4])
    def test_missing_slice(self, tmp_path, lost):
        files = write(tmp_path)
        files[lost].unlink()
        z = -300 + 2.5 * (lost - 1)
        assert f"slices are missing: 1 between {z:.2f} and {z + 5:.2f} mm" in refusal(tmp_path)

    def test_several_gaps(self, tmp_path):
        files = write(tmp_path, slices=20)
        for k in (2, 3, 8, 12, 16, 18):
            files[k].unlink()
        text = refusal(tmp_path)
        assert "2 between -297.50 and -290.00 mm, 1 between" in text and "2 more gaps" in text

    def test_one_of_three_slices_missing(self, tmp_path):
        write(tmp_path, slices=4)[2].unlink()
        assert "slices are missing: 1 between -297.50 and -292.50" in refusal(tmp_path)

    def test_two_slices_at_one_place(self, tmp_path):
        files = write(tmp_path)
        faults.copy_slice(files[3], tmp_path / "again.dcm", InstanceNumber=104)
        text = refusal(tmp_path)
        assert "2 slices share their position" in text
        assert "at -292.50 mm" in text and "InstanceNumber 4, 104" in text

    def test_two_reconstructions_under_one_uid(self, tmp_path):
        for number, file in enumerate(write(tmp_path), start=101):
            faults.copy_slice(file, tmp_path / "other" / file.name, InstanceNumber=number)
        text = refusal(tmp_path)
        assert (
            "12 slices share their position" in text and "InstanceNumber 1, 2, 3, 4, 5, 6 and 6 more" in text
        )

    def test_one_image_copied(self, tmp_path):
        files = write(tmp_path)
        faults.copy_slice(files[0], tmp_path / "backup" / "x.dcm", new_uid=False)
        assert "more than once: InstanceNumber 1, 1" in refusal(tmp_path)

    def test_mixed_sizes_spacings_orientations_and_frames(self, tmp_path):
        changes = {
            "size": (
                faults.halve_matrix,
                r"image sizes, 4x5 \(5\), 2x3 \(1\); the odd ones are InstanceNumber 2",
            ),
            "spacing": (lambda f: faults.set_tags(f, PixelSpacing=["0.9", "0.8"]), "pixel spacings"),
            "turn": (
                lambda f: faults.set_tags(f, ImageOrientationPatient=["0", "1", "0", "-1", "0", "0"]),
                "turned against each other: InstanceNumber 2",
            ),
            "frame": (lambda f: faults.set_tags(f, FrameOfReferenceUID="1.2.3"), "frames of reference"),
        }
        for name, (change, pattern) in changes.items():
            change(write(tmp_path / name)[1])
            assert re.search(pattern, refusal(tmp_path / name))

    def test_gantry_tilt(self, tmp_path):
        files = write(tmp_path)
        faults.tilt_gantry(files, 12)
        assert "gantry tilt: slices are stacked 12.0 degrees off" in refusal(tmp_path)

    def test_slight_tilt_keeps_the_slices_where_they_are(self, tmp_path):
        files = write(tmp_path)
        faults.tilt_gantry(files, 0.3)
        affine = read(tmp_path).affine
        np.testing.assert_allclose(affine[:3, 3], AFFINE[:3, 3])
        np.testing.assert_allclose(affine[:3, 2], AFFINE[:3, 2])  # the table's direction, not the normal

    def test_slice_shifted_sideways(self, tmp_path):
        faults.move_slice(write(tmp_path)[3], (0.5, 0, 0))
        assert "shifted sideways against the others: InstanceNumber 4" in refusal(tmp_path)

    @pytest.mark.parametrize(
        "tag",
        [
            "RescaleSlope",
            "RescaleIntercept",
            "ImagePositionPatient",
            "ImageOrientationPatient",
            "PixelSpacing",
        ],
    )
    def test_missing_tags(self, tmp_path, tag):
        faults.set_tags(write(tmp_path)[2], **{tag: None})
        text = refusal(tmp_path)
        assert tag in text and "InstanceNumber 3" in text

    @pytest.mark.parametrize(
        "change, pattern",
        [
            ({"RescaleSlope": "0"}, "RescaleSlope"),
            ({"PixelSpacing": ["0", "0.7"]}, "PixelSpacing"),
            ({"RescaleType": "OD"}, "RescaleType is OD"),
            ({"ImageOrientationPatient": ["1", "0", "0", "0.5", "1", "0"]}, "orthogonal"),
            ({"SamplesPerPixel": 3}, "grey-level"),
            ({"NumberOfFrames": "4"}, "one grey-level frame"),
        ],
    )
    def test_invalid_tags(self, tmp_path, change, pattern):
        faults.set_tags(write(tmp_path), **change)
        assert pattern in refusal(tmp_path)

    def test_other_modality(self, tmp_path):
        faults.set_tags(write(tmp_path), Modality="MR")
        assert "modality is MR, not CT" in refusal(tmp_path)

    def test_localizer_and_capture_under_the_same_uid_are_left_out_and_mentioned(self, tmp_path):
        files = write(tmp_path)
        uid = str(dcmread(files[0]).SeriesInstanceUID)
        faults.add_localizer(files[0], tmp_path / "scout.dcm", uid)
        faults.add_localizer(files[1], tmp_path / "scout2.dcm", uid)
        faults.add_secondary_capture(files[0], tmp_path / "capture.dcm", uid)
        volume = read(tmp_path)
        assert volume.hu.shape == (5, 4, 6)
        assert any("Secondary Capture" in note for note in volume.notes)
        assert "2 localizers left out of the series" in volume.notes

    def test_slices_with_gaps_between_them_are_mentioned(self, tmp_path):
        write(tmp_path, slice_thickness=1)
        assert "slices of 1 mm every 2.5 mm" in read(tmp_path).notes[0]

    def test_one_slice_without_thickness(self, tmp_path):
        faults.set_tags(write(tmp_path, slices=1), SliceThickness=None)
        assert "without SliceThickness" in refusal(tmp_path)

    def test_pixels_cut_off(self, tmp_path):
        files = write(tmp_path)
        faults.truncate(files[4], 0.99)
        text = refusal(tmp_path)
        assert "pixels of InstanceNumber 5 cannot be decoded" in text

    def test_pixels_missing(self, tmp_path):
        files = write(tmp_path)
        faults.set_tags(files[4], PixelData=None)
        assert "pixels of InstanceNumber 5" in refusal(tmp_path)

    def test_file_gone_after_it_was_found(self, tmp_path):
        files = write(tmp_path)
        (study,) = find_studies(tmp_path)
        files[2].unlink()
        with pytest.raises(ValueError, match="InstanceNumber 3 cannot be decoded: No such file") as caught:
            read_series(study.series[0])
        assert str(tmp_path) not in str(caught.value)

    @pytest.mark.parametrize("keep", [0, 60, 400])
    @pytest.mark.parametrize("suffix", [".dcm", ""])
    def test_last_slice_broken(self, tmp_path, keep, suffix):
        # The last slice leaves no gap behind: only the file itself shows that something is lost.
        files = [Path(f).rename(Path(f).with_suffix(suffix)) for f in write(tmp_path)]
        faults.truncate(files[-1], keep)
        assert "1 file beside it cannot be read as DICOM" in refusal(tmp_path)


@real_data
class TestRealScans:
    root = Path(os.environ.get("CT_DATA", ""))

    def test_lidc(self):
        volume = read(self.root / "lidc" / "LIDC-IDRI-0001")
        assert volume.hu.shape == (512, 512, 133)
        assert volume.hu.min() == -2048 and volume.hu.max() == 3071
        # The table stands at z = -340 mm for the lowest slice; the headers' x and y change sign in RAS.
        expected = [[-0.703125, 0, 0, 166], [0, -0.703125, 0, 171.699997], [0, 0, 2.5, -340], [0, 0, 0, 1]]
        np.testing.assert_allclose(volume.affine, expected, atol=1e-6)

    def test_lidc_against_itk(self):
        itk_reader = pytest.importorskip("monai.data").ITKReader
        pytest.importorskip("itk")
        folder = str(self.root / "lidc" / "LIDC-IDRI-0003")
        reader = itk_reader()
        image, meta = reader.get_data(reader.read(folder))
        volume = read(folder)
        np.testing.assert_allclose(volume.affine, meta["affine"], atol=1e-5)
        np.testing.assert_array_equal(volume.hu, image)

    def test_eight_millimetre_slices(self):
        volume = read(self.root / "ct_lung_dicom")
        assert volume.hu.shape == (512, 512, 30) and volume.spacing[2] == pytest.approx(8)
        assert volume.series.kernel == "B40f"

    def test_ten_studies_of_one_slice(self):
        studies = find_studies(self.root / "covid_hu_slices")
        assert len(studies) == 10 and len({study.name for study in studies}) == 10
        for study in studies:
            volume = read_series(choose_series(study)[0])
            assert volume.hu.shape == (512, 512, 1)
            # Air around the patient and in the lungs, and soft tissue, are where HU has them.
            body = volume.hu[volume.hu > -1100]
            assert np.percentile(body, 1) < -950 and -150 < np.percentile(body, 60) < 100
