"""A study from folders of videos: a folder to hand out, and the key that stays at home.

    DIR/index.html       the page; opens from disk or from any static server, and asks nobody for anything
    DIR/videos/*.mp4     under names that are hashes of seed and content
    DIR-key.json         which name is whose; never inside DIR, or whoever rates could look it up

A video of prompt 0007 is 0007.mp4 (or .webm) in the folder of its model (`videos`). What cannot be used is left out,
with a reason. Same folders, same settings: same bytes.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

from vc2.config import canonical_json, digest
from vc2.data.decode import Facts
from vc2.data.video_files import write_whole
from vc2.errors import ConfigError
from vc2.eval.config import Prompt, load_prompts
from vc2.eval.study.config import PAGE_VERSION, StudyConfig
from vc2.eval.study.order import Matchup, trials_of
from vc2.eval.study.page import render_study
from vc2.eval.study.videos import Gathered, LeftOut, gather, short_hash, videos_in, write_timeless
from vc2.progress import Progress, silent
from vc2.seeding import generator

__all__ = ["KEY_KIND", "BuiltStudy", "build", "key_path_of"]

KEY_KIND = "vc2 study key"
KEY_VERSION = 1
SECONDS_PER_ANSWER = 3.0  # beyond looking, for the estimate
MARK = re.compile(r'<meta name="vc2-study" content="([0-9a-f]{64})">')


@dataclass(frozen=True, slots=True)
class BuiltStudy:
    """What `build` made."""

    folder: Path
    key: Path
    study: str  # digest
    models: tuple[str, ...]
    prompts: int
    matchups: int
    trials: int  # of one rater, repeats and attention trials among them
    minutes: float  # of one rater, a guess
    videos: int
    recoded: int  # videos that were coded anew
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"folder": str(self.folder), "key": str(self.key)}


def key_path_of(destination: Path) -> Path:
    """Where the key of a study lies unless told otherwise: beside its folder."""
    return destination.parent / f"{destination.name}-key.json"


def build(
    folders: Mapping[str, Path],
    destination: Path,
    config: StudyConfig | None = None,
    *,
    prompts: Path | Sequence[Prompt] | None = None,
    key: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> BuiltStudy:
    """Make a study. What was there before is replaced whole, or not at all.

    Args:
        folders: Of videos, by the name of the model; `videos/` inside is looked into where there are none.
        destination: The folder to hand out.
        config: What is asked; default: the paper's three questions about all pairs.
        prompts: What the videos were made from (see `load_prompts`); None: ids stand in for texts.
        key: File for the key; default: `key_path_of(destination)`.
        force: Replace another study, and its key.
        progress: Told about each video.

    Raises:
        ConfigError: If a folder or model has no usable videos, if nothing can be compared, or if the destination or the
            key would overwrite what is not this study.
    """
    config, destination = config or StudyConfig(), Path(os.path.abspath(destination))
    key = Path(os.path.abspath(key)) if key is not None else key_path_of(destination)
    pairs = config.pairs_of(_checked(folders))
    _check_places(folders, destination, key)
    _check_overwriting(destination, key)
    models = [model for model in folders if any(model in pair for pair in pairs)]
    found = {model: videos_in(Path(folders[model])) for model in models}
    texts, strays = _texts(found, prompts)
    chosen = _chosen(config, texts, found)
    staging = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "videos").mkdir(parents=True)
        gathered = gather(config.seed, found, chosen, staging / "videos", progress)
        gathered.left_out += strays
        matchups, secrets = _matchups(config, pairs, chosen, gathered)
        page = _page_data(config, matchups, gathered)
        study = digest(page)
        _remove_unused(staging / "videos", matchups)
        write_timeless(staging / "index.html", render_study(page, study).encode())
        if not force:
            _check_overwriting(destination, key, study)
        key.parent.mkdir(parents=True, exist_ok=True)
        write_whole(key, _key_text(study, config, models, pairs, page, secrets, gathered).encode())
        _swap(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    trials = trials_of("", "", matchups, repeats=config.repeats, most=config.trials_per_rater)
    used = {name for matchup in matchups for name in matchup.videos}
    return BuiltStudy(
        destination,
        key,
        study,
        tuple(models),
        prompts=len({secret["prompt"] for secret in secrets.values()}),
        matchups=sum(not matchup.is_attention for matchup in matchups),
        trials=len(trials),
        minutes=round(_minutes(config, len(trials), gathered), 1),
        videos=len(used),
        recoded=len({video.name for video in gathered.videos.values() if video.is_recoded and video.name in used}),
        left_out=tuple(gathered.left_out),
        warnings=tuple(_warnings(config, gathered, prompts is None)),
    )


# ---- what goes in ----


def _checked(folders: Mapping[str, Path]) -> list[str]:
    for name in folders:
        if not name.strip() or len(name) > 64 or not name.isprintable() or ":" in name:
            raise ConfigError(f"model name {name!r:.80}: expected 1 to 64 printable characters, no colon")
    return list(folders)


def _check_places(folders: Mapping[str, Path], destination: Path, key: Path) -> None:
    inside = destination.resolve()
    if key.resolve().is_relative_to(inside):
        raise ConfigError(
            f"{key}: the key says which video is whose; keep it outside of {destination}, which raters get"
        )
    for model, folder in folders.items():
        place = Path(folder).resolve()
        if place.is_relative_to(inside) or inside.is_relative_to(place):
            raise ConfigError(f"{folder}: the videos of {model} and the study {destination} must not lie in each other")


def _texts(
    found: Mapping[str, Mapping[str, Path]], prompts: Path | Sequence[Prompt] | None
) -> tuple[dict[str, str], list[LeftOut]]:
    """Texts by prompt id, in order, and the videos that no prompt asks for."""
    if prompts is None:
        return {name: name for name in sorted({name for videos in found.values() for name in videos})}, []
    known = load_prompts(prompts) if isinstance(prompts, Path) else prompts
    texts = {prompt.id: prompt.text for prompt in known}
    if not any(name in texts for videos in found.values() for name in videos):
        file, prompt = next(iter(next(iter(found.values())))), next(iter(texts), "")
        raise ConfigError(
            f"no video is of a prompt: files are called like {file!r}, prompts have ids like {prompt!r}; "
            "rename the files or give ids in a .jsonl file"
        )
    strays = [
        LeftOut(name, model, "not in the prompt file")
        for model, videos in found.items()
        for name in videos
        if name not in texts
    ]
    return texts, strays


def _chosen(config: StudyConfig, texts: Mapping[str, str], found: Mapping[str, Mapping[str, Path]]) -> dict[str, str]:
    """The prompts to use: all, or so many as are wanted, those first that every model has a video of."""
    seen = [name for name in texts if any(name in videos for videos in found.values())]
    if config.max_prompts is not None:
        draws = generator(config.seed, "study prompts").permutation(len(seen))
        lacking = {name: sum(name not in videos for videos in found.values()) for name in seen}
        ranked = sorted(range(len(seen)), key=lambda place: (lacking[seen[place]], draws[place]))
        seen = [seen[place] for place in sorted(ranked[: config.max_prompts])]
    return {name: texts[name] for name in seen}


# ---- matchups ----


def _matchups(
    config: StudyConfig, pairs: Iterable[tuple[str, str]], chosen: Mapping[str, str], gathered: Gathered
) -> tuple[list[Matchup], dict[str, dict[str, Any]]]:
    """What the page lists, in an order that says nothing; and by id, what the key adds: prompt, models."""
    matchups, secrets = [], {}
    for one, other in pairs:
        names = []
        for prompt in chosen:
            videos = [gathered.videos.get((model, prompt)) for model in (one, other)]
            if not all(videos):
                continue
            if videos[0].name == videos[1].name:  # type: ignore[union-attr]
                gathered.left_out.append(LeftOut(prompt, f"{one}:{other}", "the two videos are the same"))
            else:
                names.append(prompt)
        draws = generator(config.seed, "study sides", one, other)
        order = [names[place] for place in draws.permutation(len(names))]
        flips = draws.integers(0, 2, (len(names) + 1) // 2)
        for place, prompt in enumerate(order):
            models = (other, one) if (flips[place // 2] + place) % 2 else (one, other)
            first, second = (gathered.videos[model, prompt].name for model in models)
            twos = short_hash(config.seed, "twos", one, other, order[place - place % 2])
            name = short_hash(config.seed, "matchup", *models, prompt)
            matchups.append(Matchup(name, _caption(config, chosen[prompt]), (first, second), twos))
            secrets[name] = {"prompt": prompt, "models": list(models)}
    if not matchups:
        reasons = sorted({f"{left.model}: {left.reason}" for left in gathered.left_out})
        raise ConfigError(f"nothing to compare: no prompt has usable videos of both models ({'; '.join(reasons):.300})")
    draws = generator(config.seed, "study attention")
    for place in draws.permutation(len(matchups))[: config.attention].tolist():
        shown, models = matchups[place], secrets[matchups[place].id]
        which = int(draws.integers(0, 2))
        name = short_hash(config.seed, "attention", shown.id)
        matchups.append(Matchup(name, shown.caption, (shown.videos[which],) * 2, name, is_attention=True))
        secrets[name] = {"prompt": models["prompt"], "models": [models["models"][which]] * 2}
    return sorted(matchups, key=lambda matchup: matchup.id), secrets


def _caption(config: StudyConfig, text: str) -> str:
    return text if config.captions else ""


# ---- what comes out ----


def _page_data(config: StudyConfig, matchups: Iterable[Matchup], gathered: Gathered) -> dict[str, Any]:
    """All that the page knows: nothing about models, and no seed from which the models' places could be drawn."""
    shapes = [
        video.facts.width * Fraction(video.facts.aspect) / video.facts.height for video in gathered.videos.values()
    ]
    return {
        "version": PAGE_VERSION,
        "title": config.title,
        "questions": [question.model_dump() for question in config.questions],
        "order_seed": short_hash("order", config.seed, size=32),
        "repeats": config.repeats,
        "most": config.trials_per_rater,
        "min_seconds": config.min_seconds,
        "min_plays": config.min_plays,
        "captions": config.captions,
        "seconds": round(gathered.mean_duration, 2),  # of a video, for an estimate
        "aspect": round(float(median(shapes)), 4),  # of the frames that all videos are fitted into
        "matchups": [
            {
                "id": matchup.id,
                "caption": matchup.caption,
                "videos": list(matchup.videos),
                "twos": matchup.twos,
                "attention": matchup.is_attention,
            }
            for matchup in matchups
        ],
    }


def _key_text(
    study: str,
    config: StudyConfig,
    models: Sequence[str],
    pairs: Iterable[tuple[str, str]],
    page: Mapping[str, Any],
    secrets: Mapping[str, Mapping[str, Any]],
    gathered: Gathered,
) -> str:
    sources = [
        {"model": model, "prompt": prompt, "video": video.name, "sha256": video.sha256}
        for (model, prompt), video in sorted(gathered.videos.items())
    ]
    whole = {
        "kind": KEY_KIND,
        "version": KEY_VERSION,
        "study": study,
        "seed": config.seed,
        "models": list(models),
        "pairs": [list(pair) for pair in pairs],
        "page": page,
        "matchups": dict(sorted(secrets.items())),
        "sources": sources,
        "left_out": [asdict(left) for left in gathered.left_out],
    }
    canonical_json(whole)  # refuses what JSON cannot say
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _remove_unused(folder: Path, matchups: Iterable[Matchup]) -> None:
    used = {name for matchup in matchups for name in matchup.videos}
    for path in folder.iterdir():
        if path.name not in used:
            path.unlink()


def _check_overwriting(destination: Path, key: Path, study: str = "") -> None:
    """Refuse to write over what is no study and no key; and, where `study` is given, over those of another."""
    if destination.exists():
        if not destination.is_dir():
            raise ConfigError(f"{destination} is a file; expected a folder, or nothing")
        index = destination / "index.html"
        mark = MARK.search(index.read_text(encoding="utf-8", errors="replace")) if index.is_file() else None
        if mark is None and any(destination.iterdir()):
            raise ConfigError(f"{destination} holds other things than a study; choose another folder")
        if study and mark is not None and mark[1] != study:
            raise ConfigError(f"{destination} holds another study ({mark[1][:12]}); choose another folder, or force it")
    if key.exists():
        try:
            before = json.loads(key.read_text(encoding="utf-8"))
            other = str(before["study"]) if before["kind"] == KEY_KIND else None
        except (OSError, ValueError, TypeError, LookupError):
            other = None
        if other is None:
            raise ConfigError(f"{key} is no key of a study and would be overwritten; choose another file")
        if study and other != study:
            raise ConfigError(
                f"{key} is the key of another study ({other[:12]}), without which its answers cannot be read; "
                "choose another file, or force it"
            )


