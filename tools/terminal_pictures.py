"""Draws what ``fluxvae`` prints in a terminal: the SVG pictures of README.md, docs/batch.md and docs/memory.md.

    uv run tools/terminal_pictures.py            # writes docs/images/terminal-*.svg

Each command runs in a pseudo-terminal of a given width. What it writes is interpreted as a terminal would, and its last
screen is drawn by rich. Nothing is typed by hand, so the pictures show what this version prints on this machine.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import save_file

from fluxvae.checkpoints import ASSETS
from fluxvae.demo import read_latents

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
ROWS = 60
PICTURES = {
    "decode": ("fluxvae decode latents/ --out images/", 100, 6),
    "decode-80": ("fluxvae decode latents/ --out images/", 80, 6),
    "plan": ("fluxvae plan 2048 2048 --memory-limit 600MB", 100, 0),
    "plan-80": ("fluxvae plan 2048 2048 --memory-limit 600MB", 80, 0),
}
"""For each picture by name: the command, the terminal's columns, and the exit status that the command must end with."""

_PIECE = re.compile(r"\x1b\[\??(?P<numbers>[\d;]*)(?P<letter>[A-Za-z])|(?P<control>[\r\n])|(?P<text>[^\x1b\r\n]+)")


def make_latents(folder: Path) -> None:
    """Write latents of photographs in two sizes, and one file whose values are all NaN."""
    for name, count in (("astronaut_512x512", 20), ("coffee_400x592", 12)):
        latents, height, width = read_latents(ASSETS / "latents" / f"{name}.safetensors")
        for index in range(count):
            noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
            path = folder / f"{name.partition('_')[0]}-{index:02d}.safetensors"
            save_file({"latents": latents.float() + noise}, path, {"height": str(height), "width": str(width)})
    broken = {"latents": torch.full((1, 1024, 64), torch.nan)}
    save_file(broken, folder / "overflowed.safetensors", {"height": "512", "width": "512"})


def run_in_terminal(command: str, columns: int, cwd: Path) -> tuple[str, int]:
    """Run the command in a terminal, and return everything that it wrote there, and its exit status."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    words = [sys.executable, "-m", "fluxvae.cli", *command.split()[1:]]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(ROWS)}
    child = subprocess.Popen(words, cwd=cwd, stdin=slave, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    written = bytearray()
    try:
        while block := os.read(master, 65536):
            written += block
    except OSError:
        pass  # this is how Linux says that the other end of the terminal is closed
    os.close(master)
    return written.decode(), child.wait()


def last_screen(written: str) -> list[str]:
    """Return the lines that stand on the terminal in the end, each with its own colour codes.

    Only what rich uses to redraw is understood: carriage returns, erasing whole lines, and moving the cursor up.

    Raises:
        ValueError: the terminal was sent something else, which would be drawn wrongly.
    """
    lines, row = [""], 0
    for piece in _PIECE.finditer(written):
        letter, numbers = piece["letter"], piece["numbers"]
        if piece["text"] is not None:
            lines[row] += piece["text"]
        elif letter == "m":
            lines[row] += piece[0]
        elif piece["control"] == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif letter == "A":
            row -= int(numbers or 1)
        elif letter == "K" and numbers == "2":
            lines[row] = ""
        elif piece["control"] != "\r" and letter not in ("h", "l"):  # these two show and hide the cursor
            raise ValueError(f"no rule for the terminal's {piece[0]!r}")
    return lines


def draw(command: str, lines: list[str], columns: int, path: Path) -> None:
    """Draw a command and its output as a picture of a terminal."""
    console = Console(record=True, width=columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    for line in lines:
        text = Text.from_ansi(line)
        for part in text.divide(range(columns, len(text), columns)):  # a terminal breaks lines anywhere, not at words
            console.print(part, soft_wrap=True)
    console.print()  # without an empty line at the end, the picture cuts off the descenders of the last one
    path.write_text(console.export_svg(title="fluxvae", clear=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="the pictures to draw (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=IMAGES, help="the folder that the pictures are written to (default: docs/images)"
    )
    args = parser.parse_args()
    for name in args.only:
        command, columns, status = PICTURES[name]
        print(f"{command}, {columns} columns ...", flush=True)
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "latents").mkdir()
            make_latents(Path(work) / "latents")
            written, ended = run_in_terminal(command, columns, Path(work))
        if ended != status:
            raise SystemExit(f"{command}: exit status {ended}, expected {status}:\n{written}")
        lines = [line for line in last_screen(written) if Text.from_ansi(line).plain.strip() or line == ""]
        while lines and not Text.from_ansi(lines[-1]).plain.strip():
            lines.pop()
        draw(command, lines, columns, args.out / f"terminal-{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
