"""Runs as a process of its own, from which it takes what Windows lacks, and then uses fluxvae as its users do.

`take_away` and `as_on_windows` below say what is taken away, and what does as on Windows. fluxvae is imported then.
Python's own modules and other packages (PyTorch, Numba, diffusers, fsspec, tritonclient) are imported before. They find
their own way by ``sys.platform``, which stays what it is, because Windows' libraries are not here.
"""

from __future__ import annotations

import asyncio  # noqa: F401
import builtins
import contextlib
import ctypes
import fcntl
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import types
from multiprocessing import shared_memory  # noqa: F401
from pathlib import Path
from typing import Any

import diffusers.models.autoencoders.autoencoder_kl
import fsspec.implementations.memory
import numba  # noqa: F401
import numpy as np
import pytest
import torch
import tritonclient.grpc  # noqa: F401
from PIL import Image
from safetensors.torch import load_file

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
CALLS = """
    chown chroot confstr copy_file_range eventfd fchmod fchown fdatasync fork forkpty fpathconf fstatvfs getegid geteuid
    getgid getgroups getloadavg getpgid getpgrp getpriority getresuid getsid getuid getxattr initgroups killpg lchown
    lockf major memfd_create mkfifo mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate
    posix_spawn pread preadv pwrite pwritev readv register_at_fork sched_getaffinity sched_setaffinity sched_yield
    sendfile setegid seteuid setgid setpgid setsid setuid splice statvfs sync sysconf sysconf_names tcgetpgrp uname
    wait wait3 wait4 waitid writev O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOATIME O_NOFOLLOW O_NONBLOCK O_SYNC
    O_TMPFILE P_PID WEXITED WNOHANG WNOWAIT
""".split()  # noqa: SIM905
SIGNALS = """
    SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm setitimer
""".split()  # noqa: SIM905
LINUX_ONLY = ("/proc", "/sys", "/dev")


