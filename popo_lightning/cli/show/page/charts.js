// Line charts: axes, units, a rule with the values under the pointer, bands, logarithmic scales.

const HEIGHT = 210;
const EDGE = { left: 46, right: 10, top: 10, bottom: 34 };
const DASHES = { solid: null, dashed: '6 4', dotted: '1.5 4' };

// spec: title, about, unit, axis (own title of the x axis), log, zero, top and bottom (within the axis), whole (x in whole numbers), strokes (names by dash),
// series(): [{run, name, x, y, low, high, dash, smooth}]
function lineChart(spec) {
  const title = el('h3', {}, spec.title);
  return chartCard(spec, title, (width, tip, card) => {
    title.textContent = typeof spec.title === 'function' ? spec.title() : spec.title;
    const series = spec.series().filter((each) => each.x.length);
    if (!series.length) return [];
    const legend = spec.strokes ? [strokeLegend(spec.strokes)] : [];
    return [plot(spec, series, width, tip, card), ...legend];
  });
}

// A card that redraws itself when its width or the page's state changes, and says so if it has nothing to draw.
function chartCard(spec, title, drawing) {
  const body = el('div', {});
  const tip = el('div', { class: 'tip', hidden: true });
  const card = el(
    'section',
    { class: 'card chart' },
    el('header', {}, title, spec.control),
    el('p', { class: 'about' }, spec.about),
    body,
    tip,
  );
  let drawnAt = 0;
  const draw = () => {
    const width = body.clientWidth;
    if (!width) return;
    drawnAt = width;
    tip.hidden = true;
    const parts = drawing(width, tip, card);
    const none = spec.none || 'These runs have no such numbers.';
    body.replaceChildren(...(parts.length ? parts : [el('p', { class: 'none' }, none)]));
  };
  state.redraws.add(draw);
  new ResizeObserver(() => body.clientWidth !== drawnAt && draw()).observe(body);
  return card;
}

function plot(spec, series, width, tip, card) {
  const all = series
    .flatMap((each) => [...each.y, ...(each.low || []), ...(each.high || [])])
    .filter((y) => !spec.log || y > 0);
  const x = scale(extent(series.flatMap((each) => each.x)), [EDGE.left, width - EDGE.right], false);
  const domain = extent(all);
  if (spec.zero) domain[0] = Math.min(0, domain[0]);
  if (spec.top !== undefined) domain[1] = Math.max(spec.top, domain[1]);
  if (spec.bottom !== undefined) domain[0] = Math.min(spec.bottom, domain[0]);
  const y = scale(padded(domain, spec.log, spec.zero), [HEIGHT - EDGE.bottom, EDGE.top], spec.log);
  const root = drawn('svg', { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: 'img', tabindex: '0' });
  root.setAttribute(
    'aria-label',
    `${card.querySelector('h3').textContent}: ${series.map((each) => `${each.name} ends at ${number(each.y.at(-1))}`).join(', ')}`,
  );
  axes(root, spec, x, y, width);
  for (const each of series) lines(root, each, x, y, spec);
  pointing(root, spec, series, x, y, width, tip, card);
  return root;
}

function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function padded([low, high], log, zero) {
  if (log) return low === high ? [low / 2, high * 2] : [low, high];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [zero && low >= 0 ? 0 : low - room, high + room];
}

function scale([low, high], [from, to], log) {
  const by = log ? Math.log : (value) => value;
  const [start, end] = [by(low), by(high)];
  const at = (value) => (end === start ? (from + to) / 2 : from + ((by(value) - start) / (end - start)) * (to - from));
  return Object.assign(at, { low, high, ticks: (count) => (log ? logTicks(low, high) : niceTicks(low, high, count)) });
}

