"""The site: `sphinx-build -W docs docs/_build/html`, with the docs group and the lm extra.

`-j 2` reads two pages at a time; `-D nb_execution_mode=off` builds without running them.
"""

import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "trix_jax"
author = "trix_jax authors"
html_title = "trix_jax"
html_theme = "furo"
html_static_path = []
html_show_copyright = False
exclude_patterns = ["_build", "jupyter_execute"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Every page's blocks run, in a folder that goes away; a block that raises ends the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # of a block, on a busy machine
nb_merge_streams = True
# Pages that were not run do not say their language, and are shown without colours.
suppress_warnings = ["myst-nb.lexer"]
default_role = "code"  # docstrings write `x`, which is code here
autodoc_member_order = "bysource"
# Shapes are strings, which Sphinx takes for forward references.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True


def shorten(app, what, name, obj, options, signature, returns):
    """Without what Linen adds to every module, and with a config's default as its name."""
    if signature:
        signature = re.sub(r", parent=.*?, name=None(?=\))", "", signature)
        signature = re.sub(r"\b(\w+Config)\([^()]*\)", r"\1()", signature)
        signature = re.sub(r"<(?:class '[\w.]*?|function )(\w+)'?>", r"\1", signature)
    return signature, returns


def link_inside(app, page, source):
    """Files of the repository that a page of the site includes."""
    source[0] = source[0].replace("](../SECURITY.md)", "](security.md)")


def setup(app):
    app.connect("autodoc-process-signature", shorten)
    app.connect("source-read", link_inside)
    return {"parallel_read_safe": True}
