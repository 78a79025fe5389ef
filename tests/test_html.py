"""What a notebook shows of a fit."""

from __future__ import annotations

import html.parser
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

import problems
from nlsq_dask import FitResult, fit_dataset
from nlsq_dask.results.convergence_svg import convergence_svg

HOSTILE = '<img src=x onerror="alert(1)">&\'</td></table></style><script>alert(2)</script>'
VOID = {"br", "hr", "img", "meta", "link", "input"}


class Document(html.parser.HTMLParser):
    """Elements and text, as a browser's parser finds them; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def result():
    t, y = problems.make_decay(400, seed=1)
    ds = xr.Dataset({"y": ("t", y, {"units": "V"})}, coords={"t": ("t", t, {"units": "s"})})
    return fit_dataset(ds, problems.decay, p0=problems.P0, bounds={"rate": (0, 5)})


def test_it_has_values_errors_units_and_correlations(result):
    document = Document(result._repr_html_())
    texts = document.texts
    assert any(text.startswith("Converged") for text in texts)
    for i, name in enumerate(result.param_names):
        assert name in texts
        assert f"{result.popt[i]:.8g}" in texts
        assert f"± {result.perr[i]:.3g}" in texts
    assert {"V", "s-1", "0 … 5"} <= set(texts)
    correlation = result.correlation.sel(cov_i="rate", cov_j="offset").item()
    assert texts.count(f"{correlation:+.2f}") == 2
    assert "svg" in document.tags
    assert f"{result.history[-1].cost:.9g}" in texts


def test_it_needs_no_scripts_and_touches_nothing_else_of_the_page(result):
    document = Document(result._repr_html_())
    names = {name for name, _ in document.attributes}
    assert not names & {"id", "src", "href"}
    assert not [name for name in names if name.startswith("on")]
    assert not {"script", "img", "iframe", "link"} & set(document.tags)
    style = document.texts[0]
    selectors = [part for rule in style.split("}") for part in rule.partition("{")[0].split(",")]
    assert all(s.strip().startswith(".nlsq-fit") for s in selectors if s.strip())


def test_names_from_strangers_are_text(result, tmp_path):
    data = result.provenance.data
    record = replace(
        data,
        description=HOSTILE,
        y=replace(data.y, name=HOSTILE, units=HOSTILE),
        x=(replace(data.x[0], name=HOSTILE),),
    )
    provenance = replace(
        result.provenance,
        model=f"module.{HOSTILE}",
        model_source=HOSTILE,
        data=record,
        units={HOSTILE: HOSTILE},
    )
    hostile = replace(
        result,
        param_names=(HOSTILE, *result.param_names[1:]),
        shapes={HOSTILE: (), "rate": (), "offset": ()},
        details=HOSTILE,
        loss=HOSTILE,
        covariance_kind=HOSTILE,
        provenance=provenance,
        diagnostics={
            **result.diagnostics,
            "evaluator": HOSTILE,
            "warnings": [HOSTILE],
            "notes": [HOSTILE],
        },
    )
    for fit in (hostile, replace(hostile, pcov=None)):
        fit.save(tmp_path / "hostile.nc")
        text = FitResult.load(tmp_path / "hostile.nc")._repr_html_()
        document = Document(text)
        assert not {"script", "img"} & set(document.tags)
        assert not any(name.startswith("on") for name, _ in document.attributes)
        assert "<img" not in text.replace("&lt;img", "")
        assert sum(HOSTILE in part for part in document.texts) >= 8


def test_it_reads_no_data_and_stays_small(result):
    names = tuple(f"c[{i}]" for i in range(5000))
    many = replace(
        result,
        session=None,
        model=None,
        param_names=names,
        shapes={"c": (5000,)},
        pcov=None,
        **dict.fromkeys(("popt", "p0"), np.ones(5000)),
        **dict.fromkeys(("lower",), np.full(5000, -np.inf)),
        **dict.fromkeys(("upper",), np.full(5000, np.inf)),
        **dict.fromkeys(("is_tied", "active"), np.zeros(5000, bool)),
        is_free=np.ones(5000, bool),
        history=result.history * 200,
    )
    text = many._repr_html_()
    Document(text)
    assert len(text) < 100_000
    assert "and 4,960 more" in text
    pairs = replace(
        many,
        param_names=names[:20],
        shapes={"c": (20,)},
        popt=np.ones(20),
        p0=np.ones(20),
        pcov=np.eye(20) + 0.5,
        is_free=np.ones(20, bool),
        is_tied=np.zeros(20, bool),
    )._repr_html_()
    Document(pairs)
    assert "c[0], c[1]" in pairs


def test_a_fit_that_failed_says_so():
    ds = xr.Dataset({"y": ("t", np.arange(40.0))}, coords={"t": np.arange(40.0)})
    with pytest.warns(match="infinite standard error"):
        fit = fit_dataset(ds, lambda t, a, b, c: (a + b) * t + c)
    texts = Document(fit._repr_html_()).texts
    assert any(text.startswith("NOT CONVERGED. Not unique") for text in texts)
    assert any(text.startswith("Warning: the data determine 2 of 3") for text in texts)
    assert "not determined" in texts


# -- the picture


def test_the_picture_falls_as_the_distances_do(result):
    distances = [1e3, 10.0, 20.0, 1e-4, 0.0, np.nan]
    records = [
        replace(result.history[0], num_passes=i + 1, distance=distance, accepted=i != 2)
        for i, distance in enumerate(distances)
    ]
    svg = ET.fromstring(convergence_svg(records))
    circles = [node for node in svg.iter() if node.tag == "circle"]
    across, down = (np.array([float(c.get(axis)) for c in circles]) for axis in ("cx", "cy"))
    assert len(circles) == 5  # NaN has no place
    assert (np.diff(across) > 0).all()
    assert np.sign(np.diff(down)).tolist() == [1, -1, 1, 1]
    assert [c.get("fill") == "none" for c in circles] == [False, False, True, False, False]
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert (across > 0).all()
    assert (across < width).all()
    assert (down > 0).all()
    assert (down < height).all()
    labels = [node.text for node in svg.iter() if node.tag == "text"]
    assert {"1e-16", "1e0"} <= set(labels)
    # A decade is as long anywhere: the scale is logarithmic.
    np.testing.assert_allclose((down[3] - down[0]) / 7, (down[1] - down[0]) / 2, atol=0.1)


def test_there_is_no_picture_of_nothing(result):
    assert convergence_svg([]) == ""
    assert convergence_svg([replace(result.history[0], distance=np.inf)]) == ""
    many = [replace(result.history[0], num_passes=i) for i in range(1, 300)]
    assert len(list(ET.fromstring(convergence_svg(many)))) < 340


def test_passes_of_a_forged_history_are_no_more_labels(result):
    far = [result.history[0], replace(result.history[0], num_passes=10**15)]
    assert len(list(ET.fromstring(convergence_svg(far)))) < 40
