# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The page of published results: what it says about its own tables is recomputed from them."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from custom.losses import FocalTverskyLoss, StructureLoss
from custom.networks import SCOATNet, UNetPlusPlus

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs" / "published_results.md").read_text(encoding="utf-8")
PLAIN = " ".join(TEXT.split())
MARK = re.compile(r"<sup>(\w)</sup>")
HALF = {"percent": 0.005, "share": 0.00005}  # half of the last printed digit


@dataclass
class Table:
    section: str
    caption: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        return [MARK.sub("", name) for name in self.header]

    def value(self, row: list[str], column: str) -> float | None:
        cell = MARK.sub("", row[self.columns.index(column)])
        return None if cell == "-" else float(cell.split()[0])

    def row(self, name: str) -> list[str]:
        (found,) = (row for row in self.rows if MARK.sub("", row[0]) == name)
        return found

    def values(self, name: str, *columns: str) -> list[float | None]:
        return [self.value(self.row(name), column) for column in columns]

    def marked(self, mark: str) -> set[tuple[str, str]]:
        return {
            (MARK.sub("", row[0]), column)
            for row in self.rows
            for column, cell in zip(self.columns, row, strict=True)
            if mark in MARK.findall(cell)
        }


def read_tables() -> list[Table]:
    """Tables with the heading they stand under and the paragraph before them."""
    tables: list[Table] = []
    section = caption = ""
    for block in TEXT.split("\n\n"):
        lines = block.strip().splitlines()
        if lines[0].startswith("#"):
            section, caption = lines[0].lstrip("# "), ""
        elif lines[0].startswith("|"):
            header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            tables.append(Table(section, caption, header, rows))
        else:
            caption = " ".join(lines)
    return tables


TABLES = read_tables()


def table(section: str, number: str) -> Table:
    (found,) = (t for t in TABLES if t.section == section and t.caption.startswith(f"**Table {number},"))
    return found


SCOAT = {number: table("SCOAT-Net", number) for number in ("I", "II", "III")}
ZHOU = table("Zhou, Canu & Ruan", "1")
NCOV = {number: table("nCoVSegNet", number) for number in ("2", "3", "4", "5")}


def means() -> list[tuple[str, str, float, float, float, float]]:
    """Rows with Dice, sensitivity and PPV, and half of their last digit."""
    out = []
    for tables, half in ((SCOAT, HALF["percent"]), (NCOV, HALF["share"])):
        for number, one in tables.items():
            for row in one.rows:
                name = MARK.sub("", row[0])
                dice, sensitivity, ppv = one.values(name, "DSC", "SEN", "PPV")
                out.append((number, name, dice, sensitivity, ppv, half))
    return out


def test_every_table_of_numbers_says_whose_they_are():
    of_papers = [
        t for t in TABLES if any(re.fullmatch(r"[\d.]+", MARK.sub("", c)) for row in t.rows for c in row[1:])
    ]
    assert len(of_papers) == 10
    for one in of_papers:
        assert re.search(r"papers?'s? numbers, not ours", one.caption), one.caption
        assert all(len(row) == len(one.header) for row in one.rows)
    for one in [*SCOAT.values(), ZHOU, NCOV["2"], NCOV["3"]]:
        assert re.search(r"\d+ (scans|slices|test cases)", one.caption), "how many"
        assert re.search(r"split (unit unknown|\*\*by slice\*\*|by case)|10 test cases", one.caption), "split"
        assert re.search(r"mean over scans|aggregation not stated", " ".join(one.caption.split())), (
            "aggregation"
        )


def test_every_mark_is_used_and_explained():
    used = set(MARK.findall(" ".join(line for line in TEXT.splitlines() if not line.startswith("- <sup>"))))
    explained = re.findall(r"^- <sup>(\w)</sup>", TEXT, re.MULTILINE)
    assert sorted(used) == sorted(explained) == list("abcdefghijkl")


# ---------------------------------------------------------------- SCOAT-Net


def test_rows_that_break_the_dice_bound_are_exactly_the_marked_ones():
    """Case by case Dice is the harmonic mean of SEN and PPV, which is concave: means obey it as a bound."""
    rows = means()
    assert [sum(n in tables for n, *_ in rows) for tables in (SCOAT, NCOV)] == [22, 23]
    for bound in (lambda s, p: (s + p) / 2, lambda s, p: 2 * s * p / (s + p)):
        broken = {
            (number, name) for number, name, d, s, p, half in rows if d - half > bound(s + half, p + half)
        }
        assert broken == {("I", "MAE"), ("I", "Focal")}
    marked = {(number, *cell) for number, one in (SCOAT | NCOV).items() for cell in one.marked("a")}
    assert marked == {(number, name, "DSC") for number, name in broken}
    for name, dice, limit in (("MAE", 85.74, 84.25), ("Focal", 87.73, 87.61)):
        d, s, p = SCOAT["I"].values(name, "DSC", "SEN", "PPV")
        assert d == dice and 0 <= limit - (s + p) / 2 < 0.0051
    assert "MAE: 85.74 > 84.25; Focal: 87.73 > 87.61" in PLAIN


