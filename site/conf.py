"""Sphinx's settings for the course's site; build.py copies this file beside the pages' sources."""

import os
import sys
from pathlib import Path

ROOT = Path(os.environ["NSA_LITE_ROOT"])
sys.path.insert(0, str(ROOT / "site"))

from links import repository  # noqa: E402  it lies in the folder that was named just now

project = "Native Sparse Attention, by building it"
author = "The nsa-lite authors"
language = "en"
extensions = ["myst_nb", "katex", "terms"]

# Pages: stored outputs only.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # widgets are pages of their own here; the scripts would come from elsewhere
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a set's headings begin where its notebook's do
html_math_renderer = "katex"
exclude_patterns = ["extra", "static", "templates"]

# Looks.
html_theme = "sphinx_book_theme"
html_title = project
html_sidebars = {"**": ["home.html", "search-button-field.html", "sbt-sidebar-nav.html"]}
templates_path = ["templates"]
html_favicon = "static/favicon.svg"
html_static_path = ["static"]
html_extra_path = ["extra"]
html_css_files = ["katex.min.css", "course.css"]
html_js_files = [("course.js", {"priority": 400})]
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_permalinks_icon = "#"
html_context = {"default_mode": "auto"}  # dark where the reader's system is
html_theme_options = {
    "repository_url": repository(),
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the sidebar has a search of its own
    "primary_sidebar_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
