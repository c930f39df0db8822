// Bar charts: grouped bars over a few categories, and one stacked bar for each run.

// spec: title, about, unit, axis, categories: [names], series(): [{run, name, values}]
function barChart(spec) {
  return chartCard(spec, el('h3', {}, spec.title), (width, tip, card) => {
    const series = spec.series();
    const categories = spec.categories().slice(0, 40);
    return series.length && categories.length ? [bars(spec, series, categories, width, tip, card)] : [];
  });
}

function bars(spec, series, categories, width, tip, card) {
  const most = Math.max(...series.flatMap((each) => each.values.map((value) => value || 0)), 1e-9);
  const y = scale([0, most * 1.06], [HEIGHT - EDGE.bottom, EDGE.top], false);
  const root = drawn('svg', {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    height: HEIGHT,
    role: 'img',
    'aria-label': spec.title,
  });
  const place = Object.assign(() => 0, { ticks: () => [] });
  axes(root, spec, place, y, width);
  const room = (width - EDGE.left - EDGE.right) / categories.length;
  const thick = Math.min(26, (room * 0.8) / series.length);
  const every = Math.ceil(categories.length / Math.max(1, Math.floor(width / 34)));
  categories.forEach((category, at) => {
    const middle = EDGE.left + room * (at + 0.5);
    if (at % every === 0)
      root.append(drawn('text', { x: middle, y: HEIGHT - EDGE.bottom + 15, 'text-anchor': 'middle' }, category));
    series.forEach((each, row) => {
      const value = each.values[at] || 0;
      const left = middle + (row - series.length / 2) * thick;
      root.append(
        drawn('rect', {
          x: left + 0.5,
          width: Math.max(1, thick - 1),
          y: y(value),
          height: Math.max(0, y(0) - y(value)),
          rx: 2,
          style: { fill: colorOf(each.run) },
        }),
      );
    });
  });
  root.addEventListener('pointermove', (event) => {
    const at = Math.floor((event.clientX - root.getBoundingClientRect().left - EDGE.left) / room);
    tip.hidden = !(at in categories);
    if (tip.hidden) return;
    const rows = series.map((each) =>
      el(
        'div',
        {},
        runDot(each.run),
        el('span', {}, each.name),
        el('span', {}, (spec.form || number)(each.values[at])),
      ),
    );
    tip.replaceChildren(el('b', {}, `${spec.axis} ${categories[at]}`), ...rows);
    const left = body(root) + EDGE.left + room * (at + 1);
    tip.style.left = `${Math.max(4, left + tip.offsetWidth > card.clientWidth ? left - tip.offsetWidth - room - 8 : left)}px`;
    tip.style.top = `${root.parentElement.offsetTop + EDGE.top}px`;
  });
  root.addEventListener('pointerleave', () => (tip.hidden = true));
  return root;
}

const body = (root) => root.parentElement.offsetLeft;

function piece(spec, parts, name, total) {
  const title = `${name}: ${number(parts[name])} ${spec.unit}, ${percent(parts[name] / total)}`;
  return el('div', {
    title,
    style: { flex: `${parts[name] / total} 1 0`, background: `var(--part-${spec.parts.indexOf(name) % 9})` },
  });
}

// spec: title, about, unit, parts: [names], rows(): [{run, parts: {name: value}}]
function stackChart(spec) {
  const list = el('div', {});
  const card = el(
    'section',
    { class: 'card chart' },
    el('header', {}, el('h3', {}, spec.title)),
    el('p', { class: 'about' }, spec.about),
    list,
  );
  const draw = () => {
    const rows = spec.rows();
    const names = spec.parts.filter((name) => rows.some((row) => row.parts[name] >= 5e-4));
    const total = (row) => Object.values(row.parts).reduce((sum, value) => sum + value, 0);
    const most = Math.max(...rows.map(total), 1e-9);
    const square = (name) => el('i', { style: { background: `var(--part-${spec.parts.indexOf(name) % 9})` } });
    list.replaceChildren(
      ...rows.map((row) =>
        el(
          'div',
          { class: 'stack' },
          el(
            'div',
            { class: 'name' },
            runDot(row.run),
            row.run.name,
            el('span', { class: 'soft' }, `${number(total(row))} ${spec.unit}`),
          ),
          el(
            'div',
            { class: 'row', style: { width: `${(100 * total(row)) / most}%` } },
            names.filter((name) => row.parts[name] > 0).map((name) => piece(spec, row.parts, name, total(row))),
          ),
        ),
      ),
      el(
        'table',
        {},
        rows.length > 1 &&
          el(
            'tr',
            {},
            el('th', {}, ''),
            rows.map((row) => el('th', { class: 'number' }, row.run.name)),
          ),
        names.map((name) =>
          el(
            'tr',
            {},
            el('td', {}, square(name), name),
            rows.map((row) => el('td', { class: 'number' }, (row.parts[name] ?? 0).toFixed(3))),
          ),
        ),
      ),
    );
    if (!rows.length) list.replaceChildren(el('p', { class: 'none' }, 'These runs have no such numbers.'));
  };
  state.redraws.add(draw);
  draw();
  return card;
}
