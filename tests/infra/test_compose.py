"""The Compose file: valid, open to nobody but this machine, and without a secret."""

import yaml
from manifests import INFRA, program, run

from flows.files import HOST

SERVICES = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]


def test_it_is_what_compose_reads() -> None:
    checker = program("check-jsonschema")
    assert checker, "check-jsonschema is a package of the developer's"
    run(checker, "--builtin-schema", "vendor.compose-spec", str(INFRA / "compose.yaml"))


def test_ports_are_published_on_loopback_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_files_are_served_on_loopback_and_read_only() -> None:
    """The file server asks nobody who they are."""
    files = SERVICES["files"]
    assert files["command"][:3] == ["python", "-m", "flows.files"] and HOST == "127.0.0.1"
    assert files["network_mode"] == "host" and files["volumes"] == ["work:/srv/vc2:ro"]
    port = files["command"][files["command"].index("--port") + 1]
    assert SERVICES["worker"]["environment"]["VC2_FILES_URL"] == f"http://{HOST}:{port}"


def test_every_secret_must_be_given_and_has_no_default() -> None:
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            if any(word in name for word in ("PASSWORD", "AUTH_STRING", "ACCESS_KEY", "TOKEN")):
                assert value is None or value.endswith(":?set it in infra/.env}"), name
    said = (INFRA / ".env.example").read_text()
    for wanted in ("PREFECT_AUTH", "POSTGRES_PASSWORD", "VC2_STORE", "VC2_IMAGE"):
        assert f"\n{wanted}=" in f"\n{said}"


def test_no_service_has_more_rights_than_it_needs() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service
        assert not any(volume.startswith(("/", ".")) for volume in service.get("volumes", [])), "a folder of the host"


def test_each_waits_for_what_it_needs() -> None:
    assert SERVICES["server"]["depends_on"]["database"]["condition"] == "service_healthy"
    assert SERVICES["deploy"]["depends_on"]["server"]["condition"] == "service_healthy"
    assert SERVICES["worker"]["depends_on"]["deploy"]["condition"] == "service_completed_successfully"
    for name in ("database", "server", "worker"):
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD", name
