# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The anatomy of the synthetic chest CT as implicit functions of position in millimetres.

Coordinates are millimetres about the middle of the thorax: ``x`` grows to the patient's left, ``y`` to
posterior, ``z`` to superior. The surfaces take broadcastable arrays and return (approximate) signed distances
in millimetres, negative inside. Nothing here knows of voxels, so any grid samples the same patient.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator

from custom.data.phantom_shapes import Tube, coverage, ellipsoid, middle, radial, smooth_min

__all__ = ["Anatomy"]

_TABLE_Z = np.arange(-220.0, 221.0)
#: Levels (mm) at which the outlines below are given.
_LEVELS = [-220, -120, -60, 0, 40, 70, 95, 115, 135, 220]
_CAVITY = {
    "a": [116, 127, 132, 131, 124, 113, 98, 78, 56, 40],
    "b": [86, 91, 94, 92, 85, 76, 65, 53, 42, 32],
    "y": [-4, -3, 0, 2, 4, 6, 9, 12, 14, 14],
}
_BODY = {
    "a": [148, 155, 160, 163, 166, 169, 172, 174, 172, 120],
    "b": [112, 119, 123, 122, 117, 110, 101, 91, 81, 64],
    "y": [4, 6, 7, 8, 9, 10, 12, 14, 16, 18],
}
_SPINE_Y = [44, 56, 62, 63, 59, 52, 44, 36, 28, 10]
#: Cap that narrows each lung to its apex: half widths and centre.
_CAP_LEVELS = [-220, 20, 50, 75, 95, 108, 116, 120, 220]
_CAP = {
    "a": [110, 105, 86, 64, 48, 31, 15, 0.5, 0.5],
    "b": [130, 118, 96, 76, 58, 38, 19, 0.5, 0.5],
    "x": [55, 55, 56, 52, 48, 45, 44, 44, 44],
    "y": [2, 2, 6, 10, 13, 15, 16, 16, 16],
}
_VERTEBRA_PITCH = 24.0
_RIB_PITCH = 25.0


