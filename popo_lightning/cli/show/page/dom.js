// Elements, numbers and the page's state. Text becomes text nodes, so a run's output is never parsed as markup.

const data = JSON.parse(document.getElementById('data').textContent);
const runs = data.runs.map((run, place) => ({ ...run, place, hidden: false }));
const state = { axis: 'iteration', smoothing: 0.6, redraws: new Set() };
const SVG = 'http://www.w3.org/2000/svg';

function el(tag, properties, ...children) {
  return filled(document.createElement(tag), properties, children);
}

function drawn(tag, properties, ...children) {
  return filled(document.createElementNS(SVG, tag), properties, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'style') for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else if (name === 'value') node.value = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const colorOf = (run) => `var(--run-${run.place % 12})`;
const inColor = (run) => ({ '--of-run': colorOf(run) });
const runDot = (run) => el('span', { class: 'dot', style: inColor(run) });
const shownRuns = () => runs.filter((run) => !run.hidden);
const redraw = () => state.redraws.forEach((draw) => draw());

function number(value, digits = 3) {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString('en');
  if (size >= 10000) return Math.round(value).toLocaleString('en');
  if (size >= 100) return value.toFixed(1);
  if (size > 0 && size < 0.001) return value.toExponential(1);
  return String(Number(value.toFixed(Math.max(digits, 3))));
}

const fixed = (value) => (value === null || value === undefined ? '–' : value.toFixed(3));
const percent = (value) => (value === null || value === undefined ? '–' : `${(100 * value).toFixed(1)}%`);

function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.round(seconds)} s`;
}

function choice(label, options, chosen, act) {
  const select = el('select', { onchange: () => act(select.value), 'aria-label': label });
  for (const [value, text] of options) select.append(el('option', { value }, text));
  select.value = chosen;
  return el('label', {}, label, select);
}

// A column of metrics.csv with its iterations, without the gaps.
function column(run, name, positions = positionsOf(run)) {
  const values = run.columns[name] || [];
  const found = { x: [], y: [], steps: [] };
  values.forEach((value, place) => {
    if (value === null || positions[place] === null) return;
    found.x.push(positions[place]);
    found.y.push(value);
    found.steps.push(run.columns.step[place]);
  });
  return found;
}

const AXES = {
  iteration: { title: 'iteration', option: 'iterations', of: (run) => run.columns.step },
  responses: {
    title: 'responses generated',
    option: 'responses',
    of: (run) => carried(run.columns['total/responses'], run),
  },
  minutes: { title: 'minutes of training', option: 'minutes', of: minutesOf },
};
const positionsOf = (run) => AXES[state.axis].of(run);

function carried(values, run) {
  let last = 0;
  return run.columns.step.map((_, place) => (last = values?.[place] ?? last));
}

function minutesOf(run) {
  const seconds = run.columns['time/iteration'];
  let [sum, before] = [0, 0];
  return run.columns.step.map((step, place) => {
    sum += ((seconds?.[place] ?? 0) * (step - before)) / 60;
    before = step;
    return sum;
  });
}

const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const meanOf = (run, name) => mean((run.columns[name] || []).filter((value) => value !== null));
const namesOf = (pattern) =>
  [...new Set(runs.flatMap((run) => Object.keys(run.columns)))].filter((name) => pattern.test(name));

function debounced(act, wait = 120) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, wait);
  };
}
