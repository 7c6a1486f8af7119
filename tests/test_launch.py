"""The files that start runs on machines: checked as far as can be without them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_hosts import UNMEASURED, until
from test_main import command

from proteus_jax.metrics import read_metrics

LAUNCH = ROOT / "launch"
PYTHON_MAIN = f"^{sys.executable} main.py"
SRUN = """#!/bin/bash
# srun as two tasks of this machine.
while [[ "$1" == --* ]]; do shift; done
code=0
for task in 0 1; do
  SLURM_PROCID=$task "$@" > "task.$task.txt" 2>&1 &
  pids[$task]=$!
done
for task in 0 1; do wait "${pids[$task]}" || code=$?; done
exit "$code"
"""


def dry_run(script: str, *arguments: str, **variables: str) -> list[str]:
    result = subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env=os.environ | variables | {"DRY_RUN": "1", "PAUSE": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_shellcheck() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.is_file():
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([shellcheck, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_pod_is_made_trained_on_and_removed() -> None:
    variables = {"NAME": "p", "ZONE": "z", "TYPE": "v5litepod-16", "SPOT": "1"}
    variables |= {"SOURCE": "https://example.org/repository", "SHARED": "10.0.0.2:/share"}
    lines = dry_run("tpu_pod.sh", "--config=c.py", "--workdir=/mnt/shared/my run", **variables)
    made, *setup, trained, removed = lines
    assert made.startswith("+ gcloud compute tpus tpu-vm create p ")
    assert "--spot" in made
    assert all("--worker=all" in line for line in [*setup, trained])
    assert "main.py --config.stop_within=25 --config=c.py --workdir=/mnt/shared/my\\ run" in trained
    assert removed == "+ gcloud compute tpus tpu-vm delete p --zone=z --quiet"


# gcloud whose answers are the lines of a file, one for each create and each training: an exit code,
# whether the slice is there afterwards, and words for standard error.
GCLOUD = """#!/bin/bash
echo "$4" "${*: -1}" >> calls.txt
answer() {
  read -r code there words < answers.txt && sed -i 1d answers.txt
  echo "$there" > there.txt
  echo "$words" >&2
  exit "$code"
}
case "$4" in
  describe) cat there.txt 2>/dev/null ;;
  create) answer ;;
  ssh) case "$*" in *main.py*) answer ;; esac ;;
esac
"""


@pytest.mark.parametrize(
    ("answers", "code", "created", "trained"),
    [
        # No capacity twice, taken back once, then done.
        (
            [
                "1 GONE There is no more capacity in the zone",
                "1 GONE RESOURCE_EXHAUSTED",
                "0 READY",
                "255 GONE lost",
                "0 READY",
                "75 READY",
                "0 READY",
            ],
            0,
            4,
            3,
        ),
        (["1 GONE PERMISSION_DENIED"], 1, 1, 0),
        (["0 READY", "2 READY"], 2, 1, 1),
        # The slice is there, and the run fails again and again.
        (["0 READY", "1 READY", "127 READY", "1 READY"], 1, 1, 3),
    ],
)
def test_a_pod_goes_on_as_long_as_that_makes_sense(
    answers: list[str], code: int, created: int, trained: int, tmp_path: Path
) -> None:
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "answers.txt").write_text("".join(line + "\n" for line in answers))
    variables = {"NAME": "p", "ZONE": "z", "TYPE": "v5litepod-16", "SOURCE": "https://x"}
    variables |= {"PAUSE": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "--config=c.py"],
        env=os.environ | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == code, result.stderr
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert sum(call.startswith("create") for call in calls) == created
    assert result.stdout.count("main.py --config.stop_within=25 --config=c.py") == trained
    assert calls[-1].startswith("delete")
    assert (tmp_path / "answers.txt").read_text() == ""


def test_a_job_set_is_yaml_and_ends_in_the_command() -> None:
    yaml = pytest.importorskip("yaml")
    job_set = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert container["command"][:2] == ["python", "main.py"]
    assert job["parallelism"] == job["completions"] == 4
    assert "--config.hosts=4" in container["command"]


def tiny_run(workdir: Path, photographs: Path, teacher: Path, *more: str) -> list[str]:
    """The arguments of main.py for a small run."""
    return [*command(workdir, photographs, teacher)[2:], "--config.batch=8", *UNMEASURED, *more]


def test_slurm_runs_both_tasks_and_queues_again(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "$@" > queued.txt\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in ("main.py", "configs", "proteus_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "PROTEUS_JAX_CACHE": str(photographs.parent / "cache"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
    }
    workdir = tmp_path / "run"
    job = subprocess.Popen(
        [
            "bash",
            LAUNCH / "slurm.sh",
            *tiny_run(workdir, photographs, tiny_teacher, "--config.steps=4000"),
        ],
        env=environment,
        start_new_session=True,
    )
    until(lambda: sum(1 for _ in read_metrics(workdir)) > 3)
    # As SLURM does, to all processes of the step at once.
    subprocess.run(["pkill", "-TERM", "-s", str(job.pid), "-f", PYTHON_MAIN], check=True)
    assert job.wait(120) == 75, (tmp_path / "task.0.txt").read_text()
    assert "2 hosts x 1 device" in (tmp_path / "task.0.txt").read_text()
    assert (tmp_path / "queued.txt").read_text() == f"requeue {os.getpid()}\n"


def test_a_node_goes_on_after_an_interruption_and_ends_when_told(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    workdir = tmp_path / "run"
    script = subprocess.Popen(
        [
            "bash",
            LAUNCH / "node.sh",
            *tiny_run(workdir, photographs, tiny_teacher, "--config.steps=4000"),
        ],
        env=os.environ
        | {
            "PYTHON": sys.executable,
            "PAUSE": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "JAX_PLATFORMS": "cpu",
            "PROTEUS_JAX_CACHE": str(photographs.parent / "cache"),
        },
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: sum(1 for _ in read_metrics(workdir)) > 3)
    subprocess.run(["pkill", "-TERM", "-s", str(script.pid), "-f", PYTHON_MAIN], check=True)
    time.sleep(1)
    until(lambda: (workdir / "log.txt").is_file() and script.poll() is None)
    rows = sum(1 for _ in read_metrics(workdir))
    until(lambda: sum(1 for _ in read_metrics(workdir)) > rows + 2)
    script.send_signal(signal.SIGTERM)
    out, _ = script.communicate(timeout=120)
    assert script.returncode == 75
    assert out.count("interrupted at step") == 2
    assert "resuming at step" in out


# A Python that is too old to suit, and one that a stub of uv puts into .venv: it notes what pip is
# asked for, and has a module once that was installed.
OLD = "#!/bin/bash\nexit 1\n"
UV = """#!/bin/bash
echo "uv $*" >> calls.txt
mkdir -p "${*: -1}/bin"
cp new_python "${*: -1}/bin/python"
"""
NEW = """#!/bin/bash
case "$*" in
  *find_spec*) grep -q "pip install" calls.txt ;;
  *) echo "$*" >> calls.txt ;;
