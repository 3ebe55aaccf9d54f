"""Sphinx's settings: `make docs` builds the site, from files of this repository alone."""

import os
import pathlib
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform

import sb3_boom

ROOT = pathlib.Path(__file__).parents[1]
project = "sb3_boom"
author = "The sb3_boom developers"
version = release = sb3_boom.__version__
copyright = author
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_mock_imports = ["ray"]  # not a part of the extra `all`
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"sb3_boom {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False


def anchor(module: str, name: str) -> str:
    """
    :param module: of the package
    :param name: of a function, class or method; one that is not documented stands for the class around it
    :return: where the module's source page has it, or nothing
    """
    for full in ModuleAnalyzer.for_module(module).find_tags():
        if full.split(".")[-1] == name:
            return "#" + (full.rpartition(".")[0] if name.startswith("_") else full)
    return ""


class RepositoryLinks(SphinxTransform):
    """
    Pages link to files as GitHub resolves them, relative to ``docs``. In the site a module of the package becomes its source
    page, at the function that the link's text names; any other file a download; a folder mere text.
    """

    default_priority = 400

    def apply(self, **kwargs: object) -> None:
        """Replace the links of one page."""
        for node in list(self.document.findall(addnodes.download_reference)):
            path = (ROOT / "docs" / node["reftarget"].lstrip("/")).resolve()
            if path.suffix == ".py" and path.is_relative_to(ROOT / "sb3_boom"):
                module = path.relative_to(ROOT).with_suffix("").as_posix()
                uri = self.app.builder.get_relative_uri(self.env.docname, f"_modules/{module}")
                uri += anchor(module.replace("/", "."), node.astext())
                node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))
        for node in list(self.document.findall(addnodes.pending_xref)):
            # MyST gives a page of another folder by its whole path without suffix, what an included page links to as it is
            target = node["reftarget"]
            found = [path for path in (ROOT / f"{target}.md", ROOT / target) if path.is_file()]
            if (ROOT / "docs" / target).is_dir() or (ROOT / target).is_dir():
                node.replace_self(node.children)
            elif found and not found[0].is_relative_to(ROOT / "docs"):
                relative = pathlib.Path(os.path.relpath(found[0], ROOT / "docs")).as_posix()
                attributes = {**node.attributes, "reftarget": relative}
                node.replace_self(addnodes.download_reference("", "", *node.children, **attributes))


def without_pages_to_come(app: Sphinx, docname: str, source: list[str]) -> None:
    """
    Leave entries of index.md's contents out whose page is not written yet.

    :param app: unused
    :param docname: of the page
    :param source: its text, changed in place
    """
    if docname == "index":
        lines = source[0].splitlines(keepends=True)
        names = re.compile(r"[a-z0-9_]+\n")
        source[0] = "".join(x for x in lines if not names.fullmatch(x) or (ROOT / "docs" / f"{x.strip()}.md").exists())


def setup(app: Sphinx) -> None:
    """:param app: takes the transform"""
    app.add_transform(RepositoryLinks)
    app.connect("source-read", without_pages_to_come)
