"""Names completed by tab, by IPython's own completer."""

from __future__ import annotations

import pytest
from IPython.core.completer import IPCompleter, provisionalcompleter

import problems
from nlsq_dask import HybridStreamingConfig, fit_dataset


@pytest.fixture(scope="module")
def completer() -> IPCompleter:
    result = fit_dataset(problems.dataset(*problems.make_decay(2_000)), problems.decay, y="y")
    return IPCompleter(namespace={"result": result})


def offered(completer: IPCompleter, text: str) -> list[str]:
    with provisionalcompleter():
        return [found.text for found in completer.completions(text, len(text))]


def test_parameters_are_offered_as_keys(completer):
    names = list(completer.namespace["result"].shapes)
    assert {*names, "streaming_diagnostics"} <= {
        text.strip("\"']") for text in offered(completer, 'result["')
    }
    assert all(name in " ".join(offered(completer, f'result["{name[:2]}')) for name in names)


def test_every_key_that_is_offered_is_there(completer):
    result = completer.namespace["result"]
    for text in offered(completer, 'result["'):
        assert text.strip("\"']") in result


def test_attributes_are_offered(completer):
    texts = " ".join(offered(completer, "result.conf"))
    assert "confidence_interval" in texts


def test_options_are_offered_by_name(completer):
    completer.namespace["Config"] = HybridStreamingConfig
    assert "distance_tol=" in offered(completer, "Config(dist")
