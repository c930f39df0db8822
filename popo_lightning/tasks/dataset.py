"""Problems from data files and hub data sets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

from popo_lightning.core.errors import SettingError
from popo_lightning.core.problems import Problem
from popo_lightning.core.task import BadRow, Task
from popo_lightning.tasks.gold_answers import key, refused_answers
from popo_lightning.tasks.reward_settings import FunctionAddress, WeightedFunction, try_functions, verifier_of
from popo_lightning.tasks.rows import BadValue, RowReader, absent_columns
from popo_lightning.tasks.sources import Row, Source, read_rows
from popo_lightning.tasks.template import Template
from popo_lightning.verifiers.base import Verifier

SHOWN = 5  # maximum number of a set's bad rows in the log
SHOWN_CHARACTERS = 80

log = logging.getLogger(__name__)


class DatasetTask(Task):
    r"""Problems from hub data sets or files, read on first use.

    A source is a mapping: path (hub id, .jsonl, .json or .parquet file, glob or folder), config and split of a hub data
    set, columns (which column is our prompt, answer, id, level, subject, images; a dotted name reaches into nested
    ones, and an answer may be a mapping of names to columns), answer_after (a mark such as "####" before the gold
    answer), answer_boxed (the gold answer is in the last \boxed), skip and limit (rows).

    A row that gives no problem is left out, shown in the log and counted; see strict.

    Args:
        verifier: Grades responses: a class, the address of a function (my_rewards.py:shout), or a list of functions
            with weights ({function: my_rewards.py:shout, weight: 0.5}).
        train: Sources of the training problems, one after the other.
        benchmarks: Source of each held-out benchmark, by name.
        folder: Base folder of the sources' relative paths; null for the working directory. Paths of images are relative
            to the file that names them.
        system: System message; null for none.
        template: Text of the prompt, with {prompt} or any other column of the row in braces. LaTeX braces stay
            unchanged.
        response_prefix: Beginning of every response, such as "<think>". null adds none, but a row whose own messages
            end with an assistant turn begins its responses with that turn; "" leaves that turn out.
        chat: Ask in chat messages. false asks in plain text, for base models without a chat template. Unless data.stop
            says otherwise, a response then ends where the next question would begin: at a line that starts with
            "Question:", "Problem:", "Q:" or the template's own label before its first column.
        strict: End the run at a bad row.
        check_answers: Ask the verifier whether a response could match each gold answer, and leave out answers that none
            could match. The result is cached per set of answers.
    """

    def __init__(
        self,
        verifier: Verifier | FunctionAddress | list[FunctionAddress | WeightedFunction],
        train: list[Source],
        benchmarks: dict[str, Source],
        folder: str | None = None,
        system: str | None = None,
        template: str = "{prompt}",
        response_prefix: str | None = None,
        chat: bool = True,
        strict: bool = False,
        check_answers: bool = True,
    ) -> None:
        if not train:
            raise SettingError("data.task.train is empty; give at least one source")
        for name, text in (("system", system), ("response_prefix", response_prefix)):
            if text is not None and not chat:
                raise SettingError(
                    f"data.task.{name} is '{text}' but data.task.chat is false, which has no messages; write it into "
                    "data.task.template"
                )
        self.verifier = self.verify = verifier_of(verifier)
        self.train = train
        self.held_out = benchmarks
        self.folder = folder
        self.system = system
        self.template = Template(template)
        self.response_prefix = response_prefix
        self.chat = chat
        self.stop = () if chat else self.template.next_question()
        self.strict = strict
        self.check_answers = check_answers
        self._bad_rows: list[BadRow] = []
        self._check_template()

    def _check_template(self) -> None:
        places = self.template.names
        if not places:
            raise SettingError(
                f"data.task.template is '{self.template.text}', the same for every problem; put {{prompt}} into it"
            )
        if "answer" in places:
            raise SettingError("data.task.template has {answer}, which gives the gold answer away; remove it")
        settings = {f"train[{number}]": source for number, source in enumerate(self.train)}
        settings |= {f"benchmarks.{name}": source for name, source in self.held_out.items()}
        for setting, source in settings.items():
            if "prompt" in source.get("columns", {}) and "prompt" not in places:
                raise SettingError(
                    f"data.task.{setting}.columns.prompt is '{source['columns']['prompt']}' but data.task.template "
                    f"('{self.template.text}') has no {{prompt}}; remove the one or put in the other"
                )

    # -- the task ----------------------------------------------------------------------------------------------

    def train_problems(self) -> Sequence[Problem]:
        """Returns the problems of all sources, in order."""
        return self._train_problems

    def benchmarks(self) -> dict[str, Sequence[Problem]]:
        """Returns the problems by benchmark. Ids begin with its name, because data sets may use the same numbers."""
        return dict(self._benchmarks)

    def ask(self, question: str, images: Sequence[str] = (), gold: str | None = None) -> Problem:
        """Asks a question, a JSON object if the template has places other than {prompt}."""
        return self._reader(self.train[0]).asked(question, images, gold)

    def bad_rows(self) -> Sequence[BadRow]:
        """Returns the rows left out so far."""
        return tuple(self._bad_rows)

    @cached_property
    def _train_problems(self) -> list[Problem]:
        names = [f"train{number + 1 if number else ''}" for number in range(len(self.train))]
        sources = [(f"train[{n}]", names[n], source) for n, source in enumerate(self.train)]
        return self._read(sources, "data.task.train", "")

    @cached_property
    def _benchmarks(self) -> dict[str, list[Problem]]:
        return {
            name: self._read([(f"benchmarks.{name}", "", source)], f"data.task.benchmarks.{name}", f"{name}/")
            for name, source in self.held_out.items()
        }

    # -- reading -----------------------------------------------------------------------------------------------

    def _reader(self, source: Source) -> RowReader:
        return RowReader(source, self.template, self.system, self.response_prefix, self.chat)

    def _read(self, sources: Sequence[tuple[str, str, Source]], what: str, id_prefix: str) -> list[Problem]:
        """Reads the problems of some sources. Their ids must be unique over all of them."""
        bad: list[BadRow] = []
        made: list[tuple[Row, Problem]] = []
        taken: dict[str, Row] = {}
        rows_read = 0
        for setting, name, source in sources:
            reader = self._reader(source)
            rows = self._rows(source, f"data.task.{setting}", reader)
            rows_read += len(rows)
            for place, row in enumerate(rows, source.get("skip", 0) + 1):
                made_up_id = f"{name}-{place}" if name else str(place)
                try:
                    problem = self._problem(reader, row, made_up_id, id_prefix, taken)
                    problem = reader.graded_by(problem, row, self.verifier)
                except BadValue as error:
                    bad.append(BadRow(row.source, row.number, str(error)))
                else:
                    made.append((row, problem))
        problems = self._answerable(made, bad)
        self._report(bad, what, rows_read)
        self._warn_of_begun(problems, what)
        if not problems:
            raise SettingError(f"{what} gives no problem out of {rows_read} rows: {bad[0]}")
        try_functions(self.verifier, problems[0])
        return problems

    def _rows(self, source: Source, setting: str, reader: RowReader) -> list[Row]:
        rows = list(read_rows(source, setting, self.folder))
        if not rows:
            raise SettingError(
                f"{setting} is '{source['path']}' with skip {source.get('skip', 0)}, which gives no row; correct it"
            )
        readable = [row for row in rows if row.content is not None]
        needed = {reader.columns.get(name, name): "verifier" for name in self.verifier.columns()} | reader.needed()
        absent = absent_columns(needed, readable) if readable else []
        if absent:
            there = sorted({column for row in readable for column in row.content or {}})
            asked_by = needed[absent[0]]
            where = f"data.task.{asked_by}" if asked_by in ("template", "verifier") else f"{setting}.{asked_by}"
            raise SettingError(
                f"{where} asks for the column '{absent[0]}', which no row of {rows[0].source} has; there are "
                + ", ".join(there)[:300]
            )
        return rows

    @staticmethod
    def _problem(reader: RowReader, row: Row, made_up_id: str, id_prefix: str, taken: dict[str, Row]) -> Problem:
        if row.content is None:
            raise BadValue(row.unreadable)
        problem = reader.problem(row, made_up_id, id_prefix)
        first = taken.setdefault(problem.id, row)
        if first is not row:
            raise BadValue(
                f"has the id '{problem.id[:200]}' of row {first.number} of {first.source}; make ids unique, or leave "
                "the id column out"
            )
        return problem

    def _answerable(self, made: Sequence[tuple[Row, Problem]], bad: list[BadRow]) -> list[Problem]:
        answers = [problem.answer for _, problem in made] if self.check_answers else []
        refused = refused_answers(self.verifier, answers)
        problems = []
        for row, problem in made:
            why = refused.get(key(problem.answer)) if refused else None
            if why is None:
                problems.append(problem)
            else:
                reason = f"has a gold answer that {type(self.verifier).__name__} refuses: {why}; correct or remove it"
                bad.append(BadRow(row.source, row.number, reason))
        return problems

    def _warn_of_begun(self, problems: Sequence[Problem], what: str) -> None:
        """Warns if rows end with an assistant turn. It begins every response, but is often the solution."""
        begun = [problem for problem in problems if problem.response_prefix]
        if self.response_prefix is None and begun:
            log.warning(
                "%d of %d problems of %s end with a turn of the assistant ('%s'), with which every response to them "
                'begins; where that is the solution, set data.task.response_prefix to ""',
                len(begun),
                len(problems),
                what,
                begun[0].response_prefix[:SHOWN_CHARACTERS],
            )

    def _report(self, bad: Sequence[BadRow], what: str, rows: int) -> None:
        if not bad:
            return
        if self.strict:
            raise SettingError(
                f"data.task.strict is true and {len(bad)} of {rows} rows of {what} are bad, the first: {bad[0]}"
            )
        log.warning("%d of %d rows of %s are left out", len(bad), rows, what)
        for row in bad[:SHOWN]:
            log.warning("%s", row)
        if len(bad) > SHOWN:
            log.warning("and %d more", len(bad) - SHOWN)
        self._bad_rows += bad
