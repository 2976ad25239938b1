"""What a report begins with: its title, what was done, and what follows from it."""

from typing import Any, NamedTuple

from jbptt.learning.study_page import decision
from jbptt.report.questions.learning import study_of
from jbptt.report.words import capital


class Conclusion(NamedTuple):
    """One sentence or two, and the question whose answer is their evidence."""

    words: str
    evidence: str


def title_of(data: dict[str, Any]) -> str:
    """Of the page and of its tab."""
    about = data["model"] if "model" in data else data["text"]["source"]
    return f"With which window should it train? {about}"


def introduction(data: dict[str, Any]) -> list[str]:
    """What was trained on what, a paragraph each."""
    if "model" in data:
        learning = data["learning"]
        return [f"The model of {data['model']}. {capital(learning['data'])}."]
    settings, text = data["settings"], data["text"]
    cells = ", ".join(settings["cell"])
    paragraphs = [
        f"Small character models ({cells}; {settings['hidden_size']} hidden units) learn from "
        f"{text['source']}: {text['train_characters']:,} characters to train on and "
        f"{text['heldout_characters']:,} held out to measure on, in sequences of "
        f"{settings['num_steps']} steps, {settings['batch_size']} side by side. The ways to train "
        f"are compared on a smaller one ({data['learning']['model']}; {data['learning']['data']})."
    ]
    if text["folded_characters"]:
        share = 100 * text["folded_characters"] / text["characters"]
        paragraphs.append(
            f"The models know {text['vocabulary']} symbols, and the text has "
            f"{text['distinct_characters']:,}: {text['vocabulary'] - 1} are read as themselves, "
            f"and all others as one and the same, which is {text['folded_characters']:,} of "
            f"{text['characters']:,} characters ({share:.2g} %). Losses are those of the text so "
            "read."
        )
    return paragraphs


def conclusions(data: dict[str, Any]) -> list[Conclusion]:
    """What follows, each with a link to its evidence."""
    found = [Conclusion(decision(study_of(data["learning"])), "learning")]
    for name in ("diagnosis", "windows", "reach"):
        if name in data:
            found.append(Conclusion(data["sentences"][name], name))
    return found
