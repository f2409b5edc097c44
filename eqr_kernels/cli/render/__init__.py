"""The pictures and the page of what `eqr curve` measures: they read its JSON and nothing else.

Matplotlib and jinja2 are imported when something is drawn or written: `pip install "eqr_kernels[plot]"`.
"""

from eqr_kernels.cli.render.figures import PICTURES, NoData, Picture
from eqr_kernels.cli.render.style import require
from eqr_kernels.cli.render.write import PAGE, page, write_report

__all__ = ["PAGE", "PICTURES", "NoData", "Picture", "page", "require", "write_report"]
