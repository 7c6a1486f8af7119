"""The files that start runs on machines: checked as far as can be without them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import compiler
import pytest
from commands import UNMEASURED, command, until
from conftest import ROOT

from proteus_jax.runtime.metric_writer import read_metrics

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
    return (result.stdout + result.stderr).splitlines()


def test_shellcheck() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.is_file():
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(
        [shellcheck, "-x", *LAUNCH.glob("*.sh")], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


POD = {"NAME": "p", "ZONE": "z", "TYPE": "v5litepod-16", "SOURCE": "https://example.org/us"}


def test_a_pod_is_made_trained_on_and_removed() -> None:
    variables = POD | {"SPOT": "1", "SHARED": "10.0.0.2:/share"}
    arguments = ("start", "--config=c.py", "--workdir=/mnt/shared/my run")
    made, *setup, prepared, trained, removed = dry_run("tpu_pod.sh", *arguments, **variables)
    assert made.startswith("+ gcloud compute tpus tpu-vm create p ")
    assert "--spot" in made
    assert all("--worker=all" in line for line in [*setup, prepared, trained])
    words = "--config=c.py --workdir=/mnt/shared/my\\ run"
    assert f"main.py --prepare {words}" in prepared
    assert (
        "launch/detached.sh start .venv/bin/python main.py --config.preemption_timeout_s=25 "
        in trained
    )
    assert words in trained
    assert removed == "+ gcloud compute tpus tpu-vm delete p --zone=z --quiet"


def test_several_slices_are_queued() -> None:
    lines = dry_run("tpu_pod.sh", "start", "--config=c.py", **POD, SLICES="2", SPOT="1")
    made, removed = lines[0], lines[-1]
    assert made == (
        "+ gcloud compute tpus queued-resources create p --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=p --spot --zone=z "
        "--quiet"
    )
    for node in ("p-0", "p-1"):
        assert sum(f"tpu-vm ssh {node} --worker=all" in line for line in lines) == 3
    assert removed == "+ gcloud compute tpus queued-resources delete p --force --zone=z --quiet"


# gcloud whose answers are the lines of a file, one for each create and each look at the run: an
# exit code, whether the slice is there afterwards, and words: for standard error of a create, for
# standard output of a look.
GCLOUD = """#!/bin/bash
echo "$3" "$4" "${*: -1}" >> calls.txt
answer() {
  read -r code there words < answers.txt && sed -i 1d answers.txt
  echo "$there" > there.txt
}
case "$4" in
  describe) cat there.txt 2>/dev/null || { echo NOT_FOUND >&2; exit 1; } ;;
  create) answer; echo "$words" >&2; exit "$code" ;;
  ssh) case "$*" in *"sh status"*) answer; echo "$words"; exit "$code" ;; esac ;;
