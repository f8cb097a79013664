"""DPO and PPO, each trained on easy, hard and all. Figure 4 of the paper."""

from mixpo.experiments.results import Results
from mixpo.report import figures
from mixpo.report.arms import ORDER, claims_table
from mixpo.report.comparison import label, mean_of
from mixpo.report.document import Group, Section

METHODS = {"DPO": ("dpo-easy", "dpo-hard", "dpo"), "PPO": ("ppo-easy", "ppo-hard", "ppo")}
SUBSETS = ("easy", "hard", "all")
CLAIMS = tuple((one, other) for one, other, where in ORDER if where == "Figure 4")


def section(results: Results) -> Section | None:
    """Figure 4 in every measure, of the methods of which two subsets or more were run."""
    methods: dict[str, list[tuple[str, str]]] = {}
    claims: list[tuple[str, str]] = []
    for run in results.runs:
        for method, arms in METHODS.items():
            own = [
                (subset, name)
                for subset, arm in zip(SUBSETS, arms, strict=True)
                if (name := results.named(run, arm)) in results.names
            ]
            if len(own) > 1:
                methods[results.named(run, method)] = own
                names = {name for _, name in own}
                for one, other in CLAIMS:
                    claim = results.named(run, one), results.named(run, other)
                    claims += [claim] if names.issuperset(claim) else []
    finished = [name for own in methods.values() for _, name in own if results.done(name)]
    if not finished or not claims:
        return None
    measures = results.measures(finished)
    pictures = [
        figures.dots(
            {
                method: [
                    figures.Point(subset, mean_of(results, name, "kl_from_sft"), mean_of(results, name, key))
                    for subset, name in own
                    if name in finished
                ]
                for method, own in methods.items()
            },
            name=f"subsets-{key.replace('_', '-')}",
            y=title,
        )
        for key, title in measures.items()
    ]
    table = claims_table(results, claims, measures)
    here = [row[2] for row in table.rows]
    told = {word: sum(cell.startswith(word) for cell in here) for word in ("appears", "reversed", "not told apart")}
    left = len(here) - sum(told.values())
    said = "; ".join(f"{word} {count}" for word, count in told.items())
    opening = (
        f"Of the {len(claims)} orders of reward that the paper's Figure 4 shows, here"
        + (f", at one seed: {said}" if len(results.seeds) == 1 else f": {said}")
        + (f"; could not be compared {left}" if left else "")
        + "."
    )
    partly = [f"{label(results, name)}." for own in methods.values() for _, name in own if label(results, name) != name]
    note = "A smaller set means fewer steps: each is trained for the same number of passes over its own set."
    return Section(
        "subsets",
        "Easy, hard and all",
        opening,
        [Group(figures=pictures, notes=partly), Group(table=table, notes=[note])],
    )