esac
"""


def machine(folder: Path, **programs: str) -> dict[str, str]:
    """A folder with launch/setup.sh in it, on a machine whose Python is 3.10."""
    (folder / "bin").mkdir()
    (folder / "launch").mkdir()
    (folder / "launch" / "setup.sh").write_text((LAUNCH / "setup.sh").read_text())
    (folder / "requirements.txt").touch()
    os.utime(folder / "requirements.txt", (0, 0))
    (folder / "new_python").write_text(NEW)
    (folder / "new_python").chmod(0o755)
    olds = dict.fromkeys(("python3", "python3.11", "python3.12", "python3.13"), OLD)
    for name, text in (olds | {"uv": UV} | programs).items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return kept | {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}


def set_up(folder: Path, environment: dict[str, str], *arguments: str) -> list[str]:
    result = subprocess.run(
        ["bash", "launch/setup.sh", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return (folder / "calls.txt").read_text().splitlines()


def test_an_old_python_is_replaced_by_uv(tmp_path: Path) -> None:
    environment = machine(tmp_path)
    made, installed = set_up(tmp_path, environment, "tpu", "requirements-gcs.txt")
    assert made == "uv venv --quiet --seed --python 3.11 .venv"
    assert "-m pip install" in installed
    assert installed.endswith("jax[tpu]>=0.10.2,<0.13 -r requirements.txt -r requirements-gcs.txt")
    # What is there is not installed again.
    assert set_up(tmp_path, environment, "tpu", "requirements-gcs.txt") == [made, installed]
    # Other devices, or more packages, are.
    assert "jax[cuda13]>=" in set_up(tmp_path, environment, "cuda13")[-1]


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "[cuda13]"), ("535.129.03", "[cuda12]")]
)
def test_the_driver_says_which_jax(driver: str, extra: str, tmp_path: Path) -> None:
    environment = machine(
        tmp_path, **{"nvidia-smi": f"#!/bin/bash\necho {driver}\necho {driver}\n"}
    )
    assert f"jax{extra}>=" in set_up(tmp_path, environment)[-1]


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_each_type_of_slice_has_its_image(kind: str, image: str) -> None:
    variables = {"NAME": "p", "ZONE": "z", "TYPE": kind, "SOURCE": "https://x"}
    made, setup, trained, _ = dry_run("tpu_pod.sh", "--config=c.py", **variables)
    assert f"--version={image} " in made
    assert "launch/setup.sh tpu" in setup
    # A spot slice leaves half a minute.
    assert "--config.stop_within=25" in trained
