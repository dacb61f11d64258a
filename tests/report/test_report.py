"""The report: what it tells of runs and caches, what it escapes, and how large it may become."""

from __future__ import annotations

import csv
import html
import io
import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

import ci2p_cache as cc
from ci2p_cache.cache.summary import describe, index_parts
from ci2p_cache.errors import InputDataError, RefusedError, SourceError, UsageError
from ci2p_cache.models.complexity import complexity
from ci2p_cache.models.registry import model_config
from ci2p_cache.pictures.previews import draw_preview
from ci2p_cache.pictures.reconstructions import LatentIllustrator
from ci2p_cache.report import cache_page, charts, run_page
from ci2p_cache.report.html import MAX_BYTES, write_report
from ci2p_cache.runs.statistics import wilson_interval
from ci2p_cache.training.inputs import model_record
from tests.support.nano import nano_models
from tests.support.pictures import write_image_folder
from tests.support.run_records import write_evaluation, write_run
from tests.support.trained import rewrite_json

VAL = "val-epoch-0003-step-000000"
EVIL = "<script>alert(1)</script>\"'&\u202e"


class Page(HTMLParser):
    """A page's elements, texts and balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br") and not self.source.startswith("/>", 0):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another element at {self.getpos()}"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


_DRAWN: dict[bytes, str] = {}


def _once(draw: Callable[..., str]) -> Callable[..., str]:
    def drawn(*args, **options):
        asked = pickle.dumps((draw.__name__, args, options))
        if asked not in _DRAWN:
            _DRAWN[asked] = draw(*args, **options)
        return _DRAWN[asked]

    return drawn


@pytest.fixture(scope="module", autouse=True)
def _charts_once():
    """Draws a chart once for the same values: most tests look at the words beside it."""
    with pytest.MonkeyPatch.context() as patch:
        for page in (cache_page, run_page):
            for name in charts.__all__:
                if name in vars(page) and name.endswith(("chart", "histogram")):
                    patch.setattr(page, name, _once(getattr(charts, name)))
        yield
    _DRAWN.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with a bad one among them, and their cache; read only."""
    root = tmp_path_factory.mktemp("report")
    source = write_image_folder(root / "images", {"ant": 9, "bee": 8, "cat": 7})
    (source / "bee" / "broken.jpg").write_bytes((source / "bee" / "000.jpg").read_bytes()[:300])
    options = cc.EncodeOptions(
        encoder="bundled", size=64, val_fraction=0.4, split="hashed", shard_samples=8,
        max_errors="1",
    )  # fmt: skip
    cc.encode(source, root / "shards", options)
    return root


@pytest.fixture(scope="module")
def cache(folder):
    return cc.open_cache(folder / "shards")


def keys_of(split) -> dict[int, str]:
    found: dict[int, str] = {}
    for table in index_parts(split, ["row", "key"]):
        found.update(zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True))
    return found


def evaluated(path: Path, cache, *, wrong: int = 2, seed: int = 0) -> Path:
    """A run with that cache, of which the first `wrong` validation images are classified wrong."""
    run = write_run(path, cache=cache, seed=seed)
    split = cache["val"]
    rows = split.valid_rows
    labels = split.labels[rows]
    predicted = np.where(np.arange(len(rows)) < wrong, (labels + 1) % 3, labels)
    keys = keys_of(split)
    write_evaluation(
        run, rows=rows, keys=[keys[int(row)] for row in rows], labels=labels,
        predicted=predicted, confidence=np.linspace(0.95, 0.4, len(rows)), cache=str(cache.path),
    )  # fmt: skip
    return run


