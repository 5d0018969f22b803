"""Files outside of docs/ that pages link to, as GitHub wants it: ../folder/file.

The site has them too, under the same names, so that nothing is kept twice.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)\)")


def on_files(files, config):
    pages = [file.content_string for file in files.documentation_pages()]
    for name in {name for page in pages for name in OUTSIDE.findall(page)}:
        if (ROOT / name).is_file():  # else the build says that the link is broken
            path = str(ROOT / name)
            files.append(File.generated(config, name, abs_src_path=path))
    return files


def on_page_markdown(markdown, **_):
    return OUTSIDE.sub(r"](\1)", markdown)
