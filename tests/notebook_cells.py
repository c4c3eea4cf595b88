"""Runs the cells of a notebook from top to bottom, as a kernel does; a script: `notebook_cells.py NOTEBOOK`."""

import os
import sys
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell


class Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        """There is no window to be kept alive."""


def main(path):
    os.chdir(path.parent)
    shell = Shell()
    shell.run_line_magic("matplotlib", "inline")
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
