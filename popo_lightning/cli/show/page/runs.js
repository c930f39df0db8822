// Description of each run, and the settings in which the runs differ.

function runCards() {
  return el('div', { class: 'cards' }, runs.map(runCard));
}

function runCard(run) {
  const last = (name) => (run.columns[name] || []).filter((value) => value !== null).at(-1);
  const facts = [
    ['iterations', number(run.iterations)],
    ['responses', number(last('total/responses'))],
    ['time', run.wallSeconds === null ? duration((minutesOf(run).at(-1) || 0) * 60) : duration(run.wallSeconds)],
    ['reward', fixed(last('reward/score'))],
    ['effective share', percent(meanOf(run, 'rollout/effective_share'))],
    ['replayed share', percent(meanOf(run, 'replay/share'))],
    ...evaluationFacts(run),
  ];
  return el(
    'section',
    { class: 'card run', style: inColor(run) },
    el('h3', {}, runDot(run), run.name, el('span', { class: 'badge' }, run.finished ? 'finished' : 'not finished')),
    el(
      'p',
      { class: 'soft small' },
      [run.method && `method ${run.method}`, run.task && `task ${run.task}`, run.seed && `seed ${run.seed}`]
        .filter(Boolean)
        .join(', '),
    ),
    el(
      'dl',
      { class: 'facts' },
      facts.map(([name, value]) => el('div', {}, el('dt', {}, name), el('dd', {}, value))),
    ),
    run.command &&
      el(
        'code',
        { class: 'command' },
        run.command.split(/ (?=--)/).map((part) => [el('span', {}, part), ' ']),
      ),
    run.origin && el('p', { class: 'soft small' }, `began from ${run.origin}`),
    Object.entries(run.skipped).map(([name, count]) =>
      el('p', { class: 'note' }, `skipped ${number(count)} damaged lines of ${name}`),
    ),
    leftOut(run).map((text) => el('p', { class: 'note calm' }, text)),
    settingsOf(run),
  );
}

function evaluationFacts(run) {
  const name =
    namesOf(/^eval\/mean\/(greedy|avg)/)[0] || namesOf(/^eval\/.*\/avg_at_\d+$/)[0] || namesOf(/^eval\/.*\/greedy$/)[0];
  const values = (run.columns[name] || []).filter((value) => value !== null);
  if (!values.length) return [];
  const [, benchmark, label] = name.match(/^eval\/(.*)\/([^/]*)$/);
  return [
    [
      `${label.replace('_at_', '@')}, ${benchmark}`,
      values.length > 1 ? [el('small', {}, `${fixed(values[0])} → `), fixed(values.at(-1))] : fixed(values[0]),
    ],
  ];
}

function leftOut(run) {
  const { samples, evaluated, images } = run.leftOut;
  return [
    samples && `left out ${number(samples)} of the responses in samples.jsonl; popo show --samples shows more`,
    evaluated &&
      `left out ${number(evaluated)} of the responses of the last evaluation; popo show --evaluated shows more`,
    images && `left out ${number(images)} images; popo show --images shows more`,
  ].filter(Boolean);
}

function settingsOf(run) {
  const entries = Object.entries(run.settings);
  if (!entries.length) return null;
  const table = el(
    'table',
    { class: 'mono' },
    entries.map(([name, value]) => el('tr', {}, el('td', {}, name), el('td', {}, value))),
  );
  return el('details', {}, el('summary', {}, `all ${entries.length} settings`), el('div', { class: 'scroll' }, table));
}

function differences() {
  if (runs.length < 2) return null;
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const differing = names.filter(
    (name) => new Set(runs.map((run) => run.settings[name])).size > 1 && !/^run\.(folder|root)$/.test(name),
  );
  if (!differing.length) return el('p', { class: 'lead' }, 'The settings of these runs are the same.');
  const short = (value) => (value === undefined ? '–' : value.replace(/^popo_lightning\.|^torch\.optim\./, ''));
  const head = el(
    'tr',
    {},
    el('th', {}, 'setting'),
    runs.map((run) => el('th', {}, runDot(run), ' ', run.name)),
  );
  const rows = differing.map((name) =>
    el(
      'tr',
      {},
      el('td', { class: 'mono' }, name.replaceAll('.init_args', '').replace(/\.class_path$/, '')),
      runs.map((run) => el('td', { class: 'mono' }, short(run.settings[name]))),
    ),
  );
  return el(
    'details',
    { class: 'card', open: differing.length <= 12 },
    el('summary', {}, `${differing.length} settings differ`),
    el('div', { class: 'scroll' }, el('table', {}, el('thead', {}, head), el('tbody', {}, rows))),
  );
}
