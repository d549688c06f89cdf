"""The templates of the page, and the filters that they use."""

from __future__ import annotations

import functools
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render_template(name: str, **content: Any) -> Markup:
    """Return a template filled with content; text is escaped, markup is not.

    Parameters
    ----------
    name : str
        File name without ``.html.j2``.
    **content
        Every variable that the template uses; a missing variable is an error.

    Returns
    -------
    markupsafe.Markup
    """
    return Markup(_environment().get_template(f"{name}.html.j2").render(content))


def asset(name: str) -> Markup:
    """Return a style sheet or script of the package as it is, to go inside its element."""
    environment = _environment()
    assert environment.loader is not None
    source, *_ = environment.loader.get_source(environment, name)
    return Markup(source)


def words(text: str) -> Markup:
    """Return text with proper typography: "x " as a multiplication sign, "2^-4" as a power."""
    marked = re.sub(r"(?<![^\s])x (?=[a-z])", "&times; ", str(escape(text)))
    powers = re.sub(r"2\^(-?[\d.]+)", r"2<sup>\1</sup>", marked)
    return Markup(powers.replace("<sup>-", "<sup>&minus;"))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cdat_lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["words"] = words
    environment.globals["asset"] = asset
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment
