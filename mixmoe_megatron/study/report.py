"""The report of a run: report.md, report.html, summary.json, pictures; from evaluation.json and the training logs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmoe_megatron.cli import write_json, write_text
from mixmoe_megatron.data.corpus import reading
from mixmoe_megatron.errors import MixMoEError
from mixmoe_megatron.evaluation.routing import routing_from_dict, specialisation
from mixmoe_megatron.markup import code_span, escape_markdown
from mixmoe_megatron.study.comparison import markdown_comparison
from mixmoe_megatron.study.figures import AUX_LOSSES, draw_loss_curves, draw_retention, draw_routing, draw_scores
from mixmoe_megatron.study.html_report import render_html
from mixmoe_megatron.study.interference import interference
from mixmoe_megatron.study.retention_curve import retention_curves, retention_of
from mixmoe_megatron.study.tables import (
    interference_table,
    p_value_text,
    perplexity_table,
    routing_table,
    score_table,
    signed,
    specialisation_table,
    table,
    values_of,
)
from mixmoe_megatron.study.training_log import Curves
from mixmoe_megatron.study.verdict import DEFAULT_FULL, UNDECIDED, judge_test, judged_system, verdict

TOY_NOTE = (
    "**Toy-sized figures.** A small model was trained for minutes on a small corpus. The numbers show that every step "
    "of the path works and what it changes; they say nothing of the quality that the method reaches at full size."
)
PERPLEXITY_NOTE = (
    "Perplexity on held-out monolingual text, per token of each model's tokenizer, and bits per byte, which compare "
    "across tokenizers; lower is better."
)
INTERFERENCE_NOTE = (
    "The change of bits per byte with the 95 % interval of a paired bootstrap over texts (above 0: worse); chrF with "
    "the half-width of sacreBLEU's 95 % interval. A single text or segment has no interval."
)
SPECIALISATION_NOTE = (
    "How much an expert tells of the text's {} (mutual information; 0: all are routed alike), and the entropy of the "
    "experts."
)
RETENTION_NOTE = (
    "Bits per byte of held-out text (--eval-mono) before a stage's first step and after its last; lower is better. "
    "Paid back: no more than the dense base's."
)
NUM_EXAMPLES = 3
_REQUIRED = ("baseline", "directions", "perplexity", "routing", "significance", "signatures", "num_test_segments",
             "options", "versions", "commit", "seconds")  # fmt: skip


def check_evaluation(evaluation: dict[str, Any]) -> None:
    """Refuse what is not the content of an evaluation.json.

    Raises:
        MixMoEError: A part is missing.
    """
    missing = [key for key in _REQUIRED if key not in evaluation]
    if missing:
        raise MixMoEError(f"This is not an evaluation.json of tools/evaluate_translation.py: {missing[0]} is missing.")


@dataclass(frozen=True)
class ReportInputs:
    """Everything a report is made of.

    Attributes:
        evaluation: Content of evaluation.json.
        stages: Title of each training stage to its curves; may be empty.
        seconds: Step of the run to its wall-clock seconds; may be empty.
        pair: Such as ``de-en``; the first direction if empty.
        trained: The system that the first line judges, see `verdict.judged_system`.
        full: The system that is full fine-tuning.
        toy: Whether to say on top that the figures are toy-sized.
        training_dtype: In which the models were trained; empty where it is not known.
        dense_bits: Bits per byte of the dense base by the name of a text of --eval-mono; may be empty.
        hypotheses_dir: Where the evaluation left its hypotheses, for examples; None shows none.

    Raises:
        MixMoEError: `evaluation` is not the content of an evaluation.json, or has no system `trained`.
    """

    evaluation: dict[str, Any]
    stages: dict[str, Curves] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    pair: str = ""
    trained: str = ""
    full: str = DEFAULT_FULL
    toy: bool = False
    training_dtype: str = ""
    dense_bits: Mapping[str, float] = field(default_factory=dict)
    hypotheses_dir: Path | None = None

    def __post_init__(self) -> None:
        check_evaluation(self.evaluation)
        judged_system(self.evaluation, self.trained)

    @property
    def title(self) -> str:
        """The language pair, or the languages where nothing was translated."""
        directions = self.evaluation["directions"]
        return self.pair or next(iter(directions), "") or ", ".join(self.evaluation["perplexity"])

    @property
    def measured_stages(self) -> dict[str, Curves]:
        """The stages whose logs tell of held-out text."""
        return {title: curves for title, curves in self.stages.items() if retention_curves(curves)}

    @property
    def dtypes(self) -> dict[str, str]:
        """Of ``training``, where it is known, and of ``evaluation``."""
        training = {"training": self.training_dtype} if self.training_dtype else {}
        return {**training, "evaluation": self.evaluation["options"]["dtype"]}


def build_summary(inputs: ReportInputs) -> dict[str, Any]:
    """Return the content of summary.json.

    Of each direction's tests against the baseline, `significance` holds the last system's (Mix-MoE, in the quickstart)
    at the top and those of all systems under `systems`.
    """
    evaluation = inputs.evaluation
    significance = {
        direction: {**list(tests.values())[-1], "systems": tests}
        for direction, tests in evaluation["significance"].items()
        if tests
    }
    return {
        "verdict": verdict(evaluation, inputs.trained, inputs.full),
        "pair": inputs.title,
        "dtypes": inputs.dtypes,
        "directions": evaluation["directions"],
        "perplexity": values_of(evaluation["perplexity"], "perplexity"),
        "bits_per_byte": values_of(evaluation["perplexity"], "bits_per_byte"),
        "signatures": evaluation["signatures"],
        "significance": significance,
        "num_test_segments": evaluation["num_test_segments"],
        "routing": evaluation["routing"],
        "training": {title: _curve_ends(curves) for title, curves in inputs.stages.items()},
        "retention": retention_of(inputs.stages, inputs.dense_bits),
        "seconds": dict(inputs.seconds),
        "evaluation_seconds": evaluation["seconds"],
        "versions": evaluation["versions"],
        "commit": evaluation["commit"],
        "toy": inputs.toy,
    }


def _curve_ends(curves: Curves) -> dict[str, Any]:
    """First and last value of each loss, and the number of steps."""
    names = ["lm_loss", *(name for name in AUX_LOSSES if name in curves)]
    return {
        "steps": curves["lm_loss"][-1][0],
        "first": {name: curves[name][0][1] for name in names},
        "last": {name: curves[name][-1][1] for name in names},
    }


def _test_sentences(evaluation: dict[str, Any]) -> str:
    """One sentence a test against the baseline: better, worse or undecided."""
    lines = []
    for direction, tests in evaluation["significance"].items():
        for system, test in tests.items():
            difference = signed(test["chrf_difference"], 2)
            word = judge_test(test, "chrf", evaluation["num_test_segments"][direction])
            link = "from" if word == UNDECIDED else "than"
            names = [escape_markdown(name) for name in (direction, system, test["baseline"])]
            result = f"{difference}, paired bootstrap {p_value_text(test['chrf_p_value'])}"
            lines.append(f"- {names[0]}: {names[1]} is {word} {link} {names[2]} by chrF ({result}).")
    return "\n".join(lines)


def _translation_section(inputs: ReportInputs) -> list[str]:
    evaluation = inputs.evaluation
    counts = ", ".join(f"{escape_markdown(name)} {n}" for name, n in evaluation["num_test_segments"].items())
    parts = ["## Translation", f"Test segments: {counts}."]
    if len(evaluation["directions"]) > 2:
        parts.append(markdown_comparison(evaluation))
    parts.append(score_table(evaluation))
    if any(evaluation["significance"].values()):
        parts.append(_test_sentences(evaluation))
    return [*parts, *_examples(inputs)]


def _examples(inputs: ReportInputs) -> list[str]:
    """The first segments of each direction with every system's hypothesis."""
    if inputs.hypotheses_dir is None:
        return []
    parts = ["### Examples", "The first segments of each test set, not chosen by hand."]
    for direction, systems in inputs.evaluation["directions"].items():
        columns = {}
        for name in ("source", "reference", *systems):
            path = inputs.hypotheses_dir / f"{direction}.{name}.txt"
            if not path.is_file():
                raise MixMoEError(f"There is no {path}, which evaluation.json speaks of.")
            columns[name] = path.read_text(encoding="utf-8").split("\n")[:-1][:NUM_EXAMPLES]
        for index in range(len(columns["source"])):
            rows = [[name, _shorten(lines[index])] for name, lines in columns.items()]
            parts.append(table([direction, f"segment {index + 1}"], rows, text_columns=2))
    return parts