def take_away() -> None:
    """Take away the modules, functions, flags, signals and files that Windows does not have."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for name in CALLS:
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        delattr(signal, name)

    def without_linux(call: Any) -> Any:
        def instead(path: Any = ".", *args: Any, **options: Any) -> Any:
            told = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
            if told.startswith(LINUX_ONLY) and told != os.devnull:
                raise FileNotFoundError(2, "there is no such place on this system", told)
            return call(path, *args, **options)

        return instead

    for name in ("open", "stat", "lstat", "listdir", "scandir", "access", "readlink"):
        setattr(os, name, without_linux(getattr(os, name)))
    builtins.open = io.open = without_linux(open)
    for name in ("open", "stat"):  # Python 3.10's Path has kept the functions as they were when it was imported
        setattr(Path, name, without_linux(getattr(Path, name)))


def as_on_windows(free: int) -> None:
    """Let what both have do as on Windows, which has ``free`` bytes of memory free."""
    statvfs, flock, listing, real_open = os.statvfs, fcntl.flock, os.listdir, builtins.open
    stat = os.stat

    def disk_usage(path: Any) -> Any:
        found = statvfs(path)
        return shutil._ntuple_diskusage(found.f_blocks * found.f_frsize, 0, found.f_bavail * found.f_frsize)  # type: ignore[attr-defined]

    def is_in_use(path: Any, dir_fd: int | None = None) -> bool:
        """Whether this process has the file open or mapped: Windows then neither removes nor replaces it."""
        try:
            found = stat(path, dir_fd=dir_fd)
        except FileNotFoundError:
            return False
        for descriptor in listing("/proc/self/fd"):
            with contextlib.suppress(OSError):
                opened = stat(int(descriptor))
                if (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino):
                    return True
        with real_open("/proc/self/maps") as maps:
            return any(line.split()[4] == str(found.st_ino) and os.fspath(path) in line for line in maps)

    def unless_in_use(call: Any) -> Any:
        def instead(path: Any, *others: Any, **options: Any) -> Any:
            for one in (path, *others):
                if is_in_use(one, options.get("dir_fd")):
                    raise PermissionError(13, "the file is being used", os.fspath(one))
            return call(path, *others, **options)

        return instead

    def locking(descriptor: int, mode: int, nbytes: int) -> None:
        assert (mode, nbytes) == (2, 1)
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(13, "locked") from error

    def memory_status(pointer: Any) -> int:
        assert pointer._obj.length == ctypes.sizeof(pointer._obj) == 64
        pointer._obj.available_physical, pointer._obj.available_page_file = free, 2 * free
        return 1

    def library(name: Any, *args: Any, **options: Any) -> Any:
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        return real_library(name, *args, **options)

    def kill(pid: int, number: int) -> None:
        raise AssertionError(f"os.kill({pid}, {number}): on Windows that ends the process, or is Ctrl-C")

    for name in ("unlink", "remove", "rename", "replace"):
        setattr(os, name, unless_in_use(getattr(os, name)))
        if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10
            setattr(pathlib._NormalAccessor, name, staticmethod(getattr(os, name)))
    real_library, ctypes.CDLL = ctypes.CDLL, library  # type: ignore[assignment,misc]
    os.kill = kill
    signal.CTRL_C_EVENT = 0  # type: ignore[attr-defined]
    shutil.disk_usage = disk_usage
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[misc]
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)  # type: ignore[assignment]
    kernel = types.SimpleNamespace(GlobalMemoryStatusEx=memory_status)
    ctypes.windll = types.SimpleNamespace(kernel32=kernel)  # type: ignore[attr-defined]


def run(*words: str | Path) -> tuple[int, str]:
    """Run the command line: its exit status, and what it printed."""
    from fluxvae import cli

    said = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)  # as Windows writes to a file
    sys.argv = ["fluxvae", *map(str, words)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
    said.seek(0)
    return status, said.read()


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """The bits of the other process; or nearly, where it used AMX, which no other system than Linux is asked for."""
    from fluxvae.engine.kernels.cpu import vector_code

    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 if vector_code.HAS_AMX else 0)


def library(folder: Path, free: int) -> None:
    """Decode with spilled maps, encode, install, and do so without a limit: as the other process did."""
    import fluxvae
    from fluxvae import system
    from fluxvae.engine.memory import heap

    heap.trim_heap()
    wanted = load_file(folder / "wanted.safetensors")
    latents, spills = wanted["latents"], folder / "spills"
    spills.mkdir()
    decoder = fluxvae.Decoder.from_pretrained("demo", device="cpu", spill_dir=spills)
    height, width = 8 * latents.shape[2], 8 * latents.shape[3]
    assert "(free memory)" in str(decoder.plan(height, width))
    assert decoder.plan(height, width).limit == free * 9 // 10
    limit = decoder.engine.smallest_limit(*latents.shape[2:])
    decoder = fluxvae.Decoder(decoder.vae, memory_limit=limit, spill_dir=spills)
    assert decoder.plan(height, width).spill_bytes > 0
    during: set[str] = set()
    image = decoder.decode(latents, output_type="pt", progress=lambda *_: during.update(os.listdir(spills)))
    same(image, wanted["image"])
    assert during, "as on Windows, the file has a name while it is there"
    assert not os.listdir(spills)

    handle = fluxvae.install(decoder.vae, memory_limit=limit)
    raw = latents / decoder.vae.config.scaling_factor + decoder.vae.config.shift_factor
    with torch.no_grad():
        same(decoder.vae.decode(raw).sample, wanted["decoded"])
    handle.remove()
    picture = np.asarray(Image.open(folder / "picture.png"))
    encoder = fluxvae.Encoder.from_pretrained("demo", device="cpu", memory_limit="1GB")
    same(encoder.encode(picture, packed=False), wanted["encoded"])

    told, ctypes.windll = ctypes.windll, None  # type: ignore[attr-defined]
    assert system.free_memory() is None
    with pytest.raises(fluxvae.InvalidOptionError, match="memory_limit: got none, and this system does not tell"):
        fluxvae.Decoder(decoder.vae).plan(height, width)
    ctypes.windll = told  # type: ignore[attr-defined]


def command_line(folder: Path) -> None:
    """Plan, look, measure, and decode files: locked, resumed, fetched from elsewhere; a server is refused."""
    from fluxvae import system
    from fluxvae.batch import sources
    from fluxvae.batch.store import LocalStore, _part_name

    out, cpu = folder / "\u732b", ("--device", "cpu")
    assert run("plan", "64x64", *cpu)[0] == 0
    assert run("info", "demo")[0] == 0
    status, said = run("bench", "--sizes", "64", "--rounds", "1", "--json", *cpu)
    assert (status, json.loads(said)["rows"][0]["peak_bytes"]) == (0, None), said
    status, said = run("decode", folder / "in", "-o", out, *cpu)
    assert (status, "\\u732b" in said) == (0, True), said
    first, second = sorted(out.glob("*.png"))
    kept = second.stat().st_mtime_ns
    first.unlink()
    part = out / _part_name("other.png", "aa").replace(f".{os.getpid()}.", ".4194303.")
    part.write_bytes(b"half")
    with system.hold(out / ".fluxvae-lock"):
        status, said = run("decode", folder / "in", "-o", out, "--resume", *cpu)
        assert (status, "another job is writing" in said) == (2, True), said
    assert run("decode", folder / "in", "-o", out, "--resume", *cpu)[0] == 0
    assert first.exists()
    assert second.stat().st_mtime_ns == kept
    assert part.exists(), "nobody knows here whether the process that writes it has ended"
    assert not (out / ".fluxvae-lock").exists()
    status, said = run("encode", folder / "picture.png", "-o", folder / "latents", *cpu)
    assert status == 0, said

    elsewhere = fsspec.filesystem("memory")
    for path in (folder / "in").iterdir():
        elsewhere.put_file(str(path), f"/in/{path.name}")
    tempfile.tempdir = str(folder / "fetched")
    os.mkdir(tempfile.tempdir)
    status, said = run("decode", "memory://in", "-o", folder / "out2", *cpu)
    assert status == 0, said
    sources._remove()
    assert not os.listdir(tempfile.tempdir)
    for path in out.glob("*.png"):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(folder / "out2" / path.name)))

    known, system._msvcrt = system._msvcrt, None
    status, said = run("decode", folder / "in", "-o", folder / "out3", *cpu)
    assert (status, "cannot be locked" in said, (folder / "out3").exists()) == (2, True, False), said
    system._msvcrt = known

    sys.platform = "win32"
    status, said = run("serve")
    sys.platform = "linux"
    assert (status, "runs on Linux only" in said, "fluxvae.client" in said) == (1, True, True), said
    assert "Traceback" not in said
    assert LocalStore(out, "aa").existing() >= {"job.json"}


def client() -> None:
    """A client of a server elsewhere can be made."""
    from fluxvae.client import Client

    with Client("localhost:1"):
        pass


if __name__ == "__main__":
    assert not [name for name in sys.modules if name.startswith("fluxvae")]
    torch.set_num_threads(1)
    where, memory = Path(sys.argv[1]), 5 << 30
    assert diffusers.models.autoencoders.autoencoder_kl
    as_on_windows(memory)
    take_away()
    library(where, memory)
    command_line(where)
    client()
    print("done")
