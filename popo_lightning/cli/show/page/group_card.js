// The card of a group: its prompt, gold answer and responses.

const LONG = 700; // characters up to which a text is shown whole

function groupCard(group, query) {
  const origin = group.evaluated
    ? el('span', { class: 'badge' }, `evaluation, ${group.evaluated}`)
    : group.fresh === null
      ? null
      : el(
          'span',
          { class: `badge ${group.fresh ? '' : 'replayed'}` },
          group.fresh ? 'fresh' : `replayed, ${ageOf(group)} version${ageOf(group) === 1 ? '' : 's'} old`,
        );
  const count = el(
    'span',
    { class: `badge ${group.right ? 'right' : 'wrong'}` },
    `${group.right} of ${group.responses.length} right`,
  );
  const images = group.images.map((name) => [name, group.run.images[name]]);
  const most = Math.max(...group.responses.map((response) => Math.abs(response.advantage || 0)), 1e-9);
  return el(
    'article',
    { class: 'card group' },
    el(
      'header',
      {},
      el('span', { class: 'chip' }, runDot(group.run), group.run.name),
      el('b', {}, `iteration ${number(group.iteration)}`),
      origin,
      count,
      el(
        'span',
        { class: 'dots', 'aria-hidden': 'true' },
        group.responses.map((response) => el('i', { class: response.right ? 'right' : null })),
      ),
      Object.entries(group.info || {}).map(([name, value]) =>
        el('span', { class: 'badge' }, name, ' ', marked(value, query)),
      ),
      el('span', { class: 'soft mono' }, marked(group.problem, query)),
    ),
    el(
      'div',
      { class: `asked ${images.some(([, url]) => url) ? 'pictured' : ''}` },
      images.length > 0 &&
        el(
          'div',
          {},
          images.map(([name, url]) => (url ? picture(url) : el('p', { class: 'soft small' }, `no picture at ${name}`))),
        ),
      el(
        'div',
        {},
        group.prompt.map((message) => [
          message.role && el('p', { class: 'role' }, message.role),
          folded(message.text, query, 'said prompt'),
        ]),
        group.gold !== '' &&
          el(
            'div',
            { class: 'gold' },
            el('p', { class: 'role' }, 'gold'),
            el('p', { class: 'said' }, marked(group.gold, query)),
          ),
      ),
    ),
    el(
      'div',
      { class: 'answers' },
      group.responses.map((response) => answer(response, query, most)),
    ),
  );
}

const ageOf = (group) => Math.max(...group.responses.map((response) => response.age || 0));

function picture(url) {
  const image = el('img', { src: url, alt: 'image of the prompt' });
  image.addEventListener('load', () => image.naturalWidth < 120 && image.classList.add('tiny'));
  return image;
}

function answer(response, query, most) {
  const parts = Object.entries(response.parts || {}).filter(([name]) => name !== 'score' && name !== 'acc');
  const numbers = [
    response.greedy && el('span', {}, 'greedy'),
    response.score !== undefined && el('span', {}, `score ${number(response.score)}`),
    ...parts.map(([name, value]) => el('span', {}, `${name} ${number(value)}`)),
    response.advantage !== undefined && push(response.advantage, most),
    response.age !== undefined && el('span', {}, `age ${response.age}`),
    response.tokens !== undefined && el('span', {}, `${number(response.tokens)} tokens`),
    response.end &&
      response.end !== 'stop' &&
      el('span', { class: 'badge wrong' }, response.end === 'length' ? 'cut off' : response.end),
    response.failure && el('span', { class: 'badge wrong', title: response.failure }, 'grading failed'),
  ];
  return el(
    'div',
    { class: `answer ${response.right ? 'right' : ''}` },
    el(
      'span',
      {
        class: 'sign',
        title: response.right ? 'right' : 'wrong',
        role: 'img',
        'aria-label': response.right ? 'right' : 'wrong',
      },
      response.right ? '✓' : '✗',
    ),
    el(
      'div',
      {},
      folded(response.text, query, 'said'),
      response.cut > 0 &&
        el('p', { class: 'soft small' }, `${number(response.cut)} more characters are not in this page`),
    ),
    el('div', { class: 'numbers' }, numbers),
  );
}

function push(advantage, most) {
  const width = (50 * Math.abs(advantage)) / most;
  const bar = el('i', { style: { width: `${width}%`, left: `${advantage < 0 ? 50 - width : 50}%` } });
  return el(
    'span',
    { class: `push ${advantage < 0 ? 'down' : ''}`, title: 'advantage' },
    el('u', {}, bar),
    `advantage ${advantage > 0 ? '+' : ''}${advantage}`,
  );
}

function folded(text, query, kind) {
  const shown = el(
    'pre',
    { class: kind, dir: 'auto' },
    text === '' ? el('span', { class: 'soft' }, '(nothing)') : marked(text, query),
  );
  if (text.length <= LONG && text.split('\n').length <= 9) return shown;
  if (query && text.toLowerCase().includes(query.toLowerCase())) return shown;
  shown.classList.add('cut');
  const button = el(
    'button',
    { class: 'more', type: 'button', onclick: () => (shown.classList.remove('cut'), button.remove()) },
    `all ${number(text.length)} characters`,
  );
  return el('div', {}, shown, button);
}

function marked(text, query) {
  if (!query) return [text];
  const found = [];
  const [lower, wanted] = [text.toLowerCase(), query.toLowerCase()];
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0 && found.length < 200; at = lower.indexOf(wanted, from)) {
    found.push(text.slice(from, at), el('mark', {}, text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  return [...found, text.slice(from)];
}
