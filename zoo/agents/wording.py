"""What agents ask models, in words. All of it can be given in other words."""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["answering", "existence", "latent"]

_PRONOUNS = re.compile(
    r"\b(i|you|he|she|it|we|they|me|him|her|us|them|my|your|his|its|our|their|mine|yours|hers|ours|"
    r"theirs|this|that|these|those|who|whom|whose|which|what|(any|some|every|no)(one|body|thing)|"
    r"(him|her|it|them)sel(f|ves))\b"
)


@dataclass(frozen=True)
class SearchWording:
    """How a model is asked about regions of a picture.

    Attributes:
      to_cues: asks which things a question is about; with a `{}` for the question.
      lead: what the answer to that says before the things.
      decomposed: a question about one thing that a region answers if it shows it well; with a `{}`.
      answering: asks whether a question can be answered; with a `{}`.
      existence: asks whether a thing is to be seen; with a `{}`.
      latent: asks whether it might be seen in a closer view; with a `{}`.
      closer: stands before the question where a picture and a closer view of its part are shown.
      yes: the word that an answer begins with if so.
      no: and if not.
    """

    to_cues: str = (
        "Name the things in a picture that one has to look at to answer a question. Write 'all' "
        "before a thing if every one of its kind counts.\n\n"
        "Question: Which colour has the umbrella of the old woman?\n"
        "Answer: Her umbrella must be looked at. Look for: old woman with an umbrella.\n\n"
        "Question: Does the dog stand left or right of the red bicycle?\n"
        "Answer: Both must be found to compare their places. Look for: dog and red bicycle.\n\n"
        "Question: How many boats are on the lake?\n"
        "Answer: They must be counted. Look for: all boats.\n\n"
        "Question: {}\nAnswer:"
    )
    lead: str = "Look for:"
    decomposed: str = "What does the {} look like?"
    answering: str = (
        "Question: {}\nDoes the picture show enough to answer this question? Answer Yes or No."
    )
    existence: str = "Does the picture show a {}? Answer Yes or No."
    latent: str = (
        "Judging by what the picture shows and by common sense: could a {} be found in it by "
        "looking closer? Answer Yes or No."
    )
    closer: str = "The second picture shows the framed part of the first one closer."
    yes: str = "Yes"
    no: str = "No"

    def ask(self, kind: Kind, about: str) -> str:
        """The question of a kind about a question or a thing."""
        template: str = getattr(self, kind)
        return template.format(about)


def cues(said: str, lead: str) -> list[str]:
    """The things that an answer names after `lead`, without those that only a pronoun names.

    "... Look for: dog and red bicycle." are "dog" and "red bicycle". Nothing where it has no lead;
    with an empty lead the answer is nothing else.
    """
    _, found, rest = said.partition(lead) if lead else ("", said, said)
    line = rest.strip().split("\n")[0].rstrip().removesuffix(".")
    parts = [part.strip() for part in re.split(r",? and |, ", line)] if found else []
    return [part for part in parts if part and not _PRONOUNS.search(part.lower())]


@dataclass(frozen=True)
class DivideWording:
    """How a model is asked to describe parts of a picture, and what it is told of them later.

    Attributes:
      describe: asks for a description of what is shown.
      refine: asks for one of a picture by those of its parts; with a `{}` for these.
      objects: asks for the things in a description, as JSON; with a `{}` for it.
      inform: asks what a part of a picture says about a question; with a `{}` for it.
      nothing: what the answer to that is if it says nothing.
      informed: the question with what was found; with `{information}` and `{question}`.
    """

    describe: str = "Describe this picture."
    refine: str = (
        'These are descriptions of the parts of the picture: "{}" Write one description of the '
        "whole picture that agrees with what you see."
    )
    objects: str = (
        "List the things that a description of a picture names: general words in the singular, "
        "each once, no abstract ideas, nothing that is only supposed. Answer with JSON.\n"
        'Description: "Two cats sleep on a blue sofa beside a lamp, which may be broken."\n'
        'JSON: {{"object_list": ["cat", "sofa", "lamp"]}}\n'
        'Description: "{}"\nJSON:'
    )
    inform: str = (
        'Question: "{}" Say what this part of the picture shows that helps to answer it. If '
        "nothing does, say NONE."
    )
    nothing: str = "NONE"
    informed: str = (
        "Parts of the picture were looked at closely:\n{information}\n"
        "Question: {question}\nAnswer this question."
    )
