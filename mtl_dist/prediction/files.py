"""A trained run applied to files: every input's record to a table or to lines, its maps to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from mtl_dist.assemble import WhichCheckpoint
from mtl_dist.errors import UserError
from mtl_dist.prediction.inputs import Note, check_given, inputs_of
from mtl_dist.prediction.pictures import Pictures
from mtl_dist.prediction.predictor import Prediction, Predictor
from mtl_dist.prediction.records import Record, check_format, columns_of, open_records, plain


def predict_files(
    run: Path,
    given: Sequence[str],
    *,
    out: Path | None,
    overlays: Path | None,
    threshold: float | None,
    split: str | None,
    stdin: BinaryIO,
    note: Note,
    done: Callable[[int, int | None], None] | None = None,
    temperature: bool = False,
    checkpoint: WhichCheckpoint = "best",
) -> tuple[int, int]:
    """Predict every image of what is `given` (see `inputs_of`); how many there were, and how many had errors.

    Raises:
        UserError: something given is not there, holds no image, or the run has no checkpoint.
    """
    check_format(out)
    check_given(given)
    predictor = Predictor(run, checkpoint=checkpoint, temperature=temperature)
    pictures = Pictures(overlays, predictor.tasks) if overlays is not None else None
    example = {task: plain(answer) for task, answer in predictor.example().items()}
    if pictures is not None:
        for task, files in pictures.example().items():
            example[task] |= files
    num_images = num_errors = 0
    with open_records(out, columns_of(example)) as write:
        for prediction in predictor.stream(inputs_of(given, split, stdin, note), threshold):
            record = _record(prediction, pictures)
            write(record)
            num_images += 1
            num_errors += "error" in record
            if done is not None:
                done(num_images, None)
        if not num_images:
            raise UserError(f"{', '.join(given)}: expected at least one image, found none.")
    return num_images, num_errors


def _record(prediction: Prediction, pictures: Pictures | None) -> Record:
    if prediction.answers is None or prediction.image_CHW is None:
        return {"image": prediction.name, "error": prediction.error}
    record: Record = {"image": prediction.name}
    record |= {task: plain(answer) for task, answer in prediction.answers.items()}
    if pictures is not None:
        written = pictures.write(prediction.name, prediction.image_CHW, prediction.answers)
        for task, files in written.items():
            record[task] |= files
    return record
