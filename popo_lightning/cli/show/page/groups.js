// The browser of groups, with filters and pages.

const PAGE = 10;

function allGroups() {
  return runs.flatMap((run) =>
    run.groups.map((group) => {
      const right = group.responses.filter((response) => response.right).length;
      return { ...group, run, right, wrong: group.responses.length - right, haystack: null };
    }),
  );
}

function haystackOf(group) {
  if (group.haystack === null) {
    const texts = [
      group.problem,
      group.gold,
      ...group.prompt.map((each) => each.text),
      ...group.responses.map((each) => each.text),
      ...Object.values(group.info || {}),
    ];
    group.haystack = texts.join('\n').toLowerCase();
  }
  return group.haystack;
}

const OUTCOMES = {
  any: ['any', () => true],
  mixed: ['right and wrong ones', (group) => group.right && group.wrong],
  right: ['all right', (group) => !group.wrong],
  wrong: ['all wrong', (group) => !group.right],
  some: ['at least one right', (group) => group.right],
  failing: ['at least one wrong', (group) => group.wrong],
};
const ORIGINS = {
  any: ['any', () => true],
  fresh: ['fresh', (group) => !group.evaluated && group.fresh === true],
  replayed: ['replayed', (group) => !group.evaluated && group.fresh === false],
};
const SOURCES = {
  trained: ['trained on', (group) => !group.evaluated],
  evaluated: ['last evaluation', (group) => group.evaluated],
  any: ['both', () => true],
};

function groupBrowser() {
  const groups = allGroups();
  if (!groups.length) return el('p', { class: 'none' }, 'These runs have written no responses.');
  const trained = groups.some((group) => !group.evaluated);
  const wanted = {
    source: trained ? 'trained' : 'evaluated',
    outcome: 'any',
    origin: 'any',
    run: '',
    order: 'up',
    benchmark: '',
    text: '',
    from: '',
    to: '',
    page: 0,
  };
  const list = el('div', { id: 'groups-list' });
  const pagers = [el('div', { class: 'pager', id: 'pager' }), el('div', { class: 'pager' })];
  const draw = () => {
    const found = filtered(groups, wanted);
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    wanted.page = Math.min(wanted.page, pages - 1);
    list.replaceChildren(
      ...found.slice(wanted.page * PAGE, (wanted.page + 1) * PAGE).map((group) => groupCard(group, wanted.text)),
    );
    if (!found.length) list.append(el('p', { class: 'none' }, 'No group is like that.'));
    const turn = (page, stay) => {
      wanted.page = Math.max(0, Math.min(pages - 1, page));
      draw();
      if (!stay) document.getElementById('groups').scrollIntoView();
    };
    pagers.forEach((pager, place) =>
      pager.replaceChildren(...pagerOf(found, wanted.page, pages, (page) => turn(page, place === 0))),
    );
  };
  const change = (name) => (value) => {
    wanted[name] = value;
    wanted.page = 0;
    draw();
  };
  state.redraws.add(draw);
  draw();
  return el('div', {}, filtersOf(groups, wanted, change), pagers[0], list, pagers[1]);
}

function filtered(groups, wanted) {
  const text = wanted.text.toLowerCase();
  const [from, to] = [
    wanted.from === '' ? -Infinity : Number(wanted.from),
    wanted.to === '' ? Infinity : Number(wanted.to),
  ];
  const tests = [SOURCES[wanted.source][1], OUTCOMES[wanted.outcome][1], ORIGINS[wanted.origin][1]];
  const found = groups.filter(
    (group) =>
      !group.run.hidden &&
      tests.every((test) => test(group)) &&
      group.iteration >= from &&
      group.iteration <= to &&
      (wanted.run === '' || group.run.place === Number(wanted.run)) &&
      (wanted.benchmark === '' || group.evaluated === wanted.benchmark) &&
      (text === '' || haystackOf(group).includes(text)),
  );
  return found.sort((a, b) => (wanted.order === 'up' ? a.iteration - b.iteration : b.iteration - a.iteration));
}

function filtersOf(groups, wanted, change) {
  const named = (table) => Object.entries(table).map(([value, [text]]) => [value, text]);
  const field = (name, kind, label) => {
    const act = debounced(() => change(name)(input.value));
    const input = el('input', {
      type: kind,
      name,
      'aria-label': label,
      placeholder: kind === 'search' ? 'prompt, gold or response' : null,
      min: kind === 'number' ? '0' : null,
      oninput: act,
    });
    return el('label', {}, label, input);
  };
  const benchmarks = [...new Set(groups.map((group) => group.evaluated).filter(Boolean))];
  return el(
    'div',
    { class: 'filters', id: 'filters' },
    benchmarks.length > 0 && choice('responses', named(SOURCES), wanted.source, change('source')),
    benchmarks.length > 1 &&
      choice('benchmark', [['', 'any'], ...benchmarks.map((each) => [each, each])], '', change('benchmark')),
    runs.length > 1 &&
      choice('run', [['', 'any'], ...runs.map((run) => [String(run.place), run.name])], '', change('run')),
    choice('outcome', named(OUTCOMES), 'any', change('outcome')),
    choice('origin', named(ORIGINS), 'any', change('origin')),
    field('from', 'number', 'iterations from'),
    field('to', 'number', 'to'),
    choice(
      'order',
      [
        ['up', 'first iteration first'],
        ['down', 'last iteration first'],
      ],
      'up',
      change('order'),
    ),
    field('text', 'search', 'text'),
  );
}

function pagerOf(found, page, pages, turn) {
  const responses = found.reduce((sum, group) => sum + group.responses.length, 0);
  const button = (text, label, to, off) =>
    el('button', { class: 'plain', type: 'button', 'aria-label': label, disabled: off, onclick: () => turn(to) }, text);
  return [
    button('«', 'first page', 0, page === 0),
    button('‹', 'previous page', page - 1, page === 0),
    el('span', {}, `page ${number(page + 1)} of ${number(pages)}`),
    button('›', 'next page', page + 1, page >= pages - 1),
    button('»', 'last page', pages - 1, page >= pages - 1),
    el('span', { class: 'soft' }, `${number(found.length)} groups, ${number(responses)} responses`),
  ];
}
