"""Any folder of videos as a sample set: what another model made is scored like what ours made.

A video belongs to the prompt whose id its name begins with: `0012.mp4`, or `0012-0.mp4`, `0012_seed7.webm`. Files of
strangers are opened in the guarded child alone. What cannot be used is counted with a reason and named; files = videos
+ unreadable + second videos of a prompt + videos of no prompt, always.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from vc2.artifacts import Manifest, SampleSet, commit, find, fingerprint, put_file, put_object
from vc2.config import digest
from vc2.data.decode import Decoder
from vc2.data.media import Facts, MediaError
from vc2.errors import SourceError
from vc2.eval.config import Prompt
from vc2.eval.generate import samples_prefix
from vc2.eval.prompts import attributes_digest, prompts_digest
from vc2.progress import Progress, silent
from vc2.storage import Store, file_digest

__all__ = ["ENDINGS", "STAGE_VERSION", "import_folder", "pair_files"]

STAGE_VERSION = 1
ENDINGS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".gif")
PROBE_SECONDS = 60.0


def pair_files(files: Sequence[Path], prompts: Sequence[Prompt]) -> tuple[dict[str, Path], list[Path], list[Path]]:
    """Which file is the video of which prompt: the one called like the id, else the first that begins with it.

    Returns:
        Files by prompt id, further files of the same prompts, and files of no prompt.
    """
    ids = {prompt.id for prompt in prompts}
    found: dict[str, Path] = {}
    second, strange = [], []
    for path in sorted(files, key=lambda path: (path.stem not in ids, path.name)):
        parts = [path.stem, *(path.stem[: match.start()] for match in re.finditer(r"[-_. ]", path.stem))]
        name = next((part for part in sorted(parts, key=len, reverse=True) if part in ids), None)
        if name is None:
            strange.append(path)
        elif name in found:
            second.append(path)
        else:
            found[name] = path
    return found, second, strange


def import_folder(folder: Path, prompts: Sequence[Prompt], store: Store, *, progress: Progress = silent) -> SampleSet:
    """Store the videos of a folder as a sample set. Safe to repeat: the same videos and prompts are the same set.

    Args:
        folder: Holds a video a prompt; what is in folders below it is not looked at.
        prompts: What the videos were made from, in order.
        store: Where artifacts are kept.
        progress: Told as videos are probed.

    Raises:
        SourceError: If there is no such folder, or not one of its videos can be used.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder; expected one with a video for each prompt, called <id>.mp4")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix.lower() in ENDINGS]
    paired, second, strange = pair_files(files, prompts)
    if not paired:
        raise SourceError(
            f"{folder}: none of {len(files)} videos belongs to a prompt"
            + (f"; they are called like {files[0].name!r}, prompts have ids like {prompts[0].id!r}" if files else "")
            + f"; call them <id>.mp4 (read are {', '.join(ENDINGS)})"
        )
    unreadable: dict[str, str] = {}
    facts: dict[str, Facts] = {}
    with Decoder(PROBE_SECONDS) as decoder:
        for number, (video, path) in enumerate(sorted(paired.items()), 1):
            try:
                facts[video] = decoder.probe("film", path)
            except MediaError as error:
                unreadable[video] = str(error)
            progress("videos", number, len(paired), unreadable=len(unreadable))
    if not facts:
        video, why = next(iter(unreadable.items()))
        raise SourceError(f"{folder}: none of {len(paired)} videos can be read ({paired[video].name}: {why})")
    digests = {name: file_digest(paired[name]).sha256 for name in sorted(facts)}
    others = [sorted(path.name for path in paths) for paths in (second, strange)]
    name = fingerprint(
        "import",
        STAGE_VERSION,
        {"unreadable": unreadable, "others": others},
        {"prompts": prompts_digest(prompts), "known": attributes_digest(prompts), "files": digest(digests)},
    )
    prefix = samples_prefix(name)
    if done := find(store, prefix, SampleSet):
        return done
    entries = [put_object(store, paired[video], f"{video}{paired[video].suffix.lower()}") for video in sorted(facts)]
    sizes = Counter(f"{of_one.width}x{of_one.height}" for of_one in facts.values())
    rates = Counter(f"{float(Fraction(of_one.rate)):g}" for of_one in facts.values())
    lengths = Counter(str(of_one.frames) for of_one in facts.values())
    lines = [
        {"id": prompt.id, "prompt": prompt.text, "attributes": prompt.attributes, "file": paired[prompt.id].name}
        for prompt in prompts
        if prompt.id in paired
    ]
    text = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines)
    commonest = float(rates.most_common(1)[0][0])
    manifest = Manifest(
        kind="sample_set",
        stage="import",
        stage_version=STAGE_VERSION,
        fingerprint=name,
        config={"play_fps": commonest, "folder": folder.name},
        inputs={},
        files=(*entries, put_file(store, prefix, "prompts.jsonl", text.encode())),
        counts={
            "files": len(files),
            "videos": len(entries),
            "unreadable": len(unreadable),
            "second_videos": len(second),
            "of_no_prompt": len(strange),
            "prompts_without_video": len(prompts) - len(paired),
        },
        facts={
            "origin": f"folder {folder.name}",
            "sizes": dict(sizes.most_common()),
            "rates": dict(rates.most_common()),
            "lengths": dict(lengths.most_common()),
            "unreadable": unreadable,
            "missing": {prompt.id: "no video" for prompt in prompts if prompt.id not in paired},
            "second_videos": [path.name for path in second][:100],
            "of_no_prompt": [path.name for path in strange][:100],
        },
    )
    made = commit(store, prefix, manifest)
    assert isinstance(made, SampleSet)
    return made
