"""The miniature world on disk: raw sources in the real formats, with the truth about every file.

    <root>/
      webvid/results_2M_train.csv            videoid,name,page_idx,page_dir,duration,contentUrl
      webvid/videos/<page_dir>/<videoid>.mp4 H.264, 10 to 60 frames a second: soft, noisy, compressed, watermarked
      laion/part-0000?-<uuid>-c000.snappy.parquet   URL, TEXT, ..., top_caption, all_captions, all_similarities
      laion/www/<name>.jpg                   the bodies behind the URLs, for `vc2.miniature.server`
      laion/answers.json                     URL path -> how the server misbehaves there
      jdb/data/train/imgs/00?.tgz            00?/<uuid>.jpg: crisp, rich pictures
      jdb/data/train/train_anno_realease_repath.jsonl.tgz
      prompts.jsonl                          evaluation prompts, their truth, a real clip that shows it
      truth.jsonl                            a line per row or file: source, key, caption, scene, planted defect
      world.json                             written last: the config that made all this

A world is built in a sibling folder and renamed when it is whole. Same config, same bytes: one encoder thread, no
times, no host names. Keys: webvid `<page_dir>/<videoid>`, laion the URL, jdb `<part>/<uuid>`.
"""

import contextlib
import csv
import fcntl
import gzip
import io
import itertools
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vc2.config import digest
from vc2.data.video_files import write_mp4
from vc2.errors import SourceError
from vc2.miniature import scene as words
from vc2.miniature.config import WorldConfig
from vc2.miniature.degrade import footage
from vc2.miniature.scene import Scene, ThingTruth, Truth, draw_picture_scene, draw_video_scene
from vc2.seeding import derive_seed, generator

__all__ = ["IMAGE_HOST", "VIDEO_HOST", "World", "composed_prompts", "make_world", "open_world", "prompt_rows"]

WORLD_VERSION = 1  # raised when the bytes of a world change
IMAGE_HOST = "images.miniature.test"
VIDEO_HOST = "videos.miniature.test"

SOURCE_SIZES = ((160, 96), (192, 112), (168, 128), (144, 96), (176, 112))  # width x height
RATES = {  # frames a second, and how common: 24 to 30 prevail on the web
    Fraction(10): 2, Fraction(12): 2, Fraction(15): 2, Fraction(24000, 1001): 5, Fraction(24): 3, Fraction(25): 6,
    Fraction(30000, 1001): 4, Fraction(30): 2, Fraction(50): 1, Fraction(60000, 1001): 1, Fraction(60): 1,
}  # fmt: skip
HTML = b"<!DOCTYPE html>\n<html><head><title>Not here</title></head><body><h1>This file has moved</h1></body></html>\n"

VIDEO_DEFECTS = ("missing", "truncated", "html", "empty_caption", "too_short", "duplicate")
WEB_DEFECTS = (
    "not_found",
    "not_found",
    "not_found",
    "busy",
    "hang",
    "truncated",
    "html",
    "tiny",
    "duplicate",
    "empty_caption",
)
JDB_DEFECTS = ("no_media", "no_row", "corrupt")


Row = TypeVar("Row", "_Clip", "_WebImage")


@dataclass(frozen=True, slots=True)
class World:
    """A finished world and where its parts are."""

    root: Path
    config: WorldConfig

    @property
    def webvid_csv(self) -> Path:
        return self.root / "webvid" / "results_2M_train.csv"

    @property
    def webvid_videos(self) -> Path:
        return self.root / "webvid" / "videos"

    @property
    def laion(self) -> Path:
        return self.root / "laion"

    @property
    def jdb(self) -> Path:
        return self.root / "jdb"

    def truth(self, source: str | None = None) -> list[dict]:
        """Lines of truth.jsonl, of one source or of all."""
        return [line for line in _read_lines(self.root / "truth.jsonl") if source in (None, line["source"])]

    def prompts(self) -> list[dict]:
        """Evaluation prompts, see `prompt_rows`."""
        return _read_lines(self.root / "prompts.jsonl")


