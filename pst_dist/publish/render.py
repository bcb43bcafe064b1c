"""Renders the Jinja2 templates next to this file: HTML pages and the model card."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML does not allow or UTF-8 cannot encode; rows and file names may contain them."""


def render(template: str, **values: Any) -> str:
    """Render a template of `templates/` with the values.

    In `*.html` all values are escaped. A character that HTML does not allow becomes U+FFFD. Raises
    jinja2.UndefinedError when a value that the template uses is missing.
    """
    return _NOT_TEXT.sub("\ufffd", _environment().get_template(template).render(values))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("pst_dist.publish"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
