"""Words about a model: an imported one in lines, and a student's README.md."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proteus_jax.weights.model_dir import ModelCard

# Rows of the last measurement that the card shows, and what they are.
MEASURED = {
    "agreement_class": "cosine of class tokens with the teacher's, its mean subtracted",
    "agreement_patch": "the same of patch tokens",
    "cka": "linear CKA of class tokens",
    "neighbour_overlap": "share of nearest neighbors in common with the teacher",
    "knn_top1": "k-NN on labeled images, percent",
    "teacher_knn_top1": "the teacher's",
    "ridge_top1": "linear probe on labeled images, percent",
    "teacher_ridge_top1": "the teacher's",
}


def license_of(cards: Mapping[str, ModelCard], start: ModelCard | None = None) -> str:
    """A student's: those of all its teachers, and of the weights that it started from."""
    licenses = "; ".join(dict.fromkeys(card.license for card in cards.values()))
    teachers_text = "its teacher" if len(cards) == 1 else "its teachers"
    start_text = (
        "" if start is None else f"; and that of the weights it started from: {start.license}"
    )
    return f"that of {teachers_text}: {licenses}{start_text}"


def description(directory: Path, card: ModelCard) -> Iterator[str]:
    """Describes an imported model in lines: what it is, and what is to be known of its source."""
    spec = card.spec
    yield (
        f"{directory}: {card.family}, {spec.depth} blocks, {spec.width} wide, {spec.heads} heads, "
        f"{spec.feed_forward}, patch {spec.patch_size}, "
        f"{'rotary positions' if spec.positions == 'rotary' else 'table'} {spec.grid} x "
        f"{spec.table_shape[1]}, {spec.registers} registers"
    )
    mean, deviation = (", ".join(f"{value:.3g}" for value in part) for part in card.normalization)
    yield f"image statistics: mean {mean}; deviation {deviation}"
    if "stored_as" in card.source:
        yield f"stored as {card.source['stored_as']}, widened to float32"
    if "left_out" in card.source:
        yield f"left out, of no use to a backbone: {', '.join(card.source['left_out'])}"
    if card.absent:
        yield f"absent in the source, zeros here: {', '.join(card.absent)}"


def text_of(
    card: ModelCard,
    name: str,
    teachers: Mapping[str, tuple[str, ModelCard]],
    recipe: Mapping[str, Any],
    results: Mapping[str, float],
) -> str:
    """README.md in Markdown; `teachers` as they are named in the configuration, with their cards;
    `results` by the keys of metrics.jsonl.
    """
    return "\n".join(_lines(card, name, teachers, recipe, results)) + "\n"


def _lines(
    card: ModelCard,
    name: str,
    teachers: Mapping[str, tuple[str, ModelCard]],
    recipe: Mapping[str, Any],
    results: Mapping[str, float],
) -> Iterator[str]:
    spec, first = card.spec, next(iter(teachers.values()))[0]
    yield from _front_matter(card)
    yield f"# {name} from {first}"
    yield ""
    yield (
        f"A vision transformer of {spec.depth} blocks, {spec.width} wide, patches of "
        f"{spec.patch_size} px, distilled with Proteus (arXiv 2407.10366) by proteus_jax."
    )
    yield ""
    yield "```python"
    yield "import proteus_jax"
    yield ""
    yield 'model = proteus_jax.load("this directory")'
    yield "features = model(images)  # uint8 [batch, height, width, 3]"
    yield "```"
    yield ""
    mean, deviation = (", ".join(f"{value:.6g}" for value in part) for part in card.normalization)
    yield f"Images, from 0 to 1, are normalized with mean {mean} and deviation {deviation}."
    yield ""
    yield from _table(
        "Teachers", [(source, _description(teacher)) for source, teacher in teachers.values()]
    )
    yield from _table("Recipe", [(key, _plain(value)) for key, value in recipe.items()])
    measured = [(label, f"{results[key]:.4g}") for key, label in MEASURED.items() if key in results]
    if measured:
        yield from _table("Measured at the end, on held-out images", measured)
    yield "## License"
    yield ""
    yield f"The weights carry on {card.license}."


def transformers_text(card: ModelCard, name: str, sized: bool) -> str:
    """README.md of a model for transformers; `sized` where its table was made for a size."""
    spec = card.spec
    side = spec.grid * spec.patch_size
    lines = [
        *_front_matter(card, "transformers"),
        f"# {name}",
        "",
        f"A vision transformer of {spec.depth} blocks, {spec.width} wide, patches of "
        f"{spec.patch_size} px, written by proteus_jax for transformers.",
        "",
        "```python",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        'processor = AutoImageProcessor.from_pretrained("this repository")',
        'model = AutoModel.from_pretrained("this repository")',
        'outputs = model(**processor(images=image, return_tensors="pt"))',
        "outputs.last_hidden_state  # the class token, registers if there are any, patches",
        "```",
        "",
        f"Images are {side} x {side} px, the size of its position table"
        + (", which was resized to it when the model was written." if sized else "."),
    ]
    if spec.positions == "table" and spec.interpolate_offset:
        lines += [
            "",
            f"At other sizes transformers resizes the table to the size of the image; DINOv2's own "
            f"code, and proteus_jax, add {spec.interpolate_offset:g} to that size, and the tokens "
            "differ. For another size write the model for it: `proteus convert export DIR "
            "--format huggingface --size PX --output NEW`.",
        ]
    return "\n".join(lines) + "\n"


def _front_matter(card: ModelCard, library: str = "proteus_jax") -> Iterator[str]:
    """The front matter that Hugging Face's hub reads."""
    yield "---"
    yield f"library_name: {library}"
    yield "pipeline_tag: image-feature-extraction"
    yield "license: other"
    yield f"license_name: {_plain(card.license)!r}"
    yield "---"


def _description(card: ModelCard) -> str:
    digest = card.source.get("sha256", "")
    note = card.source.get("note", "")
    facts = [card.license, *([f"sha256 {digest}"] if isinstance(digest, str) and digest else [])]
    return _plain("; ".join([*facts, *([note] if note else [])]))


def _table(title: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"## {title}"
    yield ""
    yield "| | |"
    yield "|---|---|"
    for left, right in rows:
        yield f"| {_plain(left)} | {right} |"
    yield ""


def _plain(value: Any) -> str:
    """On one line, and no markup of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