function niceTicks(low, high, count) {
  if (low === high) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1)
    found.push(Number((at * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  if (high / low < 5) return niceTicks(low, high, 4);
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) {
    for (const each of [1, 2, 5]) found.push(each * 10 ** power);
  }
  const inside = found
    .filter((each) => each >= low * 0.999 && each <= high * 1.001)
    .map((each) => Number(each.toPrecision(6)));
  return inside.length > 6 ? inside.filter((each) => /^1e/.test(each.toExponential())) : inside;
}

function axes(root, spec, x, y, width) {
  const floor = HEIGHT - EDGE.bottom;
  for (const value of y.ticks(4)) {
    root.append(
      drawn('line', { class: 'gridline', x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
    );
    root.append(drawn('text', { x: EDGE.left - 7, y: y(value) + 4, 'text-anchor': 'end' }, tick(value)));
  }
  root.append(drawn('line', { class: 'axis', x1: EDGE.left, x2: width - EDGE.right, y1: floor, y2: floor }));
  for (const value of x
    .ticks(Math.max(2, Math.floor(width / 90)))
    .filter((each) => !spec.whole || Number.isInteger(each))) {
    root.append(drawn('text', { x: x(value), y: floor + 15, 'text-anchor': 'middle' }, tick(value)));
  }
  root.append(
    drawn('text', { x: width - EDGE.right, y: HEIGHT - 4, 'text-anchor': 'end' }, spec.axis || AXES[state.axis].title),
  );
  root.append(drawn('text', { x: 0, y: HEIGHT - 4 }, spec.unit || ''));
}

function tick(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return size > 0 && size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(4)));
}

function lines(root, each, x, y, spec) {
  const usable = (value) => !spec.log || value > 0;
  const way = (values) =>
    values
      .map((value, place) => (usable(value) ? `${x(each.x[place]).toFixed(1)},${y(value).toFixed(1)}` : null))
      .filter(Boolean);
  const style = { stroke: each.color || colorOf(each.run), fill: 'none' };
  if (each.low) {
    const around = [...way(each.high), ...way(each.low).reverse()].join('L');
    root.append(drawn('path', { class: 'band', d: `M${around}Z`, style: { fill: style.stroke } }));
  }
  const smooth = each.smooth && state.smoothing > 0 && each.y.length > 8;
  if (smooth) root.append(drawn('path', { class: 'line raw', d: `M${way(each.y).join('L')}`, style }));
  const shown = smooth ? smoothed(each.y, state.smoothing) : each.y;
  root.append(
    drawn('path', {
      class: 'line',
      d: `M${way(shown).join('L')}`,
      'stroke-dasharray': DASHES[each.dash || 'solid'],
      style,
    }),
  );
  if (each.x.length === 1 || each.dots) {
    way(each.y).forEach((point) =>
      root.append(
        drawn('circle', { cx: point.split(',')[0], cy: point.split(',')[1], r: 2.6, style: { fill: style.stroke } }),
      ),
    );
  }
}

// An exponential moving average that starts from the values' own mean, not from zero.
function smoothed(values, factor) {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    sum = factor * sum + (1 - factor) * value;
    weight = factor * weight + (1 - factor);
    return sum / weight;
  });
}

function nearest(values, at) {
  let [low, high] = [0, values.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < at) low = middle;
    else high = middle;
  }
  return Math.abs(values[high] - at) < Math.abs(values[low] - at) ? high : low;
}

function pointing(root, spec, series, x, y, width, tip, card) {
  const marks = drawn('g', {});
  root.append(marks);
  const everywhere = [...new Set(series.flatMap((each) => each.x))].sort((a, b) => a - b);
  let place = -1;
  const leave = () => {
    tip.hidden = true;
    marks.replaceChildren();
  };
  const show = (at) => {
    marks.replaceChildren(
      drawn('line', { class: 'rule', x1: x(at), x2: x(at), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
    );
    const rows = [];
    for (const each of series) {
      const index = nearest(each.x, at);
      if (Math.abs(x(each.x[index]) - x(at)) > 12) continue;
      const color = each.color || colorOf(each.run);
      marks.append(drawn('circle', { cx: x(each.x[index]), cy: y(each.y[index]), r: 3.5, style: { fill: color } }));
      const band = each.low ? ` (${number(each.low[index])} to ${number(each.high[index])})` : '';
      rows.push(
        el(
          'div',
          {},
          el('span', { class: 'dot', style: { '--of-run': color } }),
          el('span', {}, each.name),
          el('span', {}, number(each.y[index]) + band),
        ),
      );
    }
    tip.replaceChildren(el('b', {}, `${spec.axis || AXES[state.axis].title} ${number(at)}`), ...rows);
    tip.hidden = false;
    const left = root.parentElement.offsetLeft + x(at) + 12;
    tip.style.left = `${Math.max(4, left + tip.offsetWidth > card.clientWidth ? left - tip.offsetWidth - 24 : left)}px`;
    tip.style.top = `${root.parentElement.offsetTop + EDGE.top}px`;
  };
  root.addEventListener('pointermove', (event) => {
    const box = root.getBoundingClientRect();
    const at = x.low + ((event.clientX - box.left - EDGE.left) / (width - EDGE.left - EDGE.right)) * (x.high - x.low);
    place = nearest(everywhere, at);
    show(everywhere[place]);
  });
  root.addEventListener('pointerleave', leave);
  root.addEventListener('blur', leave);
  root.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    place = Math.min(everywhere.length - 1, Math.max(0, place + step));
    show(everywhere[place]);
  });
}

function strokeLegend(strokes) {
  const shown = Object.entries(strokes).map(([dash, name]) => {
    const line = drawn('line', {
      x1: 1,
      x2: 25,
      y1: 4,
      y2: 4,
      'stroke-dasharray': DASHES[dash],
      'stroke-width': 2,
      stroke: 'currentColor',
    });
    return el(
      'span',
      {},
      dash === 'band'
        ? el('i', { style: { background: 'color-mix(in srgb, currentColor 30%, transparent)' } })
        : drawn('svg', {}, line),
      name,
    );
  });
  return el('div', { class: 'strokes' }, shown);
}
