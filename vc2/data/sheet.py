"""A contact sheet: one HTML page that shows what is in a shard set, by numbers and to the eye.

It opens anywhere, asks nobody for anything (its policy forbids the browser to), and runs no script. Captions are
words of strangers: every word on the page is escaped. Clips play at their own rate under the pointer or the focus:
their frames lie side by side in one picture, which is moved behind a window.

The index is read a row group at a time; of each sample a few numbers are kept, of those shown everything.
"""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vc2.artifacts import Manifest
from vc2.data.audit import shard_table, stored_table
from vc2.data.cache import is_absolute, read_range
from vc2.data.config import SampleForm
from vc2.data.foreign import FOREIGN, Extractor, draw
from vc2.data.shards import decode_frames, shard_name
from vc2.errors import StoreError
from vc2.progress import size_text
from vc2.seeding import generator
from vc2.storage import Store

__all__ = ["contact_sheet"]

STOPS = 8  # frames of a clip that are shown
WIDTH = 240  # of a frame, pixels
QUALITY = 68
PAIRS = 8  # near duplicates that are shown beside what they are like
MOST_SHARDS = 400  # lines of the table of shards
BINS = 24
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def contact_sheet(store: Store, manifest: Manifest, *, samples: int = 48, seed: int = 0) -> str:
    """A self-contained page about a shard set.

    Args:
        store: Where the set is.
        manifest: Of the set.
        samples: How many to show, drawn evenly.
        seed: Of the draw.

    Raises:
        StoreError: If the index cannot be read. A sample that cannot is shown as such.
    """
    index = _Index(store, manifest, samples, seed)
    rejects = _table(store, manifest, "rejects.parquet", ["what", "reason", "detail", "key", "locator"])
    with Extractor(60) as extractor:
        show = _Show(store, manifest, extractor)
        parts = (
            _header(manifest, index),
            _accounts(manifest, rejects),
            _histograms(manifest, index),
            _gallery(
                "Samples", f"{len(index.shown)} of {_count(index.rows)}, drawn evenly.", map(show.card, index.shown)
            ),
            _pairs(index, show),
            _shards(store, manifest),
        )
        body = "\n".join(part for part in parts if part)
    title = escape(f"{_source(manifest)}: contact sheet")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# ---- what is in it ----


class _Index:
    """Numbers of all samples; lines of those that are shown."""

    def __init__(self, store: Store, manifest: Manifest, samples: int, seed: int) -> None:
        with stored_table(store, manifest.file("index.parquet").key) as table:
            self.rows = table.metadata.num_rows
            draws = generator(seed, "contact sheet").permutation(self.rows)[:samples]
            wanted, pairs = np.sort(draws), []
            self.shown: list[dict[str, Any]] = []
            found: dict[str, list[np.ndarray]] = {name: [] for name in ("fps", "length", "caption", "motion")}
            self.duplicates, first = 0, 0
            for group in range(table.num_row_groups):
                lines = table.read_row_group(group, use_threads=False)
                self.shown += lines.take(wanted[(wanted >= first) & (wanted < first + len(lines))] - first).to_pylist()
                first += len(lines)
                near = lines.filter(pc.is_valid(lines["duplicate_of"]))  # type: ignore[attr-defined]
                self.duplicates += len(near)
                pairs += near.slice(0, PAIRS - len(pairs)).to_pylist()
                for name in ("fps", "length", "motion"):
                    found[name].append(lines[name].to_numpy(zero_copy_only=False))
                found["caption"].append(pc.utf8_length(lines["caption"]).to_numpy(zero_copy_only=False))  # type: ignore[attr-defined]
            self.columns = {name: np.concatenate(some) if some else np.zeros(0) for name, some in found.items()}
            originals = {line["duplicate_of"] for line in pairs}
            known: dict[str, dict[str, Any]] = {}
            for group in range(table.num_row_groups if originals else 0):
                keys = table.read_row_group(group, columns=["key"], use_threads=False)["key"].to_pylist()
                places = [place for place, key in enumerate(keys) if key in originals]
                if places:
                    lines = table.read_row_group(group, use_threads=False).take(places).to_pylist()
                    known |= {line["key"]: line for line in lines}
        self.pairs = [(known[line["duplicate_of"]], line) for line in pairs if line["duplicate_of"] in known]


