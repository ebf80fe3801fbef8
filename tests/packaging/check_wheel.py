"""``make check-wheel``: check a wheel as a user installs it, in a fresh environment for each torch.

    python tests/packaging/check_wheel.py dist/*.whl torch==2.11.0 python3.13:torch==2.15.0

Before the colon stands the interpreter; without one it is that of this script. Each environment is
made, checked and removed. On a Hopper GPU the compiled kernels run; elsewhere the library is loaded
and its refusal of CPU tensors is looked at. A missing interpreter is named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

# In the environment under test: what an op gives, and what the library says.
PROBE = """
import sys
import torch
import dsv4_plugin
from dsv4_plugin import topk

device = "cuda" if torch.cuda.is_available() else "cpu"
g = torch.Generator().manual_seed(0)
logits = torch.randn(4, 5000, generator=g).bfloat16().to(device)
lengths = torch.tensor([5000, 700, 512, 3], dtype=torch.int32, device=device)

def check(got, want):
    assert got.dtype == torch.int32 and got.shape == (4, 512), (got.dtype, got.shape)
    assert torch.equal(got.sort(dim=1).values.long(), want), (got, want)

# The oracle: a stable sort, so that of equal scores the lowest column comes first.
want = torch.full((4, 512), -1)
for row, length in enumerate(lengths.tolist()):
    order = logits[row, :length].float().cpu().sort(descending=True, stable=True).indices[:512]
    want[row, : len(order)] = order
want = want.sort(dim=1).values.to(device)
check(topk(logits, lengths, 512, backend="torch"), want)
print("topk by torch on", device, "is exact")

from dsv4_plugin.ops import torch_library

for name in dsv4_plugin.__all__:
    getattr(dsv4_plugin, name)
assert {"topk", "select", "candidate_select_out"} <= {*torch_library.registered}
for name in torch_library.registered:
    assert getattr(torch.ops.dsv4, name).default._schema.name == f"dsv4::{name}", name
check(torch.ops.dsv4.topk(logits, lengths, 512, backend="torch"), want)
print(len(torch_library.registered), "ops are in torch.ops.dsv4, and its topk is exact")

if "library" not in sys.argv:
    sys.exit()
from dsv4_plugin.kernels import cuda
from dsv4_plugin.kernels.arguments import TopkArgs

assert cuda.missing() is None, cuda.missing()
if device == "cuda" and torch.cuda.get_device_capability() in cuda.CAPABILITIES:
    check(topk(logits, lengths, 512, backend="cuda"), want)
    print("topk by cuda is exact")
else:
    rows = torch.empty(4, 512, dtype=torch.int32)
    try:
        cuda.topk(
            TopkArgs(
                logits.cpu(), lengths.cpu(), rows, None, None, None, 512, 1, 64, False, None
            )
        )
    except (TypeError, ValueError) as error:
        assert "logits" in str(error) and "cpu" in str(error).lower(), error
        print("the library loads and refuses CPU tensors:", str(error).splitlines()[0])
    else:
        raise AssertionError("the library took CPU tensors")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s WHEEL [PYTHON:]TORCH …")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("torch", nargs="+", help="torch==2.11.0, or python3.13:torch==2.11.0")
    arguments = parser.parse_args()
    wheel = arguments.wheel.resolve()
    if not wheel.is_file():
        parser.error(f"there is no wheel {arguments.wheel}; `make wheel` builds it")
    with zipfile.ZipFile(wheel) as archive:
        library = "dsv4_plugin/_C.so" in archive.namelist()
    print(f"{wheel.name}, {'with' if library else 'WITHOUT'} the compiled kernels")
    if library == wheel.name.endswith("-any.whl"):
        parser.error(f"{wheel.name} has the tag of a wheel {'without' if library else 'with'} them")
    left = []
    for wanted in arguments.torch:
        name, _, torch = wanted.rpartition(":")
        python = shutil.which(name) if name else sys.executable
        if python is None or not starts(python):
            left.append(f"{wanted}: there is no {name} on PATH")
            continue
        with tempfile.TemporaryDirectory(prefix="dsv4-wheel-") as folder:
            check(Path(folder), wheel, library, python, torch)
    for line in left:
        print(f"NOT CHECKED, {line}")
    return 1 if left else 0


def starts(python: str) -> bool:
    """Say whether an interpreter runs: a version manager has names of what it does not run."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def check(folder: Path, wheel: Path, library: bool, python: str, torch: str) -> None:
    """Install ``wheel`` beside ``torch`` in a new environment in ``folder`` and try it."""
    began = time.monotonic()
    print(f"\n{python}, {torch}: installing (the CUDA builds of torch are some GB)", flush=True)
    call(folder, python, "-m", "venv", folder / "venv")
    bin = folder / "venv" / "bin"
    call(folder, bin / "python", "-m", "pip", "install", "-q", "--no-cache-dir", wheel, torch)
    call(folder, bin / "python", "-m", "pip", "check")
    version = wheel.name.split("-")[1]

    # 1: what a machine without a Hopper GPU is told; 0: the kernels can serve.
    done = call(folder, bin / "dsv4-plugin", "doctor", "--json", codes=(0, 1))
    report = json.loads(done)
    assert report["versions"]["dsv4-plugin"] == version, report["versions"]
    assert (
        report["versions"]["torch"].split("+")[0] == torch.rpartition("=")[2] or "==" not in torch
    )
    assert report["library"]["present"] == report["library"]["loads"] == library, report["library"]
    assert all(report["entry_points"].values()), report["entry_points"]
    assert not [row for row in report["ops"].values() if not row["auto"]], report["ops"]
    names = ("python", "torch", "tvm-ffi")
    print("  doctor:", ", ".join(f"{name} {report['versions'][name]}" for name in names))
    print("  doctor:", report["verdict"])

    for line in call(folder, bin / "python", "-c", PROBE, *["library"] * library).splitlines():
        print(" ", line)
    link_tools(folder)
    done = call(folder, bin / "python", "-m", "tests.fuzz", "--cases", "60", "--seed", "1")
    print("  fuzz:", done.splitlines()[-1], flush=True)
    print(f"  passed in {time.monotonic() - began:.0f} s", flush=True)


def link_tools(folder: Path) -> None:
    """Make the fuzzer importable in ``folder``, and not the checkout's package beside it."""
    for name in ("tests", "benchmarks"):
        (folder / name).symlink_to(Path(__file__).resolve().parents[2] / name)


def call(folder: Path, *command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run a command without a variable of this session that would change it; returns its stdout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "PYTHON"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=env, capture_output=True, text=True
    )
    if done.returncode not in codes:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"check-wheel: {command[0]} … ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
