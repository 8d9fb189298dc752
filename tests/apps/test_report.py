"""The report: numbers against plain loops, and a page that is safe, sound and readable whatever the names are."""
import inspect
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image
from torch import nn

from cft.apps import report as report_module
from cft.apps.drawing import data_uri, overlay
from cft.apps.report import (
    Number,
    Report,
    card_of,
    change_interval,
    choose_pictures,
    compare,
    group_answers,
    numbers_of,
    place,
    sample_pictures,
    signed,
)
from cft.data import backdrop
from cft.data.folders import scan
from cft.data.models import base_model
from cft.evaluate import audit as audit_module
from cft.evaluate.audit import Rule, audit, html_template, paired_interval
from cft.evaluate.metrics import COLUMNS
from cft.files import ASSETS

CSS = re.sub(r"/\*.*?\*/", "", (ASSETS / "report/report.css").read_text(encoding="utf-8"), flags=re.S)
LIGHT, DARK = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in CSS.split("(prefers-color-scheme: dark)"))
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e&'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class ByColour(nn.Module):
    """Names the class whose colour is nearest to one place of the picture: the middle (the object) or the corner."""

    num_classes = 3
    COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    pretrained_cfg = dict(architecture="by colour", input_size=(3, 24, 24), crop_pct=1.0, interpolation="bilinear",
                          mean=(0.5,) * 3, std=(0.5,) * 3)

    def __init__(self, corner):
        super().__init__()
        self.place = slice(0, 2) if corner else slice(10, 14)
        self.colours = nn.Parameter(torch.tensor(self.COLOURS / 255 * 2 - 1).float())

    def forward(self, x):
        return -(x[:, :, self.place, self.place].mean((2, 3))[:, None] - self.colours).square().sum(2)


def squares(root, counts=(5, 6, 4), names=("one", "two", "three"), size=24):
    """A square in the colour of its class before a background in nearly the same colour, with its mask."""
    rng = np.random.default_rng(0)
    for label, (folder, count) in enumerate(zip(names, counts)):
        for kind in ("images", "objects"):
            (root / kind / folder).mkdir(parents=True)
        for k in range(count):
            picture = (ByColour.COLOURS[label] + rng.integers(-9, 9, (size, size, 3))).clip(0, 255).astype(np.uint8)
            mask = np.zeros((size, size), np.uint8)
            mask[size // 3: 2 * size // 3, size // 3: 2 * size // 3] = 255
            Image.fromarray(picture).save(root / "images" / folder / f"{k}.png")
            Image.fromarray(mask).save(root / "objects" / folder / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = squares(tmp_path_factory.mktemp("squares"))
    return scan(root / "images", objects=root / "objects", classes=["one", "two", "three"])


@pytest.fixture(scope="module")
def pair(world):
    return tuple(audit(ByColour(corner), world, rule=Rule(40), progress=False) for corner in (True, False))


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """Audits of two vision transformers on drawn pictures: these have relevance."""
    root = backdrop.write(tmp_path_factory.mktemp("drawn") / "w", {"val": 4}, seed=5)
    folder = scan(root / "images/val", objects=root / "objects/val", classes=list(backdrop.CLASSES))
    return [audit(base_model(seed), folder, progress=False) for seed in (0, 1)]


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_change_of_answers_is_bonett_and_price(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, 17)) < [[0.7], [0.4]]
    assert np.allclose(change_interval(first.astype(float) - second), paired_interval(first, second))


def test_change_interval_by_hand():
    changes = [2.0, -1.0, 0.0, 0.5]
    padded = changes + [1.0, -1.0]
    mean = math.fsum(padded) / 6
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in padded) / 6)
    half = 1.959963984540054 * spread / math.sqrt(6)
    assert change_interval(np.array(changes)) == pytest.approx((37.5, 100 * (mean - half), 100 * (mean + half)))
    assert change_interval(np.full(9, 2.0))[2] <= 200 and change_interval(np.zeros(500))[2] < 1
    for none in ([3.0], []):
        with pytest.raises(ValueError, match="changes between -2 and 2, at least one"):
            change_interval(np.array(none))