class _Show:
    """Makes cards of samples."""

    def __init__(self, store: Store, manifest: Manifest, extractor: Extractor) -> None:
        self._store, self._manifest, self._extractor = store, manifest, extractor
        self._form: SampleForm | None = None
        if manifest.stage == FOREIGN:
            self._form = SampleForm.model_validate(manifest.config["form"])

    def card(self, line: Mapping[str, Any], note: str = "") -> str:
        """A sample: its frames, its caption, where it comes from."""
        try:
            frames = self._frames(line)
            picture = _picture(frames, line)
        except (StoreError, KeyError) as error:
            picture = f'<p class="broken">cannot be read: {escape(str(error))}</p>'
        facts = [f"{line['fps']} fps"] if line["fps"] else []
        facts += [f"motion {line['motion']:.1f}"] if line["motion"] is not None else []
        facts += [f"{line['cuts']} cut{'s' * (line['cuts'] > 1)}"] if line["cuts"] else []
        facts += [size_text(line["length"])]
        facts += ["near duplicate"] if line["duplicate_of"] else []
        tags = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
        above = f'<p class="note">{escape(note)}</p>' if note else ""
        return (
            f'<article class="card">{above}{picture}<p class="caption">{escape(line["caption"] or "")}</p>'
            f'<ul class="facts">{tags}</ul><p class="origin"><b>{escape(line["key"])}</b>'
            f"<span>{escape(line['locator'] or '')}</span></p></article>"
        )

    def _frames(self, line: Mapping[str, Any]) -> np.ndarray:
        tar = self._manifest.file(shard_name(line["shard"]))
        data = read_range(self._store, tar.key, line["offset"], line["length"])
        if self._form is None:
            return decode_frames(data, line["frame_bytes"], line["ending"])
        clip = draw(line["key"], line["facts"], self._form, 0, 0) if line["fps"] else None
        return self._extractor.frames(data, "video" if clip else "image", self._form, clip)


def _picture(frames: np.ndarray, line: Mapping[str, Any]) -> str:
    import cv2
    import simplejpeg

    height, width = frames.shape[1:3]
    size = WIDTH, max(1, round(WIDTH * height / width))
    places = np.unique(np.linspace(0, len(frames) - 1, min(STOPS, len(frames))).round().astype(int))
    small = [cv2.resize(frames[place], size, interpolation=cv2.INTER_AREA) for place in places]
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(np.hstack(small)), QUALITY, colorsubsampling="420")
    uri = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    shape = f"aspect-ratio:{size[0]}/{size[1]}"
    if len(small) == 1:
        return f'<img class="still" src="{uri}" style="{shape}" width="{size[0]}" height="{size[1]}" alt="the picture">'
    count, seconds = len(small), len(frames) / max(1, line["fps"])
    strip = f"--strip:url({uri});--count:{count};--seconds:{seconds:.3f}s;{shape}"
    stops = {"first": 0, "middle": count // 2, "last": count - 1}
    thumbs = "".join(
        f'<i role="img" aria-label="{name} frame" style="--at:{100 * place / (count - 1):.4f}%;{shape}"></i>'
        for name, place in stops.items()
    )
    label = f"{len(frames)} frames; plays under the pointer"
    return (
        f'<div class="clip" style="{strip}"><div class="player" tabindex="0" role="img" aria-label="{label}" '
        f'style="{shape}"></div><div class="stops">{thumbs}</div></div>'
    )


# ---- the parts of the page ----


def _header(manifest: Manifest, index: _Index) -> str:
    counts, config = manifest.counts, manifest.config
    source = config.get("source")
    kind = source.get("kind", "") if isinstance(source, Mapping) else "tars of others"
    form = config.get("form", {})
    what = f"{form.get('num_frames', '?')} frames of {form.get('width', '?')} x {form.get('height', '?')}"
    tiles = {
        "samples": _count(index.rows),
        "shards": _count(counts.get("shards", sum(entry.name.endswith(".tar") for entry in manifest.files))),
        "in tars": size_text(sum(entry.size for entry in manifest.files if entry.name.endswith(".tar"))),
        "near duplicates": _count(index.duplicates),
    }
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items())
    licences = "; ".join(f"{name}: {text}" for name, text in manifest.licenses.items()) or "not stated"
    told = {
        "form": what if manifest.facts.get("media") != "image" else what.replace("1 frames of ", ""),
        "made": f"{manifest.created_at[:16].replace('T', ' ')} in {manifest.seconds:.0f} s",
        "fingerprint": manifest.fingerprint,
        "licence": licences,
    }
    lines = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in told.items())
    return (
        f'<header><p class="kind">shard set of {escape(str(manifest.facts.get("media", "sample")))}s'
        f"{escape(f', {kind}' if kind else '')}</p><h1>{escape(_source(manifest))}</h1>"
        f'<dl class="tiles">{shown}</dl><dl class="told">{lines}</dl></header>'
    )