def _swap(staging: Path, destination: Path) -> None:
    old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
    if destination.exists():
        destination.rename(old)
    staging.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


def _minutes(config: StudyConfig, trials: int, gathered: Gathered) -> float:
    looking = max(config.min_seconds, max(1, config.min_plays) * gathered.mean_duration)
    return trials * (looking + SECONDS_PER_ANSWER * len(config.questions)) / 60


def _warnings(config: StudyConfig, gathered: Gathered, without_prompts: bool) -> Iterable[str]:
    """Ways in which raters could tell models apart, or cannot do what they are asked."""
    if without_prompts and any(question.id == "text_video_alignment" for question in config.questions):
        yield "no prompts given: raters see ids in place of texts and cannot judge alignment; give the prompt file"
    by_model: dict[str, list[Facts]] = {}
    for (model, _), video in gathered.videos.items():
        by_model.setdefault(model, []).append(video.facts)
    for what, tell in (
        ("size", lambda facts: f"{facts.width} x {facts.height}"),
        ("rate", lambda facts: f"{float(Fraction(facts.rate)):.3g} fps"),
        ("duration", lambda facts: f"{facts.duration:.1f} s"),
    ):
        usual = {
            model: max(sorted(map(tell, found)), key=list(map(tell, found)).count) for model, found in by_model.items()
        }
        if len(set(usual.values())) > 1:
            told = ", ".join(f"{model} {value}" for model, value in usual.items())
            yield f"videos differ in {what} ({told}): raters may tell the models apart by it"