def test_no_row_is_of_pooled_counts():
    """Their Dice would be the harmonic mean itself, to the printed digit."""
    for number, name, d, s, p, half in means():
        assert abs(d - 2 * s * p / (s + p)) > 2 * half, (number, name)


def test_what_the_two_versions_have_in_common():
    columns = ("DSC", "SEN", "PPV", "VA v2", "RLP v2", "RLR v2", "VA v1", "RLP v1", "RLR v1")
    assert SCOAT["II"].values("SCOAT-Net", *columns) == SCOAT["III"].values("SCOAT-Net", *columns)
    assert SCOAT["II"].values("UNet++", *columns) == SCOAT["III"].values("UNet++", *columns)
    ours, loss = SCOAT["II"].values("SCOAT-Net", *columns), SCOAT["I"].values("BCE-Dice", *columns)
    assert [i for i, (a, b) in enumerate(zip(ours, loss, strict=True)) if a != b] == [columns.index("VA v1")]
    for row in SCOAT["I"].rows:  # v2 changed the last row of Table I only
        name = MARK.sub("", row[0])
        same = SCOAT["I"].values(name, *columns[3:6]) == SCOAT["I"].values(name, *columns[6:])
        assert same == (name != "BCE-Dice")


def test_misprinted_cells_repeat_their_neighbour():
    misprints = set()
    for number, one in SCOAT.items():
        for row in one.rows:
            name = MARK.sub("", row[0])
            va = {c: one.value(row, c) for c in ("VA v1", "VA v2")}
            misprints |= {(number, name, c) for c, v in va.items() if v == one.value(row, "PPV")}
    assert misprints == {("I", "BCE-Dice", "VA v1"), ("II", "Attention U-Net", "VA v1")}
    assert misprints == {(number, *cell) for number, one in SCOAT.items() for cell in one.marked("b")}
    assert SCOAT["III"].values("SCOAT-Net", "VA v1") == [94.97]
    assert SCOAT["II"].values("Attention U-Net", "VA v2") == [94.94]


def best(one: Table, column: str, least: bool = False) -> str:
    rows = [row for row in one.rows if one.value(row, column) is not None]
    return MARK.sub("", (min if least else max)(rows, key=lambda row: one.value(row, column))[0])


def test_sentences_that_the_tables_do_not_bear_out():
    losses, networks, modules = SCOAT.values()
    columns = ("DSC", "SEN", "PPV", "VA v2", "RLP v2", "RLR v2")
    others = {c for c in columns if best(losses, c) != "BCE-Dice"}
    assert others == {"SEN", "RLR v2", "PPV"}, "the text admits the first two"
    assert best(losses, "PPV") == "BCE"
    assert losses.marked("c") == {("BCE", "PPV"), ("BCE-Dice", "PPV")}
    assert best(networks, "SEN", least=True) == "CE-Net"
    assert networks.marked("d") == {("U-Net", "SEN"), ("CE-Net", "SEN")}
    higher = set()
    for column in ("RLP v2", "RLP v1"):
        (limit,) = modules.values("SCOAT-Net", column)
        higher |= {(MARK.sub("", r[0]), column) for r in modules.rows if modules.value(r, column) > limit}
    assert higher == modules.marked("f")


@pytest.mark.parametrize(
    "name, network, millions",
    [
        ("UNet++", lambda **k: UNetPlusPlus(attention_gates=False, **k), "9.16"),
        ("AttentionV2 (attention gates)", lambda **k: UNetPlusPlus(attention_gates=True, **k), "9.84"),
        ("SCOAT-Net", SCOATNet, "10.21"),
    ],
)
def test_params_are_file_sizes(name, network, millions):
    """Of the paper's three-channel networks; names of parameters, longer here, are in the file too."""
    built = network(spatial_dims=2, in_channels=3, out_channels=1, channels=[32, 64, 128, 256, 512])
    file = io.BytesIO()
    torch.save(built.state_dict(), file, _use_new_zipfile_serialization=False)
    cell = SCOAT["III"].row(name)[1]
    printed = float(re.findall(r"[\d.]+", cell)[-1])
    assert len(file.getvalue()) / 2**20 == pytest.approx(printed, abs=0.02)
    parameters = sum(p.numel() for p in built.parameters())
    assert f"{parameters / 1e6:.2f}" == millions and millions in PLAIN