def _shorten(text: str, limit: int = 300) -> str:
    return (text if len(text) <= limit else text[: limit - 1] + "…") if reading(text) else "(empty)"


def _training_section(stages: dict[str, Curves]) -> list[str]:
    rows = []
    for title, curves in stages.items():
        ends = _curve_ends(curves)
        aux = ", ".join(f"{label} {ends['last'][name]:.2f}" for name, (label, _) in AUX_LOSSES.items()
                        if name in ends["last"])  # fmt: skip
        losses = [f"{ends[key]['lm_loss']:.3f}" for key in ("first", "last")]
        rows.append([title, str(ends["steps"]), *losses, aux])
    header = ["stage", "steps", "first loss", "last loss", "last aux loss (1 = balanced)"]
    return ["## Training", "![Loss curves](loss_curves.png)", table(header, rows)]


def _retention_section(inputs: ReportInputs) -> list[str]:
    if not inputs.measured_stages:
        return []
    rows = []
    for entry in retention_of(inputs.stages, inputs.dense_bits):
        bits = [f"{entry[key]:.3f}" if entry[key] is not None else "-" for key in ("start", "last", "dense")]
        tokens = f"{entry['tokens'] / 1e6:.2f}" if entry["tokens"] is not None else "-"
        paid = "not yet" if entry["paid_back_at"] is None else f"at step {entry['paid_back_at']}"
        paid = paid if entry["dense"] is not None else "-"
        rows.append([entry["stage"], entry["text"], str(entry["steps"]), tokens, *bits, paid])
    header = ["stage", "text", "steps", "million tokens", "start", "last", "dense base", "paid back"]
    picture = "![Bits per byte of held-out text](retention.png)"
    return ["### Retention while training", RETENTION_NOTE, picture, table(header, rows, text_columns=2)]


