"""Sphinx configuration: ``make docs`` executes the notebooks and writes docs/_build/html."""

from __future__ import annotations

import nsq_ref

project = "nsq"
author = "The nsq authors"
project_copyright = author
release = version = nsq_ref.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "examples"]
nitpicky = False
# Fields of classes are written as references to any object of that name, which may be several.
suppress_warnings = ["ref.python"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

# Forced: what a notebook shows depends on the library, which a cache would not notice.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"

autodoc_member_order = "bysource"
autodoc_mock_imports = ["torch", "transformers"]  # large, and needed by one page only
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
default_role = "py:obj"
napoleon_google_docstring = False
napoleon_use_ivar = True  # or each field of a tuple is described twice

html_theme = "furo"
html_title = "nsq"