esac
"""


def watched_pod(folder: Path, answers: list[str], stub: str = GCLOUD) -> tuple[int, list[str], str]:
    """The exit code of tpu_pod.sh where gcloud answers so, what it was called with, and what the
    script said.
    """
    (folder / "gcloud").write_text(stub)
    (folder / "gcloud").chmod(0o755)
    (folder / "answers.txt").write_text("".join(line + "\n" for line in answers))
    more = {"PAUSE": "0", "PATH": f"{folder}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "--config=c.py"],
        env=os.environ | POD | more,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (folder / "answers.txt").read_text() == ""
    calls = (folder / "calls.txt").read_text().splitlines()
    return result.returncode, calls, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("answers", "code", "created", "trained"),
    [
        # No capacity twice, taken back once, interrupted once, then done.
        (
            [
                "1 GONE There is no more capacity in the zone",
                "1 GONE RESOURCE_EXHAUSTED",
                "0 READY",
                "0 READY running",
                "255 PREEMPTED lost",
                "0 READY",
                "0 READY ended 75",
                "0 READY running",
                # A connection that breaks is no end of the run.
                "255 READY",
                "0 READY ended 0",
            ],
            0,
            4,
            3,
        ),
        (["1 NONE PERMISSION_DENIED"], 1, 1, 0),
        (["0 READY", "0 READY ended 2"], 2, 1, 1),
        # The slice is there, and the run fails again and again.
        (["0 READY", "0 READY ended 1", "0 READY lost", "0 READY ended 127"], 127, 1, 3),
    ],
)
def test_a_pod_goes_on_as_long_as_that_makes_sense(
    answers: list[str], code: int, created: int, trained: int, tmp_path: Path
) -> None:
    found, calls, said = watched_pod(tmp_path, answers)
    assert found == code, said
    assert sum(call.startswith("tpu-vm create") for call in calls) == created
    start = "sh start .venv/bin/python main.py --config.preemption_timeout_s=25 --config=c.py"
    assert said.count(start) == trained
    # Where there was none to be had nothing is left to remove.
    assert calls[-1].startswith("tpu-vm delete") or code == 1


def test_a_pod_that_was_deleted_or_stopped_is_not_made_again(tmp_path: Path) -> None:
    """By somebody else, from another terminal, while this one watches."""
    code, calls, said = watched_pod(tmp_path, ["0 READY", "0 READY stopped 75"])
    assert code == 75
    assert "was asked to stop, and did" in said
    assert sum(call.startswith("tpu-vm create") for call in calls) == 1
    (tmp_path / "there.txt").unlink()
    (tmp_path / "calls.txt").unlink()
    code, calls, said = watched_pod(tmp_path, ["0 READY", "255 NONE"])
    assert code == 75
    assert "p was deleted" in said
    assert sum(call.startswith("tpu-vm create") for call in calls) == 1
    # Nothing of anybody's is deleted.
    assert not any(call.startswith("tpu-vm delete") for call in calls)


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        # A command line that is wrong, and hosts that do not answer.
        (["0 READY none"], 2, "p stays"),
        (["255 READY"], 1, "p stays"),
        # The same command again while the run is at work watches it to its end.
        (["0 READY running", "0 READY running", "0 READY ended 0"], 0, "ended 0"),
    ],
)
def test_a_slice_that_was_there_is_not_removed_for_a_failure(
    answers: list[str], code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "there.txt").write_text("READY\n")
    refusing = "*--prepare*) exit 2 ;; "
    if answers[0].startswith("255"):
        refusing = "*test\\ -e*) exit 255 ;; "
    stub = GCLOUD.replace('ssh) case "$*" in ', f'ssh) case "$*" in {refusing}')
    found, calls, words = watched_pod(tmp_path, answers, stub=stub)
    assert found == code, words
    assert said in words
    assert any(call.startswith("tpu-vm delete") for call in calls) == (code == 0)


def test_what_is_being_deleted_is_not_made_again(tmp_path: Path) -> None:
    deleting = (
        'describe) [ "$(cat there.txt)" != DELETING ] || { echo DELETING; rm there.txt; exit; }; '
    )
    stub = GCLOUD.replace("describe) ", deleting)
    code, calls, said = watched_pod(tmp_path, ["0 READY", "255 DELETING"], stub=stub)
    assert code == 75
    assert "p was deleted" in said
    assert sum(call.startswith("tpu-vm create") for call in calls) == 1


def test_a_slice_that_was_made_over_a_broken_connection_is_found(tmp_path: Path) -> None:
    answers = ["1 READY ConnectionError", "0 READY ended 0"]
    code, calls, said = watched_pod(tmp_path, answers)
    assert code == 0, said
    assert sum(call.startswith("tpu-vm create") for call in calls) == 1
    assert calls[-1].startswith("tpu-vm delete")


def test_stop_keeps_a_slice_that_could_not_be_asked(tmp_path: Path) -> None:
    unreachable = GCLOUD.replace("ssh) ", "ssh) exit 255; ")
    environment = os.environ | POD | {"PATH": f"{programs(tmp_path, gcloud=unreachable)}"}
    (tmp_path / "there.txt").write_text("READY\n")
    stop = ["bash", LAUNCH / "tpu_pod.sh", "stop"]
    result = subprocess.run(
        stop, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "not every host could be asked: p stays" in result.stderr
    # One that was taken back has nothing to save.
    (tmp_path / "there.txt").write_text("PREEMPTED\n")
    subprocess.run(stop, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "calls.txt").read_text().splitlines()[-1].startswith("tpu-vm delete")


def test_a_broken_network_costs_no_slice(tmp_path: Path) -> None:
    """gcloud answers nothing for a while: what is there stays, and is watched again."""
    down = "describe) read -r line < down.txt && sed -i 1d down.txt && exit 1; "
    stub = GCLOUD.replace("describe) ", down)
    (tmp_path / "gcloud").write_text(stub)
    answers = ["0 READY", "0 READY none", "255 READY", "0 READY ended 0"]
    (tmp_path / "there.txt").write_text("READY\n")
    (tmp_path / "down.txt").write_text("x\nx\n")
    code, calls, said = watched_pod(tmp_path, answers[1:], stub=stub)
    assert code == 0, said
    assert "gcloud does not answer" in said
    assert not any(call.startswith("tpu-vm create") for call in calls)
    assert sum(call.startswith("tpu-vm delete") for call in calls) == 1


def test_a_queued_slice_is_waited_for(tmp_path: Path) -> None:
    stub = GCLOUD.replace("describe) ", "describe) [[ $3 != queued* ]] || { queue; exit; }; ")
    queue = (
        "queue() { read -r state < states.txt && sed -i 1d states.txt; "
        "[ $state != NONE ] || { echo NOT_FOUND >&2; exit 1; }; echo $state; }\n"
    )
    stub = stub.replace("answer() {", queue + "answer() {")
    (tmp_path / "states.txt").write_text(
        "NONE\nWAITING_FOR_RESOURCES\nSUSPENDED\nPROVISIONING\nACTIVE\n"
    )
    (tmp_path / "gcloud").write_text(stub)
    (tmp_path / "gcloud").chmod(0o755)
    (tmp_path / "answers.txt").write_text("0 READY\n0 READY\n0 READY ended 0\n")
    result = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "start", "--config=c.py"],
        env=os.environ
        | POD
        | {"QUEUED": "1", "PAUSE": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "p: WAITING_FOR_RESOURCES" in result.stdout
    assert "p: SUSPENDED; it is made again" in result.stdout
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert sum(call.startswith("queued-resources create") for call in calls) == 2
    assert calls[-1].startswith("queued-resources delete")


# gcloud with one worker: this machine, with a home of its own.
LOCAL_GCLOUD = """#!/bin/bash
case "$4" in
  describe) cat "$HOME/state.txt" 2>/dev/null || { echo NOT_FOUND >&2; exit 1; } ;;
  create) echo READY > "$HOME/state.txt" ;;
  delete) rm -f "$HOME/state.txt" ;;
  ssh)
    for word in "$@"; do
      case "$word" in --command=*) cd "$HOME" && exec bash -c "${word#--command=}" ;; esac
    done
    ;;