def test_change_interval_covers_as_it_says():
    """On changes drawn from a known law, about 95 of 100 intervals hold the truth."""
    rng, hits = np.random.default_rng(0), 0
    law, truth = [-1, 0, 1, 2], -0.1 + 0.3 + 2 * 0.1
    for _ in range(2000):
        _, low, high = change_interval(rng.choice(law, 40, p=[0.1, 0.5, 0.3, 0.1]))
        hits += low <= 100 * truth <= high
    assert 0.93 < hits / 2000 < 0.98


def test_compare_is_a_plain_loop(pair, vits):
    for before, after in (pair, vits):
        found = compare(before, after)
        assert list(found.columns) == list(COLUMNS)
        classes = before.images.folder.classes
        for split in ("all", f"class {classes[1]}"):
            rows = [(a, b) for a, b in zip(before.pictures.itertuples(), after.pictures.itertuples())
                    if split in ("all", f"class {classes[a.label]}")]
            expected = {"accuracy": [float(b.correct) - float(a.correct) for a, b in rows]}
            expected["alone"] = [b.alone - a.alone for a, b in rows]
            expected["gap"] = [(b.own - b.other) - (a.own - a.other) for a, b in rows]
            got = numbers_of(found)[split]
            for metric, values in expected.items():
                values = [v for v in values if not math.isnan(v)]
                number = got["background_alone" if metric == "alone" else metric]
                assert number.n == len(values) and number.value == pytest.approx(100 * sum(values) / len(values))
                assert number[1:3] == pytest.approx(change_interval(np.array(values))[1:])
            if "off" in before.pictures:
                shares = [b.off - a.off for a, b in rows if not math.isnan(a.off)]
                assert got["off_object"].value == pytest.approx(sum(shares) / len(shares))


def test_compare_refuses_what_cannot_be_compared(pair, world, tmp_path):
    before, _ = pair
    with pytest.raises(ValueError, match="they differ in own_from"):
        compare(before, audit(ByColour(False), world, seed=3, progress=False))
    with pytest.raises(ValueError, match="they differ in own_from"):
        compare(before, audit(ByColour(False), world.root, classes=["one", "two", "three"], progress=False))
    with pytest.raises(ValueError, match="they differ in id"):
        compare(before, audit(ByColour(False), replace(world, samples=world.samples[1:]), progress=False))
    with pytest.raises(ValueError, match="the same classes"):
        compare(before, audit(ByColour(False), replace(world, classes=("one", "two", "3")), progress=False))


def test_groups_are_plain_loops(vits):
    found, classes = vits[0], vits[0].images.folder.classes
    label = {p.id: classes[p.label] for p in found.pictures.itertuples()}
    tally = {}
    for p in found.pictures.itertuples():
        if not math.isnan(p.other):
            misled = classes[int(p.other_predicted)] == label[p.other_from]
            tally.setdefault((label[p.id], label[p.other_from]), []).append((p.other, misled))
    both = group_answers(found, least=1)
    assert len(both) == len(tally)
    for row in both.to_dict("records"):
        answers = tally[row["class"], row["background"]]
        assert row["n"] == len(answers) and row["right"] == pytest.approx(100 * np.mean([a for a, _ in answers]))
        assert row["misled"] == pytest.approx(100 * np.mean([m for _, m in answers]))
        assert row["low"] <= row["right"] <= row["high"]
    assert both["high"].is_monotonic_increasing and (group_answers(found)["n"] >= 3).all()
    assert group_answers(found, "background", 1)["n"].sum() == sum(map(len, tally.values()))
    with pytest.raises(ValueError, match="background or both"):
        group_answers(found, "place")


def test_a_model_of_backgrounds_is_misled_by_them(pair):
    assert (group_answers(pair[0], "background")["misled"] == 100).all()
    assert (group_answers(pair[1], "background")["misled"] == 0).all()