def test_a_run_and_its_cache_are_told_in_one_page_that_loads_nothing(folder, cache, tmp_path):
    run = evaluated(tmp_path / "runs" / "mine", cache)
    out = tmp_path / "deep" / "report.html"
    summary = write_report([run, cache.path], out, illustrator=LatentIllustrator())
    page = Page(out)
    assert not page.open
    assert (summary.runs, summary.bytes) == (("mine",), out.stat().st_size)
    for told in (
        "vitds_tiny", "best top-1", "waiting for data", "Where the time of an epoch goes",
        "Most confident mistakes", "Confusion matrix: rows", "Expected calibration error",
        "Learning rate", "L2 norm of all gradients", "learning rate, 1e-3",
        *describe(cache).size_words[1:],
        "Accuracy per class", cache.fingerprint.digest, "entropy bound", "JPEG, quality 90",
        "float16", "Worst by PSNR", "Drawn at random", "Energy of the", "broken.jpg",
        "Images per class", "saturated",
    ):  # fmt: skip
        assert told in page.text or told in page.source, told
    # Two mistakes; pairs of an original and a reconstruction of all that there are.
    assert 6 < len(cache["val"].valid_rows) <= 9
    pictures = [given for tag, given in page.tags if tag == "img"]
    assert len(pictures) == 2 + 2 * len(cache["val"].valid_rows)
    assert all(
        given["alt"] and str(given["src"]).startswith("data:image/jpeg") for given in pictures
    )
    assert page.count("script") == page.count("link") == 0
    links = [given["href"] or "" for _, given in page.tags if "href" in given]
    assert links
    assert all(link.startswith("#") for link in [*links, *re.findall(r"url\((.)", page.source)])
    assert "http" not in re.sub(r"base64,[^\"]*|http-equiv", "", page.source)
    assert "default-src 'none'" in page.source
    charts = [given for tag, given in page.tags if tag == "svg"]
    assert len(charts) >= 8
    assert all(given["aria-label"] and given["role"] == "img" for given in charts)
    tables = page.count("table")
    assert page.count("caption") == page.count("thead") == tables > 5
    assert all("scope" in given for tag, given in page.tags if tag == "th")
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))


def test_the_figures_are_those_of_the_cache(cache, tmp_path):
    sample = LatentIllustrator(num_samples=5).measure(cache, num_shown=1)
    assert sample is not None
    assert sample.split == "val"
    assert [one.group for one in sample.shown] == ["worst", "median", "random"]
    rows = [row.row for row in sample.rows]
    assert len(set(rows)) == 5
    told = draw_preview(cache, tmp_path / "look.png", split="val", rows=rows).samples
    for row, other in zip(sample.rows, told, strict=True):
        assert row.psnr_db[0] == pytest.approx(other.psnr_db[0], abs=1e-4)
        assert row.bpp[0] == pytest.approx(other.bpp[0])
        assert row.stored_bytes[0] == other.stored_bytes[0]
        assert (row.key, row.class_title) == (other.key, other.class_title)
    assert len(sample.jpeg_bytes) == 5
    assert min(sample.jpeg_bytes) > 500
    worst = min(row.psnr_db[0] for row in sample.rows if row.psnr_db[0] is not None)
    assert sample.shown[0].measured.psnr_db[0] == worst


def test_the_same_runs_and_caches_give_the_same_bytes(folder, cache, tmp_path):
    run = evaluated(tmp_path / "mine", cache)
    # Without a suffix, and with one in capitals.
    pages = [tmp_path / name for name in ("a", "b.HTML")]
    for page in pages:
        _DRAWN.clear()
        write_report([run, cache.path], page, illustrator=LatentIllustrator(num_samples=3))
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_hostile_names_are_shown_and_never_obeyed(cache, tmp_path):
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", classes=(EVIL, "b", "c"), note=EVIL)
    write_evaluation(
        run, rows=[0, 1, 2, 3], keys=[EVIL, "</figcaption>", "x" * 10**5, "\udcff".encode(
            "utf-8", "replace").decode()],
        labels=[0, 0, 1, 2], predicted=[1, 0, 1, 0], confidence=[0.9, 0.8, 0.7, 0.6], split=EVIL,
    )  # fmt: skip
    args = yaml.safe_load((run / "args.yaml").read_text())
    args["cache"] = args["numerics"]["device"] = f"{EVIL}/shards"
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    out = tmp_path / "r.html"
    write_report([run, write_run(tmp_path / "two")], out)
    page = Page(out)
    assert not page.open
    assert page.count("script") == page.count("img") == 0
    assert "<script" not in page.source
    assert "<img" not in page.source
    assert not any(name.startswith("on") for _, given in page.tags for name in given)
    assert "\u202e" not in page.source
    assert "<script>alert(1)</script>\"'&\\u202e" in page.text
    assert out.stat().st_size < 400_000


def test_what_is_missing_is_named_with_the_command_that_makes_it(cache, tmp_path):
    run = write_run(tmp_path / "mine", cache=cache)
    write_report([run], tmp_path / "r.html")
    text = Page(tmp_path / "r.html").text
    assert f"This run was not evaluated, so classes, confusions and calibration are not known. " \
        f"ci2p-cache evaluate {run}" in text  # fmt: skip
    write_report([cache.path], tmp_path / "c.html")
    assert "Reconstructions and bounds were not asked for" in Page(tmp_path / "c.html").text


