"""DPO and PPO, each trained on easy, hard and all. Figure 4 of the paper."""

from mixpo.report import figures
from mixpo.report.arms import borne_out
from mixpo.report.comparison import difference_text, differences, mean_of
from mixpo.report.document import Group, Section, Table
from mixpo.report.results import Results

METHODS = {"DPO": ("dpo-easy", "dpo-hard", "dpo"), "PPO": ("ppo-easy", "ppo-hard", "ppo")}
SUBSETS = ("easy", "hard", "all")
CLAIMS = (
    ("dpo-easy", "dpo-hard"),
    ("dpo-easy", "dpo"),
    ("dpo", "dpo-hard"),
    ("ppo", "ppo-easy"),
    ("ppo", "ppo-hard"),
)
"""What the paper finds on HH-RLHF: the first above the second (DPO: easy 1.907, all 1.859)."""


def section(results: Results) -> Section | None:
    """Figure 4 in every measure."""
    methods = {name: arms for name, arms in METHODS.items() if set(arms) <= set(results.plain)}
    if not methods:
        return None
    names = [arm for arms in methods.values() for arm in arms]
    measures = results.measures(names)
    pictures = [
        figures.dots(
            {
                method: [
                    figures.Point(subset, mean_of(results, arm, "kl_from_sft"), mean_of(results, arm, key))
                    for subset, arm in zip(SUBSETS, arms, strict=True)
                ]
                for method, arms in methods.items()
            },
            name=f"subsets-{key.replace('_', '-')}",
            y=label,
        )
        for key, label in measures.items()
    ]
    claims = [claim for claim in CLAIMS if set(claim) <= set(names) and results.common_seeds(*claim)]
    found = {key: differences(results, claims, key) for key in measures}
    rows = [
        [
            f"{one} > {other}",
            *(text for key in measures for text in (difference_text(found[key][n]), borne_out(found[key][n]))),
        ]
        for n, (one, other) in enumerate(claims)
    ]
    headings = ["the paper finds", *(text for label in measures.values() for text in (f"our {label}", "here"))]
    note = (
        f"p corrected for the {len(claims)} claims (Holm). A smaller set means fewer steps: in the paper as here, each "
        "is trained for the same number of passes."
    )
    told = {
        word: sum(borne_out(one) == word for one in found["score"])
        for word in ("appears", "reversed", "not told apart")
    }
    opening = (
        f"Of the {len(claims)} orders of reward that the paper's Figure 4 shows, {told['appears']} appear here, "
        f"{told['reversed']} are reversed and {told['not told apart']} are not told apart."
    )
    return Section(
        "subsets", "Easy, hard and all", opening, [Group(figures=pictures), Group(table=Table(headings, rows, [note]))]
    )