def test_numbers_read_well():
    assert signed(-0.4) == "0" and signed(-3) == "−3" and signed(7.6) == "+8"
    assert Number(float("nan"), float("nan"), float("nan"), 1).interval() == "[one picture]"
    assert Number(52, 44, 60, 9).percent() == "52\u00a0%"
    turns = {(0.1, 2): 1, (-2, -0.1): -1, (-1, 1): 0, (0, 2): 0, (math.nan, math.nan): 0}
    assert {ends: Number(1, *ends, 9).turn for ends in turns} == turns
    places = {(-70, -50, 100): "0.0%", (20, -50, 100): "46.7%", (120,): "100.0%", (8.33,): "8.3%"}
    assert {where: place(*where) for where in places} == places


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_chosen_and_drawn(vits, pair):
    ids = choose_pictures(vits[0], 5)
    label = dict(zip(vits[0].pictures["id"], vits[0].pictures["label"]))
    assert len({label[i] for i in ids}) == len(ids) <= 5
    p = vits[0].pictures.set_index("id").loc[ids]
    assert ((p.own == 1) & (p.other == 0)).all()
    assert choose_pictures(pair[1], 5) == []  # a model of objects is wrong nowhere
    assert sample_pictures(vits[0], 4, 1) == sample_pictures(vits[0], 4, 1) != sample_pictures(vits[0], 4, 2)
    assert len(sample_pictures(pair[0], 99)) == 15


def test_a_card_says_what_the_models_say(vits):
    picture = choose_pictures(vits[0], 1)[0]
    card, cases = card_of(vits, picture, ("accuracy", "other_background")), [found.look(picture) for found in vits]
    assert card.id == picture and card.label == cases[0].label
    assert [shot.metric for shot in card.shots] == ["accuracy", "other_background"]
    for shot, key in zip(card.shots, ("original", "other")):
        assert (shot.pixels == overlay(cases[0].pictures[key])).all()
        for answer, case in zip(shot.answers, cases, strict=True):
            said, sure = case.answers[key]
            assert answer == (said, round(100 * sure), said == case.label)
    rows = [found.pictures.set_index("id").loc[picture] for found in vits]
    assert [(heat.audit, heat.off) for heat in card.maps] == [(i, round(row.off)) for i, row in enumerate(rows)]
    assert card.behind == rows[0].other_from and not card_of(vits, picture, ("accuracy",)).behind
    assert len(card_of(vits[:1], picture).shots) == 6


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags must nest; collects what is to be looked at."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.headings, self.text, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs), list(self.open)))
        if "id" in dict(attrs):
            self.ids.append(dict(attrs)["id"])
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [(attrs, inside) for t, attrs, inside in self.seen if t == tag]


def text_of(report):
    """The words of a page, with single spaces (but those that do not break)."""
    return re.sub(r"[ \n]+", " ", "".join(Page(report.html()).text))


def assert_safe(text):
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "form", "link", "base", "svg"} & {tag for tag, *_ in page.seen}
    for tag, attrs, _ in page.seen:
        assert not any(key.startswith("on") for key in attrs), (tag, attrs)
        for key in ("src", "href", "action", "srcset", "poster", "background"):
            place = attrs.get(key, "#part-")
            assert place.startswith(("data:image/jpeg;base64,", "#part-")), (tag, place[:60])
    assert not re.search(r"https?:|url\(|@import|expression\(", text)
    assert text.count("default-src 'none'") == 1
    return page


@pytest.fixture(scope="module")
def pages(pair, vits, world):
    blind = audit(ByColour(True), world.root, classes=["one", "two", "three"], progress=False)
    run = {"steps": 3, "recipe": {"rate": 0.1}, "epochs": [{"loss": 1}]}
    return {"pair": Report(*pair), "vits": Report(*vits, run=run, command="cft audit", made="today"),
            "single": Report(vits[0]), "blind": Report(blind), "blind pair": Report(blind, blind)}


