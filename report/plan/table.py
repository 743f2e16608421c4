"""A plan on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from report.plan.plan import Plan
from report.plan.report import Report, by_moment, bytes_by_recomputation, peak_rows

GIB = 2**30


def gib(count: float) -> str:
    return f"{count / GIB:,.2f}"


def si(value: float, unit: str) -> str:
    """ "3.41 TB"."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}"


def share(value: float | None) -> str:
    return "refused" if value is None else f"{100 * value:.1f} %"


def days(plan: Plan) -> str:
    """Of the token budget; small ones with two digits."""
    return f"{plan.days:,.1f}" if plan.days >= 1 else f"{plan.days:.2g}"


def show(report: Report, console: Console) -> None:
    """Print everything: the layout's figures, sizes that fail, layouts that fit, and what was assumed."""
    recipe, machine = report.recipe, report.machine
    console.print(
        f"{recipe.name}: {report.parameters:,} parameters on {report.world} x {machine.name} "
        f"({report.nodes} node{'s' * (report.nodes > 1)} of {report.per_node})",
        markup=False,
    )
    if (plan := report.plan) is not None:
        _layout(plan, report.tokens, console)
        for table in (_bytes(plan), _activations(report), _flops(plan), _step(plan), _traffic(plan), _mfu(plan)):
            console.print(table)
    for table in (_constraints(report), _suggestions(report)):
        if table is not None:
            console.print(table)
    console.print(_assumptions(report))
    refused = report.found.refused if report.found is not None else {}
    for tp, why in refused.items():
        console.print(f"Not tried: parallel.tp={tp}: {why}", markup=False)
    for note in report.notes:
        console.print(f"Note: {note}", markup=False)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place < left else "right", overflow="fold")
    return made


def _layout(plan: Plan, tokens: int, console: Console) -> None:
    verdict = "fits" if plan.fits else "does not fit"
    console.print(
        f"{plan.layout.describe()}: {verdict}, {gib(plan.fullest.peak)} of {gib(plan.limit)} GiB on the fullest rank; "
        f"{plan.tokens_per_second:,.0f} tokens/s, {days(plan)} days for {tokens / 1e9:,.3g} G tokens",
        markup=False,
    )


def _bytes(plan: Plan) -> Table:
    rank = plan.fullest
    table = _table(f"Bytes of pipeline rank {rank.pp_rank}", "copy", "GiB", "bytes a parameter")

    def add(name: str, count: int) -> None:
        table.add_row(name, gib(count), f"{count / rank.parameters:.3f}")

    for kind, count in rank.kinds().items():
        add(kind, count)
    table.add_section()
    add(f"at its peak ({rank.moment})", rank.peak)
    for moment, count in by_moment(rank).items():
        if moment != rank.moment:
            add(f"in its {moment}", count)
    table.add_section()
    add("logits of a micro-batch, while they are there", max(each.logits for each in plan.ranks))
    add("buckets of gradients, while they are there", rank.buckets)
    return table


def _activations(report: Report) -> Table:
    table = _table("Activations that forwards keep on a rank", "recomputation", "GiB", "peak of the rank, GiB", "fits")
    for recompute, (kept, peak, fits) in bytes_by_recomputation(report).items():
        table.add_row(recompute, gib(kept), gib(peak), "yes" if fits else "no")
    return table


def _flops(plan: Plan) -> Table:
    total = sum(each.flops for each in plan.shares)
    table = _table("FLOPs of a step by GEMM", "GEMM", "a", "b", "multiplied as", "FLOPs", "share", left=4)
    for each in plan.shares:
        operands = ("", "") if "," in each.leg else (each.a or "high", each.b or "high")
        table.add_row(each.leg, *operands, each.element, si(each.flops, "FLOP"), share(each.flops / total))
    return table


def _step(plan: Plan) -> Table:
    table = _table("One step", "part", "ms", "share")
    for name, seconds in plan.step.parts.items():
        note = f" (bubble {share(plan.step.bubble)})" if name == "micro-batches" and plan.layout.pp > 1 else ""
        table.add_row(name + note, f"{1e3 * seconds:,.1f}", share(seconds / plan.step.seconds))
        for kind, own in plan.step.kinds.items() if name == "micro-batches" else ():
            table.add_row(f"  {kind}", f"{1e3 * own:,.1f}", share(own / plan.step.seconds), style="dim")
    table.add_section()
    table.add_row("together", f"{1e3 * plan.step.seconds:,.1f}", "")
    return table


def _traffic(plan: Plan) -> Table:
    """What a rank sends; `ranks` are those of the group, and the nodes that they lie on."""
    columns = ("what", "collective", "ranks", "times", "sent", "between nodes", "ms", "exposed")
    table = _table("Sent by a rank in a step", *columns, left=2)
    for t in plan.step.transfers:
        numbers = (f"{t.members} on {t.nodes}", f"{t.count:,}", si(t.sent, "B"), si(t.between, "B"))
        milliseconds = (f"{1e3 * t.seconds:,.1f}", f"{1e3 * t.exposed:,.1f}")
        table.add_row(f"{t.what} ({t.group})", f"{t.kind} {t.payload}", *numbers, *milliseconds)
    return table


def _mfu(plan: Plan) -> Table:
    table = _table("Model FLOP/s utilization", "against", "MFU", "peak", left=1)
    for name, each in plan.utilizations().items():
        table.add_row(name, share(each.value), str(each.peak))
    return table


def _constraints(report: Report) -> Table | None:
    if not report.constraints:
        return None
    table = _table("Sizes that are no multiple of what kernels want", "linears", "size", "multiple of", "", left=1)
    for each in report.constraints:
        word = "refused by kernels, padded here" if each.hard else "runs, tiles partly empty"
        where, _, side = each.where.rpartition(": ")
        table.add_row(f"{where} ({side})", f"{each.size:,}", str(each.multiple), word)
    return table


def _suggestions(report: Report) -> Table | None:
    found = report.found
    if found is None:
        return None
    title = f"Layouts that fit, fastest first ({found.fitting} of {found.tried} tried)"
    table = _table(title, "layout", "peak, GiB", "tokens/s", "ms a step", "days", "MFU (BF16)")
    for plan in found.plans:
        table.add_row(*_suggestion(plan))
    return table


def _suggestion(plan: Plan) -> Sequence[str]:
    bf16 = plan.utilizations()["BF16 peak"].value
    return (
        plan.layout.describe(),
        gib(plan.fullest.peak),
        f"{plan.tokens_per_second:,.0f}",
        f"{1e3 * plan.step.seconds:,.0f}",
        days(plan),
        share(bf16),
    )


def _assumptions(report: Report) -> Table:
    table = _table("Assumed (* guessed)", "what", "value", "source", left=3)
    for row in peak_rows(report.machine):
        table.add_row(*row)
    return table