def open_world(root: Path) -> World:
    """The finished world at `root`.

    Raises:
        SourceError: If there is none.
    """
    try:
        stored = json.loads((root / "world.json").read_text())
        return World(root, WorldConfig.model_validate(stored["config"]))
    except (OSError, ValueError, KeyError):
        raise SourceError(
            f"{root}: no finished miniature world here (no readable world.json); make one with make_world"
        ) from None


def make_world(config: WorldConfig, root: Path) -> World:
    """Make the world of `config` at `root`, or find it there. Leftovers of killed runs beside it are removed.

    Raises:
        SourceError: If something else is at `root`.
    """
    root = Path(os.path.abspath(root))
    root.parent.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    if (found := _existing(config, root)) is not None:
        return found
    with _workplace(root) as place:
        truth = [*_write_webvid(config, place), *_write_laion(config, place), *_write_jdb(config, place)]
        _write_lines(place / "truth.jsonl", truth)
        _write_lines(place / "prompts.jsonl", prompt_rows(config))
        counts = {source: sum(line["source"] == source for line in truth) for source in ("webvid", "laion", "jdb")}
        stored = {
            "version": WORLD_VERSION,
            "digest": _digest(config),
            "config": config.model_dump(mode="json"),
            "lines": counts,
        }
        (place / "world.json").write_text(json.dumps(stored, indent=1) + "\n")
        try:
            place.rename(root)
        except OSError:  # someone was faster, or put something else there
            if (found := _existing(config, root)) is None:
                raise
            return found
    return World(root, config)


def _digest(config: WorldConfig) -> str:
    return digest({"version": WORLD_VERSION, **config.identity()})


def _existing(config: WorldConfig, root: Path) -> World | None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        stored = json.loads((root / "world.json").read_text()).get("digest")
    except (OSError, ValueError, AttributeError):
        raise SourceError(
            f"{root}: there is something here that is no miniature world; choose another folder or remove it"
        ) from None
    if stored != _digest(config):
        raise SourceError(
            f"{root}: a miniature world of another config or version is here; choose another folder or remove it"
        )
    return World(root, config)


@contextlib.contextmanager
def _workplace(root: Path) -> Iterator[Path]:
    """A locked temporary sibling of `root`, removed at the end if still there. One without a live lock is stale."""
    place = root.parent / f".{root.name}.{uuid.uuid4().hex[:12]}.partial"
    place.mkdir()
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        place.mkdir(exist_ok=True)  # a sweep may have come between
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def _sweep(root: Path) -> None:
    for place in root.parent.glob(f".{root.name}.*.partial"):
        with contextlib.suppress(OSError):
            handle = os.open(place, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place)
            finally:
                os.close(handle)


# --- WebVid -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Clip:
    """One row of the WebVid CSV before it is written."""

    videoid: str
    page_dir: str
    truth: Truth
    size: tuple[int, int]
    rate: Fraction
    num_frames: int
    defect: str | None

    @property
    def key(self) -> str:
        return f"{self.page_dir}/{self.videoid}"

    @property
    def seconds(self) -> float:
        return float(self.num_frames / self.rate)


def _video_truths(config: WorldConfig) -> tuple[list[Truth], list[Truth]]:
    """All a video can show, in a seeded order: what is in the world, and an eighth that is kept out of it."""
    combinations = itertools.product(words.VIDEO_BACKGROUNDS, words.SHAPES, words.VIDEO_COLOURS, words.DIRECTIONS)
    truths = [
        Truth(background, (ThingTruth(shape, colour, "plain", motion),))
        for background, shape, colour, motion in combinations
    ]
    order = generator(config.seed, "video truths").permutation(len(truths))
    shuffled = [truths[index] for index in order]
    kept_out = len(shuffled) // 8
    return shuffled[kept_out:], shuffled[:kept_out]


