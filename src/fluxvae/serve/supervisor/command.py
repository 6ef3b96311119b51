"""Runs the supervisor in a terminal, in a container or under systemd: handles signals and tells people what happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

from rich.console import Console

from fluxvae import __version__
from fluxvae.errors import InvalidOptionError
from fluxvae.serve.models import MODELS, encodes
from fluxvae.serve.supervisor.checks import check_packages, is_loopback
from fluxvae.serve.supervisor.supervisor import ServeSettings, Supervisor

__all__ = ["read_token", "run"]

_TICK_S = 0.1
_WATCH_S = 0.25  # looking ten times a second would cost an idle server a noticeable part of a core
_TELL_EVERY_S = 5.0  # into a log; a terminal is told twice a second


def read_token(path: Path | None) -> str | None:
    """Read the token that the gateway will ask for, from this file, or without one from FLUXVAE_TOKEN.

    Returns:
        None where there is neither a file nor the variable: the gateway then asks for no token.

    Raises:
        InvalidOptionError: there are both, or the file cannot be read.
    """
    from_environment = os.environ.get("FLUXVAE_TOKEN")
    if path is None:
        return from_environment
    if from_environment is not None:
        raise InvalidOptionError("--token-file: got one while FLUXVAE_TOKEN is set too; give one of them")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise InvalidOptionError(f"--token-file: {path} cannot be read: {error}") from error


def run(settings: ServeSettings, *, follow_logs: bool) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP. A second signal ends the waiting for requests that are under way.

    Args:
        settings: what to serve, and how.
        follow_logs: copy the logs of Triton and the gateway to standard error.

    Returns:
        The exit status: 0 after a clean stop.

    Raises:
        FluxVAEError: Triton or the gateway could not be started, or can no longer be kept running; or the
            extra ``serve`` is not installed.
    """
    check_packages()
    signals: list[int] = []
    stop = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in stop}
    try:
        return _run(settings, signals, follow_logs)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(settings: ServeSettings, signals: list[int], follow_logs: bool) -> int:
    console = Console(highlight=False, soft_wrap=True)

    def report(line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal or pipe is gone, which is no reason to stop serving
            console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False)

    supervisor = Supervisor(settings, report=report)
    console.print(f"fluxvae {__version__} with tritonserver at {supervisor.installation}", markup=False)
    for warning in [*settings.check_exposure(supervisor.installation), *settings.check_memory()]:
        report(f"warning: {warning}")
    try:
        supervisor.launch()
        if follow_logs:
            _follow({supervisor.triton_log, supervisor.gateway_log})
        else:
            logs = dict.fromkeys((supervisor.triton_log, supervisor.gateway_log))
            kept = "" if settings.log_file is not None else " (until it stops; --log-file keeps them)"
            console.print(f"logs: {', '.join(map(str, logs))}{kept}", markup=False)
        if _wait_ready(supervisor, console, signals):
            _announce(supervisor, console)
            _notify("READY=1")
            while not signals:
                supervisor.tend()
                time.sleep(_WATCH_S)
        if signals:
            name = signal.Signals(signals[0]).name
            report(
                f"{name}: finishing what is under way, for {settings.drain_s:g} s at most; another signal stops at once"
            )
            _notify("STOPPING=1")
    finally:
        supervisor.stop(lambda: len(signals) > 1)
    report("stopped")
    return 0


def _wait_ready(supervisor: Supervisor, console: Console, signals: list[int]) -> bool:
    started = time.monotonic()
    what = f"loading {', '.join(supervisor.settings.models.values())} and decoding a first time"
    told = 0.0
    with console.status(what) as status:

        def stopped() -> bool:
            nonlocal told
            elapsed = time.monotonic() - started
            if elapsed - told >= (0.5 if console.is_terminal else _TELL_EVERY_S):
                told = elapsed
                line = f"{what} ... {elapsed:.0f} s"
                status.update(line) if console.is_terminal else console.print(line, markup=False)
            return bool(signals)

        return supervisor.wait_ready(stopped)


def _announce(supervisor: Supervisor, console: Console) -> None:
    server, settings = supervisor.server, supervisor.settings
    for name, checkpoint in settings.models.items():
        what = "pictures to latents" if MODELS[name].encodes else "latents to pictures"
        approximate = ", approximate previews" if MODELS[name].vae_class == "AutoencoderTiny" else ""
        console.print(f"serving {checkpoint} as {name}: {what}{approximate}", markup=False)
    ways = {encodes(name) for name in settings.models}
    protocols = [name for name, way in (("remote_decode", False), ("remote_encode", True)) if way in ways]
    for name, where in (
        ("gateway", f"{supervisor.url}  (a page, {', '.join(protocols)}, /docs, /healthz, /readyz, /metrics)"),
        ("Triton gRPC", server.grpc_url),
        ("Triton HTTP", f"http://{server.http_url}"),
        ("metrics", server.metrics_url),
    ):
        console.print(f"  {name:<12} {where}", markup=False)
    if is_loopback(settings.host):
        console.print("Only this machine can reach it; --host 0.0.0.0 opens the gateway to the network.")
    else:
        console.print(f"The gateway is open on {settings.host}, port {supervisor.port}.")
    console.print("The gateway asks for a token." if settings.token else "The gateway asks for no token.")
    console.print("Ctrl-C stops it.")


def _notify(state: str) -> None:
    """Tell systemd our state by one datagram, as sd_notify(3) describes, if it started us with Type=notify."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


def _follow(paths: set[Path]) -> None:
    """Copy what is appended to these files to standard error, in threads that run until the process ends."""

    def copy(path: Path) -> None:
        with path.open("ab"), path.open("rb") as log:
            while True:
                if chunk := log.read(1 << 16):
                    os.write(2, chunk)
                else:
                    time.sleep(_TICK_S)

    for path in paths:
        threading.Thread(target=copy, args=(path,), name=f"follow {path.name}", daemon=True).start()
