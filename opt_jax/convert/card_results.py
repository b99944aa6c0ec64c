"""The model card's table of results, out of results.json."""

import json
import math
import re
from collections.abc import Mapping

from opt_jax.convert.preparation import Preparation
from opt_jax.convert.shards import ExportError
from opt_jax.evaluation.report_figures import headlines

SHOWN = 12  # figures, of those that have no headline
OF_DRAWN_PICTURES = ("Named objects drawn", "named_objects_found", "code_perplexity")
NOT_OF_THE_MODEL = ("seconds/", "encoders/", "set_aside/", "triplets/", "parameters", "before/")
# Figures that need a decoder: it writes, draws, or tells how likely a text is.
OF_DECODERS = re.compile(
    r"(captioning|speech_recognition|paired|\w+_to_image|retrieval|retrieval_(likelihood|information)\w*)/.*"
    r"|.*/accuracy_written.*"
)


def results(prepared: Preparation, dtype: str, only: str, evaluated: bool) -> str:
    """Markdown; arguments as of `card.model_card`, dtype that of the weights.

    Raises: ExportError: results.json is damaged.
    """
    found = read_results(prepared)
    if not found:
        return "This training was not evaluated.\n"
    if not evaluated:
        return f"Step {prepared.step:,} was not evaluated; the training's results are of another.\n"
    if only == "encoder":
        found = {name: value for name, value in found.items() if not OF_DECODERS.fullmatch(name)}
    rows = [(row["name"], row["value"], row["beside"]) for row in headlines(found)]
    others = [name for name in found if not name.startswith(NOT_OF_THE_MODEL)]
    rows = rows or [(f"`{name}`", found[name], "") for name in others[:SHOWN]]
    there, here = drawn(prepared)
    told = f"{best(there)} for each text; here {best(here)}" if there != here else ""
    lines = []
    for name, value, beside in rows:
        if told and any(part in name for part in OF_DRAWN_PICTURES):
            beside = f"{beside}; {told}" if beside else told
        lines.append(f"| {name} | {value:.2f} | {beside} |")
    if not lines:
        return "There are none of what this folder holds.\n"
    precision = prepared.config.get("precision", "float32")
    here = f"; this folder's weights are {dtype}" if dtype != precision else ""
    told = f"On the test split of the training's data, in {precision}{here}:\n"
    return "\n".join([told, "| figure | value | beside |", "|---|---|---|", *lines, ""])


def read_results(prepared: Preparation) -> Mapping[str, float]:
    """The finite numbers in results.json; none where there is no such file. Raises ExportError."""
    path = prepared.workdir / "results.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ExportError(f"{path} is damaged ({error}); evaluate again, or move it away") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path}: expected figures by name, found {type(found).__name__}; evaluate again")
    return {name: value for name, value in found.items() if is_figure(value)}


def is_figure(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def drawn(prepared: Preparation) -> tuple[int, int]:
    """Of how many pictures the best is kept: in the evaluation, and by the exported folder."""
    return prepared.config.evaluation.get("drawn", 1), prepared.settings["num_drawn"]


def best(number: int) -> str:
    return f"the best of {number} pictures" if number > 1 else "one picture"
