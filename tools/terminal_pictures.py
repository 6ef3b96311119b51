"""Draw what ``fluxvae`` prints in a terminal: the SVG pictures of README.md and docs/batch.md.

    uv run tools/terminal_pictures.py            # writes docs/images/terminal-*.svg

Each command runs in a pseudo-terminal of so many columns; what it wrote is followed as a terminal would, to its last
screen, and drawn by rich. Nothing is typed by hand, so the pictures say what this version and this machine say.
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
"""Name: the command, columns, and the exit status it must end with."""

_PIECE = re.compile(r"\x1b\[\??(?P<numbers>[\d;]*)(?P<letter>[A-Za-z])|(?P<control>[\r\n])|(?P<text>[^\x1b\r\n]+)")


def make_latents(folder: Path) -> None:
    """Photographs' latents of two sizes, and one file that holds no numbers."""
    for name, count in (("astronaut_512x512", 20), ("coffee_400x592", 12)):
        latents, height, width = read_latents(ASSETS / "latents" / f"{name}.safetensors")
        for index in range(count):
            noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
            path = folder / f"{name.partition('_')[0]}-{index:02d}.safetensors"
            save_file({"latents": latents.float() + noise}, path, {"height": str(height), "width": str(width)})
    broken = {"latents": torch.full((1, 1024, 64), torch.nan)}
    save_file(broken, folder / "overflowed.safetensors", {"height": "512", "width": "512"})


def run_in_terminal(command: str, columns: int, cwd: Path) -> tuple[str, int]:
    """All that the command wrote to its terminal, and its exit status."""
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
        pass  # how Linux says that the other end is closed
    os.close(master)
    return written.decode(), child.wait()


def last_screen(written: str) -> list[str]:
    """The lines that stand on the terminal in the end, each with its own colour codes.

    Only what rich does to redraw is known: carriage returns, lines erased whole, the cursor up.

    Raises:
        ValueError: something else, which would be drawn wrong.
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
        elif piece["control"] != "\r" and letter not in ("h", "l"):  # shown and hidden cursors
            raise ValueError(f"no rule for the terminal's {piece[0]!r}")
    return lines


def draw(command: str, lines: list[str], columns: int, path: Path) -> None:
    """As a picture of a terminal."""
    console = Console(record=True, width=columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    for line in lines:
        text = Text.from_ansi(line)
        for part in text.divide(range(columns, len(text), columns)):  # as a terminal does: not at words
            console.print(part, soft_wrap=True)
    console.print()  # or the last line's descenders are cut off
    path.write_text(console.export_svg(title="fluxvae", clear=False))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES), help="pictures to draw")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder (default: docs/images)")
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
