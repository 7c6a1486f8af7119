"""Rules for the fields of a configuration that evaluates."""

from collections.abc import Mapping
from typing import Any

from proteus_jax.config import to_record
from proteus_jax.data.reading_rules import READING_RULES
from proteus_jax.evaluation.config import EvalConfig
from proteus_jax.evaluation.protocols.registry import PROTOCOLS
from proteus_jax.models.precision import PRECISIONS
from proteus_jax.schema import MOST_WORKERS, SEED, Rule, Schema, at_least, one_of, up_to

_RULES: dict[str, Rule] = {
    "protocol": one_of(*PROTOCOLS),
    "model": Rule(bool, "a model: a directory, a run, or a known name"),
    "seed": SEED,
    "batch": at_least(1),
    "precision": one_of(*PRECISIONS),
    "data.root": Rule(lambda value: isinstance(value, str), "a place of images"),
    **READING_RULES,
    "data.resize": at_least(1),
    "data.crop": at_least(1),
    "data.workers": up_to(MOST_WORKERS),
    "data.threads": up_to(MOST_WORKERS),
}


def resolve(values: Mapping[str, Any]) -> EvalConfig:
    """Makes the record of a configuration, as JSON values, whose fields keep the rules."""
    protocol = PROTOCOLS[values["protocol"]]
    settings = to_record(protocol.settings, values.get(protocol.name, {}))
    return to_record(EvalConfig, {**values, "as_json": dict(values), "settings": settings})


def _check(config: EvalConfig) -> list[str]:
    problems = []
    if config.data.crop > config.data.resize:
        problems.append(
            f"--config.data.crop: expected at most data.resize, {config.data.resize}, found "
            f"{config.data.crop}"
        )
    return problems


def evaluation_schema(config: Any) -> Schema:
    """Makes the schema of a configuration that evaluates, by the protocols that it has fields for
    and the one that it names.
    """
    known = [each for each in PROTOCOLS.values() if each.name in (*config, config.get("protocol"))]
    own = {f"{each.name}.{field}": rule for each in known for field, rule in each.rules.items()}
    numbers = tuple(f"{each.name}.{field}" for each in known for field in each.numbers)
    return Schema(
        {**_RULES, **own}, resolve, _check, lambda field: field == "data.workers", numbers
    )
