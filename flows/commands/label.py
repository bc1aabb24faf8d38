"""`ecgfm label`: free-text reports to labels."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ecgfm.config import ReportsConfig, from_dict
from flows.commands.options import Debug, complete_label_sets, one_line_errors


class _TableByDefault(TyperGroup):
    """What is none of the commands is a table of reports, unless it is a slip of one and no file."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        slip = bool(args) and bool(get_close_matches(args[0], self.commands)) and not Path(args[0]).exists()
        if args and args[0] not in self.commands and not slip:
            args = ["table", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["table", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_TableByDefault,
    no_args_is_help=True,
    help="""Read free-text ECG reports: which findings each asserts, with the words that do so.

    A table of reports needs no command: ecgfm label reports.csv --out labels.parquet. No text leaves this machine, and
    none is logged.
    """,
)

Mode = Annotated[
    Literal["own", "ecg-fm"],
    typer.Option("--mode", help="own: our vocabulary. ecg-fm: ECG-FM's pattern files, read as ECG-FM reads them."),
]
Patterns = Annotated[
    Path | None, typer.Option("--patterns", metavar="DIR", help="With --mode ecg-fm: the folder of its pattern files.")
]
Mended = Annotated[
    bool,
    typer.Option("--mended", help="With --mode ecg-fm: heed descriptors in every report, and let 'without' deny."),
]
LabelSet = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="SET",
        help="Only a set of labels, such as ecg-fm-17; ecgfm label sets lists them.",
        show_default="every finding",
        autocompletion=complete_label_sets,
    ),
]
Rules = Annotated[
    Path | None, typer.Option("--rules", metavar="FILE", help="Your own findings and words (YAML), merged over ours.")
]


def _config(mode: str, patterns: Path | None, mended: bool, label_set: str | None, rules: Path | None) -> ReportsConfig:
    given = {"label_set": label_set, "patterns": patterns, "rules": rules}
    values = {name: str(value) for name, value in given.items() if value is not None}
    return from_dict(ReportsConfig, {"mode": mode, "mended": mended, **values}, "ecgfm label")


@app.command("table")
def table(
    reports: Annotated[
        Path, typer.Argument(metavar="REPORTS", help="A table, .csv, .tsv or .parquet.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A column per label, .parquet or .csv.")],
    text_column: Annotated[
        str, typer.Option("--text-column", metavar="NAME", help="The column of the reports' text.")
    ] = "report",
    id_column: Annotated[
        str, typer.Option("--id-column", metavar="NAME", help="The column that names each report.")
    ] = "record_id",
    mode: Mode = "own",
    patterns: Patterns = None,
    mended: Mended = False,
    label_set: LabelSet = None,
    rules: Rules = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=0, help="Processes; 0: one per core, where there are many reports.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Label a table of reports: a row per report, a column per label with its probability.

    Beside FILE: FILE.findings, a row per report and label with status, probability, span and rule, and
    FILE.unmatched.csv, what nothing explains, by how many reports have it.

    Examples:

      ecgfm label reports.csv --out labels.parquet

      ecgfm label reports.parquet --text-column findings --id-column study_id --labels ecg-fm-17 --out labels.csv
    """
    with one_line_errors(debug):
        from ecgfm.label_reports import label_file

        config = _config(mode, patterns, mended, label_set, rules)
        for line in label_file(reports, text_column, id_column, out, config, jobs).in_words():
            typer.echo(line)


@app.command("compare")
def compare(
    reports: Annotated[
        Path, typer.Argument(metavar="REPORTS", help="A table, .csv, .tsv or .parquet.", show_default=False)
    ],
    patterns: Annotated[Path, typer.Option("--patterns", metavar="DIR", help="The folder of ECG-FM's pattern files.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A row per difference, .parquet or .csv.")],
    text_column: Annotated[
        str, typer.Option("--text-column", metavar="NAME", help="The column of the reports' text.")
    ] = "report",
    id_column: Annotated[
        str, typer.Option("--id-column", metavar="NAME", help="The column that names each report.")
    ] = "record_id",
    label_set: Annotated[
        str,
        typer.Option(
            "--labels", metavar="SET", help="Labels that both modes give.", autocompletion=complete_label_sets
        ),
    ] = "ecg-fm-17",
    mended: Mended = False,
    above: Annotated[
        float,
        typer.Option(
            "--above", min=0.0, max=1.0, help="A label is asserted above this probability; 0: whatever is not denied."
        ),
    ] = 0.0,
    rules: Rules = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=0, help="Processes; 0: one per core, where there are many reports.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Read reports in both modes: how far they agree on each label, and where they do not.

    FILE has a row per report and label that one mode asserts and the other does not, with status, probability, words
    and rule of both. For whoever moves from ECG-FM's labels to ours.

    Example:

      ecgfm label compare reports.csv --patterns ecg-fm/patterns --out differences.csv
    """
    with one_line_errors(debug):
        from ecgfm.label_compare import compare_file

        own = _config("own", None, False, label_set, rules)
        ecg_fm = _config("ecg-fm", patterns, mended, None, None)
        for line in compare_file(reports, text_column, id_column, out, own, ecg_fm, above, jobs).in_words():
            typer.echo(line)


@app.command("explain")
def explain(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A report, or - to read one from standard input.")],
    mode: Mode = "own",
    patterns: Patterns = None,
    mended: Mended = False,
    label_set: LabelSet = None,
    rules: Rules = None,
    debug: Debug = False,
) -> None:
    """Show how a report is read: statement by statement what it says, by which words, and which labels follow.

    Example:

      ecgfm label explain "Sinus rhythm. No evidence of acute infarct, possible LVH."
    """
    with one_line_errors(debug):
        from ecgfm.label_reports import labeler, labels_of
        from ecgfm.reports.explain import explain as lines_of

        report = typer.get_text_stream("stdin").read() if text == "-" else text
        config = _config(mode, patterns, mended, label_set, rules)
        for line in lines_of(labeler(config), report, labels_of(config)):
            typer.echo(line)


@app.command("graph")
def graph(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A finding, such as 'Left bundle branch block'.")],
    rules: Rules = None,
    debug: Debug = False,
) -> None:
    """Draw a finding's ancestors: what it is a kind of, up to the top, and what is a kind of it.

    Example:

      ecgfm label graph "Left bundle branch block"
    """
    with one_line_errors(debug):
        from ecgfm.reports.explain import tree
        from ecgfm.reports.vocabulary import Vocabulary

        for line in tree(Vocabulary.read(rules), name):
            typer.echo(line)


@app.command("sets")
def sets(rules: Rules = None, debug: Debug = False) -> None:
    """List the sets of labels that --labels takes, with their labels.

    Example:

      ecgfm label sets
    """
    with one_line_errors(debug):
        from ecgfm.reports.vocabulary import Vocabulary

        for name, labels in Vocabulary.read(rules).label_sets.items():
            typer.echo(f"{name}: {', '.join(labels)}")