def test_mistakes_without_their_cache_are_listed_without_pictures(cache, tmp_path):
    run = evaluated(tmp_path / "mine", cache)
    illustrator = LatentIllustrator()
    for change, told in (("cache", "is not there, or not the run's cache"), ("keys", "other imag")):
        if change == "cache":
            args = yaml.safe_load((run / "args.yaml").read_text())
            args["cache"] = str(tmp_path / "gone")
            (run / "args.yaml").write_text(yaml.safe_dump(args))
            rewrite_json(run / "evaluations" / f"{VAL}.json", cache="gone")
            write_report([run], tmp_path / "r.html", illustrator=illustrator)
        else:
            write_evaluation(
                run, rows=[0, 1], keys=["other/1.jpg", "other/2.jpg"], labels=[0, 1],
                predicted=[1, 1], confidence=[0.9, 0.8], cache=str(cache.path),
            )  # fmt: skip
            write_report([run], tmp_path / "r.html", illustrator=illustrator)
        page = Page(tmp_path / "r.html")
        assert told in page.text
        assert page.count("img") == 0
        assert "Most confident mistakes" in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (f"evaluations/{VAL}.json", b"{"),
        (f"evaluations/{VAL}.json", b'{"version": 1}'),
        (f"evaluations/{VAL}.json", b'{"confusion": 3, "bins": [[]]}'),
        (f"evaluations/{VAL}.parquet", b"PAR1 and no more"),
        ("evaluation.json", b"{"),
        ("model.json", b"[]"),
    ],
)
def test_a_damaged_piece_is_named_and_the_rest_is_told(cache, tmp_path, name, content):
    run = evaluated(tmp_path / "mine", cache)
    (run / name).write_bytes(content)
    write_report([run], tmp_path / "r.html")
    text = Page(tmp_path / "r.html").text
    assert f"{Path(name).name} is damaged" in text
    assert "best top-1" in text


def test_without_its_source_a_cache_still_shows_what_it_decodes_to(folder, cache, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "moved")
    moved = LatentIllustrator(source=tmp_path / "moved", num_samples=2).measure(cache, num_shown=1)
    assert moved is not None
    assert all(row.source == "unchanged" for row in moved.rows)
    with pytest.raises(SourceError, match="nowhere"):
        nowhere = LatentIllustrator(source=tmp_path / "nowhere")
        write_report([cache.path], tmp_path / "r.html", illustrator=nowhere)
    for path in (tmp_path / "moved").rglob("*.jpg"):
        path.unlink()
    illustrator = LatentIllustrator(source=tmp_path / "moved", num_samples=4)
    write_report([cache.path], tmp_path / "r.html", illustrator=illustrator)
    page = Page(tmp_path / "r.html")
    assert "The source images were not found" in page.text
    assert "Worst by PSNR" not in page.text
    assert page.count("img") == 3


class TestWhatMadeARun:
    def test_the_command_date_and_parameters_are_those_of_the_run(self, run, cache, tmp_path):
        with nano_models():
            made = run(
                "train", cache.path, "--model", "vitds_nano", "--epochs", 1, "--batch-size", 8,
                "--pos-embed", "--ema", 0.5, "--out", tmp_path / "my runs", "--device", "cpu",
            )  # fmt: skip
            assert made.code == 0, made.err
            (folder,) = (tmp_path / "my runs").iterdir()
            model = cc.create_model("vitds_nano", num_classes=3, latent_size=4, pos_embed=True)
            summary = folder / "summary.csv"
            before = summary.read_bytes()
            os.utime(summary, (0, 86_400))
            write_report([folder], tmp_path / "r.html")
            page = Page(tmp_path / "r.html")
            shown = re.search(r'<code class="typed">(ci2p-cache train .*?)</code>', page.source)
            assert shown is not None
            again = run(*shlex.split(html.unescape(shown[1]))[1:], "--device", "cpu")
        # The same settings: they continue the run, which has ended.
        assert again.code == 0, again.err
        assert "old name" not in again.err
        assert summary.read_bytes() == before
        assert "last written 1970-01-02 00:00 UTC" in page.text
        trained = sum(each.numel() for each in model.parameters())
        frozen = complexity("vitds_tiny", size=64).encoder_parameters
        assert f"parameters {(trained + frozen) / 1e6:.2f} M {trained:,} trained" in page.text

    def test_what_no_option_sets_is_said_and_the_encoder_in_the_loop_is_an_option(self, tmp_path):
        mine = write_run(tmp_path / "mine", betas=[0.5, 0.9], decay_norm_and_bias=True)
        args = yaml.safe_load((mine / "args.yaml").read_text())
        args["settings"]["loader"] = "OnlineLoader"
        (mine / "args.yaml").write_text(yaml.safe_dump(args))
        write_report([mine], tmp_path / "r.html")
        shown = "--from-images (no option sets decay_norm_and_bias yes, betas 0.5, 0.9)"
        assert shown in Page(tmp_path / "r.html").text
        assert "The number of parameters is not known" in Page(tmp_path / "r.html").text

    @pytest.mark.parametrize(
        ("model", "encoder", "told"),
        [
            ({}, None, "parameters - 6,352,227 trained; the run has no copy of its g_a"),
            ({}, b"none", "encoder.safetensors cannot be read"),
            ({"depths": [10**9, 1]}, None, "1,000,000,001 blocks; up to 1,000 are counted"),
            ({"embed_dims": [10**18, 16]}, None, "model.json is damaged"),
        ],
    )
    def test_parameters_that_cannot_be_counted_are_a_remark(
        self, cache, tmp_path, model, encoder, told
    ):
        mine = write_run(tmp_path / "mine", cache=cache)
        record = model_record(cache, model_config("vitds_tiny", num_classes=3, latent_size=4))
        record["model"] |= model
        (mine / "model.json").write_text(json.dumps(record))
        if encoder is not None:
            (mine / "encoder.safetensors").write_bytes(encoder)
        write_report([mine], tmp_path / "r.html")
        assert told in Page(tmp_path / "r.html").text


