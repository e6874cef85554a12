# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A DICOMweb server, MONAI Label on it, and OHIF in a browser: what annotators see."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from label_tester import ATTENTION, ROOT, TALKED_TO, centroid, check_same, segment, serving, sha256
from orthanc_tester import running_orthanc
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from scipy.ndimage import distance_transform_edt

from custom.data import make_phantom, write_dicom_series
from custom.data.scans import read_scan

SCREENSHOT = ROOT / "tests-artifacts" / "ohif.png"
REAL = "ct_lung_dicom"
BROWSER = [
    *("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"),
]
LPS = np.array([-1.0, -1.0, 1.0])  # from RAS, and back
LOADED = """() => {
    const cache = window.cornerstone && window.cornerstone.cache;
    const volumes = cache ? cache.getVolumes() : [];
    return volumes.length > 0 && volumes.every(v => !v.loadStatus || v.loadStatus.loaded);
}"""
JUMP = """point => {
    for (const viewport of window.cornerstone.getRenderingEngines()[0].getViewports()) {
        const {focalPoint, position, viewPlaneNormal: normal} = viewport.getCamera();
        const way = normal.reduce((sum, n, i) => sum + n * (point[i] - focalPoint[i]), 0);
        const moved = from => from.map((x, i) => x + way * normal[i]);
        viewport.setCamera({focalPoint: moved(focalPoint), position: moved(position)});
        viewport.render();
    }
}"""
LABELMAP = """() => {
    const volume = window.services.segmentationService.getLabelmapVolume('1');
    const values = volume.voxelManager.getCompleteScalarDataArray();
    const [width, height] = volume.dimensions;
    const sum = [0, 0, 0];
    let voxels = 0;
    for (let i = 0; i < values.length; i++) {
        if (values[i]) {
            voxels++;
            sum[0] += i % width;
            sum[1] += Math.floor(i / width) % height;
            sum[2] += Math.floor(i / (width * height));
        }
    }
    const place = volume.imageData.indexToWorld(sum.map(x => x / voxels));
    return {voxels, dimensions: Array.from(volume.dimensions), centroid: Array.from(place)};
}"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("ohif")


@pytest.fixture(scope="module")
def series(work):
    """Folder of a real series, or of a synthetic one where there is no real data."""
    if os.environ.get("CT_DATA"):
        return Path(os.environ["CT_DATA"]) / REAL
    phantom = make_phantom(shape=(128, 128, 20), spacing=(2.7, 2.7, 14.0), seed=5, burden=0.6)
    write_dicom_series(work / "series", phantom.image, phantom.affine, seed=5)
    return work / "series"


@pytest.fixture(scope="module")
def gap(work):
    """Folder of a series that lacks a slice."""
    phantom = make_phantom(shape=(48, 48, 12), spacing=(7.2, 7.2, 22.0), seed=6)
    write_dicom_series(work / "gap", phantom.image, phantom.affine, seed=6)[5].unlink()
    return work / "gap"


def uids(folder: Path) -> tuple[str, str]:
    header = pydicom.dcmread(
        next(p for p in sorted(folder.iterdir()) if p.is_file()), stop_before_pixels=True
    )
    return str(header.StudyInstanceUID), str(header.SeriesInstanceUID)


@pytest.fixture(scope="module")
def orthanc(work, series, gap):
    with running_orthanc(work / "orthanc") as running:
        versions = [running.get(path)["Version"] for path in ("/system", "/plugins/dicom-web")]
        TALKED_TO.append(f"Orthanc {versions[0]}, DICOMweb {versions[1]}: {running.dicomweb}")
        for folder in (series, gap):
            running.upload(path for path in sorted(folder.iterdir()) if path.suffix.lower() != ".txt")
        yield running


@pytest.fixture(scope="module")
def server(work, models, orthanc):
    with serving(work / "server", {ATTENTION: models[ATTENTION]}, orthanc.dicomweb) as started:
        yield started


@pytest.fixture(scope="module")
def expected(work, models, series) -> nib.Nifti1Image:
    """The mask that ``monai.bundle run`` writes for the DICOM folder."""
    (mask,) = segment(ATTENTION, models[ATTENTION], series, work / "expected").values()
    return mask


def test_the_mask_of_a_dicomweb_series_is_the_one_that_monai_bundle_run_writes(
    server, series, expected, tmp_path
):
    assert server.get("/datastore/")["total"] == 2
    mask = server.mask(ATTENTION, uids(series)[1], tmp_path / "mask.nii.gz")
    check_same(mask, expected, read_scan(series).affine)


def test_a_series_with_a_gap_is_refused_in_one_line(server, gap):
    answer = server.infer(ATTENTION, uids(gap)[1])
    assert answer.status_code == 422 and "slices are missing" in answer.json()["detail"]


def check_segmentation(dataset: pydicom.Dataset, expected: nib.Nifti1Image, series_uid: str) -> None:
    (segment_item,) = dataset.SegmentSequence
    (kind,) = segment_item.SegmentedPropertyTypeCodeSequence
    (category,) = segment_item.SegmentedPropertyCategoryCodeSequence
    (region,) = segment_item.AnatomicRegionSequence
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("112001", "DCM")
    assert (category.CodeValue, category.CodingSchemeDesignator) == ("49755003", "SCT")
    assert (region.CodeValue, region.CodingSchemeDesignator) == ("39607008", "SCT")
    assert segment_item.SegmentLabel == "opacity" and "78961009" not in str(dataset.SegmentSequence)
    assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == series_uid
    # Another program's reader, so that a mistake of ours could not cancel itself.
    volume = highdicom.seg.Segmentation.from_dataset(dataset).get_volume(
        combine_segments=True, allow_missing_positions=True
    )
    wanted = np.asarray(expected.dataobj) > 0
    assert np.count_nonzero(volume.array) == np.count_nonzero(wanted)
    place = centroid(volume.array > 0, volume.affine) * LPS
    assert np.allclose(place, centroid(wanted, expected.affine), atol=0.01)


def test_a_dicom_seg_has_the_right_codes_and_lies_where_the_mask_lies(server, series, expected):
    series_uid = uids(series)[1]
    answer = server.infer(ATTENTION, series_uid, "dicom_seg", label_info=[{"name": "opacity"}])
    assert answer.status_code == 200, answer.text
    check_segmentation(pydicom.dcmread(io.BytesIO(answer.content)), expected, series_uid)
    refused = server.infer(ATTENTION, series_uid, "dicom_seg", label_info=[{"name": "spleen"}])
    assert refused.status_code == 422 and "no DICOM codes are known" in refused.json()["detail"]


def test_ohif_shows_the_mask_where_it_lies(server, series, expected):
    with sync_playwright() as playwright:
        program = shutil.which("chromium")
        assert program, "install the package chromium"
        # Playwright would switch the GPU off, and with it the software renderer that stands in for one.
        browser = playwright.chromium.launch(
            executable_path=program, args=BROWSER, ignore_default_args=["--disable-gpu"]
        )
        try:
            TALKED_TO.append(f"Chromium {browser.version}: {server.url}/ohif/")
            page = browser.new_page(viewport={"width": 1600, "height": 1000})
            point = deepest(expected)
            before, after, labelmap = auto_segment(page, server.url, uids(series)[0], point)
        finally:
            browser.close()
    SCREENSHOT.parent.mkdir(exist_ok=True)
    SCREENSHOT.write_bytes(after)
    wanted = np.asarray(expected.dataobj) > 0
    assert labelmap["dimensions"] == list(wanted.shape)
    assert labelmap["voxels"] == np.count_nonzero(wanted)
    place = np.array(labelmap["centroid"]) * LPS
    assert np.allclose(place, centroid(wanted, expected.affine), atol=0.01)
    left, right = 290, 1310  # the three planes lie between the panels
    changed = (pixels(before) != pixels(after)).any(axis=2)[:, left:right]
    drawn = [int(np.count_nonzero(plane)) for plane in np.array_split(changed, 3, axis=1)]
    assert min(drawn) > 200, f"an overlay in each plane, found {drawn} pixels"


def deepest(mask: nib.Nifti1Image) -> list[float]:
    """The point farthest from the mask's surface, LPS mm: all three planes through it show the mask."""
    depth = distance_transform_edt(np.asarray(mask.dataobj) > 0, nib.affines.voxel_sizes(mask.affine))
    voxel = np.unravel_index(np.argmax(depth), depth.shape)
    return (nib.affines.apply_affine(mask.affine, voxel) * LPS).tolist()