def test_parameters_that_are_known_by_the_file_only():
    for name, millions in (
        ("AttentionV1 (residual attention)", 14.0),
        ("AttentionV3 (pyramid attention)", 9.2),
    ):
        (mib,) = SCOAT["III"].values(name, "Params")
        assert mib * 2**20 / 4e6 == pytest.approx(millions, abs=0.05)
    assert "AttentionV1 has about 14.0 and AttentionV3 9.2" in PLAIN


# ---------------------------------------------------------------- Zhou, Canu & Ruan


def test_gains_in_the_text_are_relative():
    (gains,) = (t for t in TABLES if t.caption.startswith("**Gains"))
    rows = [MARK.sub("", row[0]) for row in ZHOU.rows]
    for row, (start, end) in zip(gains.rows, ((0, 1), (2, 3), (0, 2), (1, 3)), strict=True):
        for metric in ("Dice", "SEN"):
            (a,), (b,) = (ZHOU.values(rows[i], metric) for i in (start, end))
            assert gains.value(row, f"{metric}: points") == pytest.approx(b - a)
            assert gains.value(row, f"{metric}: text") == pytest.approx(100 * (b / a - 1), abs=0.006)


def test_zhous_rows_cannot_be_pooled_over_one_test_set():
    """Of pooled counts, FP / lesion = SEN (2 / Dice - 1) - 1, and FP / rest = 1 - SPE."""
    shares = []
    for row in ZHOU.rows:
        values = []
        for signs in [(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]:
            printed = (ZHOU.value(row, c) for c in ("Dice", "SEN", "SPE"))
            dice, sen, spe = ((v + 0.05 * sign) / 100 for v, sign in zip(printed, signs, strict=True))
            odds = (1 - spe) / (sen * (2 / dice - 1) - 1)
            values.append(odds / (1 + odds))
        shares.append((min(values), max(values)))
    assert 0.0195 < shares[0][1] < 0.02 and 0.028 < shares[3][0] < 0.0285
    assert "at most 2.0 % by the first row and at least 2.8 % by the last" in PLAIN


# ---------------------------------------------------------------- nCoVSegNet


def test_voe_follows_from_dice_in_every_row():
    rows = [(one, row) for number, one in NCOV.items() if number != "5" for row in one.rows]
    assert len(rows) == 15
    for one, row in rows:
        dice, voe = one.value(row, "DSC"), one.value(row, "VOE")
        assert math.floor(1e4 * (1 - dice / (2 - dice))) == round(1e4 * voe), row[0]
    rounded = [round(1 - one.value(r, "DSC") / (2 - one.value(r, "DSC")), 4) for one, r in rows]
    assert rounded != [one.value(r, "VOE") for one, r in rows], "cut off, not rounded"
    curve = [2 - 2 / (2 - d) for d in (0.2, 0.5, 0.8)]
    assert (curve[0] + curve[2]) / 2 < curve[1], "a mean over cases would come out smaller"


def test_rvd_is_not_that_of_pooled_counts():
    for number in ("2", "3", "4"):
        for row in NCOV[number].rows:
            sen, ppv, rvd = (NCOV[number].value(row, c) for c in ("SEN", "PPV", "RVD"))
            assert abs(abs(sen / ppv - 1) - rvd) > 1e-3, row[0]
    sen, ppv, rvd, dice = NCOV["2"].values("nCoVSegNet", "SEN", "PPV", "RVD", "DSC")
    assert (
        f"{abs(sen / ppv - 1):.4f} for nCoVSegNet in Table 2, printed {rvd:.4f}".replace("0.", ".") in PLAIN
    )
    assert f"{2 * sen * ppv / (sen + ppv):.4f}, printed {dice:.4f}".replace("0.", ".") in PLAIN


def test_rows_that_are_the_same_network():
    columns = ("DSC", "SEN", "SPE", "PPV")
    assert NCOV["2"].values("nCoVSegNet", *columns) == NCOV["4"].values("two-stage", *columns)
    assert NCOV["5"].values("H (all)", *columns) == NCOV["4"].values("single-stage", *columns)


def test_gains_over_ce_net():
    one, other = (NCOV["2"].values(name, "DSC", "SEN", "VOE", "RVD") for name in ("CE-Net", "nCoVSegNet"))
    points = [100 * (b - a) for a, b in zip(one[:2], other[:2], strict=True)]
    relative = [100 * (1 - b / a) for a, b in zip(one[2:], other[2:], strict=True)]
    assert "percentage points ({:.2f}, {:.2f})".format(*points) in PLAIN
    assert "are relative ({:.2f}, {:.2f})".format(*relative) in PLAIN


# ---------------------------------------------------------------- formulas


def test_misprinted_formulas():
    """As printed and as implemented, at the point that the page names."""

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    assert softplus(0 - 1) == pytest.approx(0.313, abs=5e-4), "-log sigma(1 - y) at y = 0"
    assert softplus(0) == pytest.approx(0.693, abs=5e-4), "-log(1 - sigma(y)) at y = 0"
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 10:25, 12:30] = 1
    p = g = mask
    assert float((p * g).sum() / (p.sum() + g.sum())) == 0.5, "Zhou, eq. 8"
    assert float(1 - 2 * (g * p).sum() / (g + p + g * p).sum()) == pytest.approx(1 / 3), "nCoVSegNet, eq. 8"
    alpha = (torch.nn.functional.avg_pool2d(g * 0, 31, 1, 15) - g * 0).abs()
    assert float(alpha.sum()) == 0, "nCoVSegNet, eq. 6: the denominator on a slice without lesion"
    logits = 200 * mask - 100
    tversky = FocalTverskyLoss(alpha=0.5, beta=0.5, gamma=1.0, sigmoid=True, batch=True)
    assert float(tversky(logits, mask)) == pytest.approx(0, abs=1e-5)
    assert float(StructureLoss(window=31, gamma=5)(logits, mask)) == pytest.approx(0, abs=1e-5)
    assert math.isfinite(float(StructureLoss(window=31, gamma=5)(logits * 0 - 5, mask * 0)))