class TestConfusionMatrix:
    def drawn(self, tmp_path: Path, num_classes: int, labels, predicted) -> Page:
        classes = tuple(f"kind {number}" for number in range(num_classes))
        run = write_run(tmp_path / "mine", classes=classes)
        write_evaluation(
            run, rows=range(len(labels)), keys=[str(i) for i in range(len(labels))], labels=labels,
            predicted=predicted, confidence=np.full(len(labels), 0.5),
        )  # fmt: skip
        write_report([run], tmp_path / "r.html")
        return Page(tmp_path / "r.html")

    def test_it_has_the_shares_of_each_true_class(self, tmp_path):
        labels = [0] * 300 + [1] * 4 + [2] * 2
        predicted = [0] * 299 + [2] + [1, 1, 1, 0] + [2, 2]
        page = self.drawn(tmp_path, 3, labels, predicted)
        (drawing,) = re.findall(r'<svg class="matrix".*?</svg>', page.source)
        texts = re.findall(r"<text [^>]*>([^<]*)<", drawing)
        assert sorted(texts[8:]) == sorted(["100", "&lt;1", "75", "25", "100"])
        # Column and row of each cell, the palest first.
        shades = re.findall(r'fill-opacity="([\d.]+)" d="(.*?)"', drawing)
        cells = [sorted(re.findall(r"M(\d) (\d)", where)) for _, where in shades]
        assert cells == [[("2", "0")], [("0", "1")], [("1", "1")], [("0", "0"), ("2", "2")]]
        assert "25.0% of kind 1, taken for kind 0" in page.text
        assert "Most frequent confusions" not in page.text

    @pytest.mark.parametrize(("count", "is_drawn"), [(50, True), (51, False)])
    def test_of_more_than_fifty_classes_the_most_frequent_are_listed(
        self, tmp_path, count, is_drawn
    ):
        labels = np.repeat(np.arange(count), 2)
        predicted = np.where(np.arange(2 * count) % 2, labels, (labels + 1) % count)
        page = self.drawn(tmp_path, count, labels, predicted)
        assert ('<svg class="matrix"' in page.source) == is_drawn
        assert ("Most frequent confusions" in page.text) != is_drawn


