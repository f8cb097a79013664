"""DPO and PPO trained on easy, hard and all pairs (Figure 4 of the paper)."""

from mixpo.experiments.results import Results
from mixpo.report import figures
from mixpo.report.arms import PAPER_ORDER, build_claims_table
from mixpo.report.comparison import estimate_kl_and_mean, format_arm_label, join_names
from mixpo.report.document import Section, SectionGroup

METHODS = {"DPO": ("dpo-easy", "dpo-hard", "dpo"), "PPO": ("ppo-easy", "ppo-hard", "ppo")}
SUBSETS = ("easy", "hard", "all")
CLAIMS = tuple((one, other) for one, other, where in PAPER_ORDER if where == "Figure 4")


def build_subsets_section(results: Results) -> Section | None:
    """The section with rewards of DPO and PPO on easy, hard and all pairs (Figure 4); None without two to compare."""
    methods: dict[str, list[tuple[str, str]]] = {}
    claims: list[tuple[str, str]] = []
    for run in results.runs:
        for method, arms in METHODS.items():
            arms_by_subset = [
                (subset, name)
                for subset, arm in zip(SUBSETS, arms, strict=True)
                if (name := results.qualify_arm_name(run, arm)) in results.arm_names
            ]
            if len(arms_by_subset) > 1:
                methods[results.qualify_arm_name(run, method)] = arms_by_subset
                for one, other in CLAIMS:
                    claim = results.qualify_arm_name(run, one), results.qualify_arm_name(run, other)
                    claims += [claim] if {name for _, name in arms_by_subset}.issuperset(claim) else []
    names = [name for own in methods.values() for _, name in own]
    finished = [name for name in names if results.get_finished_by_seed(name)]
    if not finished or not claims:
        return None
    measures = results.get_shared_measures(finished)
    plots = []
    for key, title in measures.items():
        by_method = {
            method: [estimate_kl_and_mean(results, name, key, subset) for subset, name in own if name in finished]
            for method, own in methods.items()
        }
        plots.append(figures.plot_grouped_intervals(by_method, name=f"subsets-{key.replace('_', '-')}", ylabel=title))
    table = build_claims_table(results, claims, measures)
    verdicts = [row[2] for row in table.rows]
    words = ("confirmed", "reversed", "not significant")
    counts = {word: sum(verdict.startswith(word) for verdict in verdicts) for word in words}
    if missing := len(verdicts) - sum(counts.values()):
        counts["not compared"] = missing
    opening = (
        f"Of the {len(claims)} differences in reward that the paper's Figure 4 shows, "
        f"{join_names([f'{count} are {word}' for word, count in counts.items()])}"
        f"{' (at one seed)' if len(results.seeds) == 1 else ''}."
    )
    failures = [f"{label}." for name in names if (label := format_arm_label(results, name)) != name]
    note = "A smaller set means fewer steps: every arm makes the same number of passes over its own set."
    groups = [SectionGroup(figures=plots, notes=failures), SectionGroup(table=table, notes=[note])]
    return Section("subsets", "Easy, hard and all", opening, groups)