@pytest.mark.parametrize("which", ["pair", "vits", "single", "blind", "blind pair"])
def test_a_page_is_sound_and_loads_nothing(pages, which):
    report = pages[which]
    text = report.html()
    page = assert_safe(text)
    assert text == report.html(), "the same report is the same file"
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:])), "no heading is skipped"
    assert all(attrs.get("alt") and attrs["width"].isdigit() for attrs, _ in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a.get("scope") in ("row", "col") for a, _ in page.all("th"))
    assert len(set(page.ids)) == len(page.ids) and {a["href"][1:] for a, _ in page.all("a")} == set(page.ids)
    assert page.all("html")[0][0]["lang"] == "en" and page.all("title") and page.all("main") and page.all("details")
    words = "".join(page.text)
    assert "What this report does not show" in words and "Configuration and provenance" in words
    assert report.before.record["sha256"] in words
    assert "nan" not in re.sub("[0-9a-f]{40,}", "", words).lower().split()
    assert not {"class", "style"} & set(re.findall(r"<(\w+)>", words))


def test_the_verdict_comes_first_and_says_what_was_found(pages):
    words = lambda which: text_of(pages[which])
    opening = r"Does by colour lean on the background\?.{0,80}▲ leans on the background ?Yes\. .*?0 of 100.*?100"
    assert re.search(opening, words("pair"))
    assert "The gap has shrunk: 0 points, a change of −100" in words("pair") and "✓ better" in words("pair")
    assert "These pictures cannot tell." in words("blind") and "Object masks are missing" in words("blind")
    assert "need object masks" in words("blind")
    reverse = text_of(Report(pages["pair"].after, pages["pair"].before))
    assert "No. " in reverse and "The gap has grown" in reverse and "✗ worse" in reverse
    assert "Measurably worse than before" in reverse


def test_numbers_on_the_page_are_those_of_the_audit(pages):
    report = pages["vits"]
    words = "".join(Page(report.html()).text)
    for row in report.before.numbers.query("split == 'all'").itertuples():
        if row.metric in ("accuracy", "other_background", "off_object"):
            assert f"{row.value:.0f}\u00a0%" in words and f"[{row.low:.0f}, {row.high:.0f}]" in words
    gap = numbers_of(report.before.numbers)["all"]["gap"]
    assert f"{gap.points()} points" in words and gap.interval(True) in words
    assert "today" in words and "rate 0.1" in words and "loss" not in words


def test_hostile_names_stay_text(tmp_path, world):
    names = (f"a{EVIL}", "two", "three")
    hostile = replace(world, classes=names, set_aside=(f"{EVIL}.jpg: broken",))
    model = ByColour(True)
    model.pretrained_cfg = {**ByColour.pretrained_cfg, "architecture": EVIL}
    before, after = (audit(m, hostile, progress=False) for m in (model, ByColour(False)))
    for found in (before, after):
        found.pictures["id"] = [f"{EVIL}/{i}" for i in found.pictures["id"]]
        for column in ("own_from", "other_from"):
            found.pictures[column] = [f"{EVIL}/{i}" for i in found.pictures[column]]
    honest = audit(model, hostile, progress=False)
    before.look = after.look = lambda picture: honest.look(picture.removeprefix(f"{EVIL}/"))
    report = Report(before, after, run={EVIL: {EVIL: [EVIL]}}, command=EVIL, made=EVIL)
    text = report.html()
    page = assert_safe(text)
    words = "".join(page.text)
    assert words.count(EVIL) > 10 and "<script>alert(1)" not in text
    assert_safe(f"<meta content=\"default-src 'none'\">{report._repr_html_()}")
    assert json.loads(report.to_json())["record"]["model"] == EVIL


def test_names_are_set_apart(pair):
    folder = replace(pair[0].images.folder, classes=('a<"b\u202e', "two", "three"))
    text = Report(audit(ByColour(True), folder, progress=False), worst=1, random=1).html()
    assert text.count("<bdi>a&lt;&#34;b\u202e</bdi>") > 3 and 'a<"b' not in text
    assert 'alt="A picture of a&lt;&#34;b\u202e, as it is' in text
    assert 'data-label="named the background&#39;s class"' in text