def _accounts(manifest: Manifest, rejects: list[dict[str, Any]]) -> str:
    """Every row of the source has one fate; whether they add up is said in words."""
    counts = manifest.counts
    rows = counts.get("rows", 0)
    fates = [
        ("with samples", counts.get("rows_with_samples", counts.get("samples", 0)), "good"),
        ("rejected", counts.get("rows_rejected", 0), "bad"),
        ("exact duplicates", counts.get("rows_duplicate", 0), "same"),
    ]
    total = sum(count for _, count, _ in fates)
    bar = "".join(f'<i class="{kind}" style="flex:{count}"></i>' for _, count, kind in fates if count)
    sum_text = " + ".join(f'<span class="{kind}"><b>{_count(count)}</b> {name}</span>' for name, count, kind in fates)
    verdict = "the accounts are even" if total == rows else f"{_count(abs(rows - total))} rows are unaccounted for"
    reasons = Counter(line["reason"] for line in rejects if line["what"] in ("row", "duplicate"))
    examples = {line["reason"]: line for line in reversed(rejects)}
    most = max(reasons.values(), default=1)
    bars = "".join(
        f'<tr><th scope="row">{escape(reason)}</th><td class="bar"><i style="width:{100 * count / most:.2f}%"></i></td>'
        f'<td class="number">{_count(count)}</td><td class="number">{_percent(count, rows)}</td>'
        f'<td class="example">{escape(_example(examples[reason]))}</td></tr>'
        for reason, count in reasons.most_common()
    )
    table = (
        f'<table class="reasons"><thead><tr><th scope="col">reason</th><th scope="col" class="wide">'
        f'<span class="unseen">share</span></th><th scope="col" class="number">rows</th><th scope="col" class="number">'
        f'of all</th><th scope="col">for example</th></tr></thead><tbody>{bars}</tbody></table>'
        if bars
        else '<p class="lead">Nothing was left out.</p>'
    )
    others = [f"{_count(counts[name])} {text}" for name, text in OTHERS.items() if counts.get(name)]
    beside = f'<p class="lead">Beside these: {escape(", ".join(others))}.</p>' if others else ""
    return (
        f'<section><h2>Accounts</h2><p class="sum"><span><b>{_count(rows)}</b> rows</span> = {sum_text}</p>'
        f'<div class="fates" role="img" aria-label="shares of the rows">{bar}</div>'
        f'<p class="{"even" if total == rows else "odd"}">{verdict}</p>{table}{beside}</section>'
    )


OTHERS = {
    "clips_rejected": "clips rejected of rows that keep others",
    "media_unmatched": "media that no row names",
}


def _example(line: Mapping[str, Any]) -> str:
    where = line["locator"] or line["key"] or ""
    return f"{where}: {line['detail']}" if line["detail"] else where


def _histograms(manifest: Manifest, index: _Index) -> str:
    found = index.columns
    videos = manifest.facts.get("media") != "image"
    charts = []
    if videos and index.rows:
        labels = Counter(found["fps"].astype(int).tolist())
        charts.append(_chart("Frame rate", "frames per second", [(str(fps), labels[fps]) for fps in sorted(labels)]))
        motion = found["motion"][~np.isnan(found["motion"].astype(float))].astype(float)
        charts.append(_binned("Motion", "mean change of luma between frames, of 255", motion))
    charts.append(_binned("Size", "kB per sample", found["length"] / 1000))
    charts.append(_binned("Captions", "characters", found["caption"]))
    return f'<section><h2>Spread</h2><div class="charts">{"".join(charts)}</div></section>' if index.rows else ""


def _binned(title: str, unit: str, values: np.ndarray) -> str:
    if not len(values):
        return ""
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    whole = bool(np.all(values == np.round(values))) and high - low < BINS
    edges = np.arange(low, high + 2) if whole else np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    median = float(np.median(values))
    bars = [(f"{_figure(edges[n])} to {_figure(edges[n + 1])}", int(count)) for n, count in enumerate(counts)]
    more = " and more" if values.max() > edges[-1] else ""
    ends = (_figure(low), f"median {_figure(median)}", _figure(edges[-1]) + more)
    return _chart(title, unit, bars, ends)


