"""Compatibility of a run with the command that resumes it: what differs, and what of it may."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from proteus_jax.checkpoint.items import FORMAT, VERSION
from proteus_jax.engine.checkpointing import CheckpointManager
from proteus_jax.errors import InputError
from proteus_jax.runtime import collectives
from proteus_jax.runtime.workdir import STUDENTS

# Facts of a checkpoint that are no part of a run's identity: what its student carries on, and the
# configuration that it was made with.
CARD, CONFIGURATION = "card", "configuration"
# Fields, and groups of them, of which the facts say what matters: a teacher may lie elsewhere.
IDENTITY = (
    *("teachers", "method.name", "method.loss_weights", "student", "init", "seed", "batch"),
    *("optimizer.name", "optimizer.mu_dtype", "data.root", "data.weights", "data.crop"),
    *("data.subset", "data.repeated_aug", "data.randaugment", "data.erasing", "data.held_out"),
)
# Fields that change no number of the training, but for rounding. Every other one that may change
# does so from the step on at which the run is resumed.
WITHOUT_EFFECT = (
    *("fsdp", "remat", "attention", "hosts", "devices", "log_every", "eval_every"),
    *("checkpoint_every", "max_skipped", "max_failed_saves", "keep_checkpoints", "keep_every"),
    *("preemption_timeout_s", "eval", "data.workers", "data.threads"),
    "data.max_corrupt_fraction",
)
# What is given in epochs counts only where it is not given in steps.
_IN_STEPS = {"epochs": "steps", "optimizer.warmup_epochs": "optimizer.warmup_steps"}
# Fields that decide when a run ends.
LENGTH = (*_IN_STEPS, *_IN_STEPS.values(), "data.epoch")


class Differences(NamedTuple):
    """Differences in words, a line each: those that a run is refused for, and those that may be."""

    refused: list[str]
    allowed: list[str]


def find_resume_point(
    manager: CheckpointManager, facts: Mapping[str, Any], workdir: Path
) -> tuple[int | None, list[str]]:
    """Finds the step to go on from, None at the beginning, and what there is to say of it:
    checkpoints that are damaged, and what differs from the run until now. InputError where that
    must not differ.
    """
    remarks = []
    newest = None
    if jax.process_index() == 0:
        try:
            newest = manager.latest()
            left = [name for name in STUDENTS if (workdir / name).exists()]
            if newest.step is None and left:
                raise InputError(f"{workdir} has {left[0]}/, but no checkpoint: of another run")
        except InputError as error:
            raise InputError(
                f"{error}. Restore its checkpoints/ from a copy, give another workdir, or remove "
                "this one to begin anew"
            ) from None
        instead = (
            "there is none before it" if newest.step is None else f"step {newest.step} is whole"
        )
        remarks += [
            f"the checkpoint of step {number} is not whole: {reason}; {instead}"
            for number, reason in newest.faults.items()
        ]
        remarks += [
            f"{name}, which a save left unfinished, is removed" for name in newest.unfinished
        ]
    step = -1 if newest is None or newest.step is None else newest.step
    step = collectives.broadcast_from_rank0(step)
    if step >= 0:
        remarks += _allowed_differences(manager.facts(step), facts, step)
    if newest is not None:
        manager.quarantine(newest)
    if step < 0:
        return None, remarks
    manager.resumed(step)
    return step, remarks


def _allowed_differences(
    saved: Mapping[str, Any], expected: Mapping[str, Any], step: int
) -> list[str]:
    """Lists what differs and may; InputError where anything differs that must not."""
    different = compare_facts(saved, expected)
    if not different.refused:
        return different.allowed
    where = f"--workdir holds another run, at step {step}"
    error = InputError([f"{where}: {line} (refused)" for line in different.refused])
    for line in different.allowed:
        error.add_note(f"{line} (this may differ)")
    raise error


def refuse_hosts_that_differ(
    facts: Mapping[str, Any], *, saved: bool, views: np.ndarray | None
) -> None:
    """InputError on all hosts where one sees other images, another teacher or another workdir: they
    would wait for each other for ever, or train on something else. `saved` says whether this host
    sees the checkpoint to go on from, `views` are its held-out images.
    """
    seen = {
        "images or teacher": json.dumps(facts),
        "checkpoint in the workdir": str(saved),
        "held-out images that can be read": hashlib.sha256(
            b"" if views is None else views.tobytes()
        ).hexdigest(),
    }
    different = [what for what, text in seen.items() if not collectives.same_on_all_hosts(text)]
    if different:
        raise InputError([f"the hosts do not see the same {what}" for what in different])


def compare_facts(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> Differences:
    """Between the facts of a checkpoint and those of this run."""
    if saved.get(FORMAT) != VERSION:
        return Differences(
            [
                f"{FORMAT}: the checkpoint has {saved.get(FORMAT, 1)}, this version of proteus_jax "
                f"reads {VERSION}; go on with the version that began the run"
            ],
            [],
        )
    was, now = dict(saved), dict(expected)
    own = [dict(_leaves(facts.pop(CONFIGURATION, {}))) for facts in (was, now)]
    for facts in (was, now):
        facts.pop(CARD, None)
    refused = _different(dict(_leaves(was)), dict(_leaves(now)))
    lines = [f"{key}: {_refusal(key, *values)}" for key, values in refused.items()]
    given = {field for field in _IN_STEPS.values() if own[1].get(field) is not None}
    allowed = [
        f"--config.{field}: {_short(before)} until now, {_short(after)} from here on"
        f"{_rule(field, given)}"
        for field, (before, after) in _different(*own).items()
        if field not in refused and not (refused and _within(field, IDENTITY))
    ]
    return Differences(lines, allowed)


def _refusal(key: str, before: Any, after: Any) -> str:
    """Words for a refused difference; digests, which say nothing to a reader, are named by what
    they are of.
    """
    if not (_is_digest(before) and _is_digest(after)):
        return f"the checkpoint has {_short(before)}, this run has {_short(after)}"
    what = "other weights"
    if key == "data":
        what = "other images (added, removed, renamed, changed, held out otherwise)"
    return f"{what} than in the checkpoint: sha256 {before[:12]}... there, {after[:12]}... here"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _leaves(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _different(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (was.get(key), now.get(key))
        for key in (*now, *(key for key in was if key not in now))
        # As it comes back from a file: tuples are lists there.
        if json.dumps(was.get(key)) != json.dumps(now.get(key))
    }


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _within(field: str, groups: tuple[str, ...]) -> bool:
    return any(field == group or field.startswith(f"{group}.") for group in groups)


def _rule(field: str, given: set[str]) -> str:
    """The effect of a change; `given` are the fields in steps that a run has."""
    if _IN_STEPS.get(field) in given:
        return f", which counts for nothing beside --config.{_IN_STEPS[field]}"
    if _within(field, IDENTITY + WITHOUT_EFFECT):
        return ", which changes no number of the training"
    if field in LENGTH:
        return "; the learning rate follows the new length"
    return ""
