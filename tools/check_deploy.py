"""Check every file under deploy/ by a tool that is not ours.

    uv run --isolated --only-group deploy tools/check_deploy.py
    ... tools/check_deploy.py --need promtool systemd-analyze kubectl --crds inferenceservices.yaml scaledobjects.yaml

- Dockerfile: hadolint.
- compose.yaml: compose-spec's JSON schema; ``docker-compose config``, where it is installed.
- kubernetes/: Kubernetes' own schemas, unknown fields refused (kubernetes-validate), for each file, and for what
  ``kubectl kustomize`` or ``kustomize build`` makes of each folder, where one of them is installed. KServe's, KEDA's
  and the Prometheus operator's kinds: the projects' CustomResourceDefinitions that ``--crds`` names, likewise.
- fluxvae.service: ``systemd-analyze verify``, every word of which counts, and ``systemd-analyze security``.
- prometheus/: promtool, for the configuration, the rules, and their unit tests.
- grafana/: Grafana's own SDK, which must give back all that it was given; promtool, for each expression.

Prints what each said. Exits 1 where one found something, or where a tool that ``--need`` names is not installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
OUTSIDE = ("docker-compose", "kubectl", "promtool", "systemd-analyze")
"""The tools that no package of Python's registry brings. kustomize stands in for kubectl."""
_NO_DEFINITION = "not checked (--crds)"
EXPOSURE = 25
"""In tenths, how exposed systemd-analyze may call the unit. It calls it 2.0, and 9.2 without the protections."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--need", nargs="+", default=[], choices=OUTSIDE, help="tools that must be installed")
    parser.add_argument("--crds", nargs="+", default=[], type=Path, help="YAML files of CustomResourceDefinitions")
    args = parser.parse_args()
    checks: dict[str, Callable[[], str]] = {
        "Dockerfile": lambda: run(tool("hadolint"), "--failure-threshold", "info", DEPLOY / "Dockerfile"),
        "compose.yaml, schema": lambda: run(
            tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"
        ),
        "compose.yaml, docker-compose": lambda: run(
            tool("docker-compose"), "-f", DEPLOY / "compose.yaml", "config", "--quiet", FLUXVAE_TOKEN="x"
        ),
        "fluxvae.service": unit,
        "prometheus/prometheus.yaml": lambda: run(
            tool("promtool"), "check", "config", "--syntax-only", DEPLOY / "prometheus/prometheus.yaml"
        ),
        "prometheus/rules.yaml": lambda: run(tool("promtool"), "check", "rules", DEPLOY / "prometheus/rules.yaml"),
        "prometheus/rules_test.yaml": lambda: run(
            tool("promtool"), "test", "rules", DEPLOY / "prometheus/rules_test.yaml"
        ),
        "grafana/fluxvae.json, SDK": dashboard,
        "grafana/fluxvae.json, expressions": expressions,
    }
    for path in sorted(MANIFESTS.rglob("*.yaml")):
        if path.name != "kustomization.yaml":
            name = path.relative_to(DEPLOY).as_posix()
            checks[name] = functools.partial(manifests, lambda path=path: path.read_text(encoding="utf-8"), args.crds)
    for folder in sorted({path.parent for path in MANIFESTS.rglob("kustomization.yaml")}):
        name = f"{folder.relative_to(DEPLOY).as_posix()}/, kustomize"
        checks[name] = functools.partial(manifests, functools.partial(kustomize, folder), args.crds)
    failed = 0
    for name, check in checks.items():
        try:
            said = check().strip()
        except Missing as missing:
            needed = missing.args[0] in args.need
            failed += needed
            print(f"{'FAILED' if needed else 'not checked'}  {name}: there is no {missing}")
        except (Found, OSError, ValueError, yaml.YAMLError) as found:
            failed += 1
            print(f"FAILED  {name}: {found}")
        else:
            print(f"ok  {name}" + (f": {said}" if said else ""))
    print(f"{failed} failed" if failed else "all that was checked is in order")
    return 1 if failed else 0


class Found(Exception):
    """A tool found something."""


class Missing(Exception):
    """A tool is not installed, or a definition is not given; its only argument is the name."""


def tool(name: str) -> str:
    """Return where a program is: beside this Python, or on the PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise Missing(name)
    return found


