"""The model card's table of results, out of results.json."""

import json
import math
from collections.abc import Mapping

from opt_jax.convert.preparation import Preparation
from opt_jax.convert.shards import ExportError
from opt_jax.evaluation.report_figures import headlines

SHOWN = 12  # figures, of those that have no headline
OF_DRAWN_PICTURES = ("Named objects drawn", "named_objects_found", "code_perplexity")


def results(prepared: Preparation) -> str:
    """Markdown. Raises ExportError: results.json is damaged."""
    found = read_results(prepared)
    if not found:
        return "This training was not evaluated.\n"
    rows = [(row["name"], row["value"], row["beside"]) for row in headlines(found)]
    others = [name for name in found if not name.startswith(("seconds/", "encoders/", "set_aside/"))]
    rows = rows or [(f"`{name}`", found[name], "") for name in others[:SHOWN]]
    there, here = drawn(prepared)
    told = f"{best(there)} for each text; here {best(here)}" if there != here else ""
    lines = []
    for name, value, beside in rows:
        if told and any(part in name for part in OF_DRAWN_PICTURES):
            beside = f"{beside}; {told}" if beside else told
        lines.append(f"| {name} | {value:.2f} | {beside} |")
    return "\n".join(["On its test split:\n", "| figure | value | beside |", "|---|---|---|", *lines, ""])


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
