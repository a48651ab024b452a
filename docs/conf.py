"""The site: `sphinx-build -W docs docs/_build/html`, with the docs group and the lm
extra installed.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "trix_jax"
author = "trix_jax authors"
html_title = "trix_jax"
html_theme = "furo"
html_static_path = []
exclude_patterns = ["_build", "jupyter_execute"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Every page's blocks run, in a folder that goes away; a block that raises ends the
# build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
default_role = "code"  # docstrings write `x`, which is code here
autodoc_member_order = "bysource"
autodoc_typehints = (
    "none"  # shapes are strings that Sphinx takes for forward references
)
napoleon_google_docstring = True