esac
"""
# Python as pip leaves it: everything is there already.
INSTALLED = """#!/bin/bash
case "$*" in *"-m pip install"*) echo "$*" >> "$HOME/pip.txt"; exit ;; esac
exec {python} "$@"
"""
LOCAL_UV = '#!/bin/bash\nmkdir -p "${*: -1}/bin" && cp "$HOME/python" "${*: -1}/bin/python"\n'


def programs(folder: Path, **texts: str) -> str:
    """Programs in a folder; returns PATH with that first."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_a_pod_from_nothing_to_a_student(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """All that happens on a worker as it is delivered, with Python 3.10: cloned, set up, fetched,
    trained apart from the connection, watched to its end.
    """
    home = tmp_path / "home"
    home.mkdir()
    olds = dict.fromkeys(("python3", "python3.11", "python3.12", "python3.13"), OLD)
    path = programs(tmp_path / "bin", gcloud=LOCAL_GCLOUD, uv=LOCAL_UV, **olds)
    programs(home, python=INSTALLED.format(python=sys.executable))
    arguments = tiny_run(home / "run", photographs, tiny_teacher, "--config.steps=3")
    arguments = [each.replace(str(ROOT), str(home / "proteus_jax")) for each in arguments]
    result = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "start", *arguments],
        env={
            "HOME": str(home),
            "PATH": path,
            "PAUSE": "0.5",
            "JAX_PLATFORMS": "cpu",
            "PROTEUS_JAX_CACHE": str(tmp_path / "cache"),
            **POD,
            "SOURCE": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--editable .[tpu,gcs]" in (home / "pip.txt").read_text()
    assert "ready: images and models are here" in result.stdout
    assert (home / "run" / "student" / "model.safetensors").is_file()
    # The slice is gone.
    assert not (home / "state.txt").exists()


ONE_TASK = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nSLURM_PROCID=0 exec "$@"\n'


@pytest.mark.slow
def test_slurm_from_nothing_to_a_student(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """A node as it is delivered, with Python 3.10: the job makes its environment."""
    home, folder = tmp_path / "home", tmp_path / "submitted"
    home.mkdir()
    folder.mkdir()
    olds = dict.fromkeys(("python3", "python3.11", "python3.12", "python3.13"), OLD)
    path = programs(tmp_path / "bin", srun=ONE_TASK, uv=LOCAL_UV, **olds)
    programs(home, python=INSTALLED.format(python=sys.executable))
    for name in ("main.py", "configs", "proteus_jax", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    # Its scripts find their folder by their own place.
    shutil.copytree(LAUNCH, folder / "launch")
    arguments = tiny_run(tmp_path / "run", photographs, tiny_teacher, "--config.steps=3")
    result = subprocess.run(
        ["bash", folder / "launch" / "slurm.sh", *arguments],
        env={
            "HOME": str(home),
            "PATH": path,
            "JAX_PLATFORMS": "cpu",
            "SLURM_NNODES": "1",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "1",
            "PROTEUS_JAX_CACHE": str(photographs.parent / "cache"),
            "XLA_FLAGS": compiler.FLAGS,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--editable .\n" in (home / "pip.txt").read_text()
    assert "ready: images and models are here" in result.stdout
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_pods_of_a_job_set_meet_and_train(
    tmp_path: Path, photographs: Path, tiny_teacher: Path
) -> None:
    """The command of kubernetes.yaml, as each of its pods gets it, for a tiny run."""
    yaml = pytest.importorskip("yaml")
    job_set = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    pods, variables = job["parallelism"], {each["name"]: each["value"] for each in container["env"]}
    assert variables == {"PROTEUS_JAX_CACHE": "/runs/cache"}
    # What says which images, teacher and folder are meant comes last, and wins.
    tiny = tiny_run(tmp_path / "run", photographs, tiny_teacher, "--config.steps=2")
    asked = [each for each in container["command"][2:] if each.startswith("--config.")]
    running = [
        subprocess.Popen(
            [sys.executable, ROOT / "main.py", *asked, *tiny],
            env=os.environ
            | {
                "TPU_WORKER_ID": str(pod),
                "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * pods),
                "PROTEUS_JAX_CACHE": str(photographs.parent / "cache"),
                "XLA_FLAGS": compiler.FLAGS,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for pod in range(pods)
    ]
    said = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * pods, said
    assert f"on {pods} hosts x 1 device" in said[0]


DETACHED = LAUNCH / "detached.sh"


def test_what_is_detached_outlives_its_terminal_and_is_stopped(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "NAME": "a test"}
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('hello', flush=True)\n"
        "time.sleep(60)\n"
    )

    def detached(*words: str) -> str:
        result = subprocess.run(
            ["bash", DETACHED, *words], env=environment, capture_output=True, text=True, timeout=30
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert detached("status") == "none\n"
    detached("start", sys.executable, "-c", program)
    until(lambda: detached("status") == "running\nhello\n")
    assert "runs already" in detached("start", "false")
    assert detached("stop") == "stopped 75\nhello\n"
    # One that has ended by itself when it is asked is not begun again either.
    detached("start", "false")
    until(lambda: detached("status") == "ended 1\nhello\n")
    assert detached("stop") == "stopped 1\nhello\n"
    # Killed with the shell that would have written its end down.
    detached("start", sys.executable, "-c", program)
    until(lambda: detached("logs") == "hello\nhello\n")
    os.killpg(
        int((tmp_path / "proteus_jax" / os.uname().nodename / "a test" / "pid").read_text()),
        signal.SIGKILL,
    )
    until(lambda: detached("status").startswith("lost"))


def test_a_job_set_is_yaml_and_ends_in_the_command() -> None:
    yaml = pytest.importorskip("yaml")
    job_set = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert container["command"][:2] == ["python", "main.py"]
    assert job["parallelism"] == job["completions"] == 4
    assert "--config.hosts=4" in container["command"]
    shared = [each["name"] for each in container["volumeMounts"] if each["mountPath"] == "/dev/shm"]
    (volume,) = [each for each in job["template"]["spec"]["volumes"] if each["name"] in shared]
    assert volume["emptyDir"]["medium"] == "Memory"


def test_the_image_is_made_as_recommended() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed")
    found = subprocess.run([hadolint, LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


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
    for name in ("main.py", "configs", "proteus_jax", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "PROTEUS_JAX_CACHE": str(photographs.parent / "cache"),
        "XLA_FLAGS": compiler.FLAGS,
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
            "XLA_FLAGS": compiler.FLAGS,
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


def test_a_request_in_the_pause_begins_nothing(tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/bash\necho run >> "$HOME/runs.txt"; exit 75\n')
    (tmp_path / "python").chmod(0o755)
    script = subprocess.Popen(
        ["bash", LAUNCH / "node.sh"],
        env=os.environ | {"PYTHON": str(tmp_path / "python"), "HOME": str(tmp_path), "PAUSE": "60"},
        stdout=subprocess.DEVNULL,
    )
    until((tmp_path / "runs.txt").is_file)
    time.sleep(0.5)
    script.send_signal(signal.SIGTERM)
    assert script.wait(10) == 75
    assert (tmp_path / "runs.txt").read_text() == "run\n"


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
    made, installed = set_up(tmp_path, environment, "tpu", "gcs")
    assert made == "uv venv --quiet --seed --allow-existing --python 3.11 .venv"
    assert "-m pip install" in installed
    assert installed.endswith("--editable .[tpu,gcs]")
    # What is there is not installed again.
    assert set_up(tmp_path, environment, "tpu", "gcs") == [made, installed]
    # Other devices, or more packages, are.
    assert "--editable .[cuda13]" in set_up(tmp_path, environment, "cuda13")[-1]


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "[cuda13]"), ("535.129.03", "[cuda12]")]
)
def test_the_driver_says_which_jax(driver: str, extra: str, tmp_path: Path) -> None:
    environment = machine(
        tmp_path, **{"nvidia-smi": f"#!/bin/bash\necho {driver}\necho {driver}\n"}
    )
    assert f"--editable .{extra}" in set_up(tmp_path, environment)[-1]


def test_what_was_chosen_by_hand_is_kept(tmp_path: Path) -> None:
    """On a login node without a driver somebody chose CUDA 12; the nodes could have 13."""
    environment = machine(tmp_path, **{"nvidia-smi": "#!/bin/bash\necho 580.65.06\n"})
    lines = set_up(tmp_path, environment, "cuda12")
    assert set_up(tmp_path, environment) == lines
    assert "--editable .[cuda13]" in set_up(tmp_path, environment, "cuda13")[-1]


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
    made, setup, _, trained, _ = dry_run("tpu_pod.sh", "--config=c.py", **POD | {"TYPE": kind})
    assert f"--version={image} " in made
    assert "launch/setup.sh tpu" in setup
    # A spot slice leaves half a minute.
    assert "--config.preemption_timeout_s=25" in trained