class TestTables:
    @pytest.fixture
    def runs(self, cache, tmp_path):
        """One evaluated at its last and best checkpoint, and one whose cache is gone."""
        odd = write_run(tmp_path / "a|b_50%&[x]\\", cache=cache)
        (odd / "checkpoints").mkdir()
        (odd / "checkpoints" / "last.json").write_text(json.dumps({"best": VAL[4:], "last": LAST}))
        for checkpoint, right in ((VAL[4:], 8), (LAST, 7)):
            scored(odd, right, checkpoint=checkpoint)
        return [odd, write_run(tmp_path / "*plain--@1", model="vit_tiny")]

    def test_csv_has_shares_and_their_intervals(self, run, cache, runs):
        ran = run("report", *runs, "--table", "csv")
        assert ran.code == 0, ran.err
        first, second = csv.DictReader(io.StringIO(ran.out))
        wanted = {
            "run": "a|b_50%&[x]\\", "model": "vitds_tiny", "epochs": "3", "dtype": "int8",
            "codec": "zstd", "last_top1": "0.7", "last_top1_low": "0.0", "best_top1": "0.8",
            "best_top1_high": "1.0", "bytes_per_view": str(describe(cache).bytes_per_view),
            "parameters": "",
        }  # fmt: skip
        assert {name: first[name] for name in wanted} == wanted
        assert (second["run"], second["codec"], second["best_top1_low"]) == ("*plain--@1", "", "")
        assert float(second["last_top1"]) == pytest.approx(0.8, abs=0.03)

    @pytest.mark.parametrize("first", "=+-@")
    def test_a_spreadsheet_computes_no_name(self, run, tmp_path, first):
        ran = run("report", write_run(tmp_path / f"{first}1+1"), "--table", "csv")
        assert next(csv.DictReader(io.StringIO(ran.out)))["run"] == f"'{first}1+1"

    def test_markdown_and_latex_escape_what_is_special_there(self, run, runs):
        ran = run("report", *runs, "--table", "markdown")
        head, rule, first, second = ran.out.splitlines()
        assert first.startswith(r"| a\|b\_50%\&\[x\]\\ | vitds\_tiny | - | - | 3 | int8 | zstd |")
        assert "| 70.0 [0.0, 100.0] | 80.0 [0.0, 100.0] |" in first
        assert second.startswith(r"| \*plain--@1 | vit\_tiny |")
        pipes = [re.sub(r"\\.", "", line).count("|") for line in (head, rule, first, second)]
        assert pipes == [11] * 4
        ran = run("report", *runs, "--table", "latex")
        begin, _, _, _, first, second, _, end = ran.out.splitlines()
        assert (begin, end) == (r"\begin{tabular}{llrrrllrrr}", r"\end{tabular}")
        assert first.startswith(r"a\textbar{}b\_50\%\&{[}x]\textbackslash{} & vitds\_tiny & ")
        assert second.startswith("{*}plain-{}-@1 & ")
        assert second.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", first)) == 9

    def test_a_file_is_written_where_an_earlier_table_may_be(self, run, runs, tmp_path):
        out = tmp_path / "t.tex"
        for _ in range(2):
            ran = run("report", *runs, "--table", "latex", "--out", out)
            assert (ran.code, ran.out) == (0, f"written: {out}\n")
        assert out.read_text() == run("report", *runs, "--table", "latex").out
        out.write_text("my thesis")
        ran = run("report", *runs, "--table", "latex", "--out", out)
        assert (ran.code, out.read_text()) == (4, "my thesis")
        for words in (("--out", tmp_path / "t.csv"), ("--json",)):
            assert run("report", *runs, "--table", "markdown", *words).code == 2

    @pytest.fixture
    def seeds(self, tmp_path):
        """Two configurations, one of two seeds and one of one; 100 images."""
        labels, rows = [0, 1] * 50, list(range(100))
        made = []
        for name, seed, lr, right in (("a0", 0, 0.1, 60), ("a1", 1, 0.1, 70), ("b0", 0, 0.2, 90)):
            made.append(write_run(tmp_path / name, seed=seed, lr=lr))
            predicted = [label if row < right else 1 - label for row, label in enumerate(labels)]
            write_evaluation(
                made[-1], rows=rows, keys=[f"{row}.jpg" for row in rows], labels=labels,
                predicted=predicted, confidence=[0.9] * 100,
            )  # fmt: skip
        return made

    def test_over_seeds_each_configuration_has_a_row(self, run, seeds, tmp_path):
        ran = run("report", *seeds, "--table", "csv", "--over-seeds")
        assert ran.code == 0, ran.err
        first, second = csv.DictReader(io.StringIO(ran.out))
        assert (first["runs"], first["seeds"], second["runs"]) == ("a0, a1", "2", "b0")
        assert float(first["mean_top1"]) == pytest.approx(0.65)
        assert float(first["deviation_top1"]) == pytest.approx(0.05 * 2**0.5)
        assert (first["over_first"], first["over_first_low"]) == ("", "")
        assert (second["seeds"], second["mean_top1"], second["deviation_top1"]) == ("1", "0.9", "")
        gains = [float(second[f"over_first{end}"]) for end in ("_low", "", "_high")]
        # 20 images gain a whole point, ten half of one.
        assert gains == pytest.approx([0.17, 0.25, 0.33], abs=0.015)
        out = tmp_path / "t.md"
        assert run("report", *seeds, "--table", "markdown", "--over-seeds", "--out", out).code == 0
        _, _, first, second = out.read_text().splitlines()
        assert "| 2 | 65.0 | 7.1 | - |" in first
        assert re.search(r"\| 1 \| 90\.0 \| - \| \+25\.0 \[\+1\d\.\d, \+3\d\.\d\] \|", second)
        ran = run("report", *seeds, "--table", "latex", "--over-seeds")
        assert "2 & 65.0 & 7.1 & - &" in ran.out
        ran = run("report", seeds[0], seeds[2], "--table", "csv", "--over-seeds")
        assert (ran.code, "differ in their seed alone" in ran.err) == (3, True)
        assert run("report", *seeds, "--over-seeds").code == 2

    def test_seeds_without_validation_are_no_configuration(self, run, seeds, tmp_path):
        for path in (write_run(tmp_path / name, seed=i) for i, name in enumerate("cd")):
            head, *rows = (path / "summary.csv").read_text().splitlines()
            place = head.split(",").index("val_loss")
            cells = [row.split(",") for row in rows]
            blank = [",".join([*row[:place], "", "", "", *row[place + 3 :]]) for row in cells]
            (path / "summary.csv").write_text("\n".join([head, *blank, ""]))
            seeds.append(path)
        out = tmp_path / "r.html"
        assert run("report", *seeds, "--out", out).code == 0
        ran = run("report", *seeds, "--table", "csv", "--over-seeds")
        assert (ran.code, "was not validated" in ran.err) == (3, True)

    def test_a_table_of_no_run_is_refused(self, run, cache, tmp_path):
        assert "no run folder is given" in run("report", cache.path, "--table", "csv").err
        begun = without_epochs(tmp_path / "begun", has_summary=True)
        ran = run("report", write_run(tmp_path / "a"), begun, "--table", "csv")
        assert (ran.code, ran.out) == (3, "")


