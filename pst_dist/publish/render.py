"""The Jinja2 templates beside this file: HTML pages and the model card."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML does not allow or that UTF-8 cannot encode; texts of rows and file names may hold them."""


def render(template: str, **values: Any) -> str:
    """What a template of `templates/` makes of the values.

    In `*.html` all values are escaped. A character that HTML does not allow becomes U+FFFD. Raises
    jinja2.UndefinedError for a value that the template uses and that is not given.
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