def pixels(screenshot: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB"))


def auto_segment(page: Page, url: str, study_uid: str, point: list[float]) -> tuple[bytes, bytes, dict]:
    """Open a study, connect the panel, run Auto-Segmentation; screenshots before and after, and the mask."""
    page.goto(f"{url}/ohif/monai-label?StudyInstanceUIDs={study_uid}")
    page.wait_for_selector("#monailabelServerURL", timeout=120_000)
    page.get_by_text("Confirm and Hide").click()
    page.wait_for_function(LOADED, timeout=180_000)
    page.evaluate(JUMP, point)
    page.fill("#monailabelServerURL", f"{url}/")
    page.click(".settingsTable .actionButton")
    page.locator(".modelSelector:visible select").first.wait_for(timeout=60_000)
    page.wait_for_timeout(5_000)  # the panel's own notice fades, and the empty label map is drawn
    before = page.screenshot()
    with page.expect_response(lambda response: "/infer/" in response.url, timeout=300_000) as answer:
        page.get_by_title("Run Segmentation").first.click()
    assert answer.value.status == 200
    page.wait_for_timeout(6_000)
    return before, page.screenshot(), page.evaluate(LABELMAP)


def test_a_saved_label_goes_to_the_server_and_training_reads_it_from_there(
    server, orthanc, series, expected, tmp_path
):
    study_uid, series_uid = uids(series)
    nib.save(expected, tmp_path / "label.nii.gz")
    answer = server.save_label(
        series_uid, tmp_path / "label.nii.gz", label_info=[{"name": "opacity", "model_name": "by hand"}]
    )
    assert answer.ok, answer.text
    (saved,) = orthanc.segmentations()
    check_segmentation(saved, expected, series_uid)
    assert saved.StudyInstanceUID == study_uid and saved.SeriesDescription == "by hand"
    assert saved.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"

    (local,) = (server.folder / "app" / "dicom").rglob(f"labels/final/{series_uid}.nii.gz")
    local.unlink()  # so that training must take it from the server
    before = sha256(server.weights(ATTENTION))
    server.train(ATTENTION, val_split=0.0)
    assert sha256(server.weights(ATTENTION)) != before
    read = nib.load(local)
    assert np.array_equal(np.asarray(read.dataobj) > 0, np.asarray(expected.dataobj) > 0)
    assert np.allclose(read.affine, expected.affine, atol=1e-4)


def test_the_log_does_not_tell_whose_the_studies_are(server, series, gap):
    """After everything above: inference, a saved label, training."""
    said = server.log() + server.said()
    assert uids(series)[1] in said, "the log is that of these studies"
    for folder in (series, gap):
        header = pydicom.dcmread(next(iter(sorted(folder.glob("*.dcm")))), stop_before_pixels=True)
        for value in (header.PatientID, header.PatientName):
            assert not value or str(value) not in said, value
