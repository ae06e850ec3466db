"""Find what the model must generate in a rendered conversation, by rendering it and not by reading the template.

For the assistant turn k of a chat, `prompt` = render(chat[:k], add_generation_prompt=True) is what inference feeds, and
render(chat[:k+1]) begins with it: what follows, up to the token that ends the turn, is what the model must generate.
The same text is then located in the rendering of the whole conversation. Templates that write an earlier turn
otherwise than they ask for it (Qwen3 leaves its reasoning out), and prompts that open a block which the written
answers lack (`<think>` of DeepSeek-R1 distills), are handled here; see `Finder`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from finetune.errors import InputError
from finetune.tokenization.chat import (
    Chat,
    Span,
    TemplateRefused,
    answer_core,
    before_tag,
    first_call,
    has_calls,
    padding_of,
    reasoning_of,
    same_form,
    shared_start,
    skip_space,
    with_core,
    without_reasoning,
)

Write = Callable[[Chat, bool], tuple[str, list[Span]]]
"""From a chat, and whether the generation prompt follows, to the text and the ranges of generation blocks."""

STAND_IN = 0xF0000  # private-use plane 15; plane 16 is taken by ControlStrings
# Answers of one conversation that are each rendered by themselves. Of more, only the first two and the last are, since
# the prompts of all together take quadratic time, and the others are found by the pattern of the second.
MOST_EXACT, MOST_EXACT_WITH_CALLS = 32, 256
CLOSING = re.compile(r"</[A-Za-z_][\w-]*>\Z")
OPENING = re.compile(r"\s*<([A-Za-z_][\w-]*)>\s*\Z")
REASONING_LOST = "the template writes this earlier turn without its reasoning"


class NoEnd(InputError):
    """The template writes no token that could end an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One assistant turn in a rendered text; positions are characters.

    `index` is the turn's place in the chat. [`start`, `end`) is what the model must generate; `border` is where the
    generation prompt ends. `ends`: whether the last token of the range is the one that ends generation. `masked` is
    the reason why the turn carries no label, or empty.
    """

    index: int
    start: int
    end: int
    border: int
    ends: bool = True
    masked: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A rendered conversation and its answers in order.

    `blocks` are the template's own generation blocks. `own` is False if the text is not, character by character, what
    apply_chat_template gives (an opened block, or reasoning that is kept); `added` is the end that the template leaves
    to the next turn and that stands at the end of the text, or empty.
    """

    text: str
    answers: tuple[Answer, ...]
    blocks: tuple[Span, ...] = ()
    own: bool = True
    added: str = ""


@dataclass(frozen=True, slots=True)
class _Asked:
    """Turn k as the model is asked for it."""

    prompt: str  # what inference feeds
    lead: str  # what the model writes before the answer's core (reasoning, white space)
    core: str  # the answer's own words, without white space at its edges
    trail: str  # what it writes after them, up to and with the end
    opened: str = ""  # the end of the prompt that the template's own rendering of the answer lacks
    padding: tuple[str, str] = ("", "")  # of an answer found by a pattern: white space at its content's edges

    @property
    def leads(self) -> tuple[str, ...]:
        """Return the variants before the core: templates keep or trim the content's white space."""
        return (self.lead + self.padding[0], self.lead) if self.padding[0] else (self.lead,)

    @property
    def trails(self) -> tuple[str, ...]:
        """Return the variants after the core."""
        return (self.padding[1] + self.trail, self.trail) if self.padding[1] else (self.trail,)

    @property
    def text(self) -> str:
        return self.lead + self.core + self.trail


