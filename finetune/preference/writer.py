"""Render pairs with the recipe's template, verify it on a sample, write them to Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from finetune.context import Context
from finetune.preference.curate import Curation
from finetune.preference.records import Pair, Rendering, as_json
from finetune.preference.tokens import UNLIMITED, TokenizedPair, pair_table, tokenize
from finetune.tokenization.chat import verification_sample
from finetune.tokenization.chat_template import Template, choose_template
from finetune.tokenization.encoder import Encoder
from finetune.tokenization.id_check import IdCheck
from finetune.tokenization.row_tokenizer import RowTokenizer, Rules

BATCH = 256  # pairs rendered and tokenised together
SAMPLE = 200  # sides that the template is tried on, and whose ids are compared with apply_chat_template's


class PairWriter:
    """Renders pairs with one template and writes them; `worker` tokenizes the rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        stops = frozenset(tokenizer.get_vocab()[s] for s in template.finder.stops)
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        rules = Rules("assistant", UNLIMITED, "drop", bos, tokenizer.bos_token_id, False, eos, stops)
        self.tokenizer, self.template = tokenizer, template
        self.worker = RowTokenizer(template, Encoder(tokenizer), rules)
        self.ids = IdCheck(tokenizer, template)
        self.proved = 0

    @classmethod
    def proved_on(
        cls, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, base: Path, asked: Rendering
    ) -> PairWriter:
        """Return a writer for the template, after comparing the token ids of a sample with apply_chat_template's.

        Raises GateRefused if choose_template does, or if ids or prompts differ.
        """
        every = (pair.example(side) for pair in pairs for side in range(len(pair.answers)))
        sample = verification_sample(every, SAMPLE)
        template = choose_template(
            asked.template, asked.template_file, tokenizer, sample, asked.system, asked.reasoning, base
        )
        made = cls(tokenizer, template)
        for row in sample:
            made.ids.compare(row, made.worker)
        made.proved = made.worker.check_prompts(sample)
        return made

    def write(
        self, curation: Curation, numbers: Sequence[int], target: Path, method: str, most: int, ctx: Context
    ) -> list[TokenizedPair]:
        """Write the pairs `numbers` of `curation` in order, and return them.

        Those over `most` tokens, and those that the template refuses, are left out in `curation` with a reason.
        """
        kept: list[TokenizedPair] = []
        groups = [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)]
        with pq.ParquetWriter(target, pair_table([], method).schema, compression="zstd") as writer:
            for group in ctx.track(groups, f"render {target.stem}", len(groups)):
                made: list[TokenizedPair] = []
                pairs = [curation.pairs[i] for i in group]
                for number, outcome in zip(group, tokenize(pairs, self.worker, most, self._decode), strict=True):
                    if isinstance(outcome, TokenizedPair):
                        made.append(outcome)
                    else:
                        curation.leave_out(number, outcome)
                writer.write_table(pair_table(made, method))
                kept += made
        return kept

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""


def write_texts(path: Path, train: Sequence[TokenizedPair], held: Sequence[TokenizedPair]) -> None:
    """Write texts.parquet, the pairs as messages: pair_id, split, prompt, an answer a side, tools (JSON texts)."""
    sides = train[0].pair.sides
    rows = []
    for split, pairs in (("train", train), ("eval", held)):
        for pair in (one.pair for one in pairs):
            answers = {side: as_json(a) for side, a in zip(sides, pair.answers, strict=True)}
            rows.append(
                {"pair_id": pair.id, "split": split, "prompt": as_json(pair.prompt), **answers, "tools": pair.tools}
            )
    schema = pa.schema([(name, pa.string()) for name in ("pair_id", "split", "prompt", *sides, "tools")])
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")