def test_every_value_is_escaped_by_the_environment():
    for name in ("report.html.j2", "audit.html.j2", "case.html.j2"):
        template = html_template(name)
        assert template.environment.autoescape is True and template is html_template(name)
        with pytest.raises(UndefinedError):
            template.render()
        assert not re.search(r"\|\s*safe\b|autoescape", (ASSETS / "report" / name).read_text(encoding="utf-8"))
    for module in (report_module, audit_module):
        assert not re.search(r"</\w|<(p|b|td|div|span|img)\b", inspect.getsource(module)), "markup is for templates"


def test_a_class_may_be_called_all(pair):
    folder = replace(pair[0].images.folder, classes=("all", "two", "three"))
    both = (audit(ByColour(corner), folder, progress=False) for corner in (True, False))
    text = Report(*both, worst=1, random=1).html()
    row = re.search('<bdi>all</bdi></th><td data-label="pictures"><div>5</div>.*?</tr>', re.sub(r">\s+<", "><", text))
    assert row and row[0].count("badge") == 2


def test_pictures_are_bounded(pages):
    noise = torch.rand(3, 1500, 1500, generator=torch.Generator().manual_seed(0))
    assert len(data_uri(overlay(noise))) < 60_000
    for report in (pages["vits"], Report(pages["vits"].before, worst=2, random=1)):
        n = len(re.findall("data:image/jpeg;base64,", report.html()))
        assert n <= 5 + 6 * report.worst + 3 * report.random


def test_a_thousand_classes_stay_readable(vits):
    many = replace(vits[0])
    birds = vits[0].numbers.query("split == 'class bird'")
    many.numbers = pd.concat([vits[0].numbers, *(birds.assign(split=f"class bird {i}") for i in range(200))])
    page = Page(Report(many, worst=0, random=1).html())
    assert sum("more classes are in the table of all numbers" in t for t in page.text) == 2


def contrast(a, b):
    """WCAG 2: ratio of relative luminances."""
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_enough(palette):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for text in ("ink", "soft", "after", "bad", "warn", "good"):
        for ground in ("paper", "ground"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    for kind in ("bad", "warn", "good"):
        assert contrast(palette[kind], palette[f"{kind}-ground"]) >= 4.5
    for mark in ("before", "after"):
        assert contrast(palette[mark], palette["paper"]) >= 3


def test_the_sheet_stays_inside_the_report():
    rules = re.sub(r"@media[^{]+\{|@page\s*\{[^}]*\}", "", CSS)
    heads = re.findall(r"([^{}]+)\{[^{}]*\}", rules)
    selectors = [s.strip() for head in heads for s in re.split(r",(?![^(]*\))", head)]
    assert len(selectors) > 80 and not [s for s in selectors if not s.startswith(".cft-report")]
    assert CSS.count("{") == CSS.count("}") and not re.search(r"\{[{%#]", CSS), "nothing in it is a template"


# -- the object -------------------------------------------------------------------------------------------------------


def test_save_and_refusals(pages, tmp_path):
    report = pages["pair"]
    assert report.save(tmp_path / "deep/report.html").read_text(encoding="utf-8") == report.html()
    written = json.loads(report.save(tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["verdict"] == "leans on the background" and written["after"]["verdict"] == report.after.verdict
    assert {row["metric"] for row in written["change"]} >= {"gap", "accuracy"}
    assert all(row["n"] >= 3 for row in written["groups"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "report.json"]
    with pytest.raises(ValueError, match="ends with .html or .json"):
        report.save(tmp_path / "report.pdf")
    with pytest.raises(ValueError, match="at least 0"):
        Report(report.before, random=-1)


def test_shown_in_a_notebook(pages):
    html = pages["vits"]._repr_html_()
    assert html.startswith('<div class="cft-report"><style>') and "All numbers" not in html and " id=" not in html
    assert repr(pages["vits"]).startswith("Report(Audit of 48 pictures") and "; after: " in repr(pages["vits"])
