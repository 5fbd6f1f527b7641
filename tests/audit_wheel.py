"""What a wheel and an sdist may hold.

python tests/audit_wheel.py dist/*.whl dist/*.tar.gz
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "fips_ext"
ROOT = Path(__file__).parent.parent
# Of the wheel, beside the sources of the package; of the sdist, what a build and the tests need.
BINARIES = {"_C", "_host"}
NEEDED_IN_SDIST = {
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "csrc",
    "cmake",
    "python",
    "tests",
}
LIBRARIES = "libtorch|libtorch_cpu|libdl|libpthread|librt|libstdc\\+\\+|libgcc_s|libm|libc|ld-linux-x86-64"
ALLOWED_LIBRARIES = re.compile(rf"^({LIBRARIES})\.so")


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        problems = audit_wheel(path) if path.suffix == ".whl" else audit_sdist(path)
        for problem in problems:
            print(f"{path.name}: {problem}", file=sys.stderr)
        if problems:
            raise SystemExit(1)
        print(f"{path.name}: ok, {path.stat().st_size / 2**20:.1f} MiB")


def audit_wheel(path: Path) -> list[str]:
    version = path.name.split("-")[1]
    info = f"{PACKAGE}-{version}.dist-info"
    problems = []
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        sources = {str(p.relative_to(ROOT / "python")) for p in tracked("python")}
        found = {name for name in names if name.startswith(f"{PACKAGE}/")}
        libraries = {name for name in found if name.endswith(".so")}
        problems += [
            f"{name} is outside of the package"
            for name in names
            if not name.startswith((f"{PACKAGE}/", info))
        ]
        problems += [f"{name} is missing" for name in sorted(sources - found)]
        problems += [f"{name} is not tracked" for name in sorted(found - sources - libraries)]
        if {Path(name).name.partition(".")[0] for name in libraries} != BINARIES:
            problems.append(f"its libraries are {sorted(libraries)}, not {sorted(BINARIES)}")
        metadata = wheel.read(f"{info}/METADATA").decode()
        for line in (f"Version: {version}", "License-Expression: Apache-2.0", "Requires-Dist: torch>="):
            if line not in metadata:
                problems.append(f"METADATA lacks {line!r}")
        if f"{info}/licenses/LICENSE" not in names:
            problems.append("the licence is missing")
        if "fips_ext.cli:main" not in wheel.read(f"{info}/entry_points.txt").decode():
            problems.append("the fips command is missing")
        for name in libraries:
            problems += audit_library(Path(wheel.extract(name, folder)))
    return problems


def audit_library(path: Path) -> list[str]:
    out = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", out)
    problems = [f"{path.name} needs {name}" for name in needed if not ALLOWED_LIBRARIES.match(name)]
    if re.search(r"\((RPATH|RUNPATH)\)", out):
        problems.append(f"{path.name} has an RPATH: it would look for libraries where it was built")
    if found := re.search(rb"/[\w./-]+/csrc/[\w./-]+", path.read_bytes()):
        problems.append(f"{path.name} names a folder of the machine that built it: {found[0].decode()}")
    return problems


def audit_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as sdist:
        names = {str(Path(*Path(member.name).parts[1:])) for member in sdist.getmembers() if member.isfile()}
    allowed = {str(p.relative_to(ROOT)) for p in tracked(".")} | {"PKG-INFO"}
    top = {name.partition("/")[0] for name in names}
    problems = [f"{name} is missing" for name in sorted(NEEDED_IN_SDIST - top)]
    return problems + [f"{name} is not tracked" for name in sorted(names - allowed)]


def tracked(folder: str) -> list[Path]:
    out = subprocess.run(
        ["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in out.stdout.split("\0") if name]


if __name__ == "__main__":
    main(sys.argv[1:])