def _interference_section(evaluation: dict[str, Any]) -> list[str]:
    rows = interference(evaluation)
    if not rows:
        return []
    return ["### Before and after, language by language", INTERFERENCE_NOTE, interference_table(rows)]


def _routing_section(evaluation: dict[str, Any]) -> list[str]:
    parts = [
        "## Routing",
        "Share of the tokens that each expert got: of monolingual text, then of prompts with their reference "
        "translation. `n Σ f P` is the aux loss: 1 when balanced, the number of experts at collapse. `top prob` is the "
        "mean of the winning expert's probability.",
    ]
    for kind, title in (("routing", "languages"), ("routing_of_directions", "directions")):
        for name, routing in evaluation.get(kind, {}).items():
            measures = specialisation({text: routing_from_dict(value) for text, value in routing.items()})
            shown = escape_markdown(name)
            parts += [f"### {shown}, by {title}", f"![{title} of {shown}]({kind}_{name}.png)", routing_table(routing)]
            if len(routing) > 1:
                parts += [SPECIALISATION_NOTE.format(title), specialisation_table(measures)]
    return parts


def _provenance_section(inputs: ReportInputs) -> list[str]:
    evaluation = inputs.evaluation
    blocks = evaluation["signatures"].values()
    signatures = sorted({f"- {name}: {code_span(text)}" for block in blocks for name, text in block.items()})
    parts = ["## How these figures were made"]
    if signatures:
        parts.append("sacreBLEU signatures:\n\n" + "\n".join(signatures))
    options = [
        f"{key} {escape_markdown(repr(value))}"
        for key, value in evaluation["options"].items()
        if not isinstance(value, dict) and key != "format_version"
    ]
    parts.append(f"Options: {', '.join(options)}.")
    if inputs.seconds:
        rows = [[step, f"{seconds:.0f}"] for step, seconds in inputs.seconds.items()]
        parts.append(table(["step", "seconds"], [*rows, ["total", f"{sum(inputs.seconds.values()):.0f}"]]))
    versions = ", ".join(f"{name} {version}" for name, version in evaluation["versions"].items())
    return [*parts, f"Versions: {versions}.", f"Commit: {evaluation['commit'] or 'not in a git checkout'}."]


def render_report(inputs: ReportInputs) -> str:
    """Return the text of report.md."""
    evaluation = inputs.evaluation
    parts = [f"**{verdict(evaluation, inputs.trained, inputs.full, escape_markdown)}**"]
    parts.append(f"# Mix-MoE report: {escape_markdown(inputs.title)}")
    if inputs.toy:
        parts.append(TOY_NOTE)
    parts.append("Computed in " + ", ".join(f"{dtype} ({what})" for what, dtype in inputs.dtypes.items()) + ".")
    parts.append("![Scores](scores.png)")
    if evaluation["directions"]:
        parts += _translation_section(inputs)
    if evaluation["perplexity"]:
        parts += ["## What was kept, what was lost", PERPLEXITY_NOTE, perplexity_table(evaluation)]
        parts += _interference_section(evaluation)
    if inputs.stages:
        parts += [*_training_section(inputs.stages), *_retention_section(inputs)]
    if evaluation["routing"]:
        parts += _routing_section(evaluation)
    return "\n\n".join([*parts, *_provenance_section(inputs)]) + "\n"


def write_report(inputs: ReportInputs, output_dir: Path) -> dict[str, Any]:
    """Write report.md, report.html, summary.json and the pictures; return the summary.

    Args:
        inputs: What to report.
        output_dir: Created if absent. Pictures: scores.png, loss_curves.png, retention.png, routing_{system}.png,
            routing_of_directions_{system}.png.

    Raises:
        MixMoEError: Hypotheses that the evaluation speaks of are missing.
    """
    text, summary = render_report(inputs), build_summary(inputs)
    output_dir.mkdir(parents=True, exist_ok=True)
    draw_scores(inputs.evaluation, output_dir / "scores.png")
    if inputs.stages:
        draw_loss_curves(inputs.stages, output_dir / "loss_curves.png")
    if inputs.measured_stages:
        draw_retention(inputs.measured_stages, inputs.dense_bits, output_dir / "retention.png")
    for kind in ("routing", "routing_of_directions"):
        for name, routing in inputs.evaluation.get(kind, {}).items():
            draw_routing(routing, output_dir / f"{kind}_{name}.png")
    write_text(output_dir / "report.md", text)
    write_text(output_dir / "report.html", render_html(text, output_dir))
    write_json(output_dir / "summary.json", summary)
    return summary
