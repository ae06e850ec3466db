"""The targets of curation.py as a table: what was asked, what was found, whether it is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Line = tuple[str, str, str, bool | None]  # what, target, found, whether it is enough (None: only for comparison)


def table(found: dict[str, Any]) -> str:
    """Markdown; a part that did not run says so."""
    lines = ["| what | target | found | |", "|---|---|---|---|"]
    for part, judge in PARTS.items():
        if part not in found or "failed" in found[part]:
            lines.append(f"| {part} | | {'failed' if part in found else 'not run'} | |")
            continue
        for what, target, value, enough in judge(found[part]):
            lines.append(f"| {what} | {target} | {value} | {'' if enough is None else 'ok' if enough else 'MISSED'} |")
    return "\n".join(lines)


def _files(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, found[name]) for name in found if name != "took")


def quality(found: dict[str, Any]) -> Iterator[Line]:
    """Pairs against brute force, and the notebook's way beside."""
    for name, f in _files(found):
        pairs, ours, k2, words = f["pairs"], f["ours"], f["k2"], f["wording"]
        value = f"{pairs['ours']:,} of {pairs['brute']:,} pairs, recall {pairs['recall']:.4f}"
        yield f"{name}: pairs at 0.9 = brute force", "recall 1.0", value, pairs["recall"] == 1
        wrong = (ours["wrongly_kept"], ours["wrongly_dropped"])
        yield f"{name}: wrongly kept, wrongly dropped", "0, 0", f"{wrong[0]}, {wrong[1]}", wrong == (0, 0)
        value = f"{k2['wrongly_kept']:,}, {k2['wrongly_dropped']:,} ({k2['kept']:,} kept, ours {ours['kept']:,})"
        yield f"{name}: the k = 2 notebook's", "", value, None
        value = f"{words['recall']:.4f} on {words['sample_pairs']:,} pairs of a sample"
        yield f"{name}: wording pairs = brute force", "recall 1.0", value, words["recall"] == 1


def render(found: dict[str, Any]) -> Iterator[Line]:
    """Render with mask and audit."""
    for name, f in _files(found):
        low, high = f["ratio_range"]["render"]
        value = f"{f['ratio_to_raw']['render']:.2f} × ({low:.2f} to {high:.2f}), {f['rows']:,} rows"
        yield f"{name}: render with mask and audit", "≤ 4 × raw", value, f["ratio_to_raw"]["render"] <= 4


def encode(found: dict[str, Any]) -> Iterator[Line]:
    """Both encoders against the default call."""
    rates = found["rows_per_second"]
    value = f"{found['ratio']:.2f} × ({rates['ours']:,.0f} against {rates['default']:,.0f} rows/s)"
    enough = found["ratio"] >= 1.3 and found["same_rows_kept"]
    yield "embedding, the same rows kept", "≥ 1.3 × sentence-transformers", value, enough
    yield "a static model", "≥ 50 ×", f"{found['static_ratio']:,.0f} ×", found["static_ratio"] >= 50


def search(found: dict[str, Any]) -> Iterator[Line]:
    """The search against the products alone."""
    value = f"{found['ratio']:.2f} × at {found['rows']:,} × {found['dimension']}"
    yield "exact search", "≤ 1.2 × blocked products", value, found["ratio"] <= 1.2


def semhash(found: dict[str, Any]) -> Iterator[Line]:
    """Beside SemHash."""
    for name, f in _files(found):
        theirs, ours = f["semhash"], f["ours"]
        value = f"{f['times_as_fast']:.1f} × as fast; wrongly kept {ours['wrongly_kept']}, it {theirs['wrongly_kept']}"
        enough = f["times_as_fast"] >= 1 and ours["wrongly_kept"] <= theirs["wrongly_kept"]
        yield f"{name}: SemHash, same vectors", "at least as fast, recall no less", value, enough


def stages(found: dict[str, Any]) -> Iterator[Line]:
    """All that follows embedding."""
    for name, f in _files(found):
        value = f"{f['seconds']:.1f} s, {f['peak_bytes'] / 1e9:.2f} GB, {f['dedup']['rows_in']:,} rows"
        enough = f["seconds"] <= 60 and f["peak_bytes"] <= 2e9
        yield f"after embedding, {name}", "≤ 60 s, ≤ 2 GB", value, enough


def packing(found: dict[str, Any]) -> Iterator[Line]:
    """Bins over the bound."""
    for name, f in _files(found):
        value = f"{f['ours']:,} bins, {f['ours_over_bound']:.4f} ×; TRL's call {f['trl_over_bound']:.4f} ×"
        yield f"packing, {name} tokens", "≤ 1.005 × the bound", value, f["ours_over_bound"] <= 1.005


def wording(found: dict[str, Any]) -> Iterator[Line]:
    """The exact join beside two LSH libraries."""
    for name in ("ours", "datasketch", "rensa"):
        if name in found:
            f = found[name]
            value = f"recall {f['recall']:.3f} of {found['ours']['candidates']:,} pairs, {f['seconds']['sum']:.1f} s, "
            value += f"{f['more_bytes'] / 1e6:.0f} MB"
            enough = f["recall"] == 1 if name == "ours" else None
            yield f"wording, {found['rows']:,} rows: {name}", "recall 1.0" if name == "ours" else "", value, enough


PARTS = {
    "quality": quality, "render": render, "encode": encode, "search": search, "semhash": semhash, "stages": stages,
    "packing": packing, "wording": wording,
}  # fmt: skip
