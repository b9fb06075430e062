"""Bucket and roles: checked by Terraform itself where it and its provider are at hand, and for what the store needs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from manifests import INFRA, program, run

FOLDER = INFRA / "terraform"
TEXT = "\n".join(path.read_text() for path in sorted(FOLDER.glob("*.tf")))
# Where installations keep providers beside Terraform's own cache; TF_PLUGIN_DIR names another place.
USUAL = (Path.home() / ".terraform.d/plugins", Path("/usr/local/share/terraform/plugins"), *Path("/opt").glob("*"))


def terraform() -> str:
    found = program("terraform")
    if found is None:
        pytest.skip("no terraform")
    return found


def test_it_is_formatted() -> None:
    run(terraform(), "fmt", "-check", "-diff", str(FOLDER))


def test_it_is_valid(tmp_path: Path) -> None:
    place = os.environ.get("TF_PLUGIN_DIR") or next(
        (str(path) for path in USUAL if (path / "registry.terraform.io/hashicorp/aws").is_dir()), None
    )
    if place is None:
        pytest.skip("no AWS provider at hand; TF_PLUGIN_DIR names a folder that has it")
    for path in FOLDER.glob("*.tf"):
        shutil.copy(path, tmp_path)
    settings = {name: value for name, value in os.environ.items() if name != "TF_CLI_CONFIG_FILE"}
    command = (terraform(), "init", "-backend=false", "-input=false", "-no-color", f"-plugin-dir={place}")
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    if done.returncode and "no available releases match" in done.stderr:
        pytest.skip(f"another version of the AWS provider in {place}")
    assert done.returncode == 0, done.stderr
    run(terraform(), "validate", "-no-color", cwd=tmp_path, env=settings)


def test_what_says_that_an_artifact_is_finished_is_written_once_and_stays() -> None:
    """The bucket's policy: no manifest without If-None-Match, none deleted but by `gc`; states are not among them."""
    found = re.search(r"manifests = \[(.*?)\]", TEXT, flags=re.DOTALL)
    assert found
    guarded = set(re.findall(r'"([^"]+)"', found[1]))
    assert guarded == {
        "shards/*/manifest.json", "runs/*/checkpoints/*/manifest.json", "samples/*/manifest.json",
        "scores/*/manifest.json", "reports/*/manifest.json",
    }  # fmt: skip
    policy = (FOLDER / "bucket.tf").read_text()
    assert 'variable = "s3:if-none-match"' in policy and 'aws_iam_role.this["gc"].arn' in policy


def test_every_place_of_a_store_is_somebodys() -> None:
    """Each folder that the code writes into is one that a role may write: a new one must be added here too."""
    root = INFRA.parent / "vc2"
    text = "\n".join(path.read_text() for path in [*root.rglob("*.py"), *(INFRA.parent / "flows").glob("*.py")])
    known = {
        "shards", "objects", "ledgers", "runs", "samples", "scores",
        "reports", "removals", "pages", "rehearsals", "probe",
    }  # fmt: skip
    for folder in known:
        assert f'"{folder}/*"' in TEXT, folder
    keys = re.findall(r"f\"([a-z]+)/(?:\{[^}]+\}/)*\{(?:self\.)?(?:fingerprint|sha256|artifact\.fingerprint)", text)
    assert set(keys) <= known, set(keys) - known
