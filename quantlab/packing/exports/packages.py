"""Packages that only an export needs."""

from __future__ import annotations

from importlib.util import find_spec

from quantlab.errors import PackError


def require_packages(target: str, *names: str) -> None:
    """Raise PackError unless the packages are installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise PackError(
            f"exporting to {target} needs packages that are not installed",
            got=", ".join(missing),
            next_step='pip install "quantlab[export]"',
        )