class Anatomy:
    """One synthetic patient: body, chest wall, lungs, airways, vessels and upper abdomen.

    Args:
        seed: the patient; body size, fat, heart and diaphragm vary a little with it.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        wide, deep = rng.normal(1.0, 0.025, 2).clip(0.95, 1.04)
        self.fat = float(rng.uniform(8.0, 17.0))
        heart = float(rng.uniform(0.92, 1.08))
        self._right_dome = float(rng.uniform(-52, -40))
        self._left_dome = self._right_dome - float(rng.uniform(7, 15))
        self._rib_phase = float(rng.uniform(0, _RIB_PITCH))
        self._vertebra_phase = float(rng.uniform(0, _VERTEBRA_PITCH))
        factors = {"a": wide, "b": deep, "x": wide, "y": 1.0}
        self._tables: dict[str, np.ndarray] = {}
        for name, levels, curves in (
            ("cavity", _LEVELS, _CAVITY),
            ("body", _LEVELS, _BODY),
            ("cap", _CAP_LEVELS, _CAP),
        ):
            for key, values in curves.items():
                self._tables[f"{name}_{key}"] = PchipInterpolator(levels, values)(_TABLE_Z) * factors[key]
        self._tables["spine_y"] = PchipInterpolator(_LEVELS, _SPINE_Y)(_TABLE_Z) * deep
        self._heart = ((22.0, -34.0 * deep, -24.0), (60.0 * heart, 43.0 * heart, 45.0 * heart))
        # Columns are the heart's axes: the long one points left, forward and down, to the apex.
        self._heart_axes = np.linalg.qr(np.array([[0.75, 0.4, 0.0], [-0.42, 0.8, 0.0], [-0.5, 0.2, 1.0]]))[0]
        self.trachea = [
            Tube((0, 6, 170), (0, 4, 100), 9, 9), Tube((0, 4, 100), (-3, 10, 50), 9, 9),
            Tube((-3, 10, 50), (-22, 14, 36), 8, 7.5), Tube((-22, 14, 36), (-44, 16, 18), 7.5, 6),
            Tube((-3, 10, 50), (24, 16, 32), 7.5, 6.5), Tube((24, 16, 32), (50, 20, 18), 6.5, 5.5),
        ]  # fmt: skip
        self.great_vessels = [
            Tube((-8, -26, -5), (-16, -28, 45), 16, 16), Tube((-16, -28, 45), (-6, -14, 64), 16, 15),
            Tube((-6, -14, 64), (12, 8, 66), 15, 14), Tube((12, 8, 66), (24, 32, 50), 14, 13),
            Tube((24, 32, 50), (22, 36, 0), 13, 12.5), Tube((22, 36, 0), (14, 32, -80), 12.5, 12),
            Tube((14, 32, -80), (6, 22, -220), 12, 10),
            Tube((14, -36, -5), (22, -20, 30), 15, 14), Tube((22, -20, 30), (48, 8, 34), 13, 9),
            Tube((20, -14, 26), (-30, -4, 22), 12, 10), Tube((-30, -4, 22), (-48, 2, 14), 10, 8),
            Tube((-30, -20, 95), (-30, -22, 0), 9, 10), Tube((-30, -20, 95), (-32, -14, 170), 8, 7),
            Tube((28, -30, 110), (-28, -26, 82), 6, 7), Tube((28, -30, 110), (34, -16, 170), 6, 6),
            Tube((-10, -14, 66), (-24, -2, 170), 6, 5), Tube((2, -2, 70), (22, 2, 170), 5, 4),
            Tube((12, 6, 70), (34, 14, 120), 5, 5), Tube((-20, 8, -20), (-24, 18, -80), 12, 12),
            Tube((-24, 18, -80), (-22, 24, -220), 12, 12),
            Tube((-10, 6, -4), (-46, 14, -6), 8, 6), Tube((24, 8, -2), (48, 18, -2), 8, 6),
        ]  # fmt: skip
        self.oesophagus = [Tube((2, 18, 170), (4, 26, 60), 6, 7), Tube((4, 26, 60), (6, 24, -90), 7.5, 8)]
        # What the mediastinal pleura drapes over, the airways with their walls.
        self._central = [*self.great_vessels, *self.oesophagus, *self.trachea]
        self.roots = {  # where vessels and bronchi enter each lung
            "left": [(48, 8, 34), (48, 18, -2), (50, 20, 18)],
            "right": [(-48, 2, 14), (-46, 14, -6), (-44, 16, 18)],
        }

    def at(self, name: str, z):
        """The value of a curve at height ``z``; a plain float for one height keeps arrays in float32."""
        value = np.interp(z, _TABLE_Z, self._tables[name])
        return float(value) if np.ndim(z) == 0 else value.astype(np.float32)

    # ---- surfaces
    def body(self, x, y, z):
        """Skin, with the furrow of the back and the pectoral muscles."""
        oval = radial(x, y - self.at("body_y", z), self.at("body_a", z), self.at("body_b", z), 2.3)
        back, front = np.clip((y - 40) / 50, 0, 1), np.clip((-20 - y) / 50, 0, 1)
        pectoral = 5 * np.exp(-(((np.abs(x) - 70) / 34) ** 2)) * np.exp(-(((z - 50) / 45) ** 2))
        furrow = 5 * np.exp(-((x / 13) ** 2)) - 3 * np.exp(-(((np.abs(x) - 42) / 22) ** 2))
        return oval + back * furrow - front * (pectoral - 2.5 * np.exp(-((x / 16) ** 2)))

    def cavity(self, x, y, z):
        """Inner surface of the rib cage."""
        return radial(x, y - self.at("cavity_y", z), self.at("cavity_a", z), self.at("cavity_b", z), 2.3)

    def diaphragm(self, x, y, z):
        """Negative below the two domes, which fall off most at the back, to the costophrenic recess."""
        left = 1 / (1 + np.exp(np.clip(-x / 9, -30, 30)))
        top = self._right_dome + (self._left_dome - self._right_dome) * left
        rho2 = ((np.abs(x) - 54) / 74) ** 2 + ((y + 6) / 90) ** 2
        drop = 46 + 28 * np.clip(y / 88, -1, 1)
        return (z - top + drop * rho2**1.15) * 0.75

    def heart(self, x, y, z):
        """Ventricles, with the apex to the left, front and below, and atria: a distance for each."""
        centre, radii = self._heart
        p = [c - o for c, o in zip((x, y, z), centre, strict=True)]
        q = [sum(float(self._heart_axes[i, j]) * p[i] for i in range(3)) for j in range(3)]
        ventricles = ellipsoid(q[0], q[1], q[2], (0.0, 0.0, 0.0), radii)
        right = ellipsoid(x, y, z, (-22.0, -20.0, -16.0), (25.0, 31.0, 34.0))
        left = ellipsoid(x, y, z, (2.0, 6.0, 2.0), (36.0, 19.0, 23.0))
        return ventricles, smooth_min(right, left, 12)

    def vertebra(self, x, y, z):
        """Vertebral bodies with their discs."""
        return radial(x, y - self.at("spine_y", z), 18.0, 15.0, 2.4)

    def mediastinum(self, x, y, z):
        """Everything between the lungs in one smooth cover: heart, vessels, airways, oesophagus and spine."""
        front = np.clip((y + 40) / 60, 0, 1)
        cover = np.abs(x) - (4.5 + 8 * front)  # the lungs nearly meet in front
        upper = radial(x, y + 2, 30.0, 38.0) + 1.2 * np.maximum(66 - z, 0)
        cover = smooth_min(cover, upper, 12)
        ventricles, atria = self.heart(x, y, z)
        cover = smooth_min(cover, smooth_min(ventricles, atria, 20) - 4, 14)
        cover = smooth_min(cover, self.vertebra(x, y - 4, z) - 4, 10)
        behind = np.maximum(np.abs(x) - 22, self.at("spine_y", z) + 4 - y)
        cover = smooth_min(cover, behind, 8)
        rows = middle(x)
        for tube in self._central:
            if np.ndim(z) or tube.near(float(z), 16):
                cover[rows] = smooth_min(cover[rows], tube.distance(x[rows], y, z) - 3, 9)
        return cover

    def lung(self, x, y, z):
        """Both lungs; the side is the sign of ``x``."""
        cap = radial(
            np.abs(x) - self.at("cap_x", z), y - self.at("cap_y", z), self.at("cap_a", z), self.at("cap_b", z)
        )
        inside = np.maximum(self.cavity(x, y, z), np.maximum(cap, z - 119.5))
        # Rounded corners, so that no film of lung is left where the heart nearly touches ribs or diaphragm.
        outside = smooth_min(-inside, self.mediastinum(x, y, z), 10)
        return -smooth_min(outside, self.diaphragm(x, y, z), 5)

    # ---- Hounsfield units
    def tissue(self, x, y, z: float, width: float) -> np.ndarray:
        """The patient without lung parenchyma on one axial plane, in HU, edges softened over ``width`` mm.

        Args:
            x, y: broadcastable coordinates in mm.
            z: height of the plane in mm.
            width: size of a voxel in mm.
        """
        body, wall = self.body(x, y, z), self.cavity(x, y, z)
        hu = np.full(body.shape, -1000.0, np.float32)

        def paint(distance, value, rows: slice = slice(None)) -> None:
            hu[rows] += coverage(distance, width) * (value - hu[rows])

        couch = y - (141 - x * x / 1500)
        paint(np.maximum(np.abs(couch) - 1.2, np.abs(x) - 185), -150)
        paint(np.maximum(np.abs(couch - 16) - 1.6, np.abs(x) - 150), 120)
        paint(body, 20)
        paint(body + 1.8, -104)
        fat = self.fat * (1 + 0.25 * np.cos(2 * np.arctan2(y, x) + 0.4))
        paint(np.maximum(body + fat, wall - 45 - np.maximum(0, z - 60)), 55)
        # Fat lies between the layers of muscle: thin sheets along a wavy field.
        sheet = 3 * np.sin(x / 17 + y / 23) + 4 * np.sin(np.abs(x) / 13 - y / 19 + z / 31)
        plane = np.abs(np.abs(wall - 24 - sheet) - 9) - 0.9
        paint(np.maximum(plane, body + fat + 3), -65)
        self._skeleton_of_the_wall(paint, x, y, z, wall)
        inlet = float(np.clip((z - 100) / 25, 0, 1))  # towards the neck muscle takes the place of fat
        paint(wall, -92 + 135 * inlet)
        below = self.diaphragm(x, y, z)
        paint(np.maximum(wall + 1, np.abs(below + 2) - 2.5), 50)
        self._abdomen(paint, x, y, z, np.maximum(wall + 3, below + 4))
        chest = -below - 1
        upper = np.maximum(radial(x, y + 6, 30.0, 30.0), 70 - z)  # neck and thoracic inlet
        paint(upper + 3, -25 + 55 * inlet)
        ventricles, atria = self.heart(x, y, z)
        heart = smooth_min(ventricles, atria, 16)
        paint(np.maximum(heart, chest), 42)
        # Fat fills the groove between atria and ventricles, wider towards the surface.
        paint(
            np.maximum(np.abs(ventricles - atria) * 0.5 - 0.28 * (heart + 9), np.maximum(heart, chest)), -75
        )
        rows = middle(x)
        for tube in self.great_vessels:
            if tube.near(z, 3):
                paint(tube.distance(x[rows], y, z), 46, rows)
        for tubes, walled, value in ((self.oesophagus, 0.0, 38), (self.trachea, 1.6, 30)):
            for tube in tubes:
                if tube.near(z, 4):
                    paint(tube.distance(x[rows], y, z) - walled, value, rows)
        for tube in self.trachea:
            if tube.near(z, 3):
                paint(tube.distance(x[rows], y, z), -995, rows)
        self._spine(paint, x, y, z)
        return hu

    def _skeleton_of_the_wall(self, paint, x, y, z, wall) -> None:
        """Ribs with cartilage, sternum, scapulae, clavicles, heads of the humeri."""
        # Each rib slopes from the spine down to the front; the pitch repeats, so all are found at once.
        back = self.at("spine_y", z) + 25
        height = z + 0.42 * (back - y) + self._rib_phase
        along = (height / _RIB_PITCH - np.floor(height / _RIB_PITCH) - 0.5) * _RIB_PITCH
        thick = np.sqrt(((wall - 6.5) / 4.2) ** 2 + (along / 6.5) ** 2)
        rib = np.maximum((thick - 1) * 4.2, z - 118)
        cartilage = np.maximum(y + 45, np.abs(x) - 78) < 0
        rib = np.maximum(rib, 22 - np.abs(x)) + 50.0 * (cartilage & (z < -95))
        paint(rib, np.where(cartilage, 105, 560))
        paint(rib + 1.8, np.where(cartilage, 95, 170))
        front = self.at("cavity_y", z) - self.at("cavity_b", z) - 8
        breastbone = np.maximum(radial(x, y - front, 17.0 + 0.1 * max(z - 40, 0), 6.5, 3.0), abs(z - 25) - 62)
        paint(breastbone, 420)
        paint(breastbone + 1.8, 110)
        side = np.abs(x)
        if -25 < z < 125:
            across = (side - 112 - 0.1 * z) * 0.55 + (y - 72) * 0.83 - 0.0025 * (side - 110) ** 2
            along_blade = np.abs((side - 108 - 0.13 * z) * 0.83 - (y - 72) * 0.55) - (18 + 0.16 * (z + 25))
            blade = np.maximum(np.abs(across) - 2.6, along_blade)
            paint(blade, 480)
        for tube in (Tube((24, -50, 98), (80, -52, 114), 7, 6), Tube((80, -52, 114), (132, -10, 130), 6, 6)):
            if tube.near(z, 3):
                bone = tube.distance(side, y, z)
                paint(bone, 560)
                paint(bone + 2, 200)
        if abs(z - 128) < 30:
            head = ellipsoid(side, y, z, (150, 8, 128), (22, 22, 24))
            paint(head, 480)
            paint(head + 2.5, 190)

    def _spine(self, paint, x, y, z) -> None:
        level = (z + self._vertebra_phase) / _VERTEBRA_PITCH
        phase = abs(level - np.floor(level) - 0.5)  # 0 in the middle of a vertebra, 0.5 in a disc
        centre = self.at("spine_y", z)
        bone = self.vertebra(x, y, z)
        canal = np.sqrt(x * x + (y - centre - 24) ** 2) - 8.5
        paint(canal - 6, 60)
        if phase < 0.4:
            paint(bone, 420)
            paint(bone + 2, 190 if phase < 0.34 else 420)
        else:
            paint(bone, 85)
        if phase < 0.36:
            arch = np.maximum(canal - 5, 0 * y + centre + 12 - y)
            paint(arch, 460)
            reach = 34 - 45 * phase
            wing = np.maximum(np.abs(y - centre - 20 - 0.35 * np.abs(x)) - 5 + 8 * phase, np.abs(x) - reach)
            paint(wing, 430)
            paint(wing + 2, 200)
        # Spinous processes slope downwards, so that each lies behind the vertebra below.
        slope = (z + self._vertebra_phase + 0.9 * (y - centre - 30)) / _VERTEBRA_PITCH
        tilt = np.abs(slope - np.floor(slope) - 0.5)
        thorn = np.maximum(np.abs(x) - 3.2, np.maximum(centre + 34 - y, y - centre - 60))
        paint(np.maximum(thorn, (tilt - 0.36) * _VERTEBRA_PITCH), 430)
        paint(canal, 12)
        paint(canal + 3.2, 38)

    def _abdomen(self, paint, x, y, z, inside) -> None:
        if float(np.min(inside)) > 2:
            return
        paint(inside, -98)
        # The stomach and the spleen hollow the liver out from the left and behind.
        hollow = 128 + 0.25 * (-60 - z) - np.sqrt((x - 100) ** 2 + (y - 58) ** 2)
        paint(np.maximum(hollow, inside), 60)
        spleen = np.maximum(ellipsoid(x, y, z, (88, 38, -112), (30, 42, 46)), inside)
        paint(spleen, 52)
        stomach = np.maximum(ellipsoid(x, y, z, (64, -22, -118), (40, 40, 46)), inside + 2)
        paint(stomach, 45)
        paint(stomach + 5, 25)
        paint(
            np.maximum(stomach + 5, y + 34), -985
        )  # gas rises to the front of a patient who lies on the back
