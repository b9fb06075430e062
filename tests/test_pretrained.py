"""Foreign weights are found in a fixed order, are the bytes they should be; the network is asked only if allowed."""

import hashlib
import json
from pathlib import Path

import pytest

from vc2.errors import PretrainedMissing, WeightsError
from vc2.pretrained import MIRROR_MANIFEST, WEIGHTS, identity, is_available, mirror, resolve, status
from vc2.storage import open_store

NAME = "openclip-vit-h-14"
FILE = WEIGHTS[NAME].file


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mirror, no hub cache, a work folder of its own, offline."""
    monkeypatch.delenv("VC2_MIRROR", raising=False)
    monkeypatch.setenv("VC2_OFFLINE", "1")
    monkeypatch.setenv("VC2_WORK", str(tmp_path / "work"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror folder that has one file."""
    place = tmp_path / "mirror" / FILE
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    monkeypatch.setenv("VC2_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


def test_an_explicit_path_comes_first_and_is_taken_as_it_is(tmp_path, folder):
    (tmp_path / "mine").mkdir()
    assert resolve(NAME, path=tmp_path / "mine") == tmp_path / "mine"
    with pytest.raises(PretrainedMissing, match=r"there is no .*nowhere"):
        resolve(NAME, path=tmp_path / "nowhere")


def test_a_mirror_folder_is_looked_at(folder):
    assert resolve(NAME) == folder / FILE
    assert is_available(NAME) and not is_available("dover")


def test_what_is_nowhere_is_said_with_the_places_that_were_tried(folder):
    with pytest.raises(PretrainedMissing, match=r"'dover' not found \(tried: .*mirror.*DOVER\.pth\); put dover/DOVER"):
        resolve("dover")
    with pytest.raises(PretrainedMissing, match="no weights are called 'dovr'"):
        resolve("dovr")


def test_what_ships_with_the_package_is_always_there():
    assert resolve("miniature-image-base").is_file()
    assert status("miniature-image-base").digest == "ok"


def test_the_digest_is_recorded_on_first_use_and_compared_afterwards(folder, tmp_path):
    assert status(NAME).digest == "not checked"
    resolve(NAME)
    lock = json.loads((tmp_path / "work" / "pretrained" / "weights.lock.json").read_text())
    assert lock[NAME]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert status(NAME).digest == "ok"
    (folder / FILE).write_bytes(b"others")
    with pytest.raises(WeightsError, match=r"recorded on first use.*fetch openclip-vit-h-14 again"):
        resolve(NAME)
    told = status(NAME, digests=True)
    assert told.digest == "differs" and told.remedy == f"vc2 mirror {folder} --only {NAME}"


def test_the_mirror_says_which_bytes_its_files_are(folder):
    (folder / MIRROR_MANIFEST).write_text(json.dumps({NAME: {"file": FILE, "size": 7, "sha256": "0" * 64}}))
    with pytest.raises(WeightsError, match="its mirror says"):
        resolve(NAME)


def test_published_digits_are_compared(folder):
    place = folder / WEIGHTS["raft-things"].file
    place.parent.mkdir()
    place.write_bytes(b"not RAFT")
    with pytest.raises(WeightsError, match=r"expected 22a6c225 \(published\)"):
        resolve("raft-things")


def test_a_missing_weight_comes_with_the_command_that_mends_it(monkeypatch):
    assert status(NAME).remedy == f"vc2 mirror MIRROR --only {NAME}"
    assert "--from FOLDER" in status("dover").remedy and "DOVER.pth" in status("dover").remedy
    monkeypatch.setenv("VC2_MIRROR", "/some/mirror")
    assert status(NAME).remedy == f"vc2 mirror /some/mirror --only {NAME}"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with files by their bare names."""
    source = tmp_path / "downloads"
    source.mkdir()
    (source / "open_clip_model.safetensors").write_bytes(b"clip" * 1000)
    (source / "DOVER.pth").write_bytes(b"dover")
    return source


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_mirror_is_made_verified_and_found_again(kind, files, tmp_path, request, monkeypatch):
    place = str(tmp_path / "mirror") if kind == "folder" else request.getfixturevalue("s3_uri")
    first = {step.name: step.outcome for step in mirror(place, (NAME, "dover", "amt-s"), source=files)}
    assert first == {NAME: "copied", "dover": "copied", "amt-s": "missing"}
    again = [step.outcome for step in mirror(place, (NAME, "dover"), source=files, verify=True)]
    assert again == ["there already"] * 2

    manifest = json.loads(open_store(place).read(MIRROR_MANIFEST))
    assert manifest[NAME]["sha256"] == hashlib.sha256(b"clip" * 1000).hexdigest()
    monkeypatch.setenv("VC2_MIRROR", place)
    assert is_available(NAME) and not is_available("sam2")
    assert resolve(NAME).read_bytes() == b"clip" * 1000

    open_store(place).write(FILE, b"pilc" * 1000)
    assert [step.outcome for step in mirror(place, (NAME,), source=files)] == ["there already"]
    assert [step.outcome for step in mirror(place, (NAME,), source=files, verify=True)] == ["copied"]


def test_a_mirror_cut_short_goes_on_where_it_stopped(files, tmp_path):
    steps = mirror(str(tmp_path / "mirror"), (NAME, "dover"), source=files)
    assert next(steps).outcome == "copied"
    steps.close()
    outcomes = [step.outcome for step in mirror(str(tmp_path / "mirror"), (NAME, "dover"), source=files)]
    assert outcomes == ["there already", "copied"]


def test_wrong_bytes_do_not_get_into_a_mirror(tmp_path):
    weight = WEIGHTS["raft-things"]
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / Path(weight.file).name).write_bytes(b"a web page")
    (step,) = mirror(str(tmp_path / "mirror"), (weight.name,), source=tmp_path / "downloads")
    assert step.outcome == "wrong" and "expected 22a6c225" in step.words
    assert not (tmp_path / "mirror" / weight.file).exists()


def test_damaged_bytes_are_wrong_and_not_missing(folder, tmp_path):
    (folder / MIRROR_MANIFEST).write_text(json.dumps({NAME: {"file": FILE, "size": 7, "sha256": "0" * 64}}))
    (step,) = mirror(str(tmp_path / "another"), (NAME,))
    assert step.outcome == "wrong" and "its mirror says" in step.words


def test_what_the_hub_does_not_have_is_missing_only_where_it_was_asked_for(files, tmp_path):
    """The rest is named with the place it is published at."""
    steps = {step.name: step for step in mirror(str(tmp_path / "mirror"), source=files)}
    assert steps["dover"].outcome == steps["miniature-image-base"].outcome == "copied"
    assert steps["inception-2015-12-05"].outcome == "not on the hub"
    assert WEIGHTS["inception-2015-12-05"].url in steps["inception-2015-12-05"].words
    assert steps["sd21-base"].outcome == "missing"  # which the hub has
    (step,) = mirror(str(tmp_path / "mirror"), ("inception-2015-12-05",), source=files)
    assert step.outcome == "missing"


def test_a_name_that_several_weights_share_is_not_guessed(tmp_path):
    """`model.safetensors` alone does not say whose it is."""
    (tmp_path / "model.safetensors").write_bytes(b"whose?")
    (step,) = mirror(str(tmp_path / "mirror"), ("clip-vit-b-32",), source=tmp_path)
    assert step.outcome == "missing"


def test_every_weight_says_its_licence_and_its_use():
    for name, weight in WEIGHTS.items():
        assert name == weight.name and weight.license and weight.used_by
    files = [weight.file for weight in WEIGHTS.values()]
    assert len(set(files)) == len(files)


def test_what_can_be_no_weights_is_not_mirrored(tmp_path):
    """A web page saved in place of the file would be served for ever."""
    (tmp_path / "from").mkdir()
    for text, words in (("<html>log in</html>", "web page"), ("", "empty")):
        (tmp_path / "from" / "DOVER.pth").write_text(text)
        (step,) = mirror(str(tmp_path / "mirror"), ("dover",), source=tmp_path / "from")
        assert step.outcome == "wrong" and words in step.words
        assert not list((tmp_path / "mirror").rglob("*.pth"))


def sam2_in(folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / "sam2").mkdir(parents=True, exist_ok=True)
        (folder / "sam2" / name).write_bytes(f"{name} of sam2".encode())
    return folder


def test_weights_of_several_files_are_found_whole_or_not_at_all(tmp_path, monkeypatch):
    """Resolved is the first of them, the others lie beside it; without one of them the weight is missing, by name."""
    monkeypatch.setenv("VC2_MIRROR", str(sam2_in(tmp_path / "mirror")))
    assert is_available("sam2") and resolve("sam2", cache=tmp_path / "cache") == tmp_path / "mirror/sam2/config.json"
    whole = identity("sam2", cache=tmp_path / "cache")
    (tmp_path / "mirror" / "sam2" / "model.safetensors").unlink()
    assert not is_available("sam2")
    with pytest.raises(PretrainedMissing, match=r"sam2/model\.safetensors"):
        resolve("sam2", cache=tmp_path / "cache")
    told = status("sam2", cache=tmp_path / "cache")
    assert told.problem == "missing: model.safetensors" and told.remedy.endswith("--only sam2")
    given = sam2_in(tmp_path / "given") / "sam2"
    assert identity("sam2", path=given) == identity("sam2", path=given / "config.json") == whole
    (given / "model.safetensors").write_bytes(b"others")
    assert identity("sam2", path=given) != whole


def test_weights_of_several_files_are_mirrored_file_by_file(tmp_path, monkeypatch):
    monkeypatch.delenv("VC2_MIRROR", raising=False)
    source = sam2_in(tmp_path / "downloads")
    steps = {step.name: step.outcome for step in mirror(str(tmp_path / "mirror"), ("sam2",), source=source)}
    assert steps == {"sam2": "copied", "sam2/model.safetensors": "copied"}
    monkeypatch.setenv("VC2_MIRROR", str(tmp_path / "mirror"))
    assert resolve("sam2", cache=tmp_path / "cache").parent == tmp_path / "mirror" / "sam2"
    (tmp_path / "mirror" / "sam2" / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(WeightsError, match="its mirror says"):
        resolve("sam2", cache=tmp_path / "cache")


def test_a_package_brings_its_weights_and_is_never_mirrored(tmp_path):
    """What is installed is at hand and has a version for a digest; what is not says what to install."""
    assert is_available("rapidocr") and identity("rapidocr").startswith("rapidocr ")
    assert status("rapidocr").digest == "ok"
    assert not any("rapidocr" in step.name for step in mirror(str(tmp_path / "mirror"), source=tmp_path))