class TestSeveralRuns:
    def test_runs_are_compared_image_by_image_with_the_settings_that_differ(self, cache, tmp_path):
        runs = [
            evaluated(tmp_path / "base", cache, wrong=3),
            evaluated(tmp_path / "better", cache, wrong=0, seed=1),
            write_run(tmp_path / "plain", cache=cache, model="vit_tiny"),
        ]
        write_report(runs, tmp_path / "r.html")
        page = Page(tmp_path / "r.html")
        count = len(cache["val"].valid_rows)
        assert "3 runs compared" in page.text
        assert f"{300 / count:+.1f} [" in page.text
        assert "Settings that differ" in page.text
        assert "vit_tiny" in page.text
        assert "Not evaluated, or without predictions: plain." in page.text
        differing = page.source[page.source.index("<h3>Settings that differ") :]
        head = differing[: differing.index("</thead>")]
        assert ">model<" in head
        assert ">seed<" in head
        assert ">betas<" not in head

    @pytest.mark.slow
    def test_runs_on_other_images_are_not_compared_image_by_image(self, cache, tmp_path):
        runs = [evaluated(tmp_path / name, cache) for name in ("base", "other")]
        write_evaluation(
            runs[1], rows=[0, 1], keys=["x", "y"], labels=[0, 1], predicted=[0, 1],
            confidence=[0.5, 0.5],
        )  # fmt: skip
        write_report(runs, tmp_path / "r.html")
        text = Page(tmp_path / "r.html").text
        assert "Evaluated on other images than base" in text

    def test_an_interval_covers_the_truth_about_as_often_as_it_says(self):
        rng = np.random.default_rng(3)
        inside = 0
        for _ in range(200):
            low, high = wilson_interval(int((rng.uniform(size=120) < 0.7).sum()), 120)
            inside += low <= 0.7 <= high
        assert 180 <= inside <= 200

    @pytest.mark.slow
    def test_many_classes_epochs_and_runs_stay_under_five_megabytes(self, tmp_path):
        classes = tuple(f"a class with a rather long name, number {i}" for i in range(1000))
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(1000), 10)
        runs = []
        for number in range(13):
            run = write_run(tmp_path / f"run-{number}", epochs=300, classes=classes, seed=number)
            predicted = np.where(rng.uniform(size=10_000) < 0.6, labels, rng.permutation(labels))
            write_evaluation(
                run, rows=np.arange(10_000), keys=[f"{i:05d}.jpg" for i in range(10_000)],
                labels=labels, predicted=predicted, confidence=rng.uniform(0.2, 1, 10_000),
            )  # fmt: skip
            runs.append(run)
        summary = write_report(runs, tmp_path / "r.html")
        assert summary.bytes < MAX_BYTES
        text = Page(tmp_path / "r.html").text
        assert "The 15 worst and the 15 best of 1,000 classes" in text
        assert "Most frequent confusions" in text
        assert "Only the first 12 of 13 runs have a section of their own" in text


def scored(run: Path, right: int, **about) -> Path:
    """An evaluation of ten images, so many of which are classified right."""
    labels = np.zeros(10, int)
    predicted = (np.arange(10) >= right).astype(int)
    return write_evaluation(
        run, rows=range(10), keys=[f"{i}.jpg" for i in range(10)], labels=labels,
        predicted=predicted, confidence=np.linspace(0.5, 0.9, 10), **about,
    )  # fmt: skip


LAST = "epoch-0009-step-000000"