def _chart(title: str, unit: str, bars: Sequence[tuple[str, int]], ends: Sequence[str] = ()) -> str:
    """Upright bars; without `ends` each has its name below."""
    most, total = max(count for _, count in bars), sum(count for _, count in bars)
    step = 100 / len(bars)
    shapes = "".join(
        f'<rect x="{step * n + 0.12 * step:.3f}" y="{60 - 58 * count / most:.3f}" width="{0.76 * step:.3f}" '
        f'height="{58 * count / most:.3f}"><title>{escape(name)}: {_count(count)}</title></rect>'
        for n, (name, count) in enumerate(bars)
    )
    below = "".join(f"<span>{escape(text)}</span>" for text in (ends or [name for name, _ in bars]))
    heard = f"{total} samples; " + ", ".join(f"{name}: {count}" for name, count in bars if count)
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(unit)}</figcaption>"
        f'<svg viewBox="0 0 100 60" preserveAspectRatio="none" role="img" aria-label="{escape(heard)}">'
        f'{shapes}</svg><div class="{"ends" if ends else "names"}">{below}</div></figure>'
    )


def _gallery(title: str, lead: str, cards: Any) -> str:
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p><div class="cards">{"".join(cards)}</div></section>'


def _pairs(index: _Index, show: _Show) -> str:
    if not index.pairs:
        return ""
    pairs = "".join(
        f'<div class="pair">{show.card(first, "kept")}{show.card(second, "left out of training")}</div>'
        for first, second in index.pairs
    )
    lead = f"{len(index.pairs)} of {_count(index.duplicates)}: they stay in the tars and are left out of training."
    return f'<section><h2>Near duplicates</h2><p class="lead">{lead}</p><div class="pairs">{pairs}</div></section>'


def _tar_name(line: Mapping[str, Any]) -> str:
    """Of a foreign tar its own name, with the number of ours that stands for it."""
    ours = shard_name(line["shard"])
    return f"{ours}: {line['tar'].rpartition('/')[2]}" if is_absolute(line["tar"]) else ours


def _shards(store: Store, manifest: Manifest) -> str:
    lines = shard_table(store, manifest)
    for line in lines:
        line["slots"] = line["samples"] + (line["rejected"] or 0)
        line["yield"] = line["samples"] / line["slots"] if line["slots"] else 0.0
    note = ""
    if len(lines) > MOST_SHARDS:
        note = f"The {MOST_SHARDS} with the lowest yield of {_count(len(lines))}."
        lines = sorted(lines, key=lambda line: line["yield"])[:MOST_SHARDS]
    rows = "".join(
        f'<tr><th scope="row">{escape(_tar_name(line))}</th><td class="number">{_count(line["samples"])}</td>'
        f'<td class="number">{"" if line["rejected"] is None else _count(line["rejected"])}</td>'
        f'<td class="number">{size_text(line["bytes"])}</td>'
        f'<td class="number">{_percent(line["samples"], line["slots"])}</td>'
        f'<td class="bar"><i style="width:{100 * line["yield"]:.2f}%"></i></td></tr>'
        for line in lines
    )
    heads = "".join(f'<th scope="col" class="number">{name}</th>' for name in ("samples", "rejected", "size", "yield"))
    table = (
        f'<table class="shards"><thead><tr><th scope="col">shard</th>{heads}<th class="wide">'
        f'<span class="unseen">share</span></th></tr></thead><tbody>{rows}</tbody></table>'
    )
    lead = f'<p class="lead">{note}</p>' if note else ""
    is_long = " open" if len(lines) <= 16 else ""
    return (
        f"<section><h2>Shards</h2>{lead}<details{is_long}><summary>{_count(len(lines))} shards</summary>"
        f"{table}</details></section>"
    )


# ---- words and numbers ----


def _source(manifest: Manifest) -> str:
    return str(manifest.facts.get("source") or manifest.fingerprint[:12])


def _table(store: Store, manifest: Manifest, name: str, columns: list[str]) -> list[dict[str, Any]]:
    with stored_table(store, manifest.file(name).key) as table:
        return table.read(columns=columns, use_threads=False).to_pylist()


def _count(number: int) -> str:
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _figure(number: float) -> str:
    return _count(round(number)) if abs(number) >= 100 else f"{number:.3g}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