def run(*command: str | Path, **env: str) -> str:
    """Run a program, and return what it said. Raises Found where it failed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ, **env})
    said = re.sub(r"\x1b\[[\d;]*m", "", f"{done.stdout}\n{done.stderr}").strip().replace(str(DEPLOY), "deploy")
    if done.returncode:
        raise Found(said)
    return " ".join(said.split())


# -- Kubernetes ------------------------------------------------------------------------------------------------------


def kustomize(folder: Path) -> str:
    """Return the manifests that a folder stands for; those of a component on top of the base's."""
    command = [tool("kustomize"), "build"] if shutil.which("kustomize") else [tool("kubectl"), "kustomize"]
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(MANIFESTS, work, dirs_exist_ok=True)
        asked = Path(work) / folder.name
        if yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))["kind"] == "Component":
            asked = Path(work) / "asked"
            asked.mkdir()
            settings = {"resources": ["../base"], "components": [f"../{folder.name}"]}
            (asked / "kustomization.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        done = subprocess.run([*command, str(asked)], capture_output=True, text=True)
    if done.returncode or done.stderr.strip():
        raise Found(done.stderr.strip())
    return done.stdout


def manifests(text: Callable[[], str], crds: list[Path]) -> str:
    """Check manifests by Kubernetes' schemas, and custom resources by those of ``crds``."""
    said = []
    for manifest in yaml.safe_load_all(text()):
        kind = manifest["kind"]
        try:
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
            said.append(f"{kind} valid")
        except kubernetes_validate.ValidationError as error:
            raise Found(f"{kind}: {error.message} at {'/'.join(map(str, error.path))}") from error
        except kubernetes_validate.SchemaNotFoundError:
            said.append(f"{kind} {custom(manifest, crds)}")
    if said and all(each.endswith(_NO_DEFINITION) for each in said):
        raise Missing("definition of it (--crds)")
    return ", ".join(said)


def custom(manifest: dict[str, Any], crds: list[Path]) -> str:
    """Check a custom resource by the first of the definitions that is of its kind and version."""
    for path in crds:
        for crd in definitions(path):
            spec = crd["spec"]
            for version in spec["versions"]:
                named = (spec["names"]["kind"], f"{spec['group']}/{version['name']}")
                if named != (manifest["kind"], manifest["apiVersion"]):
                    continue
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                for error in jsonschema.Draft7Validator(schema).iter_errors(manifest):
                    where = "/".join(map(str, error.absolute_path))
                    raise Found(f"{manifest['kind']}: {error.message[:200]} at {where}")
                return f"valid by {path.name}"
    return _NO_DEFINITION


@functools.cache
def definitions(path: Path) -> list[Any]:
    """Read a file of CustomResourceDefinitions, of which some have two megabytes."""
    return list(yaml.load_all(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def strict(schema: Any) -> Any:
    """Return a CRD's schema with unknown fields refused, as the server does it in its strict mode."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("x-kubernetes-preserve-unknown-fields") is not True:
        schema.setdefault("additionalProperties", False)
    return schema


# -- systemd, Grafana ------------------------------------------------------------------------------------------------


def unit() -> str:
    """Check the unit in a file system that has the program it starts, and nothing else."""
    program = tool("systemd-analyze")
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        units = root / "etc/systemd/system"
        units.mkdir(parents=True)
        text = (DEPLOY / "fluxvae.service").read_text(encoding="utf-8")
        (units / "fluxvae.service").write_text(text, encoding="utf-8")
        for name in ("sysinit.target", "basic.target", "shutdown.target", "network-online.target", "multi-user.target"):
            (units / name).write_text("[Unit]\nDescription=stands for systemd's own\n", encoding="utf-8")
        start = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)
        assert start
        executable = root / start[1].lstrip("/")
        executable.parent.mkdir(parents=True)
        executable.write_text("#!/bin/sh\n", encoding="utf-8")
        executable.chmod(0o755)
        if said := run(program, "verify", f"--root={root}", "fluxvae.service"):
            raise Found(said)  # it ends with 0 also where it ignores a line that it does not understand
        said = run(
            program, "security", "--offline=true", f"--root={root}", f"--threshold={EXPOSURE}", "fluxvae.service"
        )
        return said[said.index("Overall") :]


def dashboard() -> str:
    """Read the dashboard with Grafana's own classes, and compare what they write with what they were given."""
    try:
        from grafana_foundation_sdk.cog.encoder import JSONEncoder
        from grafana_foundation_sdk.cog.plugins import register_default_plugins
        from grafana_foundation_sdk.models.dashboard import Dashboard
    except ImportError as error:  # it needs Python 3.11
        raise Missing("grafana-foundation-sdk") from error

    register_default_plugins()
    given = json.loads((DEPLOY / "grafana/fluxvae.json").read_text(encoding="utf-8"))
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
    if lost := differences(given, back):
        raise Found("; ".join(lost))
    return f"{len(given['panels'])} panels"


def differences(given: Any, back: Any, where: str = "") -> list[str]:
    """Say what of ``given`` is missing in ``back``, or another there. What is only in ``back`` are defaults."""
    if isinstance(given, dict) and isinstance(back, dict):
        return [
            line
            for name, value in given.items()
            for line in (
                differences(value, back[name], f"{where}/{name}") if name in back else [f"{where}/{name}: unknown"]
            )
        ]
    if isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        return [
            line
            for index, pair in enumerate(zip(given, back, strict=True))
            for line in differences(*pair, f"{where}/{index}")
        ]
    return [] if given == back else [f"{where}: {given!r} became {back!r}"]


def expressions() -> str:
    """Have promtool read each expression of the dashboard, as a recording rule, with Grafana's variables filled in."""
    panels = json.loads((DEPLOY / "grafana/fluxvae.json").read_text(encoding="utf-8"))["panels"]
    found = [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]
    rules = [{"record": f"panel:{index}", "expr": text} for index, text in enumerate(found)]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "panels.yaml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8")
        return run(tool("promtool"), "check", "rules", path).replace(str(path), "generated rules")


if __name__ == "__main__":
    sys.exit(main())