class TestSeveralEvaluations:
    def told(self, run: Path, tmp_path: Path) -> str:
        write_report([run], tmp_path / "r.html")
        return Page(tmp_path / "r.html").text

    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        return write_run(tmp_path / "mine")

    def test_the_train_split_does_not_take_the_place_of_validation(self, run_dir, tmp_path):
        scored(run_dir, 6)
        before = self.told(run_dir, tmp_path)
        scored(run_dir, 10, split="train")
        text = self.told(run_dir, tmp_path)
        for part in ("10 images of val; 95 % interval", "evaluated top-1 60.0%"):
            assert part in before
            assert part in text
        assert "All evaluations" not in before
        assert "All evaluations" in text
        assert "train epoch-0003-step-000000 the run's cache 10 100.0%" in text

    def test_the_latest_checkpoint_comes_before_others_and_own_images_before_others(
        self, run_dir, tmp_path
    ):
        scored(run_dir, 10, split="train")
        assert "evaluated top-1 100.0%" in self.told(run_dir, tmp_path)
        scored(run_dir, 2, is_own=False, split="test", cache="elsewhere")
        assert "evaluated top-1 20.0%" in self.told(run_dir, tmp_path)
        scored(run_dir, 8)
        assert "evaluated top-1 80.0%" in self.told(run_dir, tmp_path)
        scored(run_dir, 7, checkpoint=LAST)
        text = self.told(run_dir, tmp_path)
        assert "evaluated top-1 70.0%" in text
        assert "test epoch-0003-step-000000 elsewhere 10 20.0%" in text

    def test_a_run_of_an_earlier_version_stays_readable(self, run_dir, tmp_path):
        scored(run_dir, 5, is_old=True)
        text = self.told(run_dir, tmp_path)
        assert "evaluated top-1 50.0%" in text
        assert "Most confident mistakes" in text
        scored(run_dir, 9, split="train")
        assert "evaluated top-1 50.0%" in self.told(run_dir, tmp_path)
        # What is evaluated again comes before it, and it is not told twice.
        scored(run_dir, 6)
        text = self.told(run_dir, tmp_path)
        assert "evaluated top-1 60.0%" in text
        assert text.count("the run's cache 10") == 2

    def test_runs_are_compared_by_validation_whatever_was_evaluated_last(self, tmp_path):
        runs = [write_run(tmp_path / name) for name in ("base", "other")]
        for run, right in zip(runs, (5, 8), strict=True):
            scored(run, right)
            scored(run, 10, split="train")
        write_report(runs, tmp_path / "r.html")
        assert "+30.0 [" in Page(tmp_path / "r.html").text

    def test_links_and_numbers_of_files_are_bounded(self, run_dir, tmp_path):
        path = scored(run_dir, 6)
        path.with_name("zz-link.json").symlink_to(path)
        assert "is a link" in self.told(run_dir, tmp_path)
        for number in range(70):
            shutil.copy(path, path.with_name(f"val-{number:02d}.json"))
        assert "Of 72 evaluations the first 64 are shown" in self.told(run_dir, tmp_path)
        shutil.move(path.parent, tmp_path / "moved")
        path.parent.symlink_to(tmp_path / "moved")
        assert "This run was not evaluated" in self.told(run_dir, tmp_path)


def without_epochs(path: Path, *, has_summary: bool) -> Path:
    """A run whose first epoch has not ended."""
    run = write_run(path)
    summary = run / "summary.csv"
    summary.write_text(summary.read_text().splitlines()[0] + "\n")
    if not has_summary:
        summary.unlink()
    return run


class TestRunsWithoutEpochs:
    @pytest.mark.parametrize("has_summary", [True, False])
    def test_they_are_left_out_with_a_remark(self, run, tmp_path, has_summary):
        done = write_run(tmp_path / "done")
        begun = without_epochs(tmp_path / "begun", has_summary=has_summary)
        out = tmp_path / "r.html"
        ran = run("report", begun, done, "--out", out, "--json")
        assert ran.code == 0, ran.err
        told = json.loads(ran.out)
        assert (told["runs"], told["skipped"]) == (["done"], [str(begun)])
        assert f"{begun} is left out: no epoch of it has ended yet" in ran.err.replace("\n", " ")
        assert "Run begun is left out: it has no epoch yet." in Page(out).text

    def test_beside_a_cache_alone_too(self, cache, tmp_path):
        begun = without_epochs(tmp_path / "begun", has_summary=True)
        summary = write_report([begun, cache.path], tmp_path / "r.html")
        assert (summary.runs, len(summary.caches)) == ((), 1)

    @pytest.mark.parametrize("has_summary", [True, False])
    def test_a_report_of_nothing_else_is_refused(self, tmp_path, has_summary):
        begun = without_epochs(tmp_path / "begun", has_summary=has_summary)
        with pytest.raises(InputDataError, match=r"no epoch"):
            write_report([begun], tmp_path / "r.html")
        assert not (tmp_path / "r.html").exists()

    def test_a_damaged_summary_is_no_run_without_epochs(self, tmp_path):
        damaged = write_run(tmp_path / "damaged")
        (damaged / "summary.csv").write_text("epoch,loss\n1,\n")
        with pytest.raises(InputDataError, match="is damaged"):
            write_report([write_run(tmp_path / "done"), damaged], tmp_path / "r.html")