STYLE = """
:root { color-scheme: light dark; --paper: #faf9f6; --card: #fff; --sunk: #f0ede7; --ink: #1c1b19;
  --soft: #5f5b54; --line: #e0dcd3; --good: #1d7a55; --bad: #b4500f; --same: #5140c9; --mark: #5140c9;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root { --paper: #131417; --card: #1b1d21; --sunk: #26292f; --ink: #eceae5;
  --soft: #a8a49c; --line: #33363c; --good: #67cfa2; --bad: #f0a06a; --same: #a79bff; --mark: #a79bff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 2.2rem clamp(1rem, 4vw, 2.4rem) 4rem; }
h1, h2, p, dl, dd, ul, figure { margin: 0; padding: 0; }
h1 { font-size: clamp(1.8rem, 4.5vw, 2.8rem); line-height: 1.1; letter-spacing: -.025em; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; letter-spacing: -.015em; margin-bottom: .6rem; }
section { margin-top: 2.8rem; }
.kind { color: var(--soft); margin-bottom: .2rem; }
.lead { color: var(--soft); margin-bottom: .9rem; }
.unseen { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem 2.6rem; margin: 1.3rem 0 1.1rem; }
.tiles dd { font-size: 1.7rem; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tiles div { display: flex; flex-direction: column-reverse; }
.tiles dt, .told dt { color: var(--soft); font-size: .86rem; }
.told { border-top: 1px solid var(--line); padding-top: .8rem; display: grid; gap: .15rem; }
.told div { display: grid; grid-template-columns: 6.5rem 1fr; }
.told dd { overflow-wrap: anywhere; font-size: .92rem; }
.sum { display: flex; flex-wrap: wrap; gap: .1rem .6rem; font-variant-numeric: tabular-nums; }
.sum b { font-size: 1.15rem; }
.sum .good b, .even { color: var(--good); } .sum .bad b, .odd { color: var(--bad); }
.sum .same b { color: var(--same); }
.fates { display: flex; gap: 2px; height: 14px; margin: .6rem 0 .4rem; border-radius: 4px; overflow: hidden; }
.fates i { min-width: 2px; } .fates .good { background: var(--good); } .fates .bad { background: var(--bad); }
.fates .same { background: var(--same); }
.even::before { content: "\\2713\\00a0"; } .odd::before { content: "\\2717\\00a0"; } .odd { font-weight: 650; }
table { border-collapse: collapse; width: 100%; margin-top: .9rem; font-size: .92rem; }
th, td { text-align: left; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; } tbody th { font-weight: 550; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar, .wide { width: 26%; } .bar i { display: block; height: .62rem; margin-top: .42rem; border-radius: 2px; }
.reasons .bar i { background: var(--bad); } .shards .bar i { background: var(--good); }
.example { color: var(--soft); font-size: .84rem; overflow-wrap: anywhere; max-width: 30rem; }
details { border: 1px solid var(--line); border-radius: 10px; padding: .6rem 1rem; background: var(--card); }
summary { cursor: pointer; font-weight: 550; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 1.2rem; }
.charts figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; }
figcaption { color: var(--soft); font-size: .86rem; margin-bottom: .5rem; } figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: 104px; border-bottom: 1px solid var(--line); } rect { fill: var(--mark); }
.ends, .names { display: flex; justify-content: space-between; color: var(--soft); font-size: .78rem;
  padding-top: .25rem; font-variant-numeric: tabular-nums; }
.names span { flex: 1; text-align: center; min-width: 0; overflow: hidden; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1.1rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 1.1rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; padding: .6rem; background: var(--sunk);
  border-radius: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; min-width: 0;
  display: flex; flex-direction: column; }
.note { font-size: .8rem; color: var(--soft); padding: .35rem .75rem; }
.still { display: block; width: 100%; height: auto; }
.player, .stops i { background-image: var(--strip); background-size: calc(100% * var(--count)) 100%;
  background-repeat: no-repeat; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.player { width: 100%; } .clip { aspect-ratio: auto !important; }
.stops { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px; margin-top: 2px; }
.stops i { background-position-x: var(--at); }
.player:hover, .player:focus { animation: play var(--seconds) steps(var(--count), jump-none) infinite; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: -2px; }
@keyframes play { from { background-position-x: 0%; } to { background-position-x: 100%; } }
@media (prefers-reduced-motion: reduce) { .player:hover, .player:focus { animation: none; } }
.broken { padding: 1.4rem .75rem; color: var(--bad); font-size: .86rem; overflow-wrap: anywhere;
  background: var(--sunk); }
.caption { padding: .6rem .75rem .2rem; overflow-wrap: anywhere; max-height: 7.2rem; overflow-y: auto; }
.facts { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem; padding: .3rem .75rem; font-size: .76rem; }
.facts li { background: var(--sunk); border-radius: 999px; padding: .05rem .55rem; white-space: nowrap; }
.origin { margin-top: auto; padding: .35rem .75rem .6rem; font: .74rem/1.4 var(--mono); color: var(--soft);
  overflow-wrap: anywhere; } .origin b { display: block; color: var(--ink); font-weight: 550; }
@media print { body { background: #fff; font-size: 11px; } main { max-width: none; padding: 0; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: .6rem; } .card, .pair, figure, tr { break-inside: avoid; }
  .caption { max-height: none; }
  .fates i, .bar i, rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
