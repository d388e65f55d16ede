"""The documentation's settings for Sphinx; ``make docs`` builds it."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # building asks no network
sys.path.insert(0, str(Path(__file__).parent / "extensions"))

from erase_concept import __version__ as release

project = "erase-concept"
author = "The erase-concept authors"
copyright = "the erase-concept authors, Apache-2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "directives"]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["build"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

# Notebooks are executed whenever the documentation is built, each in a folder of its own.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 1800
nb_output_stderr = "remove"
nb_merge_streams = True

autodoc_default_options = {"members": True, "show-inheritance": False}
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Annotations name classes shortly, and some names stand in two modules: such a reference stays without a link.
suppress_warnings = ["ref.python"]
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
