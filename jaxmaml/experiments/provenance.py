"""The provenance of a number beside its settings: device, versions and commit."""

import pathlib
import platform
import subprocess
from importlib import metadata

import jax

import jaxmaml


def device() -> str:
    """Returns the kind and the number of the devices and the processor, as in "cpu x 2, x86_64"."""
    return f"{jax.devices()[0].device_kind} x {jax.device_count()}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Returns the versions of the packages on which the numbers depend, and of Python."""
    packages = ("jaxmaml", "jax", "jaxlib", "flax", "optax")
    return {name: metadata.version(name) for name in packages} | {
        "python": platform.python_version()
    }


def commit() -> str | None:
    """Returns the git commit of the package's checkout; None if it is not run from a checkout."""
    source = pathlib.Path(jaxmaml.__file__)
    # An environment inside another project's checkout would give the commit of that project.
    if git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return git(source.parent, "rev-parse", "HEAD")


def git(directory: pathlib.Path, *arguments: str) -> str | None:
    """Returns what a git command prints; None if it fails."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
