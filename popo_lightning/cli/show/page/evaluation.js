// Evaluations by benchmark, and for each benchmark by level, subject and its other breakdowns.

const ACCURACY = /^(greedy|avg|pass)/;
const NAMES = { response_tokens: 'tokens', truncated_frac: 'truncated', grading_failures: 'failures' };
const headingOf = (label) => NAMES[label] || label.replace('_at_', '@');

function evaluationSection() {
  if (!runs.some((run) => run.evaluations.length))
    return el('p', { class: 'none' }, 'These runs have no evaluation yet.');
  const labels = [...new Set(runs.flatMap((run) => run.evaluations.map((each) => each.label)))].sort();
  let chosen = '';
  const list = el('div', {});
  const draw = () =>
    list.replaceChildren(
      ...benchmarkCards((run) => (chosen ? run.evaluations.find((each) => each.label === chosen) : lastOf(run))),
    );
  const options = [
    ['', 'the last of each run'],
    ...labels.map((label) => [label, label.replace(/^iteration-0*(\d+)$/, 'after iteration $1')]),
  ];
  state.redraws.add(draw);
  draw();
  return el(
    'div',
    {},
    el(
      'div',
      { class: 'filters' },
      choice('evaluation', options, '', (value) => ((chosen = value), draw())),
    ),
    list,
  );
}

const inTraining = (run) => run.evaluations.filter((each) => each.label.startsWith('iteration-'));
const lastOf = (run) => inTraining(run).at(-1) || run.evaluations.at(-1);

function benchmarkCards(chosenOf) {
  const found = shownRuns()
    .map((run) => ({ run, evaluation: chosenOf(run) }))
    .filter((each) => each.evaluation);
  const names = [...new Set(found.flatMap((each) => Object.keys(each.evaluation.benchmarks)))];
  const cards = names.map((name) => {
    const mine = found
      .map(({ run, evaluation }) => ({ run, evaluation, result: evaluation.benchmarks[name] }))
      .filter((each) => each.result);
    return el('section', { class: 'card' }, el('h3', {}, name), wholeTable(name, mine), ...partTables(mine));
  });
  if (found.some((each) => Object.keys(each.evaluation.mean).length)) cards.unshift(meanCard(found));
  return cards.length
    ? [el('div', { class: 'cards wide' }, cards)]
    : [el('p', { class: 'none' }, 'The chosen runs have no such evaluation.')];
}

function meanCard(found) {
  const labels = [...new Set(found.flatMap((each) => Object.keys(each.evaluation.mean)))];
  const rows = found.map(({ run, evaluation }) =>
    el(
      'tr',
      {},
      runCell(run, evaluation),
      labels.map((label) => el('td', { class: 'number' }, fixed(evaluation.mean[label]))),
    ),
  );
  return el(
    'section',
    { class: 'card' },
    el('h3', {}, 'mean over the benchmarks'),
    tableOf(['run', ...labels.map(headingOf)], rows),
  );
}

const runCell = (run, evaluation) =>
  el(
    'td',
    {},
    runDot(run),
    ` ${run.name} `,
    el('span', { class: 'soft small' }, `after ${number(evaluation.iteration)}`),
  );

function wholeTable(name, mine) {
  const labels = [...new Set(mine.flatMap((each) => Object.keys(each.result.numbers)))].filter(
    (label) => label !== 'grading_failures' || mine.some((each) => each.result.numbers[label] > 0),
  );
  labels.sort((a, b) => rank(a) - rank(b));
  const rows = mine.map(({ run, evaluation, result }) => {
    const first = inTraining(run)[0];
    const before = first && first !== evaluation ? first.benchmarks[name]?.numbers : null;
    return el(
      'tr',
      {},
      runCell(run, evaluation),
      labels.map((label) =>
        el(
          'td',
          { class: 'number' },
          shownNumber(label, result.numbers[label]),
          changeOf(label, result.numbers[label], before?.[label]),
        ),
      ),
    );
  });
  return tableOf(['run', ...labels.map(headingOf)], rows);
}

const rank = (label) => (label === 'problems' ? 0 : ACCURACY.test(label) ? 1 + ['g', 'a', 'p'].indexOf(label[0]) : 9);

function shownNumber(label, value) {
  if (ACCURACY.test(label)) return fixed(value);
  return label.endsWith('_share') ? percent(value) : number(value, 1);
}

function changeOf(label, now, before) {
  if (!ACCURACY.test(label) || before === undefined || now === undefined) return null;
  const change = now - before;
  return el(
    'span',
    { class: `small ${change < 0 ? 'down' : 'up'}`, title: 'since the first evaluation' },
    ` ${change < 0 ? '−' : '+'}${Math.abs(change).toFixed(3)}`,
  );
}

function partTables(mine) {
  const fields = [...new Set(mine.flatMap((each) => Object.keys(each.result.breakdown)))];
  return fields.map((field) => {
    const values = [...new Set(mine.flatMap((each) => Object.keys(each.result.breakdown[field] || {})))];
    const labels = [
      ...new Set(mine.flatMap((each) => Object.values(each.result.breakdown[field] || {}).flatMap(Object.keys))),
    ].filter((label) => ACCURACY.test(label));
    labels.sort((a, b) => rank(a) - rank(b));
    const rows = values.flatMap((value) =>
      mine.map(({ run, result }, place) => {
        const numbers = result.breakdown[field]?.[value] || {};
        const first =
          place === 0 &&
          el(
            'td',
            { rowspan: String(mine.length) },
            value,
            el('span', { class: 'soft small' }, ` ${number(numbers.problems)} problems`),
          );
        return el(
          'tr',
          {},
          first,
          mine.length > 1 && el('td', {}, runDot(run), ` ${run.name}`),
          labels.map((label) => el('td', { class: 'number' }, meter(run, numbers[label]), fixed(numbers[label]))),
        );
      }),
    );
    return el(
      'details',
      { open: values.length <= 12 },
      el('summary', {}, `by ${field}`),
      tableOf([field, ...(mine.length > 1 ? ['run'] : []), ...labels.map(headingOf)], rows, mine.length > 1 ? 2 : 1),
    );
  });
}

const meter = (run, value) =>
  el('span', { class: 'meter', style: inColor(run) }, el('i', { style: { width: `${100 * (value || 0)}%` } }));

function tableOf(headings, rows, words = 1) {
  const head = headings.map((heading, place) => el('th', { class: place < words ? null : 'number' }, heading));
  return el('div', { class: 'scroll' }, el('table', {}, el('thead', {}, el('tr', {}, head)), el('tbody', {}, rows)));
}
