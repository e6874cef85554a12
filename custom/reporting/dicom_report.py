# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The numbers of a report as a DICOM Structured Report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from custom.reporting.dicom_common import (
    LABELS,
    MANUFACTURER,
    algorithm,
    claim,
    equipment,
    finding_code,
    series_number,
)
from custom.reporting.dicom_source import SourceSeries

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from highdicom.sr import Comprehensive3DSR

__all__ = ["make_report"]

_SCHEME = "99COVIDCTB"


def make_report(
    source: SourceSeries,
    segmentation: Segmentation | None,
    measured: Mapping[str, Any],
    model: Mapping[str, Any],
) -> Comprehensive3DSR:
    """Make a Comprehensive 3D SR after TID 1500 with the numbers of a JSON report, to the last digit.

    Lungs, opacity, ground-glass and consolidation are measurement groups that refer to their segments (TID
    1411); opacity by lung, of which there is no segment, and what both lungs share are groups that name the
    site (TID 1501), and so is an opacity of 0 mL. What is None in the JSON report is not in this one.

    Args:
        source: the series that was measured.
        segmentation: see :func:`make_segmentation`; None where there is none.
        measured: see :func:`custom.reporting.measure_opacity`.
        model: ``bundle``, ``software_version`` and ``weights_sha256``.
    """
    from highdicom import sr
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    groups = _Groups(source, segmentation, model)
    for side in ("left", "right"):
        measurements = [
            ("volume", measured["lung_volume_ml"][side]),
            ("mean_hu", measured["lung_mean_hu"][side]),
        ]
        groups.add(f"{side}_lung", LABELS[f"{side}_lung"], codes.SCT.Lung, side, measurements)
    for name in ("opacity", "ground_glass", "consolidation"):
        measurements = [("volume", measured[f"{name}_volume_ml"]["total"])]
        if name == "opacity":
            measurements.append(("mean_hu", measured["opacity_mean_hu"]["total"]))
        measurements.append(("percent", measured[f"{name}_percent_of_lung"]["total"]))
        groups.add(name, LABELS[name], finding_code(name), None, measurements)
        for side in ("left", "right"):
            measurements = [
                ("volume", measured[f"{name}_volume_ml"][side]),
                ("percent", measured[f"{name}_percent_of_lung"][side]),
            ]
            groups.add(None, f"{LABELS[name]}, {side} lung", finding_code(name), side, measurements)
    groups.add(None, "Severity", codes.DCM.Opacity, None, [("severity", measured["severity"]["score"])])

    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(entropy_srcs=[MANUFACTURER, str(model["bundle"])]),
            name=str(model["bundle"]) or MANUFACTURER,
            manufacturer_name=MANUFACTURER,
        ),
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=groups.made,
        title=codes.DCM.ImagingMeasurementReport,
    )
    evidence = [*source.headers, *([] if segmentation is None else [segmentation])]
    report = sr.Comprehensive3DSR(
        evidence=evidence,
        content=content,
        series_instance_uid=generate_uid(prefix=None),
        series_number=series_number(source, 2),
        sop_instance_uid=generate_uid(prefix=None),
        instance_number=1,
        is_complete=True,
        **equipment(model),
        series_description="Opacity measurements, research use only",
        coding_schemes=[
            CodingSchemeIdentificationItem(
                _SCHEME, name="covid-ct-bundles codes", responsible_organization=MANUFACTURER
            )
        ],
    )
    return claim(report, source)


class _Groups:
    """Measurement groups of a report."""

    def __init__(
        self, source: SourceSeries, segmentation: Segmentation | None, model: Mapping[str, Any]
    ) -> None:
        from highdicom.sr import AlgorithmIdentification

        self.source, self.segmentation = source, segmentation
        used = algorithm(model)
        used["parameters"] = [f"{key}={value}" for key, value in used["parameters"].items()] or None
        self.algorithm = AlgorithmIdentification(**used)
        described = [] if segmentation is None else segmentation.SegmentSequence
        self.segments = {item.TrackingID: item for item in described}
        self.made: list[Any] = []

    def add(
        self,
        segment: str | None,
        label: str,
        finding: Code,
        side: str | None,
        values: list[tuple[str, float | None]],
    ) -> None:
        """Add a group of the values that are known, about a segment where there is one of that name."""
        from highdicom import sr

        measurements = [_measurement(kind, value) for kind, value in values if value is not None]
        if not measurements:
            return
        laterality = {"left": codes.SCT.Left, "right": codes.SCT.Right, None: None}[side]
        common: dict[str, Any] = {
            "finding_type": finding,
            "finding_sites": [sr.FindingSite(anatomic_location=codes.SCT.Lung, laterality=laterality)],
            "algorithm_id": self.algorithm,
            "measurements": measurements,
        }
        item = self.segments.get(LABELS[segment]) if segment else None
        if item is None or self.segmentation is None:
            tracked = sr.TrackingIdentifier(uid=generate_uid(prefix=None), identifier=label)
            self.made.append(sr.MeasurementsAndQualitativeEvaluations(tracking_identifier=tracked, **common))
            return
        series = str(self.source.headers[0].SeriesInstanceUID)
        referenced = sr.ReferencedSegment(
            sop_class_uid=self.segmentation.SOPClassUID,
            sop_instance_uid=self.segmentation.SOPInstanceUID,
            segment_number=item.SegmentNumber,
            source_series=sr.SourceSeriesForSegmentation(series),
        )
        tracked = sr.TrackingIdentifier(uid=item.TrackingUID, identifier=label)
        self.made.append(
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=tracked, referenced_segment=referenced, **common
            )
        )


def _measurement(kind: str, value: float) -> Any:
    from highdicom.sr import CodedConcept, Measurement

    if kind == "volume":
        millilitre = CodedConcept("mL", "UCUM", "milliliter")
        return Measurement(name=codes.SCT.Volume, value=value, unit=millilitre)
    if kind == "mean_hu":
        name, unit = codes.DCM.AttenuationCoefficient, codes.UCUM.HounsfieldUnit
        return Measurement(name=name, value=value, unit=unit, derivation=codes.SCT.Mean)
    if kind == "percent":
        name = CodedConcept("PERCENT_OF_LUNG", _SCHEME, "Percentage of lung volume")
        return Measurement(name=name, value=value, unit=codes.UCUM.Percent)
    name = CodedConcept("SEVERITY_0_24", _SCHEME, "CT severity score over six lung zones, 0 to 24")
    return Measurement(name=name, value=value, unit=codes.UCUM.NoUnits)
