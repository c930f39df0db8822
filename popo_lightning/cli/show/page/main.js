// Assembles the page.

function toolbar() {
  const links = [
    ['runs', 'Runs'],
    ['learning', 'Learning'],
    ['replay', 'Replay'],
    ['time', 'Time'],
    ['evaluation', 'Evaluation'],
    ['groups', 'Groups'],
  ];
  const legend = runs.map((run) => {
    const toggle = () => {
      run.hidden = !run.hidden;
      chip.setAttribute('aria-pressed', String(!run.hidden));
      redraw();
    };
    const chip = el(
      'button',
      { class: 'chip', type: 'button', 'aria-pressed': 'true', title: 'show or hide', onclick: toggle },
      runDot(run),
      run.name,
    );
    return chip;
  });
  const axis = choice(
    'over',
    Object.entries(AXES).map(([value, { option }]) => [value, option]),
    state.axis,
    (value) => ((state.axis = value), redraw()),
  );
  const smooth = choice(
    'smoothing',
    [
      ['0', 'none'],
      ['0.6', 'some'],
      ['0.9', 'much'],
    ],
    String(state.smoothing),
    (value) => ((state.smoothing = Number(value)), redraw()),
  );
  const scheme = choice(
    'colors',
    [
      ['light dark', 'system'],
      ['light', 'light'],
      ['dark', 'dark'],
    ],
    'light dark',
    (value) => document.documentElement.style.setProperty('color-scheme', value),
  );
  return el(
    'div',
    { class: 'bar' },
    el(
      'div',
      {},
      el(
        'nav',
        { 'aria-label': 'sections' },
        links.map(([id, text]) => el('a', { href: `#${id}` }, text)),
      ),
      el('div', { class: 'legend' }, legend),
      el('div', { class: 'settings' }, axis, smooth, scheme),
    ),
  );
}

function section(id, title, lead, ...content) {
  return el(
    'section',
    { id, 'aria-label': title },
    el('h2', {}, title),
    lead && el('p', { class: 'lead' }, lead),
    content,
  );
}

function pageTitle() {
  const tasks = [...new Set(runs.map((run) => run.task).filter(Boolean))].join(', ');
  const methods = [...new Set(runs.map((run) => run.method).filter(Boolean))].join(' and ');
  return tasks && methods ? `${methods} on ${tasks}` : runs.map((run) => run.name).join(', ');
}

const made = new Date(data.made);
const when = Number.isNaN(made.getTime()) ? '' : `${made.toISOString().slice(0, 16).replace('T', ' ')} UTC`;
document
  .getElementById('page')
  .append(
    el(
      'header',
      { class: 'top' },
      el('h1', {}, pageTitle()),
      el('span', { class: 'soft small' }, runs.length > 1 ? `${runs.length} runs` : '1 run'),
    ),
    toolbar(),
    el(
      'main',
      {},
      section('runs', 'Runs', null, runCards(), differences()),
      section(
        'learning',
        'Learning',
        'Point at a chart for its values; a run’s name above hides it.',
        learningCharts(),
      ),
      section(
        'replay',
        'Replay: weights and ages',
        'Stored groups were sampled by older policies; their tokens weigh prox / behave.',
        weightCharts(),
      ),
      section('time', 'Time', null, timeCharts()),
      section('evaluation', 'Evaluation', null, evaluationSection()),
      section(
        'groups',
        'Groups of responses',
        'Right is what the verifier took for the gold answer. Advantages pull a response up or push it down.',
        groupBrowser(),
      ),
    ),
    el('footer', {}, `popo show ${data.version}, ${when}`),
  );
redraw();
