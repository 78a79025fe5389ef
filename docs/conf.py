"""The documentation site: ``python -m sphinx -W -b html docs docs/_build/html``.

Pages are MyST Markdown; those with ``{code-cell}`` blocks are notebooks, executed at each build.
The reference is made from docstrings.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from nlsq_dask import __version__

project = "nlsq_dask"
author = "The nlsq_dask developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",  # the role `autolink` of single backticks in docstrings
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
smartquotes = False  # "--" of the command line is not a dash
nitpicky = True  # a link within the site that leads nowhere fails the build
is_published = os.environ.get("DOCS_PUBLISH") == "1"  # needs a network, and takes longer

# -- Markdown and notebooks

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds, for a cell
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that cells make
# Each page is a process of its own, and they fit the same few models: what one has compiled,
# the next reads back.
scratch = tempfile.TemporaryDirectory(prefix="nlsq-dask-docs-")  # gone when the build ends
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(scratch.name, "compiled")))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# The notebooks of the examples are pages too. Tests run them; here that would be a second time.
HERE = Path(__file__).parent
shutil.rmtree(HERE / "examples", ignore_errors=True)
shutil.copytree(HERE.parent / "examples", HERE / "examples")
nb_execution_excludepatterns = [] if is_published else ["examples/*"]
# Bars appear by themselves after two seconds, so by how busy this machine is: only where asked for.
os.environ["IPYTHONDIR"] = str(Path(scratch.name, "ipython"))
startup = Path(os.environ["IPYTHONDIR"], "profile_default", "startup")
startup.mkdir(parents=True)
(startup / "bars.py").write_text("from nlsq_dask import progress; progress._SILENT_SECONDS = 1e9")

# -- reference

default_role = "autolink"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types are in the docstrings, in words and with shapes
numpydoc_show_class_members = False
maximum_signature_line_length = 80

# Without a network the build must not fail: other projects' names are then not links.
intersphinx_mapping = (
    {
        "dask": ("https://docs.dask.org/en/stable", None),
        "distributed": ("https://distributed.dask.org/en/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "python": ("https://docs.python.org/3", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
        "xarray": ("https://docs.xarray.dev/en/stable", None),
    }
    if is_published
    else {}
)
if not is_published:
    nitpick_ignore_regex = [(r"py:.*", r"(?!nlsq_dask).*")]

# -- theme

html_theme = "furo"
html_title = f"nlsq_dask {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
