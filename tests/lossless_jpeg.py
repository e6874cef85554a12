# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Lossless JPEG (process 14, first-order prediction), as archives store CT; pydicom has no encoder for it.

Reference:
    ITU-T T.81 (ISO/IEC 10918-1), annexes B and H.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1

__all__ = ["compress_slice", "encode"]

CATEGORIES = 17  # of differences, by their number of bits
CODE_BITS = 5  # one length for all of them: not the shortest file, but a valid one


def encode(pixels: np.ndarray) -> bytes:
    """A JPEG stream.

    Args:
        pixels: (rows, columns) of 16 bits; signed ones are stored by their bits.
    """
    values = pixels.astype("<i8") & 0xFFFF
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 1 << 15
    differences = (values - predicted + 0x7FFF & 0xFFFF) - 0x7FFF  # modulo 2^16, from -32767 to 32768
    bits = "".join(map(_coded, differences.ravel().tolist()))
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    rows, columns = pixels.shape
    lengths = bytes(CATEGORIES if length == CODE_BITS else 0 for length in range(1, 17))
    return b"".join(
        (
            b"\xff\xd8",
            _segment(0xC3, struct.pack(">BHHBBBB", 16, rows, columns, 1, 1, 0x11, 0)),
            _segment(0xC4, b"\x00" + lengths + bytes(range(CATEGORIES))),
            _segment(0xDA, bytes((1, 1, 0, 1, 0, 0))),  # predictor 1: the pixel to the left
            scan,
            b"\xff\xd9",
        )
    )


def compress_slice(file: Path) -> None:
    """Store the pixels of a DICOM file, which must not be compressed, as lossless JPEG."""
    dataset = dcmread(file)
    stream = encode(np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns))
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.save_as(file)


def _coded(difference: int) -> str:
    category = abs(difference).bit_length()
    code = f"{category:0{CODE_BITS}b}"
    if category in (0, 16):  # 32768 has no further bits
        return code
    return code + f"{difference if difference > 0 else difference + (1 << category) - 1:0{category}b}"


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
