"""The state of the SGLang adapter, and the checks of its hooks, which SGLang applies."""

from __future__ import annotations

import inspect
from importlib import metadata

from dsv4_plugin.engines.sglang import registry
from dsv4_plugin.engines.sglang.probe import PAGED
from dsv4_plugin.engines.shared import adapter
from dsv4_plugin.engines.shared.row_shard import Group
from dsv4_plugin.state import state

__all__ = ["SglangAdapter", "current"]


class SglangAdapter(adapter.Adapter):
    """``targets`` are the hooked attributes of each seam.

    ``group``: the ranks among which the rows of a prefill are sharded, None where they are not.
    """

    def __init__(self) -> None:
        try:
            version = metadata.version("sglang")
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        super().__init__(f"SGLang {version}")
        self.targets: dict[str, tuple[str, ...]] = {}
        self.group: Group | None = None

    def intact(self, name: str) -> bool:
        """Whether every call of a seam reaches the plugin's hook first."""
        targets = self.targets.get(name)
        return bool(targets) and all(registry.intact(target) for target in targets or ())

    def problems(self, name: str) -> list[str]:
        """Return why a seam cannot be used; an empty list if it can."""
        seam = state.seams.get(name)
        if seam is None or seam.where is None:
            return super().problems(name)
        reasons = []
        for target in self.targets.get(name, ()):
            if not registry.intact(target):
                others = registry.other_hooks(target)
                who = f" ({', '.join(others)})" if others else ""
                reasons.append(f"seam {name} ({target}) is hooked by other code as well{who}")
            elif name == "topk.paged":
                reasons += _signature_problem(target)
        return reasons


def _signature_problem(target: str) -> list[str]:
    """Return why the plugin cannot replace a top-k function of SGLang."""
    want = (*PAGED, "metadata") if target.endswith("_v2") else PAGED
    try:
        got = tuple(inspect.signature(registry.hooked(target)).parameters)
    except (TypeError, ValueError):
        return [f"{target} has no readable signature"]
    if got not in (want, (*want, "out_raw_indices")):  # 0.5.19's v2 has none
        return [f"{target} takes ({', '.join(got)}), not ({', '.join(want)}, out_raw_indices)"]
    return []


def current() -> SglangAdapter | None:
    """Return the adapter of this process; None before ``register()`` and after ``unregister()``."""
    found = adapter.current()
    return found if isinstance(found, SglangAdapter) else None
