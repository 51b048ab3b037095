"""What the doctor found out about a model, for people and as JSON."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from quantlab.store import json_text

MIB = 2**20


@dataclass(frozen=True)
class KindLine:
    """Sites of one kind, or operations that are none.

    Attributes:
        kind: of the sites, or the operation.
        count: how many there are.
        macs: multiply-accumulates of one forward at batch 1.
        covered: they can be quantized by every method.
        reason: why they stay float otherwise, and where operations that are no sites are.
    """

    kind: str
    count: int
    macs: int
    covered: bool
    reason: str = ""


@dataclass(frozen=True)
class ProtectedLine:
    """Sites outside the budget: their tag or rule, their bits ("float" among them), and their names."""

    rule: str
    bits: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """The capture matrix of a model.

    Attributes:
        model: as it was asked for.
        network: the class.
        method: how the graph came about.
        seconds: that capture and comparison took.
        notes: what was specialised, reasons for fallbacks.
        kinds: sites by kind, then operations that are no sites.
        protected: sites outside the budget.
        guards: conditions on sizes under which the graph holds.
        parameters: number of them.
        weight_bytes: of the float network.
        quantized_bytes: of the quantized one with the plan's nominal bits.
        activation_bytes: most bytes of tensors that are alive together in one forward at batch 1.
        inputs: shapes of the example at batch 1, by name.
    """

    model: str
    network: str
    method: str
    seconds: float
    notes: tuple[str, ...]
    kinds: tuple[KindLine, ...]
    protected: tuple[ProtectedLine, ...]
    guards: tuple[str, ...]
    parameters: int
    weight_bytes: int
    quantized_bytes: int
    activation_bytes: int
    inputs: dict[str, tuple[int, ...]]

    @property
    def macs(self) -> int:
        """All multiply-accumulates that are known of."""
        return sum(line.macs for line in self.kinds)

    @property
    def coverage(self) -> float:
        """Share of the multiply-accumulates that every method can quantize."""
        return sum(line.macs for line in self.kinds if line.covered) / self.macs if self.macs else 0.0

    def to_json(self) -> str:
        """What ``--json`` prints."""
        return json_text({**asdict(self), "coverage": self.coverage, "macs": self.macs})

    def to_text(self, width: int) -> str:
        """Tables for a terminal ``width`` columns wide."""
        from rich.console import Console
        from rich.table import Table

        out = Console(file=io.StringIO(), width=width, highlight=False)
        out.print(f"{self.model}: {self.network}, {self.parameters:,} parameters", markup=False)
        out.print(
            f"captured by {self.method} in {self.seconds:.1f} s, equal to the model at batch 1 and 3", markup=False
        )
        for note in self.notes:
            out.print(f"  note: {note}", markup=False)
        kinds = Table("sites", "number", "MACs", "share", "quantized", box=None, pad_edge=False)
        for line in self.kinds:
            share = f"{line.macs / self.macs:.1%}" if self.macs else "-"
            kinds.add_row(line.kind, str(line.count), f"{line.macs:,}", share, "yes" if line.covered else line.reason)
        out.print(kinds)
        out.print(f"{self.coverage:.1%} of {self.macs:,} multiply-accumulates can be quantized by every method")
        if self.protected:
            rules = Table("outside the budget", "bits", "number", "sites", box=None, pad_edge=False)
            for rule in self.protected:
                rules.add_row(rule.rule, rule.bits, str(len(rule.sites)), shortened(rule.sites))
            out.print(rules)
        out.print(
            f"inputs at batch 1: {', '.join(f'{name} {list(shape)}' for name, shape in self.inputs.items())}",
            markup=False,
        )
        limits = self.guards or ("none: every size that the model takes",)
        out.print("conditions on sizes: " + "; ".join(limits), markup=False)
        weights, quantized, activations = (
            f"{size / MIB:,.1f} MiB" for size in (self.weight_bytes, self.quantized_bytes, self.activation_bytes)
        )
        out.print(f"memory: weights {weights}, with the plan's bits {quantized}", markup=False)
        out.print(f"  activations of one forward at batch 1: {activations}", markup=False)
        return str(out.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def shortened(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
