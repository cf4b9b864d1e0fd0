"""Indirect object identification: "Then Anna and Tom ... Tom gave the ring to" should go on with " Anna".

Templates, places and objects are ours. Each prompt names two people, then one of them again as the giver; the behaviour is the
logit of the other one's name minus that of the giver's. Both orders of the first mention occur: `ABBA` (the indirect object is
named first) and `BABA` (second).

The names are divided into two halves, one for the selection prompts and one for the evaluation prompts, so that no
prompt, nor any name, that helps to choose the features is attacked (P15). Samples from one template are a cluster (P16).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveInt

from undertow.behaviours.logit_difference import LogitDifference
from undertow.config import Section
from undertow.errors import UndertowError
from undertow.models.batch import Batch
from undertow.models.language_model import LanguageModel
from undertow.tasks.base import TASKS, Split, Task, TaskData

TEMPLATES = (
    "When {first} and {second} arrived at the {place}, {giver} handed the {thing} to",
    "After {first} and {second} had talked for an hour in the {place}, {giver} passed the {thing} to",
    "On Monday {first} and {second} met near the {place}, and {giver} lent the {thing} to",
    "While {first} and {second} were cleaning the {place}, {giver} threw the {thing} to",
    "Yesterday {first} and {second} walked to the {place} together. On the way {giver} offered the {thing} to",
    "It was late when {first} and {second} left the {place}. Before the bus came, {giver} returned the {thing} to",
    "Because {first} and {second} were moving out of the {place}, {giver} sold the {thing} to",
    "At the {place}, {first} and {second} sat side by side until {giver} gave the {thing} to",
    "The guide led {first} and {second} through the {place}. At the end {giver} showed the {thing} to",
    "Last summer {first} and {second} worked in the {place}. One morning {giver} brought the {thing} to",
    "Since {first} and {second} shared a desk at the {place}, {giver} often carried the {thing} to",
    "{first} and {second} could not agree about the {place}, but in the end {giver} sent the {thing} to",
)
PLACES = ("station", "library", "garden", "museum", "market", "school", "harbour", "office", "kitchen", "theatre")
THINGS = ("book", "key", "ring", "letter", "camera", "ticket", "basket", "guitar", "map", "cup")
NAMES = (
    "Anna", "Tom", "Mary", "John", "Sarah", "David", "Laura", "Peter", "Emily", "James", "Julia", "Mark", "Alice", "Paul",
    "Emma", "Daniel", "Kate", "George", "Lisa", "Robert", "Helen", "Simon", "Jane", "Andrew", "Rachel", "Michael",
    "Maria", "Kevin", "Susan", "Brian", "Amy", "Steven", "Claire", "Jack", "Linda", "Henry", "Sophie", "Adam", "Diana",
    "Charles",
)  # fmt: skip
MIN_NAMES = 8


class IOIData(Section):
    """The `data` section of the configuration."""

    prompts: PositiveInt = Field(default=192, description="evaluation prompts")
    selection_prompts: PositiveInt = Field(default=64, description="prompts on which features are chosen")
    templates: int = Field(default=len(TEMPLATES), ge=1, le=len(TEMPLATES))
    orders: tuple[Literal["ABBA", "BABA"], ...] = Field(default=("ABBA", "BABA"), min_length=1)
    names: tuple[str, ...] = Field(default=(), description="single-token names; default: ours")


@dataclass(frozen=True)
class Prompt:
    """One IOI prompt: its text, the name that should follow and the giver's, and the template it was made from."""

    text: str
    wanted: str
    giver: str
    template: int


def make_prompts(names: list[str], count: int, orders: tuple[str, ...], templates: int, rng: random.Random) -> list[Prompt]:
    """`count` different prompts, spread evenly over templates and orders.

    Raises:
        UndertowError: there are not that many different prompts.
    """
    pairs = list(itertools.permutations(names, 2))
    if count > templates * len(pairs):
        raise UndertowError(
            f"{count} prompts were asked for, and {len(names)} names make {templates * len(pairs)}.",
            "Ask for fewer prompts or give more names.",
        )
    kinds = list(itertools.product(range(templates), orders))
    used: set[tuple[int, str, str]] = set()
    prompts = []
    while len(prompts) < count:
        template, order = kinds[len(prompts) % len(kinds)]
        wanted, giver = rng.choice(pairs)
        place, thing = rng.choice(PLACES), rng.choice(THINGS)
        if (template, wanted, giver) in used:
            continue
        used.add((template, wanted, giver))
        first, second = (wanted, giver) if order == "ABBA" else (giver, wanted)
        text = TEMPLATES[template].format(first=first, second=second, giver=giver, place=place, thing=thing)
        prompts.append(Prompt(text, wanted, giver, template))
    return prompts


class IOI(Task):
    """Indirect object identification."""

    name = "ioi"
    describes = "naming the indirect object"
    data = IOIData

    def build(self, model: LanguageModel, settings: IOIData, seed: int) -> TaskData:
        """Selection and evaluation prompts with disjoint names.

        Raises:
            UndertowError: a name given by the user is not a single token, or too few names are.
        """
        names = _single_token_names(model, settings)
        rng = random.Random(f"ioi-{seed}")
        rng.shuffle(names)
        halves = {"selection": (names[0::2], settings.selection_prompts), "evaluation": (names[1::2], settings.prompts)}
        splits = {
            split: _split(model, split, make_prompts(half, count, tuple(settings.orders), settings.templates, rng))
            for split, (half, count) in halves.items()
        }
        return TaskData(**splits)


def _single_token_names(model: LanguageModel, settings: IOIData) -> list[str]:
    if settings.names:
        for name in settings.names:
            model.single_token(f" {name}")
        names = list(dict.fromkeys(settings.names))
    else:
        names = [name for name in NAMES if _is_single(model, name)]
    if len(names) < MIN_NAMES:
        raise UndertowError(
            f"{len(names)} of the names are single tokens for {model.name}; at least {MIN_NAMES} are needed.",
            "Give --names that its tokenizer holds whole.",
        )
    return names


def _is_single(model: LanguageModel, name: str) -> bool:
    return len(model.tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) == 1


def _split(model: LanguageModel, split: str, prompts: list[Prompt]) -> Split:
    batch: Batch = model.tokens([prompt.text for prompt in prompts])
    wanted = torch.tensor([model.single_token(f" {prompt.wanted}") for prompt in prompts], device=batch.ids.device)
    giver = torch.tensor([model.single_token(f" {prompt.giver}") for prompt in prompts], device=batch.ids.device)
    return Split(
        names=[f"ioi-{split}-{index:04d}" for index in range(len(prompts))],
        clusters=[f"template-{prompt.template}" for prompt in prompts],
        batch=batch,
        behaviour=LogitDifference(wanted, giver),
    )


TASKS.add("ioi", IOI())
