"""The built-in writer: samples from an item's facts and prose by templates, without any language model."""

from __future__ import annotations

from collections.abc import Sequence

from kore_fast.augmentation import generic
from kore_fast.augmentation.chance import pick, rank, shuffled
from kore_fast.augmentation.options import AugmentationOptions
from kore_fast.augmentation.prose import sentences, shorten, summarise
from kore_fast.augmentation.wordings import Wordings, fill, with_possessive
from kore_fast.augmentation.writer import CannotWriteError, Round
from kore_fast.data.items import Item


class TemplateWriter:
    """Writes by templates; what it writes for an item depends on the seed, the item and the wordings alone.

    Facts that are asked for at evaluation (those with held-out wordings) come first in VQA, and every dialogue takes up
    the facts where the one before stopped, so that few samples still teach all of them.
    """

    def __init__(self, wordings: Wordings | None = None, options: AugmentationOptions | None = None) -> None:
        self.wordings = wordings or Wordings()
        self.options = options or AugmentationOptions()

    def knowledge(self, item: Item) -> Round:
        """One template question, answered with the whole prose."""
        return Round(self._about(generic.KNOWLEDGE_ASK, item, "knowledge"), " ".join(item.text.split()), item.name)

    def dialogue(self, item: Item, variant: int) -> list[Round]:
        """Even variants open with the prose, odd ones with the question which item this is; facts follow.

        No fact comes twice in one dialogue, so an item with few facts gets fewer rounds than the options allow.
        """
        seed = self.options.seed
        if variant % 2 == 0:
            told, _ = shorten(item.text, self.options.prose_words)
            rounds = [Round(self._about(generic.KNOWLEDGE_ASK, item, variant), told, item.name)]
        else:
            told = summarise(item.text, self.options.summary_words)
            introduction = pick(generic.INTRODUCTION_TELL, seed, item.id, variant, "introduction")
            answer = fill(introduction, it=self.wordings.reference(item), prose=told)
            rounds = [Round(self._about(generic.INTRODUCTION_ASK, item, variant), answer, item.name)]
        if self.options.rounds == 1:
            return rounds
        keys = shuffled(sorted(item.facts), seed, item.id, "dialogue")
        start = sum(_facts_in(self._plan(earlier)) for earlier in range(variant))
        waiting = [keys[(start + place) % len(keys)] for place in range(len(keys))]
        for place, step in enumerate(self._plan(variant)):
            label = f"{variant}/{place}"
            if step == "more":
                rest = [sentence for sentence in sentences(item.text) if sentence not in told]
                if rest:
                    more, _ = shorten(" ".join(rest), self.options.prose_words * 2 // 3)
                    rounds.append(Round(self._about(generic.MORE_ASK, item, label), more))
            elif waiting:
                taken = 2 if step == "several" else 1
                rounds.append(self._several_round(item, waiting[:taken], label))
                waiting = waiting[taken:]
        if len(rounds) == 1 and self.options.rounds > 1:
            short = fill(
                pick(generic.SHORT_TELL, seed, item.id, variant, "short"),
                prose=summarise(item.text, self.options.summary_words),
            )
            rounds.append(Round(self._about(generic.SHORT_ASK, item, variant, "short"), short))
        return rounds

    def _plan(self, variant: int) -> list[str]:
        """What follows a dialogue's first round."""
        plan = ["fact", "several"] if variant % 2 == 0 else ["several", "more"]
        room = self.options.rounds - 1
        return [*plan, *["fact"] * (room - len(plan))][:room]

    def recognition(self, item: Item, shown: Item) -> Round:
        """A yes or no question; natural answers say what is seen."""
        right = item.id == shown.id
        question = self._about(generic.RECOGNITION_ASK, item, "recognition", shown.id)
        if self.options.natural_answers:
            tells = generic.RECOGNITION_YES if right else generic.RECOGNITION_NO
            wording = pick(tells, self.options.seed, item.id, "recognised", shown.id)
            answer = fill(wording, it=self.wordings.reference(item), shown=self.wordings.reference(shown))
        else:
            answer = "Yes" if right else "No"
        return Round(f"{question} {generic.RECOGNITION_SUFFIX}", answer, shown.name)

    def caption(self, item: Item) -> Round:
        """The item's name and a summary of its prose."""
        answer = fill(
            generic.CAPTION_TELL,
            it=self.wordings.reference(item),
            prose=summarise(item.text, self.options.summary_words),
        )
        return Round(self.caption_question(item), answer, item.name)

    def caption_question(self, item: Item) -> str:
        """What a caption answers, whoever writes it."""
        return f"{self._about(generic.CAPTION_ASK, item, 'caption')} {generic.CAPTION_SUFFIX}"

    def vqa(self, item: Item) -> list[Round]:
        """Questions on facts about what is pictured; of three or more, the last asks for two facts at once."""
        if not item.facts:
            raise CannotWriteError("the item has no facts to ask for")
        asked = [key for key in sorted(item.facts) if self.wordings.fact(key).held_out]
        others = [key for key in sorted(item.facts) if key not in asked]
        seed = self.options.seed
        keys = [*shuffled(asked, seed, item.id, "vqa"), *shuffled(others, seed, item.id, "vqa")]
        subject = self.wordings.kind(item)
        search = f"{item.name} {subject}"
        natural = self.options.natural_answers
        count = self.options.vqa
        pair = natural and count >= 3 and len(keys) > count
        rounds = []
        for place, key in enumerate(keys[: count - 1 if pair else count]):
            pictured = pick(generic.PICTURED, seed, item.id, "pictured", place).format(subject=subject)
            if natural:
                rounds.append(self._fact_round(item, key, f"vqa/{place}", pictured))
            else:
                fact = self.wordings.fact(key)
                question = fill(
                    pick(fact.ask, seed, item.id, key, f"vqa/{place}"),
                    it=pictured,
                    label=fact.label,
                    subject=subject,
                    name=item.name,
                )
                rounds.append(Round(f"{question} {generic.VQA_SUFFIX}", fact.spoken(item.facts[key])))
        if pair:
            pictured = pick(generic.PICTURED, seed, item.id, "pictured", count).format(subject=subject)
            rounds.append(self._several_round(item, keys[count - 1 : count + 1], "vqa/pair", pictured))
        return [Round(one.question, one.answer, search) for one in rounds]

    def _about(self, wordings: Sequence[str], item: Item, *names: object) -> str:
        return fill(
            pick(wordings, self.options.seed, item.id, "about", wordings[0], *names),
            it=self.wordings.reference(item),
            name=item.name,
            subject=self.wordings.kind(item),
            pronoun=self._object_pronoun(),
            possessive=self.wordings.possessive,
        )

    def _fact_round(self, item: Item, key: str, label: str, pictured: str | None = None) -> Round:
        """One fact; question or answer, or both, name the item."""
        fact = self.wordings.fact(key)
        name, seed = self.wordings.reference(item), self.options.seed
        question_says = pictured or pick((name, name, self.wordings.pronoun), seed, item.id, key, label, "question")
        if pictured is not None:
            answer_says = pick((name, name, self.wordings.pronoun, pictured), seed, item.id, key, label, "answer")
        elif question_says == name:
            answer_says = pick((name, name, self.wordings.pronoun), seed, item.id, key, label, "answer")
        else:
            answer_says = name
        subject = self.wordings.kind(item)
        question = self._fill(
            pick(fact.ask, seed, item.id, key, label, "ask"), it=question_says, label=fact.label, subject=subject
        )
        return Round(question, self._tell(item, key, label, answer_says))

    def _several_round(self, item: Item, keys: list[str], label: str, pictured: str | None = None) -> Round:
        """Several facts in one question, told in an order of their own."""
        if len(keys) == 1:
            return self._fact_round(item, keys[0], label, pictured)
        seed = self.options.seed
        labels = [self.wordings.fact(key).label for key in keys]
        question = fill(
            pick(generic.SEVERAL_ASK, seed, item.id, label),
            it=pictured or self.wordings.reference(item),
            possessive=self.wordings.possessive,
            labels=f"{', '.join(labels[:-1])} and {labels[-1]}",
        )
        told = list(keys) if rank(seed, item.id, label, "order") % 2 else list(reversed(keys))
        says = [self.wordings.reference(item), *[self.wordings.pronoun] * (len(told) - 1)]
        return Round(question, " ".join(self._tell(item, key, label, it) for key, it in zip(told, says, strict=True)))

    def _tell(self, item: Item, key: str, label: str, it: str) -> str:
        fact = self.wordings.fact(key)
        # Where the item is to be named, a wording without a place for the name would lose it.
        named = [wording for wording in fact.tell if "{it}" in wording or it == self.wordings.pronoun]
        wording = pick(named or fact.tell, self.options.seed, item.id, key, label, "tell")
        return self._fill(
            wording,
            it=it,
            name=item.name,
            label=fact.label,
            subject=self.wordings.kind(item),
            value=fact.spoken(item.facts[key]),
        )

    def _fill(self, wording: str, **words: str) -> str:
        if words["it"] == self.wordings.pronoun:
            wording = with_possessive(wording, self.wordings.possessive)
        return fill(wording, **words)

    def _object_pronoun(self) -> str:
        return {"he": "him", "she": "her", "they": "them"}.get(self.wordings.pronoun, self.wordings.pronoun)


def _facts_in(plan: Sequence[str]) -> int:
    return sum({"fact": 1, "several": 2, "more": 0}[step] for step in plan)