class TestWhereItIsWritten:
    @pytest.fixture
    def mine(self, tmp_path: Path) -> Path:
        return write_run(tmp_path / "mine")

    @pytest.mark.parametrize("name", ["report.pdf", "report.md", "notes.txt", "summary.csv"])
    def test_another_suffix_is_refused(self, run, mine, tmp_path, name):
        (tmp_path / name).write_text("precious")
        ran = run("report", mine, "--out", tmp_path / name)
        assert ran.code == 2
        assert "does not end in .htm or .html" in " ".join(ran.err.split())
        assert (tmp_path / name).read_text() == "precious"

    def test_only_an_earlier_report_is_replaced(self, run, mine, tmp_path):
        out = tmp_path / "page.html"
        assert run("report", mine, "--out", out).code == 0
        assert run("report", mine, "--out", out).code == 0
        out.write_text("<!doctype html><title>another page</title>")
        ran = run("report", mine, "--out", out)
        assert ran.code == 4
        assert "is no report of ci2p-cache; nothing was changed" in " ".join(ran.err.split())
        assert "another page" in out.read_text()

    def test_folders_above_it_are_made_and_a_folder_in_its_place_is_refused(self, mine, tmp_path):
        write_report([mine], tmp_path / "a" / "b" / "r.html")
        with pytest.raises(UsageError, match="is a folder; wanted a file"):
            write_report([mine], tmp_path / "a")
        (tmp_path / "c.html").mkdir()
        with pytest.raises(UsageError, match="is a folder; wanted a file"):
            write_report([mine], tmp_path / "c.html")

    def test_a_cache_holds_no_report(self, cache, mine):
        for out in (cache.path / "r.html", cache.path / "index" / "deep" / "r.html"):
            with pytest.raises(UsageError, match="is in the cache"):
                write_report([mine], out)

    def test_a_link_is_replaced_and_what_it_leads_to_is_not(self, mine, tmp_path):
        (tmp_path / "there.html").write_text("precious")
        (tmp_path / "r.html").symlink_to("there.html")
        write_report([mine], tmp_path / "r.html")
        assert (tmp_path / "there.html").read_text() == "precious"
        assert not (tmp_path / "r.html").is_symlink()

    def test_a_pipe_in_its_place_is_not_waited_for(self, mine, tmp_path):
        os.mkfifo(tmp_path / "r.html")
        with pytest.raises(RefusedError, match="is no report"):
            write_report([mine], tmp_path / "r.html")


class TestCommand:
    def test_it_writes_and_says_so(self, run, cache, tmp_path):
        mine = write_run(tmp_path / "mine", cache=cache)
        out = tmp_path / "r.html"
        ran = run("report", mine, cache.path, "--out", out, "--no-pictures")
        assert ran.code == 0, ran.err
        assert f"written: {out} (runs: 1, caches: 1; " in ran.out.replace("\n", " ")
        told = json.loads(run("report", mine, "--out", out, "--json").out)
        assert told["runs"] == ["mine"]
        assert told["bytes"] == out.stat().st_size

    def test_what_is_no_run_and_no_cache_is_refused(self, tmp_path):
        with pytest.raises(InputDataError, match="neither a run folder nor a cache"):
            write_report([tmp_path], tmp_path / "r.html")
        with pytest.raises(UsageError, match="0 paths are given"):
            write_report([], tmp_path / "r.html")
        mine = write_run(tmp_path / "mine")
        with pytest.raises(UsageError, match="is given twice"):
            write_report([mine, tmp_path / "." / "mine"], tmp_path / "r.html")
        (mine / "summary.csv").write_text((mine / "summary.csv").read_text().splitlines()[0])
        with pytest.raises(InputDataError, match="no epoch yet"):
            write_report([mine], tmp_path / "r.html")
        (mine / "args.yaml").write_text("a: &a 1\nb: *a\n")
        with pytest.raises(InputDataError, match="aliases"):
            write_report([mine], tmp_path / "r.html")
        assert not (tmp_path / "r.html").exists()