class Finder:
    """Finds the answers of conversations under one template.

    Args:
        control: strings that are control tokens of the base.
        stops: those of them that end generation by the base's own configuration.
    """

    def __init__(self, control: Iterable[str], stops: Collection[str]) -> None:
        self.stops = frozenset(stops)
        strings = sorted({*control, *stops}, key=lambda s: (-len(s), s))
        self._control = re.compile("|".join(map(re.escape, strings)) or r"(?!)")

    def find(
        self,
        write: Write,
        chat: Chat,
        keep_reasoning: bool = False,
        plain: tuple[str, list[Span]] | None = None,
        prompt: str | None = None,
    ) -> Conversation:
        """Render `chat` and find its answers.

        Args:
            write: the template.
            chat: messages in the template's own form.
            keep_reasoning: write the reasoning of earlier turns also if the template leaves it out.
            plain: what `write(chat, False)` gives, if it is known.
            prompt: the last answer's prompt, if it is known.

        Raises TemplateRefused if the template refuses the chat or writes it so that an answer cannot be located, NoEnd
        if it writes no token that ends an answer.
        """
        text, blocks = plain or write(chat, False)
        turns = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        if not turns:
            return Conversation(text, (), tuple(blocks))
        asked = self._all_asked(write, chat, turns, text, prompt)
        last = asked[turns[-1]]
        whole, final = last.prompt + last.text, turns[-1] == len(chat) - 1
        if final and last.opened:
            conversation = Conversation(whole, (), own=False)
        elif final and not text.startswith(whole) and whole.startswith(text.rstrip()):  # its end opens the next turn
            own = whole.startswith(text)
            conversation = Conversation(whole, (), tuple(blocks), own, whole[len(text) :] if own else "")
        else:
            conversation = Conversation(text, (), tuple(blocks))
        answers = self._locate(write, chat, turns, asked, conversation)
        if keep_reasoning and any(a.masked or not a.ends for a in answers):
            return self._kept(write, chat, turns, asked)
        return replace(conversation, answers=answers)

    def last_control(self, text: str, start: int, end: int) -> int:
        """Where the last control token of text[start:end] ends, white space behind it apart, or -1."""
        bare = len(text[start:end].rstrip()) + start
        ends = [m.end() for m in self._control.finditer(text, start, bare)]
        return bare if ends and ends[-1] == bare else -1

    # --- one turn as it is asked for --------------------------------------------------------------------------------

    def _all_asked(
        self, write: Write, chat: Chat, turns: Sequence[int], text: str, prompt: str | None
    ) -> dict[int, _Asked]:
        patterned = len(turns) > MOST_EXACT
        if patterned and any(has_calls(chat[k]) or reasoning_of(chat[k]) for k in turns):
            if len(turns) > MOST_EXACT_WITH_CALLS:
                raise TemplateRefused(
                    f"{len(turns)} answers, some with calls or reasoning: more than {MOST_EXACT_WITH_CALLS}"
                )
            patterned = False
        asked: dict[int, _Asked] = {}
        for k in [*turns[:2], turns[-1]] if patterned else turns:
            last = k == turns[-1]
            written = text if k == len(chat) - 1 else None
            asked[k] = self._asked(write, chat[: k + 1], prompt if last else None, written)
        if patterned:
            before, after = padding_of(chat[turns[1]])
            pattern = asked[turns[1]]
            bare = replace(pattern, lead=pattern.lead.removesuffix(before), trail=pattern.trail.removeprefix(after))
            for k in turns[2:-1]:
                asked[k] = replace(bare, prompt="", core=answer_core(chat[k]), padding=padding_of(chat[k]))
        return asked

    def _asked(self, write: Write, chat: Chat, prompt: str | None, written: str | None) -> _Asked:
        """The last turn of `chat`."""
        k = len(chat) - 1
        if prompt is None:
            prompt = write(chat[:k], True)[0]
        if written is None:
            written = write(chat, False)[0]
        common = len(prompt)
        opened = ""
        if not written.startswith(prompt):
            common = before_tag(prompt, shared_start(prompt, written))
            opened = prompt[common:]
        raw = written[common:]
        core = answer_core(chat[k])
        at = self._core_position(write, chat, raw, core, written, common)
        if at < 0:
            raise TemplateRefused(f"the template does not write turn {k + 1}, an assistant's, as it was written")
        end = self._end_of_empty(write, chat, prompt, raw) if not core and not has_calls(chat[k]) else -1
        if end < 0:
            end = self._end(raw, at + len(core), has_calls(chat[k]) or not core)
        if end < 0:
            raw, end = self._borrowed_end(write, chat, raw)
        lead, trail = raw[:at], raw[at + len(core) : end]
        if opened:
            lead = self._closed(opened, lead, chat[k])
        return _Asked(prompt, lead, core, trail, opened)

    def _core_position(self, write: Write, chat: Chat, raw: str, core: str, written: str, common: int) -> int:
        if not core:
            return 0
        at = raw.find(core)
        if at < 0 or raw.find(core, at + 1) < 0:
            return at
        spot = self._stand_ins(write, chat, [len(chat) - 1], False, written).get(len(chat) - 1)
        return spot[0] - common if spot else raw.rfind(core)

    def _end(self, raw: str, after: int, whole: bool) -> int:
        """Where the answer's end token ends, or -1. `whole`: the last control token counts, as after a tool call."""
        hits = [m.span() for m in self._control.finditer(raw) if whole or m.start() >= after]
        if not hits:
            return -1
        if whole:
            return next((b for a, b in reversed(hits) if raw[a:b] in self.stops), hits[-1][1])
        run = [hits[0]]
        for hit in hits[1:]:
            if hit[0] != run[-1][1]:
                break
            run.append(hit)
        return next((b for a, b in run if raw[a:b] in self.stops), run[-1][1])

    def _end_of_empty(self, write: Write, chat: Chat, prompt: str, raw: str) -> int:
        """Where an answer without words ends: behind what the template writes after an answer with words, or -1."""
        word = chr(STAND_IN)
        text = write([*chat[:-1], {**chat[-1], "content": same_form(chat[-1]["content"], word)}], False)[0]
        _, separator, after = text.partition(word)
        end = self._end(after, 0, False) if separator and text.startswith(prompt) else -1
        return raw.find(after[:end]) + end if end >= 0 and after[:end] in raw else -1

    def _borrowed_end(self, write: Write, chat: Chat, raw: str) -> tuple[str, int]:
        """The answer with the token that opens the next turn, if that token stops the base's own generation."""
        reply = {"role": "tool", "content": "a result"} if has_calls(chat[-1]) else {"role": "user", "content": "next"}
        bare, hit = "", None
        for last in (chat[-1], without_reasoning(chat[-1])):  # GLM-4.5 leaves earlier reasoning out
            bare = write([*chat[:-1], last], False)[0].rstrip()
            after = write([*chat[:-1], last, reply], False)[0]
            if after.startswith(bare):
                hit = self._control.match(after, skip_space(after, len(bare)))
                break
        if hit is None or hit[0] not in self.stops:
            note = f"; {hit[0]!r}, which opens the next turn, does not stop this base" if hit else ""
            raise NoEnd(f"the chat template writes no token that ends an answer{note}")
        raw = raw.rstrip() + after[len(bare) : hit.end()]
        return raw, len(raw)

    def _closed(self, opened: str, lead: str, turn: dict[str, object]) -> str:
        """Return the text that the model writes before its answer after the prompt has opened a block."""
        bare = opened.rstrip()
        if tag := OPENING.search(opened):
            return f"{reasoning_of(turn)}\n</{tag[1]}>\n\n{lead.lstrip()}"
        if bare and reasoning_of(turn):
            raise TemplateRefused(
                f"the generation prompt ends with {opened[-60:]!r}, so the model is never asked for reasoning; "
                "render.reasoning: strip leaves the row's out"
            )
        if bare and not CLOSING.search(bare) and not any(m.end() == len(bare) for m in self._control.finditer(bare)):
            raise TemplateRefused(
                f"the generation prompt ends with {opened[-60:]!r}, which the template does not write before an answer"
            )
        return lead  # white space, or a block that the prompt opens and closes

    # --- all turns in one text --------------------------------------------------------------------------------------

    def _locate(
        self, write: Write, chat: Chat, turns: Sequence[int], asked: dict[int, _Asked], conversation: Conversation
    ) -> tuple[Answer, ...]:
        answers: list[Answer] = []
        spots: dict[int, Span] | None = None
        cursor = 0
        for k in turns:
            turn, text = asked[k], conversation.text
            start = len(turn.prompt)
            if turn.prompt and text.startswith(turn.prompt) and text.startswith(turn.text, start):
                answers.append(Answer(k, start, start + len(turn.text), start))
                cursor = answers[-1].end
                continue
            if spots is None:
                last = turns[-1]
                prompted = not conversation.own
                part = chat[:last] if prompted else chat
                own = asked[last].prompt if prompted else text[: len(text) - len(conversation.added)]
                spots = self._stand_ins(write, part, [i for i in turns if i < len(part)], prompted, own)
            answers.append(self._elsewhere(chat[k], k, turn, text, spots.get(k), cursor))
            cursor = answers[-1].end
        return tuple(answers)

    def _elsewhere(
        self, message: dict[str, object], k: int, asked: _Asked, text: str, spot: Span | None, cursor: int
    ) -> Answer:
        """Turn k in a text that does not begin with its prompt."""
        if has_calls(message) or not asked.core:
            return self._call_elsewhere(message, k, asked, text, cursor)
        if spot is None:
            at = text.find(asked.core + asked.trail, cursor)
            at = text.find(asked.core, cursor) if at < 0 else at
            if at < 0:
                raise TemplateRefused(f"assistant turn {k + 1} is not in the text as it was written")
            spot = (at, at + len(asked.core))
        a, b = spot
        lead = next((lead for lead in asked.leads if text.endswith(lead, cursor, a)), None)
        same_lead = lead is not None and not asked.opened
        start = border = a - len(lead or "") if same_lead else a
        trail = next((trail for trail in asked.trails if text.startswith(trail, b)), None)
        # the template ends an earlier turn otherwise (gpt-oss), and the model must not learn that end
        end, ends = (b + len(trail), True) if trail is not None else (b, False)
        masked = "" if same_lead or not reasoning_of(message) else REASONING_LOST
        return Answer(k, start, end, border, ends, masked)

    def _call_elsewhere(self, message: dict[str, object], k: int, asked: _Asked, text: str, cursor: int) -> Answer:
        """A turn of calls, or an empty one, in a text that does not begin with its prompt: found by its first call's
        name and all that follows; before it, what both texts have in common.
        """
        whole = asked.text
        name = max(0, whole.find(first_call(message)))
        at = text.find(whole[name:], cursor)
        if at < 0:
            raise TemplateRefused(f"the template does not write assistant turn {k + 1} as the model is asked for it")
        back = shared_start(whole[:name][::-1], text[cursor:at][::-1])
        # the white space that ends the generation prompt is not part of the answer
        start = at - back if back == name else min(at, skip_space(text, at - back))
        masked = "" if back == name or not reasoning_of(message) else REASONING_LOST
        return Answer(k, start, at + len(whole) - name, start, True, masked)

    def _kept(self, write: Write, chat: Chat, turns: Sequence[int], asked: dict[int, _Asked]) -> Conversation:
        """Every answer as it is asked for, in one text, with what the template writes between them."""
        text, answers = asked[turns[0]].prompt, []
        for number, k in enumerate(turns):
            start = len(text)
            text += asked[k].text
            answers.append(Answer(k, start, len(text), start))
            after = turns[number + 1] if number + 1 < len(turns) else None
            if after is None and k == len(chat) - 1:
                break
            whole = asked[after].prompt if after is not None else write(chat, False)[0]
            part = chat[:after] if after is not None else chat
            spots = self._stand_ins(write, part, [k], after is not None, whole)
            here = self._elsewhere(chat[k], k, asked[k], whole, spots.get(k), 0)
            end = here.end if here.ends else self._end(whole, here.end, False)
            text += whole[end:]
        return Conversation(text, tuple(answers), own=False)

    def _stand_ins(self, write: Write, chat: Chat, turns: Sequence[int], prompted: bool, text: str) -> dict[int, Span]:
        """Where each answer's core stands in `text` = write(chat, prompted): each is replaced by as many private-use
        characters of its own. Empty if putting the cores back does not give `text`.
        """
        swapped = list(chat)
        names: dict[int, str] = {}
        for number, k in enumerate(turns):
            if core := answer_core(chat[k]):
                names[k] = chr(STAND_IN + number % 60_000) * len(core)
                swapped[k] = with_core(chat[k], core, names[k])
        try:
            rendered = write(swapped, prompted)[0]
        except TemplateRefused:
            return {}
        pieces: list[str] = []
        spots: dict[int, Span] = {}
        cursor = 0
        for k, name in names.items():
            at = rendered.find(name, cursor)
            if at < 0:
                continue
            pieces += [rendered[cursor:at], answer_core(chat[k])]
            cursor = at + len(name)
            spots[k] = (at, cursor)
        return spots if "".join([*pieces, rendered[cursor:]]) == text else {}