def _plan_clips(config: WorldConfig) -> list[_Clip]:
    truths, _ = _video_truths(config)
    rng = generator(config.seed, "webvid plan")
    defects = _plan_defects(rng, config.num_videos, VIDEO_DEFECTS)
    rates = [rate for rate, share in RATES.items() for _ in range(share)]
    clips: list[_Clip] = []
    for index in range(config.num_videos):
        number = int(rng.integers(10**5, 10**8))
        videoid = f"{number:010d}" if index % 3 == 0 else str(number)  # some with leading zeros: ids are text
        page = 50 * (index // 40) + 1
        defect = defects.get(index)
        rate = rates[int(rng.integers(len(rates)))]
        seconds = 0.3 if defect == "too_short" else rng.uniform(3, 4) if index % 10 == 9 else rng.uniform(2, 2.6)
        clips.append(
            _Clip(
                videoid=videoid,
                page_dir=f"{page:06d}_{page + 49:06d}",
                truth=_original(clips).truth if defect == "duplicate" else truths[index % len(truths)],
                size=SOURCE_SIZES[int(rng.integers(len(SOURCE_SIZES)))],
                rate=rate,
                num_frames=max(2, round(seconds * float(rate))),
                defect=defect,
            )
        )
    return clips


def _original(rows: Sequence[Row]) -> Row:
    """The last sound row before a duplicate."""
    return next(row for row in reversed(rows) if row.defect is None)


def _plan_defects(rng: np.random.Generator, count: int, defects: Sequence[str]) -> dict[int, str]:
    """Which rows are bad and how; each defect once per 120 rows, at least once. The first row is always sound."""
    planted = [defect for defect in defects for _ in range(max(1, count // 120))]
    places = rng.choice(np.arange(1, count), size=len(planted), replace=False)
    return {int(place): defect for place, defect in zip(places, planted, strict=True)}


def _write_webvid(config: WorldConfig, root: Path) -> list[dict]:
    """Write the source; return its lines of truth."""
    clips = _plan_clips(config)
    rng = generator(config.seed, "webvid rows")
    (root / "webvid").mkdir()
    truth = []
    with open(root / "webvid" / "results_2M_train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["videoid", "name", "page_idx", "page_dir", "duration", "contentUrl"])
        for index, clip in enumerate(clips):
            caption = clip.truth.caption()
            if index % 8 == 5:
                caption += rng.choice([', "stock" footage', ", 4k, seamless loop", ", it's a still camera."])
            name = "" if clip.defect == "empty_caption" else caption
            whole = max(1, int(clip.seconds))
            url = f"http://{VIDEO_HOST}/videos/{clip.key}.mp4"
            writer.writerow(
                [clip.videoid, name, int(rng.integers(0, 9000)), clip.page_dir, f"PT00H00M{whole:02d}S", url]
            )
            scene = draw_video_scene(generator(config.seed, "webvid scene", index), clip.truth, clip.seconds)
            facts = {
                "fps": float(clip.rate),
                "num_frames": clip.num_frames,
                "width": clip.size[0],
                "height": clip.size[1],
            }
            truth.append(_truth_line("webvid", clip.key, name, scene.truth, clip.defect) | facts)
            path = root / "webvid" / "videos" / f"{clip.key}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            if clip.defect == "duplicate":
                original = _original(clips[:index])
                shutil.copyfile(root / "webvid" / "videos" / f"{original.key}.mp4", path)
                truth[-1]["duplicate_of"] = original.key
            elif clip.defect != "missing":
                _write_footage(path, config, index, clip, scene)
    return truth


def _write_footage(path: Path, config: WorldConfig, index: int, clip: _Clip, scene: Scene) -> None:
    if clip.defect == "html":
        path.write_bytes(HTML)
        return
    rng = generator(config.seed, "webvid footage", index)
    noise, crf = float(rng.uniform(3, 7)), int(rng.integers(28, 34))
    clean = scene.frames(*clip.size, (frame / float(clip.rate) for frame in range(clip.num_frames)))
    write_mp4(path, np.stack(list(footage(clean, rng, noise))), clip.rate, crf=crf, preset="superfast")
    if clip.defect == "truncated":
        os.truncate(path, int(0.55 * path.stat().st_size))


# --- LAION-COCO -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _WebImage:
    """One row of the LAION-COCO Parquet parts before it is written."""

    name: str
    truth: Truth
    size: tuple[int, int]
    watermarked: bool
    defect: str | None

    @property
    def url(self) -> str:
        return f"http://{IMAGE_HOST}/{self.name}.jpg"


def _plan_web_images(config: WorldConfig) -> list[_WebImage]:
    rng = generator(config.seed, "laion plan")
    defects = _plan_defects(rng, config.num_web_images, WEB_DEFECTS)
    images: list[_WebImage] = []
    for index in range(config.num_web_images):
        defect = defects.get(index)
        width, height = ((240, 160), (200, 200), (256, 144), (176, 224), (320, 240))[int(rng.integers(5))]
        images.append(
            _WebImage(
                name=f"{index:04d}-{derive_seed(config.seed, 'laion name', index) % 16**8:08x}",
                truth=_original(images).truth if defect == "duplicate" else _picture_truth(rng, pairs=0.3),
                size=(16, 12) if defect == "tiny" else (width, height),
                watermarked=bool(rng.random() < 0.15),
                defect=defect,
            )
        )
    return images


def _picture_truth(rng: np.random.Generator, *, pairs: float) -> Truth:
    """What a still shows: one thing, or two with probability `pairs`; never a thing of the background's own colour."""

    def pick(options):
        return options[int(rng.integers(len(options)))]

    background = pick(list(words.BACKGROUNDS))
    colours = [colour for colour in words.COLOURS if colour != background]
    chosen = rng.permutation(colours)[: 2 if rng.random() < pairs else 1]
    return Truth(
        background, tuple(ThingTruth(pick(words.SHAPES), str(colour), pick(words.TEXTURES)) for colour in chosen)
    )


def _write_laion(config: WorldConfig, root: Path) -> list[dict]:
    """Write the source; return its lines of truth."""
    images = _plan_web_images(config)
    rng = generator(config.seed, "laion rows")
    www = root / "laion" / "www"
    www.mkdir(parents=True)
    rows, truth, answers = [], [], {}
    for index, image in enumerate(images):
        caption = "" if image.defect == "empty_caption" else image.truth.caption()
        fallback = image.defect is None and index % 25 == 7  # no synthetic caption: TEXT must serve
        score = float(rng.uniform(0.28, 0.42))
        others = [f"{caption}, photo", f"a picture of {caption}"] if caption else []
        rows.append(
            {
                "URL": image.url,
                "TEXT": caption if fallback else f"{caption.capitalize()} | Free Clip Art" if caption else "",
                "HEIGHT": image.size[1],
                "WIDTH": image.size[0],
                "similarity": float(rng.uniform(0.28, 0.4)),
                "hash": derive_seed(config.seed, "laion hash", index) - (1 << 62),
                "punsafe": float(rng.uniform(0, 0.05)),
                "pwatermark": float(rng.uniform(0.8, 1.0) if image.watermarked else rng.uniform(0, 0.3)),
                "top_caption": None if fallback else caption,
                "all_captions": [] if fallback else [caption, *others],
                "all_similarities": [] if fallback else [score - 0.01 * rank for rank in range(1 + len(others))],
            }
        )
        truth.append(_truth_line("laion", image.url, caption, image.truth, image.defect))
        path = www / f"{image.name}.jpg"
        if image.defect == "duplicate":
            original = _original(images[:index])
            shutil.copyfile(www / f"{original.name}.jpg", path)
            truth[-1]["duplicate_of"] = original.url
        elif image.defect == "html":
            path.write_bytes(HTML)
        elif image.defect != "not_found":
            path.write_bytes(_web_body(config, index, image))
        if image.defect in ("busy", "hang", "truncated"):
            answers[f"/{path.name}"] = image.defect
        elif image.defect is None and index % 50 == 11:
            answers[f"/{path.name}"] = "slow"  # late, but sound
    half = (len(rows) + 1) // 2
    for part, part_rows in enumerate((rows[:half], rows[half:])):
        name = f"part-{part:05d}-{_uuid(config, 'laion part')}-c000.snappy.parquet"
        pq.write_table(
            pa.Table.from_pylist(part_rows, schema=_LAION_SCHEMA), root / "laion" / name, compression="snappy"
        )
    (root / "laion" / "answers.json").write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n")
    return truth


_LAION_SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("HEIGHT", pa.int64()),
        ("WIDTH", pa.int64()),
        ("similarity", pa.float64()),
        ("hash", pa.int64()),
        ("punsafe", pa.float64()),
        ("pwatermark", pa.float64()),
        ("top_caption", pa.string()),
        ("all_captions", pa.list_(pa.string())),
        ("all_similarities", pa.list_(pa.float64())),
    ]
)


def _web_body(config: WorldConfig, index: int, image: _WebImage) -> bytes:
    rng = generator(config.seed, "laion body", index)
    picture = draw_picture_scene(rng, image.truth, rich=False).render(*image.size)
    if image.watermarked:
        (picture,) = footage([picture], rng, 2.0)
    return _jpeg(picture, int(rng.integers(60, 85)))


# --- JourneyDB --------------------------------------------------------------------------------------------------------

JDB_SIZE = 192  # pixels, square


def _write_jdb(config: WorldConfig, root: Path) -> list[dict]:
    """Write the source; return its lines of truth."""
    rng = generator(config.seed, "jdb plan")
    defects = _plan_defects(rng, config.num_jdb_images, JDB_DEFECTS)
    half = (config.num_jdb_images + 1) // 2
    members: dict[str, dict[str, bytes]] = {"000": {}, "001": {}}
    annotations, truth = [], []
    picture_truth = _picture_truth(rng, pairs=0.7)
    for index in range(config.num_jdb_images):
        part, name, defect = ("000", "001")[index >= half], _uuid(config, "jdb", index), defects.get(index)
        if index % 5:  # every fifth picture repeats the prompt before it, as Midjourney's upscales do
            picture_truth = _picture_truth(rng, pairs=0.7)
        caption = picture_truth.caption()
        labelled = index % 9 != 4
        if defect != "no_row":
            annotations.append(_annotation(rng, f"./{part}/{name}.jpg", caption, labelled))
        if defect != "no_media":
            members[part][f"{part}/{name}.jpg"] = _art_body(config, index, picture_truth, defect)
        truth.append(_truth_line("jdb", f"{part}/{name}", caption, picture_truth, defect) | {"labelled": labelled})
    folder = root / "jdb" / "data" / "train"
    (folder / "imgs").mkdir(parents=True)
    for part, files in members.items():
        _write_tgz(folder / "imgs" / f"{part}.tgz", files)
    order = rng.permutation(len(annotations))  # the annotations are in no order of the archives
    lines = "".join(json.dumps(annotations[index]) + "\n" for index in order)
    _write_tgz(folder / "train_anno_realease_repath.jsonl.tgz", {"train_anno_realease_repath.jsonl": lines.encode()})
    return truth


def _annotation(rng: np.random.Generator, path: str, caption: str, labelled: bool) -> dict:
    flags = rng.choice(["--ar 1:1 --v 5", "--v 4 --s 750", "--ar 1:1 --q 2 --v 5.1", "--upbeta --v 4"])
    record: dict[str, Any] = {"img_path": path, "prompt": f"{caption}, highly detailed, crisp vector art {flags}"}
    if labelled:
        record["Task1"] = {
            "Style": ["vector art"],
            "Content": ["geometric shapes"],
            "Atmosphere": ["calm"],
            "Others": [],
        }
        record["Task2"] = {"Caption": f"{caption[0].upper()}{caption[1:]}."}
        record["Task3"] = {"Style Relevant Questions and Answers": [], "Content Relevant Questions and Answers": []}
    return record


def _art_body(config: WorldConfig, index: int, truth: Truth, defect: str | None) -> bytes:
    scene = draw_picture_scene(generator(config.seed, "jdb body", index), truth, rich=True)
    body = _jpeg(scene.render(JDB_SIZE, JDB_SIZE), 93)
    return body[:40] + bytes(len(body) // 3) if defect == "corrupt" else body


def _write_tgz(path: Path, files: Mapping[str, bytes]) -> None:
    """A gzip-compressed tar without times, owners or its own name in the header."""
    with (
        open(path, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(body), 0o644
            tar.addfile(member, io.BytesIO(body))


# --- Prompts and what all share ---------------------------------------------------------------------------------------


def prompt_rows(config: WorldConfig) -> list[dict]:
    """Evaluation prompts: three quarters that captions hold, a quarter that no clip shows.

    Known without making the world. Each has `prompt`, `truth` (see `Truth.from_json`), `seen` in the captions or not,
    `key` of a real clip or None, `seed`. Words and pairs of words are spread evenly.
    """
    _, kept_out = _video_truths(config)
    shown: dict[Truth, str] = {}
    for clip in _plan_clips(config):
        if clip.defect is None:
            shown.setdefault(clip.truth, clip.key)
    num_unseen = min(config.num_prompts // 4, len(kept_out))
    chosen = _spread([truth for truth in shown], config.num_prompts - num_unseen) + _spread(kept_out, num_unseen)
    return [
        {
            "prompt": truth.caption(),
            "truth": truth.as_json(),
            "seen": truth in shown,
            "key": shown.get(truth),
            "seed": index,
        }
        for index, truth in enumerate(chosen)
    ]


def composed_prompts(config: WorldConfig) -> list[dict]:
    """Prompts that ask for more than videos show: four equal kinds, as `prompt_rows` but for `kind` and `key`.

    seen        a caption of a video
    recombined  words of videos in a combination that none has
    image       a moving thing whose colour, texture and background only pictures have
    pair        two things side by side, at rest, as only pictures show
    """
    shown, kept_out = _video_truths(config)
    filmed = {clip.truth for clip in _plan_clips(config) if clip.defect is None}
    new_colours = [colour for colour in words.COLOURS if colour not in words.VIDEO_COLOURS]
    new_backgrounds = [name for name in words.BACKGROUNDS if name not in words.VIDEO_BACKGROUNDS]
    new_textures = [texture for texture in words.TEXTURES if texture != "plain"]
    images = [
        Truth(background, (ThingTruth(*thing),))
        for background, *thing in itertools.product(
            new_backgrounds, words.SHAPES, new_colours, new_textures, words.DIRECTIONS
        )
    ]
    pairs = [
        Truth(background, (ThingTruth(one, first), ThingTruth(two, second)))
        for background, one, two in itertools.product(words.BACKGROUNDS, words.SHAPES, words.SHAPES)
        for first, second in itertools.permutations(words.COLOURS, 2)
        if background not in (first, second)
    ]
    rng = generator(config.seed, "composed prompts")
    rows: list[dict] = []
    for kind, truths in (
        ("seen", [truth for truth in shown if truth in filmed]), ("recombined", kept_out), ("image", images),
        ("pair", pairs),
    ):  # fmt: skip
        mixed = [truths[index] for index in rng.permutation(len(truths))[:256]]
        for truth in _spread(mixed, config.num_prompts // 4):
            rows.append({"prompt": truth.caption(), "truth": truth.as_json(), "seen": kind == "seen", "kind": kind})
    return [row | {"seed": index} for index, row in enumerate(rows)]


def _spread(truths: list[Truth], count: int) -> list[Truth]:
    """`count` truths, each the one whose words, and pairs of words, were used least so far (ties: the earlier)."""
    used: dict[tuple[str, ...], int] = {}
    chosen: list[Truth] = []
    rest = list(truths)

    def traits(truth: Truth) -> list[tuple[str, ...]]:
        said = sorted(set(truth.caption().split()))
        return [*((word,) for word in said for _ in range(3)), *itertools.combinations(said, 2)]

    while rest and len(chosen) < count:
        best = min(rest, key=lambda truth: sum(used.get(trait, 0) for trait in traits(truth)))
        rest.remove(best)
        chosen.append(best)
        for trait in set(traits(best)):
            used[trait] = used.get(trait, 0) + 1
    return chosen


def _truth_line(source: str, key: str, caption: str, truth: Truth, defect: str | None) -> dict:
    return {"source": source, "key": key, "caption": caption, "truth": truth.as_json(), "defect": defect}


def _jpeg(picture: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _uuid(config: WorldConfig, *names: str | int) -> str:
    return str(
        uuid.UUID(int=derive_seed(config.seed, *names) << 64 | derive_seed(config.seed, *names, "low"), version=4)
    )


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
