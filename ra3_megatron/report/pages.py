"""Pages made from the templates of this package: the report of a run, of a study, of the theory."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure


def render_page(template: str, **values: Any) -> str:
    """HTML of `templates/TEMPLATE`; values are escaped. A value that the template asks for must be given."""
    environment = Environment(
        loader=PackageLoader("ra3_megatron.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_picture(file: Path, figure: Figure) -> str:
    """Write a figure as PNG; the same as data URI, so that a page is one file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    file.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
