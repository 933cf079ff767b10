"""How the documentation is built: `tox -e docs`."""

from importlib.metadata import metadata

from otel_kafka_python import __version__

urls = metadata("otel-kafka-python").get_all("Project-URL") or []
repository = dict(url.split(", ") for url in urls)["Source"]

project = "otel-kafka-python"
author = "The otel-kafka-python authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True
# Types of other projects, whose documentation is not asked for.
nitpick_ignore_regex = [("py:.*", r"(?!otel_kafka_python).*")]

myst_heading_anchors = 3

# Docstrings mark code with single backticks.
default_role = "code"
add_module_names = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_title = f"otel-kafka-python {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_js_files = ["labels.js"]
html_show_copyright = False
html_theme_options = {
    "source_repository": repository,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [{"name": "Repository", "url": repository, "html": "Repository"}],
}
