"""The IOI task: templates, names, splits (P15, P16)."""

import random

import pytest
import torch
from conftest import tiny_llama

from undertow.behaviours.logit_difference import LogitDifference
from undertow.errors import UndertowError
from undertow.tasks.ioi import IOI, NAMES, TEMPLATES, IOIData, make_prompts


class Words:
    """A tokenizer of whole words; words over seven letters are two tokens."""

    def __init__(self):
        self.ids = {}
        self.all_special_ids = [0]

    def _word(self, word):
        pieces = [word] if len(word) <= 7 else [word[:7], word[7:]]
        return [self.ids.setdefault(piece, 3 + len(self.ids)) for piece in pieces]

    def __call__(self, text, add_special_tokens=True):
        texts = [text] if isinstance(text, str) else text
        ids = [[i for word in t.split() for i in self._word(word)] for t in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def convert_ids_to_tokens(self, ids):
        back = {number: word for word, number in self.ids.items()}
        return [back[i] for i in ids]


def model():
    from dataclasses import replace

    return replace(tiny_llama(vocab=600), tokenizer=Words())


def test_templates_and_orders():
    assert len(TEMPLATES) >= 6
    assert len(set(NAMES)) == len(NAMES)
    prompts = make_prompts(["Ann", "Bob", "Cid", "Dan"], 48, ("ABBA", "BABA"), len(TEMPLATES), random.Random(0))
    assert len({prompt.text for prompt in prompts}) == 48
    for prompt in prompts:
        assert prompt.wanted != prompt.giver
        assert prompt.text.count(prompt.giver) == 2
        assert prompt.text.count(prompt.wanted) == 1
        assert prompt.text.endswith(" to")
    first = [prompt.text.index(prompt.wanted) < prompt.text.index(prompt.giver) for prompt in prompts]
    assert sum(first) == 24, "both orders, evenly"
    assert {prompt.template for prompt in prompts} == set(range(len(TEMPLATES)))


def test_selection_and_evaluation_share_no_name():
    """P15."""
    lm = model()
    data = IOI().build(lm, IOIData(prompts=40, selection_prompts=30), seed=0)
    assert (data.selection.batch.size, data.evaluation.batch.size) == (30, 40)

    def names(split):
        behaviour = split.behaviour
        assert isinstance(behaviour, LogitDifference)
        return set(behaviour.wanted.tolist()) | set(behaviour.other.tolist())

    assert not names(data.selection) & names(data.evaluation)


def test_seeded():
    lm = model()
    one, same, other = (IOI().build(lm, IOIData(prompts=12), seed=seed).evaluation for seed in (1, 1, 2))
    assert torch.equal(one.batch.ids, same.batch.ids)
    assert not torch.equal(one.batch.ids, other.batch.ids)
    assert set(one.clusters) <= {f"template-{i}" for i in range(len(TEMPLATES))}


def test_names_must_be_single_tokens():
    names = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Bartholomew")
    with pytest.raises(UndertowError, match="' Bartholomew' is 2 tokens"):
        IOI().build(model(), IOIData(names=names), 0)
    with pytest.raises(UndertowError, match="at least 8 are needed"):
        IOI().build(model(), IOIData(names=names[:4] * 3), 0)


def test_more_prompts_than_there_are():
    with pytest.raises(UndertowError, match="999 prompts were asked for"):
        make_prompts(["Ann", "Bob"], 999, ("ABBA",), 2, random.Random(0))