# ---------------------------------------------------------------- overlays

BUNDLES = sorted(folder.name for folder in (ROOT / "bundles").iterdir() if folder.is_dir())
PUBLISHED = {
    "covid_ct_scoatnet_segmentation": SCOAT,
    "covid_ct_attention_unet_segmentation": {"1": ZHOU},
    "covid_ct_ncovsegnet_segmentation": NCOV,
}


def overlays(bundle: str) -> Table:
    (found,) = (t for t in TABLES if t.section == bundle)
    return found


def test_every_bundle_has_its_papers_tables():
    assert sorted(PUBLISHED) == BUNDLES


@pytest.mark.parametrize("bundle", PUBLISHED)
def test_every_published_row_is_mapped_once(bundle):
    mapped = [
        (number, name)
        for row in overlays(bundle).rows
        for number in row[0].split(", ")
        for name in row[1].split(", ")
    ]
    rows = [(n, MARK.sub("", row[0])) for n, one in PUBLISHED[bundle].items() for row in one.rows]
    assert sorted(mapped) == sorted(rows)


@pytest.mark.parametrize("bundle", PUBLISHED)
def test_every_overlay_named_exists_and_every_one_that_exists_is_named(bundle):
    configs = ROOT / "bundles" / bundle / "configs"
    for row in overlays(bundle).rows:
        names = re.findall(r"`(\w+)`", row[2])
        assert bool(names) != (row[2] == "none"), row
        for name in names:
            assert (configs / f"{name}.json").is_file(), f"{bundle} has no {name}.json"
    there = {f.stem for f in configs.glob("*.json") if re.match(r"(loss|table\d|baseline)_", f.stem)}
    named = {name for row in overlays(bundle).rows for name in re.findall(r"`(\w+)`", row[2])}
    assert there == {name for name in named if re.match(r"(loss|table\d|baseline)_", name)}
    section = TEXT.split(f"### {bundle}")[1].split("###")[0]
    for name in re.findall(r"`(random_slice_split|train_slices|three_passes)`", section):
        assert (configs / f"{name}.json").is_file(), name


@pytest.mark.parametrize("bundle", PUBLISHED)
def test_overlays_say_that_they_are_these_rows(bundle):
    """The description inside an overlay names its row, so that two names that changed places would show."""
    checked = 0
    for row in overlays(bundle).rows:
        names, systems = re.findall(r"`(\w+)`", row[2]), row[1].split(", ")
        if not names or not re.match(r"loss|table|baseline", names[0]):
            continue
        for name, system in zip(names, systems * len(names), strict=False):
            file = ROOT / "bundles" / bundle / "configs" / f"{name}.json"
            said = json.loads(file.read_text(encoding="utf-8"))["_desc_"].lower()
            key = system.lower().replace(" loss", "").replace("bce-dice", "bce_dice").split(" (")[0]
            for word in key.split(" + "):
                assert re.search(rf"\b{re.escape(word)}(?![\w+])", said), (name, said)
            checked += 1
    assert checked >= 4
