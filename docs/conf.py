"""Configuration of the documentation; it builds without network access."""

from typing import Any

from cdat_core import __version__

project = "cdat"
author = "The cdat developers"
copyright = "The cdat developers"
release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",  # also gives the autolink role
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
default_role = "autolink"
nitpicky = True

myst_heading_anchors = 3

# The sources that numpydoc lists need not be cited by number in the text.
suppress_warnings = ["ref.footnote"]

autodoc_member_order = "groupwise"
autodoc_typehints = "none"  # the docstrings state types and shapes
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = False

# Types of other projects are not linked, because an offline build has no inventories.
# A single word that is not one of our objects is the name of a parameter or a field.
nitpick_ignore_regex = [
    (r"py:obj", r"[a-z_]+"),
    (r"py:.*", r"(array_api_compat|collections|jax|numpy|optax|scipy|torch|typing)(\..*)?"),
    (r"py:class", r"(array|callable|mapping|ndarray|Scalar|Tensor|V)"),
    (r"py:class", r"(float64|shape|samples|str to (int|float))"),
]

html_theme = "furo"
html_title = "cdat"
html_show_sphinx = False
html_theme_options = {  # so that lines of 100 columns fit
    name: {"code-font-size": "0.74rem"} for name in ("light_css_variables", "dark_css_variables")
}
copybutton_exclude = ".linenos, .gp, .go"
python_use_unqualified_type_names = True


def skip_tuple_fields(
    app: Any, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out the fields of NamedTuples: the Attributes section already describes them."""
    del app, what, name, skip, options
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Register the hook above."""
    app.connect("autodoc-skip-member", skip_tuple_fields)
