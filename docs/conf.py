"""How the documentation is built: `sphinx-build -W -b html docs build/docs`."""

from __future__ import annotations

from importlib import metadata

project = "peft-fusion"
author = "the peft-fusion contributors"
release = metadata.version("peft-fusion")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.programoutput",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the tests execute them, at a small size; what is shown was run in full

default_role = "literal"  # docstrings have `names` as Markdown has them
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"peft-fusion {release}"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
